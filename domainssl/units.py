"""Notice values that cannot be in the unit a model was made for, such as reflectance for DN.

A wrong unit raises no error by itself: normalised with the wrong statistics, every value lands
in one corner and training goes on. So the first batches of every loader are looked at on the CPU.
Each fully valid item speaks for the declared unit, for another one, or for neither; water, night,
snow and empty windows must never speak for another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domainssl.errors import DataError
from domainssl.missing import unmarked_value
from domainssl.modality import Modality, key
from domainssl.sensors import VALID_RANGES

__all__ = ["UnitCheck", "unit_change", "unit_of_item"]

Array = np.ndarray[Any, np.dtype[np.float64]]

_BATCHES = 8
_ITEMS = 16  # of one batch, evenly spread
_VALUES = 16_384  # of one item, evenly spread
_LEAST_VOTES = 3
_AGREEMENT = 0.9  # of the items that speak for any unit
_OUTSIDE = 0.01  # share of an item's values outside valid_range
FITS, UNDECIDED = "fits", ""
# Lowest and highest value of whole items, but for half a percent at either end: beyond it lie other
# scales, such as decibels times 100. Radar power and snow in the sun reach far above 1.
_PLAUSIBLE = {
    **VALID_RANGES,
    "reflectance": (-0.5, 3.3),
    "linear": (-1.0, 100.0),
    "hu": (-4096.0, 32767.0),  # scanners fill with -3024 and the like; metal reaches high
    "m": (-1000.0, 10_000.0),
    "index": (-10.0, 10.0),
}
_PERCENT = 110.0
_MOST_HU = 4096.0  # median of an item: dense bone lies below
_LEAST_DB = 1.0  # that speckle spreads decibels by, of which none lies farther from 0
_LEAST_POWER = 1e-5  # -50 dB, below the noise of every radar
_LEAST_REFLECTANCE = 2e-4  # two digital numbers

_EXPECTED = {
    "dn": "digital numbers without offset (0..10000)",
    "reflectance": "reflectance (0..1)",
    "db": "decibels (about -35..5)",
    "linear": "linear power (0 to about 1)",
    "rgb8": "8-bit values (0..255)",
    "hu": "Hounsfield units (about -1000..3000)",
    "m": "metres (about -500..9000)",
    "index": "an index (about -1..1)",
}
_REMEDY = {
    "reflectance": "If they are reflectance, multiply them by 10000, or declare value_unit "
    "'reflectance' with statistics in that unit; otherwise check the scale factor.",
    "dn": "If they are digital numbers, divide them by 10000 (after the offset is subtracted), or "
    "declare value_unit 'dn' with statistics in that unit.",
    "linear": "If they are linear power, convert them with 10 * log10(x), or declare value_unit "
    "'linear' with statistics in that unit.",
    "db": "If they are decibels, declare value_unit 'db' with statistics in that unit, or convert "
    "them with 10 ** (x / 10).",
    "normalised": "They look normalised already. The backbone normalises inside: hand over raw "
    "values and leave out the Normalize of the DataModule.",
    "scaled": "They look scaled to 0..1. The backbone normalises inside: hand over raw values.",
    "percent": "They look like percent of reflectance: divide them by 100 to have reflectance, or "
    "multiply them by 100 to have digital numbers.",
    "offset": "The cirrus band B10 lies near 1000 where it is 0..100: the offset of 1000 of "
    "processing baseline 04.00 is still in. Subtract it (data.init_args.dn_offset: 1000).",
    "range": "Check unit, scale factor and offset of the data, and nodata values that "
    "are not marked in '{name}.valid'.",
}


def unit_change(stored: str, wanted: str) -> tuple[str, float, float] | None:
    """Return how stored values become another unit, or None where there is no way.

    Args:
        stored: `dn`, `dn+1000` (with the offset of baseline 04.00), `reflectance`, `db`, `linear`,
            `amplitude`, or another name.
        wanted: The unit of the batch.

    Returns:
        Kind, factor and addition of `factor * (stored + addition)`: `linear` is that value, `power`
        10·log10 of it, `amplitude` 20·log10 of it.
    """
    addition = 0.0
    if stored == "dn+1000":
        stored, addition = "dn", -1000.0
    if stored == wanted:
        return "linear", 1.0, addition
    factor = {("reflectance", "dn"): 1e4, ("dn", "reflectance"): 1e-4}.get((stored, wanted))
    if factor is not None:
        return "linear", factor, addition
    if wanted == "db" and stored in ("linear", "amplitude"):
        return ("power" if stored == "linear" else "amplitude"), 1.0, addition
    return None


@dataclass(frozen=True, kw_only=True)
class _Item:
    """What one fully valid item looks like; quantiles leave out half a percent at either end."""

    values: Array  # (C, n)
    low: float
    high: float
    median: float
    fractional: float  # share of values that are not whole numbers

    @classmethod
    def of(cls, values: Array) -> _Item:
        low, median, high = (float(q) for q in np.quantile(values, (0.005, 0.5, 0.995)))
        return cls(
            values=values,
            low=low,
            high=high,
            median=median,
            fractional=float(np.mean(values != np.rint(values))),
        )

    def lies_in(self, limits: tuple[float, float] | None) -> bool:
        """Within limits; True without any."""
        return limits is None or (limits[0] <= self.low and self.high <= limits[1])

    def looks_like_percent(self) -> bool:
        """Reflectance of land or of the sea in percent; broken numbers."""
        return self.fractional > 0.5 and self.low >= -5 and 3 < self.high <= _PERCENT

    def looks_normalised(self, high: float) -> bool:
        """Small numbers around zero, not whole ones."""
        return self.fractional > 0.5 and -6 < self.low < -0.3 and self.high < high


def unit_of_item(values: Array, modality: Modality) -> str:
    """Say what the values of one fully valid item speak for.

    Args:
        values: Values of the item, (C, n).
        modality: What they are declared to be.

    Returns:
        `fits`, an empty string where they do not tell, or what they seem to be: `reflectance`,
        `dn`, `percent`, `linear`, `db`, `normalised`, `scaled`, `offset`, or `range` for anything
        that lies outside of `valid_range` or of what the unit can be.
    """
    if values.min() == values.max():  # an empty window
        return UNDECIDED
    item = _Item.of(values)
    rule = _RULES.get(modality.value_unit)
    verdict = rule(item, modality) if rule is not None else FITS
    if verdict in (FITS, UNDECIDED) and not item.lies_in(_PLAUSIBLE.get(modality.value_unit)):
        return "range"
    if verdict in (FITS, UNDECIDED) and modality.valid_range is not None:
        low, high = modality.valid_range
        if np.mean((values < low) | (values > high)) > _OUTSIDE:
            return "range"
    return verdict


_VISIBLE = {"B01", "B02", "B03", "B04"}  # that water does not turn black in


def _dn(item: _Item, modality: Modality) -> str:
    if item.high > 20 and item.looks_like_percent() and _VISIBLE & set(modality.channels):
        return "percent"
    if item.high > 20:
        return "offset" if _cirrus_has_offset(item, modality) else FITS
    if item.fractional <= 0.5:  # few digital numbers above zero: water in SWIR, night
        return UNDECIDED
    if item.low >= -0.3 and 0 < item.high <= 2:
        return "reflectance"
    # A digital number is at least about 0, so a z-score is at least -mean / std in every band;
    # noise around zero, at night, is not.
    if item.looks_normalised(20) and modality.mean is not None and modality.std is not None:
        least = -np.array(modality.mean) / np.array(modality.std) - 0.3
        if (np.quantile(item.values, 0.005, axis=1) > least).all():
            return "normalised"
    return UNDECIDED


def _cirrus_has_offset(item: _Item, modality: Modality) -> bool:
    """Sentinel-2 L1C: B10 sees nothing but cirrus, over snow and night too."""
    if not {"B10", "B8A"} <= set(modality.channels):
        return False
    return 800 < float(np.median(item.values[modality.channels.index("B10")])) < 1500


def _reflectance(item: _Item, modality: Modality) -> str:
    if item.looks_normalised(20):
        return "normalised"
    if item.high > 3 and item.looks_like_percent():
        return "percent"
    if item.high > 20:
        return "dn"
    if item.low > 0 and item.high < _LEAST_REFLECTANCE:
        return "range"
    return FITS if item.low >= -0.3 and item.high <= 3 else UNDECIDED


def _db(item: _Item, modality: Modality) -> str:
    if item.low >= 0 and item.median < 5:
        return "linear"
    if item.looks_normalised(8):
        return "normalised"
    if max(-item.low, item.high) < _LEAST_DB and item.high - item.low < _LEAST_DB:
        return "range"
    return FITS if item.low < -6 else UNDECIDED


def _linear(item: _Item, modality: Modality) -> str:
    if item.median < -1:
        return "db" if item.low >= _PLAUSIBLE["db"][0] else "range"
    if item.low >= 0 and item.high < _LEAST_POWER:
        return "range"
    if item.looks_normalised(8):
        return "normalised"
    return FITS if item.low >= -0.05 else UNDECIDED


def _rgb8(item: _Item, modality: Modality) -> str:
    if item.fractional > 0.5 and item.low >= 0 and item.high <= 1:
        return "scaled"
    if item.looks_normalised(20):
        return "normalised"
    return FITS if item.high > 2 else UNDECIDED


def _hu(item: _Item, modality: Modality) -> str:
    if item.median > _MOST_HU:
        return "range"
    if item.fractional > 0.5 and item.low >= 0 and item.high <= 1:
        return "scaled"
    if item.looks_normalised(10):
        return "normalised"
    return FITS if item.low < -10 or item.high > 10 else UNDECIDED


_RULES: dict[str, Callable[[_Item, Modality], str]] = {
    "dn": _dn,
    "reflectance": _reflectance,
    "db": _db,
    "linear": _linear,
    "rgb8": _rgb8,
    "hu": _hu,
}


@dataclass
class _Ballot:
    """What the items of one modality from one loader have said so far."""

    votes: Counter[str] = field(default_factory=Counter)
    low: float = np.inf
    high: float = -np.inf
    unmarked: Counter[float] = field(default_factory=Counter)

    def add(self, verdict: str, values: Array) -> None:
        self.votes[verdict] += 1
        if verdict not in (FITS, UNDECIDED):
            self.low = min(self.low, float(values.min()))
            self.high = max(self.high, float(values.max()))

    def decision(self, least: int) -> str:
        """Return what enough items, `least` or more, agree on, or an empty string."""
        spoken = {v: n for v, n in self.votes.items() if v != UNDECIDED}
        if not spoken:
            return UNDECIDED
        verdict, count = max(spoken.items(), key=lambda pair: pair[1])
        if count < least or count < _AGREEMENT * sum(spoken.values()):
            return UNDECIDED
        return verdict


class UnitCheck:
    """Looks at the first batches of every loader and raises when the unit must be another.

    Args:
        modalities: What the model takes, by name.
        stated: Modalities whose unit, scale and offset the files themselves state and the
            DataModule applies; what is stated is believed, but missing values that nothing
            declares are looked for.
        least_votes: Items that have to agree before anything is said.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        stated: Collection[str] = (),
        least_votes: int = _LEAST_VOTES,
    ) -> None:
        self.modalities = {
            name: modality
            for name, modality in modalities.items()
            if modality.kind in ("image", "series", "volume")
        }
        self.stated = frozenset(stated)
        self.least_votes = least_votes
        self._seen: Counter[str] = Counter()
        self._ballots: dict[tuple[str, str], _Ballot] = {}

    def look(self, batch: Any, loader: str) -> None:
        """Look at a batch if it is one of the first of its loader.

        Args:
            batch: On the CPU; modalities on another device and other kinds of batch pass.
            loader: Name of the loader, for the message.

        Raises:
            DataError: At least three fully valid items agree that the values are in another unit.
        """
        found = self.find(batch, loader, f"the {loader} data")
        if found:
            raise DataError(
                f"{found} If the values are right, model.init_args.execution.check_units: false "
                "accepts them."
            )

    def find(self, batch: Any, loader: str, source: str) -> str:
        """Return what `look` would say, an empty string where nothing is to be said.

        Args:
            batch: See `look`.
            loader: Name of what the batch belongs to.
            source: What it is called in the message.
        """
        if self._seen[loader] >= _BATCHES or not isinstance(batch, Mapping):
            return ""
        self._seen[loader] += 1
        for name, modality in self.modalities.items():
            x = batch.get(name)
            if not isinstance(x, Tensor) or x.device.type != "cpu" or not len(x):
                continue
            if x.ndim != len(modality.axes.split()):
                continue  # `check_batch` says so
            ballot = self._ballots.setdefault((loader, name), _Ballot())
            places = np.linspace(0, len(x) - 1, min(len(x), _ITEMS)).round().astype(int)
            for i in dict.fromkeys(places.tolist()):
                values, is_whole = _values_of(batch, x, name, i, modality)
                if not values.size:
                    continue
                if (number := unmarked_value(values)) is not None:
                    ballot.unmarked[number] += 1
                if is_whole and name not in self.stated:
                    ballot.add(unit_of_item(values, modality), values)
            for number, count in ballot.unmarked.items():
                return _said_unmarked(modality.name, number, count, source)
            verdict = ballot.decision(self.least_votes)
            if verdict not in (FITS, UNDECIDED):
                return _message(modality, ballot, verdict, source)
        return ""


def _values_of(
    batch: Mapping[str, Any], x: Tensor, name: str, i: int, modality: Modality
) -> tuple[Array, bool]:
    """Return some valid values (C, n) of an item, and whether all of it is valid.

    Padded dates do not count as a part of it.
    """
    item, valid = x[i], batch.get(key(name, "valid"))
    present, frames = batch.get(key(name, "present")), batch.get(key(name, "frames"))
    nothing = np.empty((len(modality.channels), 0))
    if isinstance(present, Tensor) and not bool(present[i]):
        return nothing, False
    real = frames[i] if isinstance(frames, Tensor) else slice(None)
    first = item[real].movedim(modality.channel_axis - 1, 0)
    pixels = first.flatten(1)  # (C, ...) -> (C, n)
    if not pixels.numel():
        return nothing, False
    # An odd step, so that it does not run down one column of the image
    step = max(1, pixels.numel() // _VALUES) | 1
    values = pixels[:, ::step].to(torch.float64).numpy()
    is_whole = bool(np.isfinite(values).all())
    if isinstance(valid, Tensor):
        mask = valid[i][real]
        is_whole &= bool(mask.all())
        if mask.shape == first.shape[1:]:
            values = values[:, mask.flatten()[::step].numpy()]
    return values, is_whole


def _said_unmarked(name: str, number: float, count: int, source: str) -> str:
    return (
        f"{name} values are {number:g} in a part of {count} item(s) of {source}, far from all "
        "others: files use this number for missing values, but here nothing declares it, "
        f"so it is not marked in '{name}.valid'. Declare it in the files (nodata, _FillValue), or "
        f"for cubes with data.init_args.modalities.{name}.nodata: {number:g}."
    )


def _message(modality: Modality, ballot: _Ballot, verdict: str, source: str) -> str:
    name, unit = modality.name, modality.value_unit
    expected = _EXPECTED.get(unit, f"the unit {unit!r}")
    if verdict == "range" and modality.valid_range is not None:
        expected += f" within {list(modality.valid_range)}"
    spoken = sum(count for kind, count in ballot.votes.items() if kind != UNDECIDED)
    digits = 2 if max(abs(ballot.low), abs(ballot.high)) < 100 else 0
    return (
        f"{name} values lie in [{ballot.low:.{digits}f}, {ballot.high:.{digits}f}] in "
        f"{ballot.votes[verdict]} of {spoken} fully valid items of {source}, but this "
        f"model expects {expected}. {_REMEDY[verdict].format(name=name)}"
    )
