"""Slides as bags: a grid of tiles over the tissue, and the features of every tile.

done = embed_slides(backbone, "slides", Path("bags"), asked, Plan(jobs=0), "tiny")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError
from domainssl.inference.dense import DenseOptions
from domainssl.inference.embed import SlideEmbedding
from domainssl.inference.slide_inputs import named_slides
from domainssl.io.ids import write_ids
from domainssl.io.slide.pyramid import SlideReading
from domainssl.io.slide.tiling import GridOptions, SlideTiling
from domainssl.modality import Modality
from domainssl.pieces import Built, Plan, build

__all__ = ["SlideBags", "embed_slides", "embed_tiles", "stain_of"]

_SIDE = 256  # of a tile, where the card states none


class Asked(Protocol):
    """What is asked of an embedding; see `run.EmbedOptions`."""

    @property
    def window(self) -> int | None:
        """Side of a tile."""

    @property
    def form(self) -> Any:
        """`zarr` for bags of our own layout, None for TRIDENT's."""

    @property
    def ids(self) -> Any:
        """Names of slides: `hashed` or `plain`."""

    @property
    def id_table(self) -> Path | None:
        """Where to write which id is which slide."""

    @property
    def mpp_um(self) -> float | None:
        """Micrometres per pixel of level 0, where slides state none or a wrong one."""

    @property
    def dense(self) -> DenseOptions:
        """Tiles at once, device, type."""


@dataclass(frozen=True, kw_only=True)
class SlideBags:
    """What `embed_slides` did.

    Attributes:
        tiled: The grids of this call.
        built: Its features.
        work: Grids and features, as they lie in the folder.
    """

    tiled: Built
    built: Built
    work: SlideEmbedding

    @property
    def skipped(self) -> dict[str, str]:
        """Why slides were left out, by id."""
        return {**self.built.skipped, **self.tiled.skipped}


def embed_slides(
    backbone: Backbone,
    source: str,
    output: Path,
    asked: Asked,
    plan: Plan,
    encoder: str,
    progress: Callable[[int, int], None] | None = None,
) -> SlideBags:
    """Write grids and bags of slides, as `tile --features` does.

    Args:
        backbone: Of tiles of one stain; its card states their resolution.
        source: A slide, a folder with some, or a table of slides.
        output: Folder of grids and bags.
        asked: What is asked.
        plan: Part, restart and processes, the latter of the grids alone.
        encoder: Name of the features.
        progress: Called with the slides done and their number, of grids, then of features.

    Raises:
        ConfigError: An option cannot be used, or features of something else lie there.
        DataError: There is no slide, or one cannot be read.
    """
    modality = stain_of(backbone)
    assert modality.mpp_um is not None  # of what `domain_of` calls slides
    if asked.form not in (None, "zarr"):
        raise ConfigError(
            f"--format {asked.form}: slides become bags, one vector per tile. Leave it out, or say "
            "zarr. For one vector per slide add --pooled, the mean over its tiles, or embed the "
            "bags with a slide encoder such as TITAN."
        )
    if asked.dense.dtype == "int8" and asked.form != "zarr":
        raise ConfigError(
            "--dtype int8: of slides needs a scale per tile, which only bags of our own layout "
            "have: add --format zarr."
        )
    slides = named_slides([source], asked.ids)
    if asked.id_table is not None:
        write_ids(asked.id_table, [s.name for s in slides], [s.path for s in slides], "slide")
    grids = SlideTiling(
        folder=output,
        slides=slides,
        options=GridOptions(
            size_px=asked.window or (modality.size[0] if modality.size else _SIDE),
            mpp_um=modality.mpp_um,
            reading=SlideReading(mpp_um=asked.mpp_um),
        ),
    )
    grids.claim(restart=plan.restart)
    tiled = build(grids, plan, progress, noun="slides")
    work = SlideEmbedding(
        grids=grids,
        backbone=backbone,
        encoder=encoder,
        batch_size=asked.dense.batch_size,
        device=asked.dense.device,
        autocast=asked.dense.autocast,
        layout="zarr" if asked.form == "zarr" else "trident",
        dtype=None if asked.dense.dtype == "float32" else asked.dense.dtype,
    )
    return SlideBags(tiled=tiled, built=embed_tiles(work, plan, progress), work=work)


def stain_of(backbone: Backbone) -> Modality:
    """Return the modality that tiles of slides are for a backbone.

    Raises:
        ConfigError: It takes something else.
    """
    modality, *more = backbone.modalities.values()
    if more or modality.kind != "image" or modality.value_unit != "rgb8":
        raise ConfigError(
            f"slides: {type(backbone).__name__} takes {', '.join(backbone.modalities)} "
            f"({modality.kind}, {modality.value_unit}); expected a backbone of one image of 8-bit "
            "colours, such as he."
        )
    return modality


def embed_tiles(
    work: SlideEmbedding, plan: Plan, progress: Callable[[int, int], None] | None = None
) -> Built:
    """Write the features of the tiles of slides that have a grid, in this process.

    Args:
        work: Grids and features.
        plan: Part and limit, as those of the grids.
        progress: Called with the slides done and their number.

    Raises:
        ConfigError: Features of something else lie there.
        DataError: A slide cannot be read.
    """
    work.claim()
    return build(work, replace(plan, jobs=0, scheduler=None), progress, noun="slides")
