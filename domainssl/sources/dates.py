"""Which dates of an item are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import numpy as np

from domainssl.errors import ConfigError, nearest
from domainssl.io.series.tile import even_dates

__all__ = ["Dates"]

_WHERE = "data.init_args.dates"
_MODES = ("one", "views", "all", "fixed")
_CHOICES = ("drawn", "even", "typical")


@dataclass(frozen=True, kw_only=True)
class Dates:
    """Which dates are read; drawn anew in every epoch. A DataModule refuses what it cannot use.

    Attributes:
        mode: `one` (drawn; no time axis), `views` (`max_dates` are drawn, 2 if left out, as a
            series), `all` (a series of at most `max_dates`) or `fixed` (those at `positions`).
            None is the mode that the DataModule names.
        max_dates: Most dates of a series, for all modalities or by modality; None means all.
        positions: With `fixed`, a position (no time axis) or a list (a series).
        start: First day used, such as `2020-03-01`.
        end: Last day used.
        span_days: Length of a temporal window drawn inside them; None uses all of it.
        max_gap_days: Most days between the dates of different modalities, with `one`.
        min_valid_fraction: Dates with a smaller fraction of valid, cloudless pixels are left out;
            with `one`, passed over for the next drawn one, if there is one.
        choice: How training takes `max_dates` out of more: `drawn` at random, `even`ly spread, or
            the `typical` clear one of each of as many equal runs (MAESTRO's temporal binning).
            Held-out items are spread evenly instead of drawn.
        cloud_percent: A pixel is cloudy if the probability of cloud or snow is larger.
        mask_clouds: Cloudy pixels (and cloud shadow, where it is known) are not valid.
        join_days: Lay acquisitions of one day over each other, as they repeat each other.
    """

    mode: Literal["one", "views", "all", "fixed"] | None = None
    max_dates: int | dict[str, int] | None = None
    positions: int | tuple[int, ...] | None = None
    start: str | None = None
    end: str | None = None
    span_days: int | None = None
    max_gap_days: int = 30
    min_valid_fraction: float | None = None
    choice: Literal["drawn", "even", "typical"] = "drawn"
    cloud_percent: float = 0.0
    mask_clouds: bool = False
    join_days: bool = True

    def __post_init__(self) -> None:
        for name, known in (("mode", (*_MODES, None)), ("choice", _CHOICES)):
            value = getattr(self, name)
            if value not in known:
                words = [k for k in known if k is not None]
                raise ConfigError(
                    f"{_WHERE}.{name}: got {value!r}, expected one of {', '.join(words)}."
                    f"{nearest(str(value), words)}"
                )
        for name in ("start", "end"):
            self._day(name)
        most = self.max_dates if isinstance(self.max_dates, dict) else {"": self.max_dates}
        counts = {f"max_dates.{m}" if m else "max_dates": value for m, value in most.items()}
        for name, count in {**counts, "span_days": self.span_days}.items():
            if count is not None and count < 1:
                raise ConfigError(f"{_WHERE}.{name}: got {count!r}, expected at least 1.")
        if not 0 <= (self.min_valid_fraction or 0) <= 1:
            raise ConfigError(
                f"{_WHERE}.min_valid_fraction: got {self.min_valid_fraction!r}, expected a "
                "fraction between 0 and 1."
            )
        if isinstance(self.positions, Sequence):
            object.__setattr__(self, "positions", tuple(self.positions))
        places = self.places
        if (self.mode == "fixed") != (self.positions is not None) or (
            self.positions is not None
            and (not places or min(places) < 0 or len(set(places)) < len(places))
        ):
            raise ConfigError(
                f"{_WHERE}: got mode={self.mode!r}, positions={self.positions!r}; mode 'fixed' "
                "needs a position such as 0, or a list of different positions such as [0, 2], and "
                "no other mode takes them."
            )

    def of(self, modes: Sequence[str], uses: Iterable[str], **defaults: Any) -> Self:
        """Return the dates with a DataModule's own defaults.

        Args:
            modes: The modes it knows; the first is its default.
            uses: The attributes that it uses, beside `mode`.
            **defaults: Values of attributes that are None.

        Raises:
            ConfigError: Another mode or attribute is set.
        """
        mode = self.mode or modes[0]
        if mode not in modes:
            raise ConfigError(f"{_WHERE}.mode: got {mode!r}; these data know {', '.join(modes)}.")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("mode", *uses) and value != field.default:
                raise ConfigError(
                    f"{_WHERE}.{field.name}: got {value!r}, but these data have no use for it; "
                    f"they use {', '.join(uses)}."
                )
        given = {n: v for n, v in defaults.items() if getattr(self, n) is None}
        return replace(self, **{"mode": mode, **given})

    def check(self, names: Sequence[str]) -> None:
        """Refuse numbers of dates for a modality that is no series here.

        Raises:
            ConfigError: Names the key.
        """
        for name in self.max_dates if isinstance(self.max_dates, dict) else ():
            if name not in names:
                raise ConfigError(
                    f"{_WHERE}.max_dates.{name}: no such series; there are "
                    f"{', '.join(names) or 'none'}.{nearest(name, names)}"
                )

    @property
    def is_series(self) -> bool:
        """True where batches have a time axis."""
        return self.mode != "one" and not isinstance(self.positions, int)

    @property
    def places(self) -> tuple[int, ...]:
        """The fixed positions, if there are any."""
        fixed = self.positions
        return (fixed,) if isinstance(fixed, int) else fixed or ()

    def most(self, name: str) -> int | None:
        """Return the most dates of one modality."""
        most = self.max_dates
        return most.get(name) if isinstance(most, dict) else most

    def drawn(self, name: str = "") -> int:
        """Return how many dates of a modality are drawn; 0 where they are fixed or all."""
        return {"one": 1, "views": self.most(name) or 2}.get(self.mode or "", 0)

    def choose(self, rng: np.random.Generator, available: int, name: str = "") -> list[int]:
        """Return ascending positions out of those available; fixed ones as they are given."""
        if self.places:
            return list(self.places)
        count = self.drawn(name)
        if count:
            return sorted(int(d) for d in rng.choice(available, count, replace=False))
        most = self.most(name)
        if most is None or most >= available:
            return list(range(available))
        return [int(d) for d in even_dates(available, most)]

    def _day(self, name: str) -> Any:
        text = getattr(self, name)
        if text is None:
            return None
        try:
            return np.datetime64(text, "D")
        except ValueError as error:
            raise ConfigError(
                f"{_WHERE}.{name}: {text!r} is not a day such as '2020-03-01'."
            ) from error

    def usable(self, times: Any) -> np.ndarray[Any, Any]:
        """Return the positions of dates between `start` and `end`; unknown ones always count."""
        days = times.astype("datetime64[D]")
        unknown = np.isnat(days)
        keep = np.ones(len(days), bool)
        start, end = self._day("start"), self._day("end")
        if start is not None:
            keep &= unknown | (days >= start)
        if end is not None:
            keep &= unknown | (days <= end)
        return np.flatnonzero(keep)
