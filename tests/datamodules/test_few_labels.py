"""A part of the training items: every class keeps some, windows of one exam stay together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from domainssl.datamodules import SlideFeatureDataModule, TileDataModule
from domainssl.errors import ConfigError, DataError
from domainssl.loading.counts import class_counts, unit_counts
from domainssl.loading.part import PartSource, drawn_units
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading, Rows
from domainssl.sources.slide_options import TileFeatures
from domainssl.sources.stain_tiles import StainSource

LABELS = [0] * 60 + [1] * 30 + [2] * 8 + [3] * 2 + [-1] * 20


def _classes(units: np.ndarray[Any, Any]) -> dict[int, int]:
    return dict(Counter(np.asarray(LABELS)[units].tolist()))


def test_every_class_keeps_its_share_and_one_item_at_least() -> None:
    found = drawn_units(120, 0.1, 0, labels=LABELS)
    assert _classes(found) == {0: 6, 1: 3, 2: 1, 3: 1, -1: 2}
    more = drawn_units(120, 0.1, 0, labels=LABELS, least=4)
    assert _classes(more) == {0: 6, 1: 4, 2: 4, 3: 2, -1: 2}
    assert set(found) < set(more) < set(drawn_units(120, 0.5, 0, labels=LABELS, least=4))
    assert set(drawn_units(120, 0.1, 1, labels=LABELS)) != set(found)
    assert len(drawn_units(120, 0.1, 0)) == 12
    assert len(drawn_units(3, 0.01, 0, labels=[-1, -1, -1])) == 1


@dataclass
class _Windows:
    """Three windows of each of 20 exams, an exam per block, of classes 0 to 4."""

    items_per_unit: int = 3

    @property
    def sizes(self) -> list[int]:
        return [3] * 20

    @property
    def num_bytes(self) -> int:
        return 60

    @property
    def unit_labels(self) -> list[int]:
        return [exam % 5 for exam in range(20)]

    def load(self, piece: Piece, epoch: int) -> Rows:
        at = torch.arange(piece.start, piece.stop) + 3 * piece.block
        return Rows(data={"index": at}, count=len(piece))


def test_windows_of_an_exam_are_drawn_as_one() -> None:
    part = PartSource(source=_Windows(), fraction=0.25, draw=3)
    assert list(part.sizes) == [3] * 5
    found = torch.cat([part.load(Piece(b, 0, 3), 0).data["index"] for b in range(5)])
    exams = found.reshape(5, 3) // 3
    assert bool((exams == exams[:, :1]).all())
    assert sorted((exams[:, 0] % 5).tolist()) == [0, 1, 2, 3, 4]


def test_seed_draws_where_no_draw_is_named() -> None:
    def chosen(**options: Any) -> list[tuple[int, list[int]]]:
        loading = Loading(workers=0, train_fraction=0.1, **options.pop("loading", {}))
        data = TileDataModule(root="sample:tiles", global_batch_size=8, loading=loading, **options)
        data.setup("fit")
        source: Any = data.source("train")
        return [(block, places.tolist()) for block, places in source._chosen]

    first = chosen(seed=1)
    assert first == chosen(seed=1) != chosen(seed=2)
    assert chosen(seed=2, loading={"train_draw": 1}) == first
    with pytest.raises(ConfigError, match="train_least: got -1, expected at least 0"):
        Loading(train_least=-1)


def test_classes_of_tiles_and_exams_are_known_without_reading() -> None:
    tiles = TileDataModule(root="sample:tiles", global_batch_size=8, loading=Loading(workers=0))
    tiles.setup("fit")
    source: Any = tiles.source("train")
    last = len(source.sizes) - 1
    read = source.load(Piece(last, 0, 8), 0).data["label"]
    assert source.unit_labels[sum(source.sizes[:last]) :][:8].tolist() == read.tolist()
    assert Counter(source.unit_labels.tolist()) == {0: 96, 1: 96, 2: 96, 3: 96}
    few = Loading(workers=0, train_fraction=0.25)
    features = TileFeatures(dim=32, mpp_um=0.5, mean=(0.0,), std=(1.0,))
    options = {"tile_features": features}
    slides = SlideFeatureDataModule(
        root="sample:bags", modalities=options, global_batch_size=2, loading=few
    )
    slides.setup("fit")
    part: Any = slides.source("train")
    labels = np.asarray(part.source.unit_labels)
    drawn = Counter(labels[[block for block, _ in part._chosen]].tolist())
    assert drawn == {c: round(n / 4) for c, n in Counter(labels.tolist()).items()}


def test_few_tiles_of_a_slide_stay_the_same_in_every_epoch() -> None:
    data = TileDataModule(root="sample:tiles", global_batch_size=8, loading=Loading(workers=0))
    data.setup("fit")
    whole: Any = data.source("train")
    drawn: StainSource = replace(whole, per_slide=2)
    part = PartSource(source=drawn, fraction=0.1)

    def ids(source: Any, epoch: int) -> list[str]:
        pieces = [Piece(b, 0, min(n, 4)) for b, n in enumerate(source.sizes[:2])]
        return [name for piece in pieces for name in source.load(piece, epoch).data["id"]]

    assert ids(part, 0) == ids(part, 1)
    assert ids(drawn, 0) != ids(drawn, 1)


def test_classes_are_counted_by_exam_and_read_where_they_are_maps() -> None:
    classes = ("a", "b", "c", "d", "e")
    assert class_counts(_Windows(), "label", classes) == [12] * 5
    part = PartSource(source=_Windows(), fraction=0.25, least=2)
    assert class_counts(part, "label", classes) == [6] * 5

    class Maps(_Windows):
        def load(self, piece: Piece, epoch: int) -> Rows:
            mask = torch.full((len(piece), 2, 2), piece.block % 2)
            mask[:, 0, 0] = -1
            mask[1] = 7  # of an item that cannot be read
            return Rows(data={"mask": mask}, count=len(piece), bad={1: "why"})

    assert class_counts(Maps(), "mask", ("a", "b")) == [60, 60]
    with pytest.raises(DataError, match="more classes than the 1 that have names: a"):
        class_counts(Maps(), "mask", ("a",))
    with pytest.raises(DataError, match="balanced counts batch.target, which the data do not"):
        class_counts(Maps(), "target", ("a", "b"))


def test_exams_that_show_a_class_are_counted_once_for_all_of_their_windows():
    assert unit_counts(_Windows(), "label", 6) == [4, 4, 4, 4, 4, 0]

    class Maps(_Windows):
        def load(self, piece: Piece, epoch: int) -> Rows:
            mask = torch.full((len(piece), 2, 2), piece.block % 2)
            mask[:, 0, 0] = -1
            if piece.block == 4:
                mask[2, 1, 1] = 3
            mask[1] = 7  # of an item that cannot be read
            return Rows(data={"mask": mask}, count=len(piece), bad={1: "why"})

    assert unit_counts(Maps(), "mask", 4) == [10, 10, 0, 1]
    assert sum(unit_counts(PartSource(source=Maps(), fraction=0.25), "mask", 4)[:2]) == 5
    with pytest.raises(DataError, match="got items with mask; expected a map"):
        unit_counts(Maps(), "target", 4)
