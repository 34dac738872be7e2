"""Tiles of stained tissue of your own: pictures in folders or a table, one or several stains.

    data = TileDataModule(root="sample:tiles", modalities={"he": Stain(), "ihc": Stain()},
                          global_batch_size=32, window=Window(size=64))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))     # he, ihc (32, 3, 64, 64)

`io/slide/manifest.py` finds tiles, `sources/stain_tiles.py` cuts windows.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from domainssl.datamodules.base import DomainDataModule, check_labels, named_sample
from domainssl.datamodules.statistics import statistics_of
from domainssl.errors import ConfigError, counted
from domainssl.io.ids import write_table
from domainssl.io.slide.manifest import TileSet, find_tiles
from domainssl.io.subjects import Found
from domainssl.loading.source import Loading, Source
from domainssl.modality import Modality, as_modalities
from domainssl.sources.held_out import HeldOut
from domainssl.sources.labels import class_names
from domainssl.sources.patients import by_patient, split_by_patient
from domainssl.sources.slide_grids import SlideTiles, with_grids
from domainssl.sources.stain_tiles import StainSource
from domainssl.sources.tile_options import Stain, TileFiles, TileLabels, tile_window, wanted_tiles
from domainssl.sources.windows import Window

__all__ = ["TileDataModule"]

_log = logging.getLogger(__name__)
_SAMPLES: dict[str, tuple[str, ...]] = {  # name -> stains
    "tiles": ("he", "ihc"),
    "slide": ("he", "ihc"),
}


class TileDataModule(DomainDataModule):
    """Windows of tiles, the same place in every stain.

    One item is one tile. Values are 8-bit colours; what lies outside of the slide is white and
    not valid.

    Args:
        root: `sample:tiles` or `sample:slide` (made on first use in the cache), or a folder.
        modalities: What is read by modality key; None takes everything of a sample.
        global_batch_size: Tiles per optimiser step, over all devices and accumulation.
        window: Their size, 224 pixels by default, and how they are drawn.
        held_out: Which patients or slides are held out, where the data state no validation split.
        labels: Class of a tile; `auto` takes that of a table; None.
        tiles: How tiles are found, named and counted.
        slides: How tiles are cut out of whole slides.
        on_bad_sample: `raise`, or `replace` by the next good tile.
        statistics: `published` (those that `modalities` state, if any), a YAML or JSON file, or
            `card` (those of the model's weights).
        seed: Seed of order, tiles and windows.
        loading: Worker processes and memory.

    Raises:
        ConfigError: An argument cannot be used.
    """

    def __init__(
        self,
        root: str = "sample:tiles",
        modalities: dict[str, Stain] | None = None,
        global_batch_size: int = 32,
        window: Window | None = None,
        held_out: HeldOut | None = None,
        labels: TileLabels | Literal["auto"] | None = "auto",
        tiles: TileFiles | None = None,
        slides: SlideTiles | None = None,
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
        sample = root.removeprefix("sample:")
        if not modalities and sample not in _SAMPLES:
            raise ConfigError(
                "data.init_args.modalities: missing; expected a mapping of modality keys to what "
                "they read, such as he: {stain: HE}."
            )
        self.root = root
        self.stains = dict(modalities or {name: Stain() for name in _SAMPLES[sample]})
        self.tiles = tiles or TileFiles()
        self.slides = slides or SlideTiles()
        self.window = tile_window(window, self.tiles.mpp_um)
        used = ("val_fraction", "patients", "slides", "seed")
        self.held_out = (held_out or HeldOut()).of(used)
        self.labels = TileLabels() if isinstance(labels, str) else labels
        self.found: Found[TileSet] | None = None
        self.splits: dict[str, list[TileSet]] = {}
        self._modalities = as_modalities(
            {
                name: statistics_of(
                    stain.modality(name, self.window.shape, self.tiles.mpp_um), statistics
                )
                for name, stain in self.stains.items()
            }
        )

    @property
    def modalities(self) -> dict[str, Modality]:
        """The stains by their keys; statistics as asked for."""
        return self._modalities

    def prepare_data(self) -> None:
        """Write the embedded sample, once per machine."""
        self._root()

    def _root(self) -> str:
        name = named_sample(self.root, _SAMPLES)
        if name is None:
            return self.root
        module = importlib.import_module(f"domainssl.datamodules.samples.{name}")
        return str(module.sample_root())

    def open_sources(self) -> dict[str, Source]:
        """Find the tiles and hold some patients out; predict on the test split, or on those."""
        root = self._root()
        found = find_tiles(
            root,
            wanted_tiles(self.stains, self.tiles, self.labels),
            manifest=self.tiles.manifest,
            layout=self.tiles.layout,
        )
        size = self.slides.size_px or max(self.window.shape)
        sets, empty = with_grids(found.items, self.slides, size, self.tiles.mpp_um)
        found = replace(found, items=sets, problems=[*found.problems, *empty])
        self.found = found
        for problem in found.problems:
            _log.warning("%s", problem)
        self.splits = split_by_patient(
            found.items, by_patient(self.held_out, found.items), "slides"
        )
        if "val" not in self.splits:
            _log.warning("%s: nothing is held out for validation", root)
        self.label_names = self._classes(found.items)
        if self.tiles.id_table is not None and self._rank == 0:
            named = [(name, each.patient) for each in found.items for name in each.names]
            write_table(self.tiles.id_table, named, self._ids, "tile")
        sources: dict[str, Source] = {
            split: self._source(part, is_training=split == "train")
            for split, part in self.splits.items()
        }
        sources["predict"] = self._source(list(self.splits.values())[-1], is_training=False)
        return sources

    def _source(self, sets: Sequence[TileSet], *, is_training: bool) -> StainSource:
        return StainSource(
            sets=sets,
            modalities=self._modalities,
            normalize={name: stain.normalize for name, stain in self.stains.items()},
            window=self.window,
            slides=self.slides,
            labels=self.label_names,
            per_slide=self.tiles.per_slide,
            ids=self._ids,
            seed=self.seed,
            is_training=is_training,
        )

    @property
    def _ids(self) -> str:
        """How tiles are named: drawings have nothing to protect."""
        return "plain" if self.root.startswith("sample:") else self.tiles.ids

    def _classes(self, sets: Sequence[TileSet]) -> tuple[str, ...] | None:
        """Return the class names of tiles by number; None without labels."""
        there = {label for each in sets for label in each.labels if label}
        if self.labels is None or not there:
            return None
        return class_names(there, self.labels.classes, "tiles")

    @property
    def num_classes(self) -> int | None:
        """Number of classes of tiles, None without labels; known after setup."""
        return len(self.label_names) if self.label_names is not None else None

    def identity(self) -> dict[str, Any]:
        """Return what tells these tiles from others, without a name or a path."""
        return {
            "format": "tiles",
            "layout": self.found.layout if self.found else None,
            "slides": {
                split: {
                    "count": len(part),
                    "tiles": sum(map(len, part)),
                    "digest": _digest(part),
                }
                for split, part in self.splits.items()
            },
        }

    @property
    def withheld(self) -> tuple[str, ...]:
        """Root, table, patients and slides, unless ids are plain."""
        if self._ids == "plain":
            return ()
        names = (*self.held_out.patients, *self.held_out.slides)
        texts = [self.root, self.tiles.manifest or "", "held_out.patients", "held_out.slides"]
        return tuple(text for text in (*texts, *names) if len(text) > 2)

    @property
    def problems(self) -> list[str]:
        """What was left out, and why."""
        return list(self.found.problems) if self.found else []

    def describe(self) -> list[str]:
        """Return lines that tell what was found."""
        found = self.found
        assert found is not None  # called after setup
        patients = len({each.patient for each in found.items})
        tiles = sum(map(len, found.items))
        lines = [
            f"{counted(tiles, 'tile')} of {counted(len(found.items), 'slide')} of "
            f"{counted(patients, 'patient')} in {self.root} "
            f"({found.layout})"
        ]
        lines += [f"problem: {text}" for text in found.problems]
        size = " x ".join(str(n) for n in self.window.shape)
        for name, modality in self._modalities.items():
            count = sum(each.shows(name) for each in found.items)
            lines.append(
                f"{name}: {modality.num_channels} channels {' '.join(modality.channels)} "
                f"({modality.value_unit}), {size} px of {modality.mpp_um:g} um, of {count} tiles"
            )
        names = self.label_names
        lines.append("labels: none" if names is None else f"labels: {', '.join(names)}")
        return lines + super().describe()


def _digest(sets: Sequence[TileSet]) -> str:
    """Return a hash over the sizes of up to a thousand pictures, in their order, and all counts."""
    found = hashlib.sha256()
    files = [path for each in sets for paths in each.pictures.values() for path in paths if path]
    files += [path for each in sets for path in each.slides.values()]
    found.update(f"{len(files)}\n".encode())
    for path in files[:: max(1, len(files) // 1000)]:
        found.update(f"{os.path.getsize(path)}\n".encode())
    return found.hexdigest()[:16]
