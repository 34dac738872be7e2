"""Which modality of a backbone a raster is, by its bands, and what is said where it is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from domainssl.errors import ConfigError, DataError, nearest
from domainssl.io.raster.band_names import titles_or_none
from domainssl.io.raster.bands import open_store, stored_bands
from domainssl.io.raster.describe import Sought, describe
from domainssl.io.raster.gdal import open_raster, reading
from domainssl.io.raster.geotiff import GEOTIFF_ENDINGS, describe_geotiff
from domainssl.io.raster.layer import LayerFile
from domainssl.io.raster.safe import is_safe
from domainssl.io.raster.sites import Found
from domainssl.modality import Modality
from domainssl.sensors import L1C_BANDS, S1_BANDS, canonical_band, names_of_band

__all__ = ["bands_of_words", "describe_scene", "modality_of"]


def bands_of_words(text: str) -> tuple[str, ...]:
    """Return the names in a text such as `B02,B03,B04`."""
    return tuple(text.replace(",", " ").split())


def describe_scene(
    path: str,
    modality: Modality,
    *,
    names: Sequence[str] = (),
    mask: str | None = None,
    crs: str | None = None,
    group: str = "",
) -> LayerFile:
    """Find the bands of a modality in a raster.

    Args:
        path: A GeoTIFF, Zarr store or Sentinel-2 product.
        modality: Whose bands are wanted.
        names: What the bands of a GeoTIFF are called, in their order, instead of its own names.
        mask: Array that marks invalid pixels.
        crs: Used where the file does not say.
        group: Folder inside a store.

    Raises:
        ConfigError: Bands of something else than a GeoTIFF are named.
        DataError: A band is missing, or the file does not say where or what it is.
    """
    if group and (is_safe(path) or path.lower().endswith(GEOTIFF_ENDINGS)):
        raise ConfigError(f"--group {group}: is a folder in a Zarr store; {path} is none.")
    if names:
        if not path.lower().endswith(GEOTIFF_ENDINGS):
            raise ConfigError(
                f"--bands {','.join(names)}: names the bands of GeoTIFF; {path} is none."
            )
        if mask is not None:
            raise ConfigError(f"--mask {mask}: is an array of a Zarr store; {path} is a GeoTIFF.")
        return describe_geotiff(path, modality.channels, crs=crs, names=names)
    sought = Sought(bands=modality.channels, step_hint=modality.gsd_m, mask=mask, crs=crs)
    try:
        return describe(sought, Found(path, "", group))
    except DataError as error:
        own = _bands_of(path, group)
        lacking = _missing(modality, own)
        if own and lacking:
            raise DataError(
                f"{path}: its bands ({' '.join(own)}) are not those of {modality.name!r} "
                f"({' '.join(modality.channels)}): {_lacking(lacking, own)}. {_advice(modality)}"
            ) from error
        raise


def _missing(modality: Modality, own: Sequence[str]) -> list[str]:
    known = {canonical_band(name) for name in own}
    return [band for band in modality.channels if canonical_band(band) not in known]


def _advice(modality: Modality) -> str:
    names = ",".join(modality.channels[:3]) + (",..." if modality.num_channels > 3 else "")
    return (
        "If the file has them under other names, name its bands in their order: --bands "
        f"{names} (GeoTIFF)."
    )


def modality_of(path: str, modalities: Mapping[str, Modality], **options: Any) -> str:
    """Return the modality whose bands a raster has.

    Args:
        path: The raster.
        modalities: Those of the backbone, by name.
        options: See `describe_scene`.

    Raises:
        ConfigError: It is several or none.
    """
    if len(modalities) == 1:
        return next(iter(modalities))
    fitting, reasons = [], []
    for name, modality in modalities.items():
        try:
            found = describe_scene(path, modality, **options)
        except DataError as error:
            reasons.append(f"{name}: {error}")
            continue
        if found.has_names or options.get("names"):
            fitting.append(name)
    if len(fitting) == 1:
        return fitting[0]
    own = [canonical_band(n) for n in options.get("names") or ()] or _bands_of(
        path, options.get("group", "")
    )
    if fitting:
        raise ConfigError(
            f"{path}: its bands fit several modalities of the backbone. Say which it is: "
            f"--modality {' or --modality '.join(fitting)}."
        )
    if not own and len(reasons) == len(modalities):
        raise ConfigError(
            f"{path}: which modality of the backbone is it? Say --modality "
            f"{' or '.join(modalities)}. None can be read: {' '.join(reasons)[:600]}"
        )
    wanted = []
    for name, modality in modalities.items():
        lacking = _missing(modality, own)
        said = f", of which {_lacking(lacking, own)}" if own and lacking else ""
        wanted.append(f"{name} has {' '.join(modality.channels)}{said}")
    has = f"Its bands are {' '.join(own)}" if own else "Its bands have no names"
    raise ConfigError(
        f"{path}: which modality of the backbone is it? {has}; {'; '.join(wanted)}. Say --modality "
        f"{' or '.join(modalities)}, with --bands where its bands have other names or none, in "
        "their order."
    )


def _lacking(lacking: Sequence[str], own: Sequence[str]) -> str:
    """Return what is missing, with the name that may stand for it."""
    hints = []
    for band in own:
        others = [name for each in lacking for name in names_of_band(each)]
        is_known = canonical_band(band) in (*L1C_BANDS, *S1_BANDS)
        hint = "" if is_known else nearest(band, others)
        if hint:
            meant = next(each for each in others if repr(each) in hint)
            known = canonical_band(meant)
            hints.append(f"is {band!r} {meant!r}{'' if known == meant else f', {known}'}?")
    verb = "is" if len(lacking) == 1 else "are"
    shown = f" ({' '.join(hints[:3])})" if hints else ""
    return f"{' '.join(lacking)} {verb} missing{shown}"


def _bands_of(path: str, group: str) -> list[str]:
    """Return the names of the bands of a raster as they stand there; empty where there are none."""
    if is_safe(path):
        return []
    if not path.lower().endswith(GEOTIFF_ENDINGS):
        return list(dict.fromkeys(band.name for band in stored_bands(open_store(path), group)))
    with reading(path), open_raster(path) as file:
        titles = [str(title or "").strip() for title in file.descriptions]
    named = titles_or_none(titles)
    return [] if named is None else [title for title in titles if title]
