"""What a user says about cubes: layers, windows, dates, held-out blocks, labels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from domainssl.errors import ConfigError, nearest
from domainssl.io.raster.read import MaskRule
from domainssl.io.ssl4eo.facts import PRODUCTS, canonical_band
from domainssl.modality import Modality

__all__ = ["DateChoice", "HeldOut", "Labels", "Layer", "Mask", "Windows", "default_layers"]

_UNITS = ("auto", "dn", "dn+1000", "reflectance", "db", "linear", "amplitude", "arbitrary")
# scene classification of L2A: no data, saturated, cloud shadow, clouds, thin cirrus
_SCL_HIDDEN = (0, 1, 3, 8, 9, 10)


@dataclass(frozen=True)
class Mask:
    """A mask stored beside the bands.

    Attributes:
        variable: Name of the array, such as `scl`.
        values: Classes, or bits, that make a pixel invalid.
        is_bits: The mask holds bit flags.
    """

    variable: str = "scl"
    values: tuple[int, ...] = _SCL_HIDDEN
    is_bits: bool = False

    @property
    def rule(self) -> MaskRule:
        """The part that the reader needs."""
        return MaskRule(tuple(self.values), self.is_bits)


@dataclass(frozen=True)
class Layer:
    """One sensor: where it lies below the root, and what it is.

    Attributes:
        bands: Names in the order wanted.
        path: A store, or a folder of stores or GeoTIFF, one per site; or a pattern with `{site}`,
            `{date}`, `*` and `?`, such as `{site}/s2_{date}.tif`. Empty means the layer's key.
        value_unit: What batches carry: `dn` (Sentinel-2 numbers without offset), `reflectance`,
            `db`, or `arbitrary` for values as they are.
        stored_unit: What the files hold once scale and offset of their attributes are applied:
            `dn`, `dn+1000`, `reflectance`, `db`, `linear`, `amplitude`; `auto` asks the attributes.
        gsd_m: Pixel size delivered, in metres.
        group: Folder inside a store.
        mask: A mask that marks invalid pixels, beside nodata.
        crs: Coordinate reference system where the files do not say.
        is_static: Has no dates even where the others are series, as terrain has none.
        mean: Per band; the published ones of SSL4EO-S12 where left out and known.
        std: Per band.
    """

    bands: tuple[str, ...]
    path: str = ""
    value_unit: str = "dn"
    stored_unit: str = "auto"
    gsd_m: float = 10.0
    group: str = ""
    mask: Mask | None = None
    crs: str | None = None
    is_static: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.bands:
            raise ConfigError("data.init_args.layers: a layer needs 'bands', such as [VV, VH].")
        object.__setattr__(self, "bands", tuple(self.bands))
        if self.stored_unit not in _UNITS:
            raise ConfigError(
                f"data.init_args.layers: stored_unit {self.stored_unit!r} is not one of "
                f"{', '.join(_UNITS)}.{nearest(self.stored_unit, _UNITS)}"
            )
        if self.gsd_m <= 0:
            raise ConfigError(f"data.init_args.layers: gsd_m is {self.gsd_m!r}, expected above 0.")

    def modality(self, name: str, size: int, *, is_series: bool) -> Modality:
        """Return the facts that a backbone is built from, without looking at the files."""
        mean, std, low_high = self._statistics()
        bands = tuple(canonical_band(band) for band in self.bands)
        facts = PRODUCTS["S2L1C"]
        is_optical = facts.wavelengths_nm is not None and set(bands) <= set(facts.bands)
        waves = dict(zip(facts.bands, facts.wavelengths_nm or (), strict=True))
        return Modality(
            name=name,
            kind="series" if is_series and not self.is_static else "image",
            channels=bands,
            value_unit=self.value_unit,
            size=(size, size),
            gsd_m=self.gsd_m,
            mean=self.mean or mean,
            std=self.std or std,
            valid_range=low_high,
            nodata=None,  # batches mark it in `valid`
            wavelengths_nm=tuple(waves[b] for b in bands) if is_optical else None,
        )

    def _statistics(self) -> tuple[Any, Any, Any]:
        """Return mean, std and range of SSL4EO-S12 for known bands, in this layer's unit."""
        bands = tuple(canonical_band(band) for band in self.bands)
        name = {"db": "S1GRD"}.get(self.value_unit, "S2L1C" if "B10" in bands else "S2L2A")
        facts = PRODUCTS[name]
        if self.value_unit not in ("dn", "reflectance", "db") or not set(bands) <= set(facts.bands):
            return None, None, None
        scale = 1e-4 if self.value_unit == "reflectance" else 1.0
        at = [facts.bands.index(band) for band in bands]
        return (
            tuple(facts.mean[i] * scale for i in at),
            tuple(facts.std[i] * scale for i in at),
            tuple(v * scale for v in facts.valid_range),
        )


def default_layers() -> dict[str, Layer]:
    """Return the layers of the embedded sample: Sentinel-1 and the 12 bands of L2A."""
    return {
        "s1": Layer(("VV", "VH"), value_unit="db"),
        "s2": Layer(PRODUCTS["S2L2A"].bands, value_unit="dn"),
    }


@dataclass(frozen=True)
class Windows:
    """Windows in world coordinates, the same for every layer.

    Attributes:
        side_m: Side in metres; a multiple of every layer's `gsd_m`.
        jitter: Training windows are shifted at random by up to half their side, inside their
            block; otherwise they lie side by side.
        flips: Mirror at random along both axes.
        quarter_turns: Turn at random by 0, 90, 180 or 270 degrees.
        per_block: Most windows along the side of a block; a larger chunk is read several times.
    """

    side_m: float = 1200.0
    jitter: bool = True
    flips: bool = True
    quarter_turns: bool = True
    per_block: int = 8

    def __post_init__(self) -> None:
        if self.side_m <= 0 or self.per_block < 1:
            raise ConfigError(
                f"data.init_args.windows: got side_m={self.side_m!r}, per_block="
                f"{self.per_block!r}; expected side_m > 0 and per_block >= 1."
            )

    def pixels(self, gsd_m: float, name: str) -> int:
        """Return the side in pixels of a layer.

        Raises:
            ConfigError: It is not a whole number.
        """
        count = self.side_m / gsd_m
        if abs(count - round(count)) > 1e-6 or round(count) < 1:
            raise ConfigError(
                f"data.init_args.windows.side_m={self.side_m:g} is not a multiple of "
                f"data.init_args.layers.{name}.gsd_m={gsd_m:g}; use "
                f"{max(1, round(count)) * gsd_m:g}."
            )
        return round(count)


@dataclass(frozen=True)
class DateChoice:
    """Which dates are read; drawn per block and epoch.

    Attributes:
        take: `one` (drawn; every other layer gives its nearest date), `views:3` (several drawn
            from each layer, as a series) or `all` (as a series).
        start: First day used, such as `2020-03-01`.
        end: Last day used.
        span_days: Length of a temporal window drawn inside them; None uses all of it.
        max_gap_days: Most days between the dates of different layers, with `one`.
        most: Most dates of a series; more are thinned evenly.
        least_valid: With `one`, a date on which a layer has a smaller share of valid pixels in the
            block is passed over for the next drawn one, if there is one.
    """

    take: str = "one"
    start: str | None = None
    end: str | None = None
    span_days: int | None = None
    max_gap_days: int = 30
    most: int | None = None
    least_valid: float = 0.1

    def __post_init__(self) -> None:
        if not re.fullmatch(r"one|all|views(:[1-9]\d*)?", self.take):
            raise ConfigError(
                f"data.init_args.dates.take: got {self.take!r}, expected 'one', 'all', 'views' or "
                f"'views:3'.{nearest(self.take, ('one', 'all', 'views'))}"
            )
        for name in ("start", "end"):
            self._day(name)
        for name in ("span_days", "most"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"data.init_args.dates.{name}: got {value!r}, expected 1 or more."
                )

    @property
    def is_series(self) -> bool:
        """True where batches have a time axis."""
        return self.take != "one"

    @property
    def views(self) -> int:
        """How many dates of each layer are drawn; 0 where all are taken."""
        return int(self.take.partition(":")[2] or 2) if self.take.startswith("views") else 0

    def _day(self, name: str) -> Any:
        text = getattr(self, name)
        if text is None:
            return None
        try:
            return np.datetime64(text, "D")
        except ValueError as error:
            raise ConfigError(
                f"data.init_args.dates.{name}: {text!r} is not a day such as '2020-03-01'."
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


@dataclass(frozen=True)
class HeldOut:
    """Which part is held out for validation.

    Attributes:
        share: Share of the blocks, drawn once; neighbours of the same site may be in both parts.
        sites: Names of sites held out as a whole; `share` then does not count.
        gap_m: Training blocks nearer than this to a held-out one are left out.
        seed: Seed of the draw, apart from the data's seed.
    """

    share: float = 0.1
    sites: tuple[str, ...] = ()
    gap_m: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1 or self.gap_m < 0:
            raise ConfigError(
                f"data.init_args.held_out: got share={self.share!r}, gap_m={self.gap_m!r}; "
                "expected 0 <= share < 1 and gap_m >= 0."
            )


@dataclass(frozen=True)
class Labels:
    """A map of classes; the label of a window is its most frequent class.

    Attributes:
        path: As a layer's.
        variable: Band or array.
        names: Class names, by number; taken from `flag_meanings` where left out.
    """

    path: str = "labels"
    variable: str = "label"
    names: tuple[str, ...] = ()
