"""The recipe through Lightning's strategies on two CPU processes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from cli_runs import run_session

from domainssl import load_backbone, load_task

pytestmark = pytest.mark.slow

OVERRIDES = {
    "trainer.accelerator": "cpu",
    "trainer.devices": "2",
    "trainer.precision": "32-true",
    "trainer.max_epochs": "2",
    "trainer.check_val_every_n_epoch": "2",
    "trainer.log_every_n_steps": "1",
    "model.encoding.architecture.width": "32",
    "model.encoding.architecture.depth": "2",
    "data.global_batch_size": "24",
}


SHORT = {
    **{key: value for key, value in OVERRIDES.items() if key.startswith("trainer.")},
    "trainer.max_epochs": "1",
    "trainer.check_val_every_n_epoch": "1",
    "trainer.limit_train_batches": "3",
    "trainer.limit_val_batches": "1",
}


def _fit(
    folder: Path,
    trainer_config: str,
    recipe: str = "ssl4eo_croma",
    overrides: dict[str, str] = OVERRIDES,
    batch: str = "12 items on each of 2 ranks = 24 per optimiser step",
) -> Path:
    words = ["fit", "--config", f"recipes/{recipe}.yaml", f"--run_dir={folder}"]
    words += ["--config", f"configs/trainer/{trainer_config}.yaml"]
    words += [f"--{key}={value}" for key, value in overrides.items()]
    output = folder.with_suffix(".txt")
    status = run_session(words, output)
    assert status == 0, output.read_text()[-6000:]
    assert batch in output.read_text()
    return folder


def _metrics(folder: Path) -> dict[tuple[str, str], float]:
    """Return every logged loss and evaluation by step and name; speeds are left out."""
    found = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if text and name.startswith(("train/loss", "val/")):
                    found[row["step"], name] = float(text)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, sample_root: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("strategies")
    return {name: _fit(folder / name, name) for name in ("ddp", "fsdp2")}


def test_ddp_and_fsdp2_give_equal_metrics(runs: dict[str, Path]) -> None:
    ddp, fsdp2 = (_metrics(runs[name]) for name in ("ddp", "fsdp2"))
    assert ddp.keys() == fsdp2.keys()
    losses = [key for key in ddp if "loss" in key[1]]
    assert len(losses) >= 8 * 3
    for key in losses:
        assert fsdp2[key] == pytest.approx(ddp[key], rel=1e-4), key
    for key in ddp.keys() - set(losses):
        assert fsdp2[key] == pytest.approx(ddp[key], abs=0.1), key  # accuracies of 64 items


def test_both_export_the_whole_backbone(runs: dict[str, Path]) -> None:
    ddp, fsdp2 = (load_backbone(runs[name] / "backbone") for name in ("ddp", "fsdp2"))
    assert type(fsdp2).__name__ == "CROMABackbone"
    for (name, a), b in zip(ddp.state_dict().items(), fsdp2.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    card = json.loads((runs["fsdp2"] / "backbone" / "backbone.json").read_text())
    assert card["provenance"]["world_size"] == 2


def test_a_sharded_checkpoint_loads_like_any_other(runs: dict[str, Path]) -> None:
    backbone = load_backbone(runs["fsdp2"] / "checkpoints" / "last.ckpt")
    exported = load_backbone(runs["fsdp2"] / "backbone")
    for (name, a), b in zip(
        backbone.state_dict().items(), exported.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_task_with_a_pyramid_of_maps_gives_equal_metrics(tmp_path: Path) -> None:
    all_weights = {
        "model.tuning.mode": "full", "model.head.name": "swin_unetr",
        "model.head.normalize": "false", "model.optimization.lr": "4e-3",
    }  # fmt: skip
    words = {**SHORT, **all_weights}
    ddp, fsdp2 = (
        _metrics(_fit(tmp_path / name, name, "finetune_ct_organs", words, "each of 2 ranks"))
        for name in ("ddp", "fsdp2")
    )
    assert ddp.keys() == fsdp2.keys() and len({step for step, _ in ddp}) == 3
    for key, value in ddp.items():
        counted = "/iou" in key[1]  # of whole voxels: rounding moves those between two classes
        bound = 1e-3 if counted else 1e-5
        assert fsdp2[key] == pytest.approx(value, rel=1e-3, abs=bound, nan_ok=True), key
    # not the weights: Adam enlarges the rounding of biases before a norm, which have no gradient
    tasks = [load_task(tmp_path / name / "task") for name in ("ddp", "fsdp2")]
    assert tasks[0].state_dict().keys() == tasks[1].state_dict().keys()
    assert tasks[0].classes == tasks[1].classes


def test_the_anchor_of_dino_is_sharded_too(tmp_path: Path) -> None:
    anchored = {
        "model.encoding.architecture.width": "32", "model.encoding.architecture.depth": "1",
        "model.loss_weights.gram": "2", "model.gram.start_steps": "1",
        "model.gram.refresh_every": "1", "data.global_batch_size": "4",
    }  # fmt: skip
    ddp, fsdp2 = (
        _metrics(_fit(tmp_path / name, name, "ssl4eo_dino", {**SHORT, **anchored}, "2 ranks"))
        for name in ("ddp", "fsdp2")
    )
    terms = [ddp[str(step), "train/loss/gram"] for step in range(3)]
    assert terms[0] == 0 < min(terms[1:])  # of step 0 there is no earlier teacher
    assert [fsdp2[str(step), "train/loss/gram"] for step in range(3)] == pytest.approx(terms)
