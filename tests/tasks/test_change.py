"""Change between two dates: one backbone for both, a comparison, and pixels that do not count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from domainssl.backbones.croma import CROMABackbone
from domainssl.errors import ConfigError, DataError
from domainssl.modality import Batch, Modality
from domainssl.tasks import ChangeDetectionTask
from domainssl.tasks.change import Comparison
from domainssl.tasks.dense import DenseHead, Tiles
from domainssl.tasks.export import export_task, load_task

CLASSES = ("unchanged", "changed")


def _modality(name: str, channels: tuple[str, ...], kind: Any = "series") -> Modality:
    count = len(channels)
    return Modality(
        name=name,
        kind=kind,
        channels=channels,
        value_unit="arbitrary",
        size=(32, 32),
        gsd_m=10.0,
        mean=(0.0,) * count,
        std=(1.0,) * count,
    )


MODALITIES = {"s1": _modality("s1", ("VV", "VH")), "s2": _modality("s2", ("B02", "B03", "B04"))}
IMAGES = {
    "s1": _modality("s1", ("VV", "VH"), "image"),
    "s2": _modality("s2", ("B02", "B03", "B04"), "image"),
}


def _backbone() -> CROMABackbone:
    torch.manual_seed(0)
    return CROMABackbone(IMAGES, width=32, depth=2, heads=2)


def _task(**changes: Any) -> ChangeDetectionTask:
    given: dict[str, Any] = {
        "backbone": _backbone(),
        "modalities": MODALITIES,
        "classes": CLASSES,
        "head": DenseHead(name="pyramid", features=("s1", "s2"), width=16),
        **changes,
    }
    torch.manual_seed(1)
    return ChangeDetectionTask(given.pop("backbone"), **given).eval()


def _batch(items: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(2)
    batch: Batch = {"id": [str(i) for i in range(items)]}
    for name, modality in MODALITIES.items():
        shape = (items, 2, modality.num_channels, 32, 32)
        batch[name] = torch.randn(shape, generator=generator)
        batch[f"{name}.valid"] = torch.ones(items, 2, 32, 32, dtype=torch.bool)
        batch[f"{name}.present"] = torch.ones(items, dtype=torch.bool)
        batch[f"{name}.frames"] = torch.ones(items, 2, dtype=torch.bool)
        batch[f"{name}.dates"] = torch.tensor([[18_000, 18_366]] * items, dtype=torch.int32)
    batch["mask"] = torch.randint(-1, 2, (items, 32, 32), generator=generator)
    return batch


def _swapped(batch: Batch) -> Batch:
    return {
        name: value.flip(1) if name.partition(".")[0] in MODALITIES and value.ndim > 1 else value
        for name, value in batch.items()
    }


def test_the_order_of_the_dates_matters_where_it_is_asked_for() -> None:
    batch = _batch()
    with torch.no_grad():
        logits = _task().logits(batch)
        assert logits.shape == (3, 2, 32, 32) and logits.dtype == torch.float32
        torch.testing.assert_close(_task().logits(_swapped(batch)), logits)
        ordered = _task(comparison=Comparison(mode="concat"))
        gap = ordered.logits(_swapped(batch)) - ordered.logits(batch)
    assert float(gap.abs().max()) > 1e-3


def test_a_date_is_seen_as_an_image_of_it_is() -> None:
    """Every tensor of the backbone sees one date only: the maps are those of two plain batches."""
    task, batch = _task(), _batch()
    with torch.no_grad():
        for which in range(2):
            date = task.date(batch, which)
            assert date["s2"].shape == (3, 3, 32, 32) and "s2.frames" not in date
            assert int(date["s1.dates"][0]) == (18_000, 18_366)[which]
            wanted = task.backbone.feature_maps({n: batch[n][:, which] for n in MODALITIES})
            found = task.backbone.feature_maps(date)
            torch.testing.assert_close(found["s2"], wanted["s2"])


def test_items_that_lack_a_date_and_unknown_pixels_do_not_count() -> None:
    task, batch = _task(), _batch()
    batch["s1.frames"][1, 1] = False
    with torch.no_grad():
        logits = task.logits(batch)
        loss = task.losses(logits, batch)["cross_entropy"]
    known = batch["mask"] >= 0
    known[1] = False
    wanted = torch.nn.functional.cross_entropy(logits.movedim(1, -1)[known], batch["mask"][known])
    torch.testing.assert_close(loss, wanted)
    metrics = task.metrics()
    metrics.update(*task.scored(logits, batch))
    found = task.named_results(task.computed(metrics))
    predicted = logits.argmax(1)[known]
    truth = batch["mask"][known]
    both = ((predicted == 1) & (truth == 1)).sum() / ((predicted == 1) | (truth == 1)).sum()
    torch.testing.assert_close(found["iou/changed"], both.float())


def test_a_missing_sensor_leaves_no_trace_of_its_filler() -> None:
    task, batch = _task(), _batch()
    batch["s1.present"][0] = False
    other = {**batch, "s1": batch["s1"].clone()}
    other["s1"][0] += 7.0
    with torch.no_grad():
        logits = task.logits(batch)
        torch.testing.assert_close(task.logits(other), logits)
        alone = {k: v[:1] for k, v in batch.items() if not k.startswith("s1")}
        torch.testing.assert_close(task.logits(alone), logits[:1], rtol=1e-4, atol=1e-4)


def test_held_out_items_are_judged_in_windows() -> None:
    batch = _batch(2)
    whole, tiled = _task(), _task(tiles=Tiles(size=16, overlap=0.0, blending="constant"))
    with torch.no_grad():
        quarter = {
            n: v[..., :16, 16:] if v.ndim >= 4 else v
            for n, v in batch.items()
            if n.partition(".")[0] in MODALITIES
        }
        torch.testing.assert_close(tiled(batch)[..., :16, 16:], whole.logits(quarter))
        assert tiled(batch).shape == (2, 2, 32, 32)


def test_an_export_finds_the_same_changes(tmp_path: Path) -> None:
    task, batch = _task(), _batch()
    export_task(task, tmp_path / "out")
    found = load_task(tmp_path / "out")
    assert isinstance(found, ChangeDetectionTask) and found.classes == CLASSES
    assert found.modalities["s2"].kind == "series"
    with torch.no_grad():
        torch.testing.assert_close(found.logits(batch), task.logits(batch), rtol=0, atol=0)


def test_data_without_two_dates_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no modality of the data has dates: s1 \(image\)"):
        _task(modalities=IMAGES)
    batch = _batch()
    three = {**batch, "s2": torch.cat([batch["s2"], batch["s2"][:, :1]], 1)}
    with pytest.raises(DataError, match=r"batch.s2: got 3 dates, but change is between two"):
        _task().logits(three)
    with pytest.raises(ConfigError, match="mode 'diference'.*Did you mean 'difference'"):
        Comparison(mode="diference")  # type: ignore[arg-type]
