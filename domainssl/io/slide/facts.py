"""What is asked of a slide, what is known of it, and when a stated resolution counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from domainssl.errors import ConfigError, DataError, nearest

__all__ = [
    "CONVERT",
    "MPP_RANGE_UM",
    "Pyramid",
    "Region",
    "SlideFacts",
    "SlideReading",
    "Stored",
    "facts_of",
    "level_factors",
]

Array = np.ndarray[Any, Any]
Pair = tuple[float, float]

MPP_RANGE_UM = (0.05, 10.0)
CONVERT = "vips tiffsave IN OUT.tif --tile --pyramid --bigtiff --compression jpeg --Q 90"
_LARGE = 2**27  # pixels of the smallest level, from which on an overview takes its time
_SOURCES = ("file", "objective_power")
_POWER_UM = 10.0  # objective power times um per pixel: 20x is 0.5 um
_UNLIKE = 0.02  # relative difference that is worth a word
_TABLE = "table of slides"
_USER = (_TABLE, "mpp_um")  # sources that stand above the file
_FAR = 1.5  # by which a resolution and the usual one of a power differ; cameras differ too
_MOST_PIXELS = 2**40  # level 0; the largest scans have some 2^36


@dataclass(frozen=True, kw_only=True)
class SlideReading:
    """What a user says about slides that their files leave open.

    Attributes:
        mpp_um: Micrometres per pixel of level 0; stands above whatever the file states.
        mpp_from: `file`; or `objective_power`: 10 um / power where the file states a power.
        allow_upsample: Whether tiles may be finer than level 0.
    """

    mpp_um: float | None = None
    mpp_from: Literal["file", "objective_power"] = "file"
    allow_upsample: bool = False

    def __post_init__(self) -> None:
        if self.mpp_from not in _SOURCES:
            raise ConfigError(
                f"mpp_from: got {self.mpp_from!r}, expected 'file' or 'objective_power'."
                + nearest(self.mpp_from, _SOURCES)
            )
        is_number = isinstance(self.mpp_um, int | float) and not isinstance(self.mpp_um, bool)
        if self.mpp_um is not None and not (is_number and _counts((self.mpp_um, self.mpp_um))):
            raise ConfigError(
                f"mpp_um: got {self.mpp_um!r}, expected micrometres per pixel between "
                f"{MPP_RANGE_UM[0]:g} and {MPP_RANGE_UM[1]:g}; a scan at 40x has about 0.25, at "
                "20x about 0.5."
            )


@dataclass(frozen=True, kw_only=True)
class SlideFacts:
    """What is known of a slide without its pixels.

    Attributes:
        path: Path as given.
        backend: `openslide`, `tifffile` or `picture`.
        format: What the backend calls it, such as `aperio` or `ome`.
        size: Width and height of level 0 in pixels.
        levels: Width and height of every level.
        downsamples: Quotients of the sizes, mean of both axes, as OpenSlide states them.
        factors: Level-0 pixels per pixel of every level in x and y, as tiles are read with.
        mpp: Micrometres per pixel of level 0 in x and y; None where no stated value counts.
        mpp_source: Where it comes from; None without one.
        stated: Every resolution that was found: source, x, y in um.
        objective_power: As stated, such as 20.0.
        channels: Names; `red`, `green`, `blue` for colours.
        is_rgb: Whether the channels are colours.
        dtype: Type of the stored numbers.
        tile_size: Width and height of the stored tiles of level 0.
        has_color_profile: Whether an ICC profile comes with it; it is never applied.
        warnings: What is odd.
    """

    path: str
    backend: str
    format: str
    size: tuple[int, int]
    levels: tuple[tuple[int, int], ...]
    downsamples: tuple[float, ...]
    factors: tuple[Pair, ...]
    mpp: Pair | None
    mpp_source: str | None
    stated: tuple[tuple[str, float, float], ...]
    objective_power: float | None
    channels: tuple[str, ...]
    is_rgb: bool
    dtype: str
    tile_size: tuple[int, int]
    has_color_profile: bool
    warnings: tuple[str, ...] = ()

    @property
    def cost(self) -> str:
        """What an overview costs where even the smallest level is large; empty otherwise."""
        width, height = self.levels[-1]
        if width * height < _LARGE:
            return ""
        levels = "one level" if len(self.levels) == 1 else "a smallest level"
        in_strips = self.tile_size[0] >= self.size[0]
        rows = ", whose rows are stored whole" if in_strips else ""
        more = ", and every tile whole rows" if in_strips else ""
        return (
            f"has {levels} of {width} x {height} pixels{rows}: the search for tissue and pictures "
            f"of the slide read all of it ({width * height / 1e9:.2g} billion pixels){more}. "
            f"Convert it once to a tiled pyramid: {CONVERT}"
        )

    @property
    def overruled(self) -> list[str]:
        """What the file states otherwise than the user, whose word counts."""
        return list(_overruled(self.stated, self.objective_power, self.mpp, self.mpp_source))

    def resolution(self) -> Pair:
        """Return micrometres per pixel of level 0 in x and y.

        Raises:
            DataError: None is stated that counts.
        """
        if self.mpp is not None:
            return self.mpp
        low, high = MPP_RANGE_UM
        said = "; ".join(f"{source} says {x:.6g} x {y:.6g} um" for source, x, y in self.stated)
        power = ""
        if self.objective_power:
            power = (
                f", or take 10 um / objective power ({self.objective_power:g}x: "
                f"{_POWER_UM / self.objective_power:.4g} um) with `mpp_from: objective_power`"
            )
        raise DataError(
            f"{self.path}: the resolution is not known ({said or 'the file states none'}), "
            f"expected {low:g} to {high:g} um per pixel. Give it with `mpp_um: <um per "
            f"pixel>` (`--mpp_um` of `tile`, `embed`, `predict`, "
            f"data.init_args.slides.reading.mpp_um of tiles), or for each slide in a column "
            f"`mpp_um` of a table of slides (manifest.csv){power}."
        )


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a backend finds out when it opens a file; attributes as in `SlideFacts`."""

    path: str
    backend: str
    format: str
    levels: tuple[tuple[int, int], ...]
    factors: tuple[Pair, ...] | None = None
    stated: tuple[tuple[str, float, float], ...] = ()
    objective_power: float | None = None
    channels: tuple[str, ...] = ("red", "green", "blue")
    is_rgb: bool = True
    dtype: str = "uint8"
    tile_size: tuple[int, int] = (256, 256)
    has_color_profile: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Region:
    """Pixels of one level.

    Attributes:
        values: (H, W, C): RGB uint8, or the stored numbers of channels that are no colours.
        valid: (H, W) bool; None where all are scanned and readable.
        origin: Place of the first pixel in pixels of the level, x and y; may be fractional.
        damaged: Stored tiles that could not be read: x and y in level-0 pixels, and the reason.
    """

    values: Array
    valid: Array | None
    origin: Pair
    damaged: tuple[tuple[int, int, str], ...] = ()


class Pyramid(Protocol):
    """An open slide of one backend; belongs to the process that opened it."""

    stored: Stored

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Region:
        """Read a box that lies inside a level, in pixels of the level."""

    def close(self) -> None:
        """Give the file free."""


def facts_of(stored: Stored, reading: SlideReading, mpp_um: float | None = None) -> SlideFacts:
    """Return the facts of a slide that was opened.

    Args:
        stored: What the backend has found.
        reading: What the user says about all slides.
        mpp_um: What a table says of this one; counts before `reading`.

    Raises:
        DataError: Its size cannot be that of a slide.
    """
    width, height = stored.levels[0]
    if not 0 < width * height <= _MOST_PIXELS:
        raise DataError(
            f"{stored.path}: states {width} x {height} pixels, which no scan has. The header is "
            "damaged; get the file again."
        )
    factors = stored.factors or level_factors(stored.levels)
    mpp, source = _chosen(stored, reading, mpp_um)
    return SlideFacts(
        path=stored.path,
        backend=stored.backend,
        format=stored.format,
        size=stored.levels[0],
        levels=stored.levels,
        downsamples=tuple((width / w + height / h) / 2 for w, h in stored.levels),
        factors=factors,
        mpp=mpp,
        mpp_source=source,
        stated=stored.stated,
        objective_power=stored.objective_power,
        channels=stored.channels,
        is_rgb=stored.is_rgb,
        dtype=stored.dtype,
        tile_size=stored.tile_size,
        has_color_profile=stored.has_color_profile,
        warnings=(*stored.warnings, *_odd(stored, mpp, source)),
    )


def _counts(mpp: Pair) -> bool:
    """Whether a resolution lies in the range of microscopes, also as the number it is not."""
    return all(MPP_RANGE_UM[0] <= value <= MPP_RANGE_UM[1] for value in mpp)


def _chosen(
    stored: Stored, reading: SlideReading, mpp_um: float | None
) -> tuple[Pair | None, str | None]:
    if mpp_um is not None:
        return (float(mpp_um), float(mpp_um)), _TABLE
    if reading.mpp_um is not None:
        return (float(reading.mpp_um), float(reading.mpp_um)), "mpp_um"
    power = stored.objective_power
    if reading.mpp_from == "objective_power" and power and _counts((_POWER_UM / power,) * 2):
        return (_POWER_UM / power, _POWER_UM / power), "objective_power"
    for source, x, y in stored.stated:
        if _counts((x, y)):
            return (x, y), source
    return None, None


def _odd(stored: Stored, mpp: Pair | None, source: str | None) -> Iterator[str]:
    overruled = list(_overruled(stored.stated, stored.objective_power, mpp, source))
    yield from overruled
    for name, x, y in stored.stated:
        if not _counts((x, y)):
            yield (
                f"{name} says {x:.6g} x {y:.6g} um per pixel, which does not count: outside "
                f"{MPP_RANGE_UM[0]:g} to {MPP_RANGE_UM[1]:g} um"
            )
        elif mpp is not None and source not in _USER and _differ((x, y), mpp):
            yield _read_otherwise(name, (x, y), mpp, source)
    if mpp is not None and _differ((mpp[0], mpp[0]), mpp):
        yield f"pixels are not square: {mpp[0]:.6g} x {mpp[1]:.6g} um; tiles are resampled per axis"
    power = stored.objective_power
    if mpp is not None and power and not overruled and max(mpp) * power > 2 * _POWER_UM:
        yield f"{power:g}x does not fit {mpp[0]:.4g} um per pixel: check which of them is true"


def _overruled(
    stated: Sequence[tuple[str, float, float]],
    power: float | None,
    mpp: Pair | None,
    source: str | None,
) -> Iterator[str]:
    """Yield what a file states otherwise than the user; its power where it states nothing else."""
    if mpp is None or source not in _USER:
        return
    counting = [(name, (x, y)) for name, x, y in stated if _counts((x, y))]
    yield from (_read_otherwise(n, xy, mpp, source) for n, xy in counting if _differ(xy, mpp))
    if not counting and power and not 1 / _FAR < mpp[0] * power / _POWER_UM < _FAR:
        yield (
            f"{power:g}x usually has {_POWER_UM / power:.4g} um per pixel, read with {mpp[0]:.6g} "
            f"um ({source})"
        )


def _read_otherwise(name: str, found: Pair, mpp: Pair, source: str | None) -> str:
    return (
        f"{name} says {found[0]:.6g} x {found[1]:.6g} um per pixel, read with {mpp[0]:.6g} x "
        f"{mpp[1]:.6g} um ({source})"
    )


def _differ(first: Pair, second: Pair) -> bool:
    return any(abs(a - b) > _UNLIKE * b for a, b in zip(first, second, strict=True))


def level_factors(levels: Sequence[tuple[int, int]]) -> tuple[Pair, ...]:
    """Return how many level-0 pixels a pixel of each level covers in x and y.

    Writers divide by a whole number and cut or fill up the last pixel, so that 4443 x 3567 becomes
    2221 x 1783: the quotients 2.0005 and 2.0006 drift by a pixel over the slide, the factor is 2.
    Where no whole number fits both sides, the level covers the whole slide and the quotients hold.
    """
    width, height = levels[0]
    found = []
    for w, h in levels:
        wanted = (width / w + height / h) / 2
        whole = [
            f for f in range(max(1, int(wanted * 0.75)), int(wanted * 1.5) + 2)
            if abs(w - width / f) < 1 and abs(h - height / f) < 1
        ]  # fmt: skip
        powers = [f for f in whole if f & (f - 1) == 0]
        best = min(powers or whole, key=lambda f: abs(f - wanted), default=None)
        found.append((width / w, height / h) if best is None else (float(best), float(best)))
    return tuple(found)
