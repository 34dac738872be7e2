"""Names of bands as files state them, and of bands that have none."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence

from domainssl.errors import DataError, nearest
from domainssl.io.raster.zarr import ArrayInfo, Cube
from domainssl.sensors import canonical_band

__all__ = ["no_band", "refuse_contradiction", "titles_of_axis", "titles_or_none", "without_names"]

_log = logging.getLogger(__name__)
# long_name is where rioxarray puts the descriptions of a GeoTIFF
_ATTRIBUTES = ("band_names", "bands", "descriptions", "band_descriptions", "long_name")
_SILENT = re.compile(
    r"(band|bands|layer|channel|image|lyr|variable|sample)?[\s_\-#.]*\d*|values?|data|array|"
    r"gr[ae]y|undefined|unknown|none|nan|__xarray_dataarray_variable__",
    re.IGNORECASE,
)


def titles_or_none(titles: Sequence[str | None]) -> list[str] | None:
    """Return the names of bands; None where they repeat, or say nothing as `Band 1` does.

    Numbers that do not just count the bands say something: `Band 2`, `Band 4` are B02 and B04.
    """
    plain = [str(title or "").strip() for title in titles]
    numbers = [int(found[-1]) for title in plain if (found := re.findall(r"\d+", title))]
    counts = (list(range(len(plain))), list(range(1, len(plain) + 1)))
    is_said = len(numbers) == len(plain) and numbers not in counts
    said = [title for title in plain if is_said or not _SILENT.fullmatch(title)]
    if not said or (len(plain) > 1 and len(set(said)) < len(said)):
        return None
    return [canonical_band(title) if title in said else "" for title in plain]


def refuse_contradiction(
    where: str, titles: Sequence[str | None], bands: Sequence[str], number: int = 1
) -> None:
    """Refuse repeated names that place bands elsewhere than where they would be taken from.

    Args:
        where: The file.
        titles: Names that count as none, since some are there several times.
        bands: Bands asked for, in the order in which they would be taken.
        number: Number of the first band in the file.

    Raises:
        DataError: A band asked for is named, but stands at another place.
    """
    said = [title for title in map(str, filter(None, titles)) if not _SILENT.fullmatch(title)]
    if len(set(said)) == len(said):  # they only count, as Band 1, Band 2 do
        return
    plain = [canonical_band(title) if title in said else "" for title in titles if title]
    asked = [canonical_band(band) for band in bands]
    if len(set(plain) & set(asked)) < 2 or len(plain) != len(
        asked
    ):  # one name for all says nothing
        return
    for place, (title, band) in enumerate(zip(plain, asked, strict=True)):
        if title != band and title in asked:
            raise DataError(
                f"{where}: the names of its bands repeat ({', '.join(map(str, titles))}), and band "
                f"{place + number} is called {titles[place]!r} where {bands[place]!r} would be "
                "taken. Correct the names in the file (rasterio: file.descriptions = ...), or name "
                "its bands: --bands of embed and predict (GeoTIFF)."
            )


def no_band(where: str, band: str, have: Sequence[str], silent: int = 0) -> DataError:
    """Return the error about a band that is not there.

    Args:
        where: The file or store.
        band: The band asked for.
        have: What the bands are called that are there.
        silent: How many more have no name.
    """
    nameless = f" and {silent} without a name" if silent else ""
    return DataError(
        f"{where}: no band {band!r}; there are: {', '.join(have)}{nameless}.{nearest(band, have)} "
        "If it is there under another name, ask for that name (in bands, with mean and std or "
        "data.statistics), or write the usual one into the file (rasterio: file.descriptions = "
        "..., xarray: rename); embed and predict of a GeoTIFF take names for all of its bands by "
        "--bands."
    )


def without_names(where: str, count: int, bands: Sequence[str]) -> list[str]:
    """Return the names asked for, for bands in that order that have none of their own.

    Raises:
        DataError: There are more or fewer of them.
    """
    if count != len(bands):
        raise DataError(
            f"{where}: {count} bands without names of their own, but {len(bands)} are wanted "
            f"({' '.join(bands)}). Write band names into the file, ask for all of its bands in "
            "their order, or name them: --bands of embed and predict (GeoTIFF)."
        )
    if count > 1:
        _log.info("%s: bands have no names; taken in the order %s", where, " ".join(bands))
    return [canonical_band(band) for band in bands]


def titles_of_axis(cube: Cube, info: ArrayInfo, at: int) -> list[str]:
    """Return the names of the bands along an axis of an array, or numbers that count them.

    Its coordinate counts, unless it only numbers the bands: then what attributes or a text beside
    it say does.

    Args:
        cube: The store.
        info: The array.
        at: Number of the axis.
    """
    size = info.shape[at]
    counts = [str(i) for i in range(1, size + 1)]
    told = [titles for titles in _told(cube, info, at) if len(titles) == size]
    return next((t for t in told if titles_or_none(t) is not None), (told or [counts])[0])


def _told(cube: Cube, info: ArrayInfo, at: int) -> Iterator[list[str]]:
    dim, size = info.dims[at], info.shape[at]
    folder = info.name.rpartition("/")[0]
    paths = [f"{folder}/{dim}" if folder else dim, dim]
    for path in dict.fromkeys(paths):
        if path in cube.arrays and cube.arrays[path].shape == (size,):
            yield [str(v) for v in cube.read_text(path)]
            break
    for name in _ATTRIBUTES:
        stated = info.attrs.get(name)
        if isinstance(stated, Sequence) and not isinstance(stated, str):
            yield [str(v.get("name") if isinstance(v, Mapping) else v) for v in stated]
    for path, other in cube.arrays.items():
        is_beside = path not in paths and path.rpartition("/")[0] in (folder, "")
        if is_beside and other.dims == (dim,) and other.shape == (size,) and _is_text(other):
            yield cube.read_text(path)


def _is_text(info: ArrayInfo) -> bool:
    return info.dtype.kind in "USTO"
