"""Items of one vector each: rasters, exams, slides and bags of their features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError
from domainssl.inference.bags import bag_items
from domainssl.inference.dense import DenseOptions
from domainssl.inference.items import ExamItem, SceneItem
from domainssl.inference.outputs import file_name, file_states, parquet_path
from domainssl.inference.pooled import PooledEmbedding, PooledItem
from domainssl.inference.scenes import Scene, SceneOptions
from domainssl.inference.slide_inputs import named_slides
from domainssl.inference.tokens import TokenWindows, feature_name, whole_windows
from domainssl.inference.volume_maps import find_volumes, scans_for
from domainssl.io.ids import ids_of, write_ids
from domainssl.io.raster.geoparquet import Footprint
from domainssl.io.slide.facts import SlideReading
from domainssl.io.slide.grid import plan_grid
from domainssl.io.slide.listed import ListedSlide
from domainssl.io.slide.pyramid import Slide
from domainssl.modality import Batch, Modality, key

__all__ = ["pooled_items", "pooled_scenes"]


class Asked(Protocol):
    """What is asked of an embedding; see `run.EmbedOptions`."""

    @property
    def feature(self) -> str | None:
        """Which feature is written."""

    @property
    def window(self) -> int | None:
        """Side of a window."""

    @property
    def ids(self) -> Any:
        """Names of exams and slides: `hashed` or `plain`."""

    @property
    def id_table(self) -> Path | None:
        """Where to write which id is which input."""

    @property
    def dense(self) -> DenseOptions:
        """Windows, device, type."""

    @property
    def scene(self) -> SceneOptions:
        """What is said about rasters."""

    @property
    def scan(self) -> Mapping[str, Any]:
        """What is said about scans."""

    @property
    def mpp_um(self) -> float | None:
        """Resolution of slides that state none."""


@dataclass(frozen=True, kw_only=True)
class SlideItem:
    """The tiles of a slide that hold tissue, one window each.

    Attributes:
        slide: The slide, named by its id.
        modality: What the backbone expects.
        side: Side of a tile in pixels.
        reading: What the user says of the slide.
    """

    slide: ListedSlide
    modality: Modality
    side: int
    reading: SlideReading = SlideReading()
    when_empty: ClassVar[str] = "no tile holds enough tissue"

    @property
    def name(self) -> str:
        """Id of the slide."""
        return self.slide.name

    @property
    def facts(self) -> dict[str, Any]:
        """What the vector rests on."""
        mpp = self.slide.mpp_um or self.reading.mpp_um
        said = {"mpp_um": mpp} if mpp else {}
        return {"files": file_states([self.slide.path]), "side": self.side, **said}

    def batches(self) -> Iterator[tuple[float, Batch]]:
        """Yield weight and batch of every tile.

        Raises:
            DataError: The slide cannot be read.
        """
        resolution = self.modality.mpp_um
        assert resolution is not None
        name = self.modality.name
        with Slide(self.slide.path, self.reading, self.slide.mpp_um) as slide:
            slide.tell_overruled()
            grid = plan_grid(slide, self.side, resolution)
            for x, y in grid.coords.tolist():
                rgb, valid = slide.read(x, y, self.side, resolution)
                if valid.any():
                    yield (
                        float(valid.mean()),
                        {
                            name: torch.tensor(rgb).permute(2, 0, 1)[None].float(),
                            key(name, "valid"): torch.from_numpy(valid)[None],
                        },
                    )


def _facts(backbone: Backbone, windows: TokenWindows | None) -> dict[str, Any]:
    found: dict[str, Any] = {"backbone": type(backbone).__name__}
    if windows is not None:
        found["window"] = {name: list(sizes) for name, sizes in windows.sizes.items()}
    return found


def pooled_scenes(
    backbone: Backbone, scenes: Sequence[Scene], output: Path, options: Asked
) -> PooledEmbedding:
    """Return a table of rasters, with date, reference system and footprint.

    Raises:
        ConfigError: The output is no table, or the card states no size of a window.
    """
    target = parquet_path(output)
    windows = [
        whole_windows(
            backbone, list(s.parts), feature=options.feature, size=options.window, shape=s.extent
        )
        for s in scenes
    ]
    return PooledEmbedding(
        target=target,
        items=[SceneItem(s, own) for s, own in zip(scenes, windows, strict=True)],
        feature=windows[0].feature,
        backbone=backbone,
        options=options.dense,
        facts=_facts(backbone, windows[0]),
        columns={
            "date": [scene.date or None for scene in scenes],
            "crs": [scene.crs for scene in scenes],
        },
        footprints=[Footprint(scene.crs, scene.bounds) for scene in scenes],
    )


def pooled_items(
    backbone: Backbone, domain: str, source: str, output: Path, options: Asked
) -> PooledEmbedding:
    """Return a table of exams, slides or bags.

    Args:
        backbone: What computes.
        domain: `volumes`, `slides` or `bags`; see `domain_of`.
        source: A path; see `find_volumes`, `named_slides` and `bag_items`.
        output: The table.
        options: What is asked for.

    Raises:
        ConfigError: The output is no table, or an option cannot be used.
        DataError: There is no such input.
    """
    target = parquet_path(output)
    items: Sequence[PooledItem]
    windows = None
    if domain == "bags":
        items = bags = bag_items(source, backbone, ids=options.ids)
        sources = [bag.file.path for bag in bags]
    elif domain == "slides":
        items = slides = _slides(backbone, source, options)
        sources = [item.slide.path for item in slides]
    else:
        inputs = scans_for(backbone, options.scan)
        exams = find_volumes(source, inputs, options.scene.modality)
        names = [file_name(name) for name in ids_of([exam.id for exam in exams], options.ids)]

        def of_names(there: Sequence[str], shape: Sequence[int] = ()) -> TokenWindows:
            return whole_windows(
                backbone, there, feature=options.feature, size=options.window, shape=shape
            )

        windows = of_names(list(backbone.modalities))
        items = [
            ExamItem(name, exam, inputs, of_names) for name, exam in zip(names, exams, strict=True)
        ]
        sources = [exam.id for exam in exams]
    if options.id_table is not None:
        write_ids(options.id_table, [item.name for item in items], sources, domain[:-1])
    return PooledEmbedding(
        target=target,
        items=items,
        feature=feature_name(backbone, list(backbone.modalities), options.feature),
        backbone=backbone,
        options=options.dense,
        facts=_facts(backbone, windows),
        group=1,
        is_private=options.ids == "hashed",
    )


def _slides(backbone: Backbone, source: str, options: Asked) -> list[SlideItem]:
    (modality, *others) = backbone.modalities.values()
    side = options.window or (modality.size[0] if modality.size else None)
    if others or side is None:
        raise ConfigError(
            "embed: slides are embedded by backbones of one stain whose card states the size of a "
            "tile; otherwise say --window."
        )
    reading = SlideReading(mpp_um=options.mpp_um)
    return [
        SlideItem(slide=slide, modality=modality, side=side, reading=reading)
        for slide in named_slides([source], options.ids)
    ]
