"""What the start of a run says of a task: its weights, its tuning, and the classes of maps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from small_tasks import MODALITIES, backbone, task

from domainssl.cli.run.record import _data_lines, _start_line
from domainssl.tasks import DenseHead, SegmentationTask


@pytest.mark.parametrize(
    ("mode", "path", "stage", "expected"),
    [
        (
            "frozen",
            None,
            "fit",
            "random weights, in the architecture of the recipe tiles_mae; tuning: frozen (the "
            "head alone)",
        ),
        ("full", "a.ckpt", "fit", "the checkpoint a.ckpt; tuning: full (all weights)"),
        ("full", "a.ckpt", "test", "the checkpoint a.ckpt"),
    ],
)
def test_the_start_names_weights_and_tuning(mode, path, stage, expected):
    model = task(backbone="recipe:tiles_mae", tuning={"mode": mode})
    assert _start_line(path, model, stage) == expected


def test_the_data_block_names_the_classes_that_a_task_learns():
    lines = ["96 locations", "labels: ponds, roofs", "batches: 8 items"]
    data = SimpleNamespace(describe=lambda: list(lines))
    assert _data_lines(data, task()) == lines
    model = SegmentationTask(
        backbone(), modalities=MODALITIES, classes=("water", "crops"), head=DenseHead(name="linear")
    )
    assert _data_lines(data, model)[1] == "classes of the map: water, crops"
    lines.append("segmentation maps: 3 (0 air, 1 organ)")
    assert _data_lines(data, model) == lines
