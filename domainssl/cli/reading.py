"""The options about files that `embed` and `predict` read, which are the same in both verbs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from domainssl.cli.words import Parser
from domainssl.errors import ConfigError

if TYPE_CHECKING:
    from domainssl.inference.scenes import SceneOptions

__all__ = ["add_reading", "refuse_unread", "scene_of"]

_RASTERS = (
    "bands", "stored_unit", "date", "max_dates", "mask", "crs", "group", "any_gsd", "any_unit",
)  # fmt: skip
_DOMAINS: Mapping[str, tuple[str, ...]] = {  # that read an option
    **dict.fromkeys(_RASTERS, ("rasters",)),
    "modality": ("rasters", "volumes"),
    "scan": ("volumes",),
    "mpp_um": ("slides",),
    "min_tissue": ("slides",),
    "tiles": ("bags",),
    "window": ("rasters", "volumes", "slides"),
    "halo": ("rasters", "volumes"),
    "format": ("rasters", "volumes", "slides"),
}
_WHOLE = ("halo", "format")  # that are about maps, not about one vector per item


def add_reading(parser: Parser, pixels: str) -> None:
    """Add the options that say of rasters, scans and slides what their files leave open.

    Args:
        parser: Of the verb, which adds `--date` itself.
        pixels: Whose size of pixels `--any_gsd` does without.
    """
    add = parser.add_argument
    # fmt: off
    add("--modality", metavar="NAME",
        help="which of several modalities a single file holds, where its bands do not tell")
    add("--bands", default="", metavar="B02,B03,...",
        help="bands of a GeoTIFF in their order, where it names none or others")
    add("--stored_unit", default="auto", metavar="UNIT",
        help="what rasters hold: dn, dn+1000, baseline, reflectance, db, linear, amplitude, "
        "arbitrary; or by modality: s1=db,s2=dn (default: auto, their attributes tell)")
    add("--mask", metavar="ARRAY", help="array of a store that marks clouds, such as scl")
    add("--crs", metavar="EPSG:N", help="of rasters that do not state it")
    add("--group", default="", help="folder inside a store")
    add("--any_gsd", action="store_true", help=f"take pixels of another size than {pixels}")
    add("--any_unit", action="store_true", help="take values that look like those of another unit")
    add("--scan", nargs="+", default=[], metavar="KEY=VALUE",
        help="how scans are read whose files leave it open: orientation=assume_pixdim, volume=0, "
        "space=LPS, series=mr-3 (as inspect shows it)")
    add("--mpp_um", type=float, metavar="UM",
        help="um per pixel of level 0, for slides that state none or a wrong one, as does the "
        "column mpp_um of a table of slides for each")
    # fmt: on


def refuse_unread(
    parser: Parser, options: argparse.Namespace, domain: str, *, pooled: bool = False
) -> None:
    """Refuse what is said about inputs of another domain: nothing would read it.

    Args:
        parser: Of the verb.
        options: Of the verb.
        domain: See `domain_of`.
        pooled: One vector per item is asked for.

    Raises:
        ConfigError: Something of it was given.
    """
    for name, domains in _DOMAINS.items():
        given = getattr(options, name, None)
        if not hasattr(options, name) or given == parser.get_default(name):
            continue
        if domain not in domains:
            raise ConfigError(
                f"--{name}: is read for {' and '.join(domains)}, but these weights take {domain}. "
                "Leave it out."
            )
        if pooled and name in _WHOLE:
            raise ConfigError(
                f"--{name}: is for maps, but --pooled writes one table. Leave it out."
            )


def scene_of(
    options: argparse.Namespace, *, date: str | None = None, max_dates: int | None = None
) -> SceneOptions:
    """Return what the options of `add_reading` say about rasters.

    Args:
        options: Of the verb.
        date: Date of a cube.
        max_dates: Dates of a series.

    Raises:
        ConfigError: Bands cannot be read.
    """
    from domainssl.inference.scene_bands import bands_of_words
    from domainssl.inference.scenes import SceneOptions

    return SceneOptions(
        modality=options.modality,
        bands=bands_of_words(options.bands),
        stored_unit=options.stored_unit,
        date=date,
        max_dates=max_dates,
        mask=options.mask,
        crs=options.crs,
        group=options.group,
        any_gsd=options.any_gsd,
        any_unit=options.any_unit,
    )
