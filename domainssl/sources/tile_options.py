"""The options of tiles: stains, files and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from domainssl.errors import ConfigError, nearest
from domainssl.io.ids import IDS
from domainssl.io.slide.manifest import LAYOUTS, WantedTiles
from domainssl.modality import Modality
from domainssl.sources.stain_normalization import NORMALIZATIONS
from domainssl.sources.windows import Window

__all__ = ["Stain", "TileFiles", "TileLabels", "tile_window", "wanted_tiles"]

_WHERE = "data.init_args"
_CHANNELS = ("red", "green", "blue")
_DEFAULT = Window(size=224.0)


@dataclass(frozen=True, kw_only=True)
class Stain:
    """What a modality reads of every tile.

    Attributes:
        stain: Its name in the data: a column of the table, a folder, the end of a file name; `*`
            takes every picture of a folder as a tile. Empty means the key.
        mean: Mean per colour for the normalisation form `zscore`, where it is known; empty for
            none. A file of `statistics` counts before it.
        std: Standard deviation per colour, likewise.
        normalize: Bring the colours of every tile to those of a reference: `macenko` for H&E,
            `reinhard`, or `none`. A tile without tissue stays as it is.
    """

    stain: str = ""
    normalize: Literal["none", "macenko", "reinhard"] = "none"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.normalize not in NORMALIZATIONS:
            raise ConfigError(
                f"{_WHERE}.modalities: got normalize={self.normalize!r}, expected one of "
                f"{', '.join(NORMALIZATIONS)}.{nearest(self.normalize, NORMALIZATIONS)}"
            )

    def modality(self, name: str, size: tuple[int, ...], mpp_um: float) -> Modality:
        """Return the facts of the modality under a key."""
        return Modality(
            name=name,
            kind="image",
            channels=_CHANNELS,
            value_unit="rgb8",
            size=size,
            mpp_um=mpp_um,
            valid_range=(0.0, 255.0),
            mean=self.mean or None,
            std=self.std or None,
        )


@dataclass(frozen=True, kw_only=True)
class TileFiles:
    """How tiles are found, named and counted.

    Attributes:
        layout: `auto` recognises it; `manifest`, `folder`, or `slides`, whose tiles are cut out
            while they are read.
        manifest: A table of the tiles, CSV, JSON lines or Parquet, relative to the root; None
            takes `manifest.csv`, `.jsonl` or `.parquet` in it, if there is one.
        patient: Regular expression whose first group, found in the id of a tile, is its patient;
            empty takes the column `patient`, or the first folder of the tile.
        slide: The same for its slide; empty takes the column `slide`, or its folders.
        mpp_um: Microns per pixel of the tiles; slides are read at it.
        per_slide: Most tiles of a slide in an epoch, drawn anew in each, so that large resections
            do not outweigh biopsies.
        id_table: CSV file to write that tells which id is which tile and patient; None writes
            none.
        ids: `hashed` ids tell nothing about names of files and patients; `plain` is for public
            data, as the embedded sample has them.
    """

    layout: str = "auto"
    manifest: str | None = None
    patient: str = ""
    slide: str = ""
    mpp_um: float = 0.5
    per_slide: int = 1000
    id_table: str | None = None
    ids: Literal["hashed", "plain"] = "hashed"

    def __post_init__(self) -> None:
        for name, options in (("layout", ("auto", *LAYOUTS)), ("ids", IDS)):
            value = getattr(self, name)
            if value not in options:
                raise ConfigError(
                    f"{_WHERE}.tiles.{name}: got {value!r}, expected one of {', '.join(options)}."
                    f"{nearest(value, options)}"
                )
        if self.per_slide < 1:
            raise ConfigError(
                f"{_WHERE}.tiles.per_slide: got {self.per_slide!r}, expected at least 1."
            )
        if not 0.05 <= self.mpp_um <= 10:
            raise ConfigError(
                f"{_WHERE}.tiles.mpp_um: got {self.mpp_um!r}, expected microns per pixel between "
                "0.05 and 10, such as 0.5 for 20x."
            )


@dataclass(frozen=True, kw_only=True)
class TileLabels:
    """What is known of tiles beside their pictures, for evaluation and tasks.

    Attributes:
        column: Column of a table with the class of a tile; empty for none.
        classes: The classes by number; empty takes those that occur, sorted.
    """

    column: str = "label"
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))


def tile_window(asked: Window | None, mpp_um: float) -> Window:
    """Return a window in whole pixels; 224 without a size of its own.

    Raises:
        ConfigError: Its size is no whole number of pixels, or windows would be resized.
    """
    window = (asked or Window()).sized(_DEFAULT)
    window.must_not_resize()
    return window.on_grid(mpp_um * 1e-6)


def wanted_tiles(
    stains: dict[str, Stain], files: TileFiles, labels: TileLabels | None
) -> WantedTiles:
    """Return what is looked for in a data set."""
    return WantedTiles(
        stains={name: s.stain or name for name, s in stains.items()},
        label=labels.column if labels else "",
        patient=files.patient,
        slide=files.slide,
    )
