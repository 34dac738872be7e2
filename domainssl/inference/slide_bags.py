"""Slides as bags: a grid of tiles over the tissue, and the features of every tile.

done, embedding = embed_slides(backbone, "slides", Path("bags"), asked, Plan(jobs=0), "tiny")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError
from domainssl.inference.dense import DenseOptions
from domainssl.inference.embed import SlideEmbedding
from domainssl.inference.slide_inputs import named_slides
from domainssl.io.ids import write_ids
from domainssl.io.slide.tiling import GridOptions, SlideTiling
from domainssl.pieces import Built, Plan, build

__all__ = ["embed_slides"]

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
    def dense(self) -> DenseOptions:
        """Tiles at once, device, type."""


def embed_slides(
    backbone: Backbone,
    source: str,
    output: Path,
    asked: Asked,
    plan: Plan,
    encoder: str,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Built, SlideEmbedding]:
    """Write grids and bags of slides, as `tile --features` does.

    Args:
        backbone: Of tiles of one stain; its card states their resolution.
        source: A slide, or a folder with some.
        output: Folder of grids and bags.
        asked: What is asked.
        plan: Part, restart and processes, the latter of the grids alone.
        encoder: Name of the features.
        progress: Called with the slides done and their number.

    Raises:
        ConfigError: An option cannot be used, or features of something else lie there.
        DataError: There is no slide, or one cannot be read.
    """
    (modality, *others) = backbone.modalities.values()
    if others or not modality.mpp_um:
        raise ConfigError(
            f"embed: slides are embedded by backbones of one stain; this one takes "
            f"{', '.join(backbone.modalities)}."
        )
    if asked.form not in (None, "zarr"):
        raise ConfigError(
            f"embed: slides become bags, one vector per tile; form {asked.form!r} is not for them. "
            "For one vector per slide say pooled."
        )
    if asked.dense.dtype == "int8" and asked.form != "zarr":
        raise ConfigError(
            "embed: int8 features of slides need a scale per tile, which only bags of our own "
            "layout have: say form zarr."
        )
    side = asked.window or (modality.size[0] if modality.size else _SIDE)
    paths, ids = named_slides([source], asked.ids)
    if asked.id_table is not None:
        write_ids(asked.id_table, ids, paths, "slide")
    grids = SlideTiling(
        folder=output,
        slides=paths,
        ids=ids,
        options=GridOptions(size_px=side, mpp_um=modality.mpp_um),
    )
    grids.claim(restart=plan.restart)
    tiled = build(grids, plan, noun="slides")
    ready = [key for key in grids.keys if grids.is_ready(key)]
    places = dict(zip(ids, paths, strict=True))
    work = SlideEmbedding(
        folder=output,
        slides=[places[key] for key in ready],
        ids=ready,
        backbone=backbone,
        encoder=encoder,
        reading=grids.options.reading,
        batch_size=asked.dense.batch_size,
        device=asked.dense.device,
        autocast=asked.dense.autocast,
        layout="zarr" if asked.form == "zarr" else "trident",
        dtype=None if asked.dense.dtype == "float32" else asked.dense.dtype,
    )
    work.claim()
    built = build(work, replace(plan, jobs=0, scheduler=None), progress, noun="slides")
    return replace(built, skipped={**tiled.skipped, **built.skipped}), work
