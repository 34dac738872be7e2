"""Feature bags of slides of your own, in the layouts of CLAM, TRIDENT or this library.

    data = SlideFeatureDataModule(root="sample:bags", global_batch_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))     # tile_features (8, 256, 32)

`io/slide/features.py` reads bags, `sources/slides.py` cuts regions out of their grids.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

from domainssl.datamodules.base import DomainDataModule, check_labels, named_sample
from domainssl.datamodules.statistics import statistics_of
from domainssl.errors import ConfigError, counted
from domainssl.io.ids import ids_of, write_table
from domainssl.io.slide.bag_slides import SlideBag, find_slides
from domainssl.io.subjects import Found
from domainssl.loading.source import Loading, Source
from domainssl.modality import Modality, as_modalities
from domainssl.sources.held_out import HeldOut
from domainssl.sources.labels import class_names
from domainssl.sources.patients import by_patient, split_by_patient
from domainssl.sources.slide_options import (
    SlideFiles,
    SlideLabels,
    SlideWindow,
    TileFeatures,
    wanted_slides,
)
from domainssl.sources.slides import SlideSource

__all__ = ["SlideFeatureDataModule"]

_log = logging.getLogger(__name__)
# what the embedded samples hold, in both layouts
_SAMPLE = TileFeatures(dim=32, mpp_um=0.5, mean=(0.0,), std=(1.0,))
_SAMPLES = {
    "bags": ("bags", "trident"),
    "bags_clam": ("bags", "clam"),
    "cohort": ("cohort", "trident"),
}


class SlideFeatureDataModule(DomainDataModule):
    """Regions of feature grids, or samples of the tiles of slides.

    One item is one region, or one sample; a block is a slide. Values are features as they are in
    the files. `tile_features.coords` holds row and column in tiles, `tile_features.geo` where the
    first of them lies in pixels of level 0.

    Args:
        root: `sample:bags` (in TRIDENT's layout), `sample:bags_clam` or `sample:cohort`, made on
            first use in the cache, or a folder.
        modalities: One set of features by its key; None takes that of the sample.
        global_batch_size: Items per optimiser step, over all devices and accumulation.
        window: What an item shows: a region of 16 by 16 tiles by default.
        held_out: Which patients are held out, where the data state no validation split.
        labels: Class of a slide; `auto` takes that of a table; None.
        slides: How slides are found and named.
        on_bad_sample: `raise`, or `replace` by the next good item.
        statistics: `published` (those that `modalities` state, if any), a YAML or JSON file, or
            `card` (those of the model's weights).
        seed: Seed of order, regions and samples.
        loading: Worker processes and memory.

    Raises:
        ConfigError: An argument cannot be used.
    """

    def __init__(
        self,
        root: str = "sample:bags",
        modalities: dict[str, TileFeatures] | None = None,
        global_batch_size: int = 8,
        window: SlideWindow | None = None,
        held_out: HeldOut | None = None,
        labels: SlideLabels | Literal["auto"] | None = "auto",
        slides: SlideFiles | None = None,
        on_bad_sample: Literal["raise", "replace"] = "raise",
        statistics: str = "published",
        seed: int = 0,
        loading: Loading | None = None,
    ) -> None:
        super().__init__(
            global_batch_size=global_batch_size,
            seed=seed,
            on_bad_sample=on_bad_sample,
            loading=loading,
        )
        check_labels(labels, "column and classes")
        if not modalities and root.removeprefix("sample:") not in _SAMPLES:
            raise ConfigError(
                "data.init_args.modalities: missing; expected a mapping of one key to the features "
                "it reads, such as tile_features: {dim: 1024, encoder: uni_v1}."
            )
        chosen = dict(modalities or {"tile_features": _SAMPLE})
        if len(chosen) != 1:
            raise ConfigError(
                f"data.init_args.modalities: got {', '.join(chosen)}, expected one set of features."
            )
        ((self.key, self.features),) = chosen.items()
        self.root = root
        self.window = window or SlideWindow()
        self.held_out = (held_out or HeldOut()).of(("val_fraction", "patients", "slides", "seed"))
        self.labels = SlideLabels() if isinstance(labels, str) else labels
        self.slides = slides or SlideFiles()
        self.found: Found[SlideBag] | None = None
        self.splits: dict[str, list[SlideBag]] = {}
        modality = self.features.modality(self.key, self.window.shape)
        self._modalities = as_modalities({self.key: statistics_of(modality, statistics)})

    @property
    def modalities(self) -> dict[str, Modality]:
        """The features by their key; statistics as asked for."""
        return self._modalities

    def prepare_data(self) -> None:
        """Write the embedded sample, once per machine."""
        self._root()

    def _root(self) -> str:
        name = named_sample(self.root, _SAMPLES)
        if name is None:
            return self.root
        module = importlib.import_module("domainssl.datamodules.samples.bags")
        sample, layout = _SAMPLES[name]
        return str(module.sample_root(sample) / layout)

    def open_sources(self) -> dict[str, Source]:
        """Find the slides and hold some patients out; predict on the test split, or on those."""
        root = self._root()
        wanted = wanted_slides(self.features, self.slides, self.labels, self.window)
        found = find_slides(root, wanted)
        self.found = found
        for problem in found.problems:
            _log.warning("%s: %s", root, problem)
        rule = by_patient(self.held_out, found.items)
        self.splits = split_by_patient(found.items, rule, "slides")
        if "val" not in self.splits:
            _log.warning("%s: nothing is held out for validation", root)
        there = {slide.label for slide in found.items if slide.label}
        self.label_names = None
        if self.labels is not None and there:
            self.label_names = class_names(there, self.labels.classes, "slides")
        if self.slides.id_table is not None and self._rank == 0:
            named = [(slide.id, slide.patient) for slide in found.items]
            write_table(self.slides.id_table, named, self._ids, "slide")
        sources: dict[str, Source] = {
            split: self._source(part, is_training=split == "train")
            for split, part in self.splits.items()
        }
        sources["predict"] = self._source(list(self.splits.values())[-1], is_training=False)
        return sources

    def _source(self, slides: Sequence[SlideBag], *, is_training: bool) -> SlideSource:
        names = self.label_names
        numbers = {name: i for i, name in enumerate(names or ())}
        return SlideSource(
            slides=slides,
            ids=ids_of([slide.id for slide in slides], self._ids),
            modality=self._modalities[self.key],
            features=self.features,
            window=self.window,
            files=self.slides,
            labels=None if names is None else [numbers.get(s.label, -1) for s in slides],
            seed=self.seed,
            is_training=is_training,
        )

    @property
    def _ids(self) -> str:
        """How slides are named: those of the sample have nothing to protect."""
        return "plain" if self.root.startswith("sample:") else self.slides.ids

    @property
    def num_classes(self) -> int | None:
        """Number of classes of slides, None without labels; known after setup."""
        return len(self.label_names) if self.label_names is not None else None

    def identity(self) -> dict[str, Any]:
        """Return what tells these slides from others, without a name or a path."""
        return {
            "format": "feature bags",
            "layout": self.found.layout if self.found else None,
            "dim": self.features.dim,
            "slides": {
                split: {"count": len(part), "digest": _digest(part)}
                for split, part in self.splits.items()
            },
        }

    @property
    def withheld(self) -> tuple[str, ...]:
        """Root, tables, patients and slides, unless ids are plain."""
        if self._ids == "plain":
            return ()
        files = (self.slides.manifest or "", self.slides.splits or "")
        texts = [self.root, *files, "held_out.patients", "held_out.slides"]
        names = (*self.held_out.patients, *self.held_out.slides)
        return tuple(text for text in (*texts, *names) if len(text) > 2)

    @property
    def problems(self) -> list[str]:
        """What was left out, and why."""
        return list(self.found.problems) if self.found else []

    def describe(self) -> list[str]:
        """Return lines that tell what was found."""
        found = self.found
        assert found is not None  # called after setup
        slides = found.items
        patients = len({slide.patient for slide in slides})
        tiles = sorted(slide.tiles for slide in slides)
        shown = self.window.shape
        what = (
            f"regions of {shown[0]} x {shown[1]} tiles" if len(shown) == 2 else f"{shown[0]} tiles"
        )
        names = self.label_names
        count = f"{counted(len(slides), 'slide')} of {counted(patients, 'patient')}"
        return [
            f"{count} in {self.root} ({found.layout})",
            *(f"problem: {text}" for text in found.problems),
            f"tiles per slide: {tiles[0]} to {tiles[-1]}, median {tiles[len(tiles) // 2]}",
            f"{self.key}: {self.features.dim} features"
            f"{f' of {self.features.encoder}' if self.features.encoder else ''}, {what} "
            f"({math.prod(shown)} tokens)",
            "labels: none" if names is None else f"labels: {', '.join(names)}",
            *super().describe(),
        ]


def _digest(slides: Sequence[SlideBag]) -> str:
    """Return a hash over the numbers of tiles of slides, in their order."""
    found = hashlib.sha256()
    for slide in slides:
        found.update(f"{slide.tiles}\n".encode())
    return found.hexdigest()[:16]
