"""`fit --plan`: its numbers, what it leaves behind, and what it refuses with which change."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from domainssl.backbones.vit import ViTArchitecture, ViTBackbone
from domainssl.cli import main
from domainssl.cli.run import plan as planning
from domainssl.cli.run.plan import Asked
from domainssl.cli.run.plan_measure import Bounds, _line, step_seconds
from domainssl.cli.run.plan_report import lines, problems_of
from domainssl.cli.run.plan_steps import Measured, _tokens
from domainssl.modality import Modality

RECIPE = ["--config", "recipes/ssl4eo_croma.yaml", "--data.global_batch_size=16"]
Plan = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Plan:
    monkeypatch.chdir(tmp_path)
    patient = Bounds(slow_s=math.inf, whole_s=math.inf)  # whatever else the machine does
    monkeypatch.setattr(planning, "BOUNDS", patient)

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        status = main(["fit", *RECIPE, *words, "--plan", "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run


def test_a_plan_tells_tokens_parameters_memory_reads_time_and_disk(
    plan: Plan, tmp_path: Path
) -> None:
    status, facts = plan("--trainer.max_epochs=7")
    assert status == 0 and facts["problems"] == []
    assert list(tmp_path.iterdir()) == []  # no run, no log
    assert facts["tokens"] == {"s1": 64, "s2": 64, "joint": 64}  # windows of 64, patches of 8
    assert facts["items"] == {"train": 96, "val": 64}
    assert facts["parameters"] == {"trained": 852_001, "frozen": 0, "backbone": 718_944}
    weights = 4 * facts["parameters"]["trained"]
    memory = facts["memory"]
    assert memory["is_measured"] and memory["measured_at"] == [2, 4, 16]
    # weights, gradients and the two moments of AdamW, and activations above them
    assert memory["bytes_per_device"] > 4 * weights
    assert memory["bytes_without_items"] == pytest.approx(4 * weights, rel=0.3)
    assert memory["largest_batch"] > 16
    reading, time = facts["reading"], facts["time"]
    assert reading["amplification"] >= 1
    ratio = reading["bytes_per_step"] / reading["bytes_needed_per_step"]
    assert ratio == pytest.approx(reading["amplification"], rel=1e-3)
    assert reading["blocks_per_step"] == pytest.approx(3 / 6)  # 96 items in 3 blocks, 6 steps
    assert time["steps_per_epoch"] == 6 and time["epochs"] == 7
    assert time["batch_s"] == pytest.approx(time["compute_s"] + reading["seconds_per_batch"])
    assert time["run_s"] == pytest.approx(7 * 6 * time["batch_s"])
    disk = facts["disk"]
    assert disk["checkpoint_bytes"] == pytest.approx(3 * weights, rel=0.01)
    assert disk["checkpoints"] == 3
    assert disk["run_bytes"] == 3 * disk["checkpoint_bytes"] + disk["export_bytes"]


def test_devices_that_are_not_here_and_accumulation_divide_the_batch(plan: Plan) -> None:
    words = ["--trainer.accelerator=cpu", "--trainer.devices=4", "--trainer.strategy=ddp"]
    status, facts = plan(*words, "--trainer.accumulate_grad_batches=2")
    assert status == 0
    assert facts["batch"] == {
        "global": 16, "devices": 4, "accumulate": 2, "per_device": 2, "is_divisible": True,
    }  # fmt: skip
    assert facts["time"]["steps_per_epoch"] == 6
    assert facts["device"]["strategy"] == "ddp"


def test_a_batch_larger_than_the_data_or_no_multiple_is_refused(plan: Plan) -> None:
    status, facts = plan("--data.global_batch_size=1001", "--trainer.accumulate_grad_batches=4")
    assert status == 2 and "time" not in facts
    assert facts["problems"] == [
        "data.init_args.global_batch_size=1001 cannot be divided by 1 device x 4 accumulated "
        "batches. Set it to 1000 or 1004.",
        "a batch of 1001 is larger than the 96 training items. Set "
        "data.init_args.global_batch_size=96 or lower, or use more data.",
    ]


def test_a_step_that_cannot_fit_is_estimated_and_not_tried(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, real = plan()
    needed = real["memory"]["bytes_per_device"]
    small = SimpleNamespace(available=round(0.6 * needed))
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: small)
    status, facts = plan()
    memory = facts["memory"]
    assert status == 2 and not memory["is_measured"] and memory["measured_at"] == [2, 4]
    assert memory["bytes_per_device"] == pytest.approx(needed, rel=0.15)  # the line is right
    assert facts["time"]["batch_s"] is None
    (problem,) = facts["problems"]
    fits = memory["largest_batch"]
    assert f"; {fits} fit. Set trainer.accumulate_grad_batches=" in problem
    assert f"data.init_args.global_batch_size={fits}" in problem


def test_a_slow_model_is_planned_from_two_steps_of_two_items(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, real = plan()
    said = capsys.readouterr().err
    monkeypatch.setattr(planning, "BOUNDS", Bounds(slow_s=0.0, whole_s=0.0))
    monkeypatch.setattr(planning, "_READ", 8)
    status = main(["fit", *RECIPE, "--plan", "--json"])
    found = capsys.readouterr()
    facts = json.loads(found.out)
    memory, time = facts["memory"], facts["time"]
    assert status == 0 and memory["measured_at"] == [2] and not memory["is_measured"]
    assert memory["bytes_per_device"] == pytest.approx(real["memory"]["bytes_per_device"], rel=0.2)
    assert not time["is_measured"] and time["run_s"] > 0
    assert time["steps_per_epoch"] == real["time"]["steps_per_epoch"] == 6
    assert facts["batch"] == real["batch"] and facts["tokens"] == real["tokens"]
    needed = real["reading"]["bytes_needed_per_step"]
    assert facts["reading"]["bytes_needed_per_step"] == pytest.approx(needed, rel=0.01)
    assert "to compute a batch" in str(list(lines(facts))) and "about " in str(list(lines(facts)))
    steps = [line.partition(": ")[2] for line in found.err.splitlines() if "plan, " in line]
    assert steps == [
        "reading 4 items",
        "step 1 of 4: 2 items, to warm up",
        "step 2 of 2: 2 items, for its memory",
        "reading 3 batches of 8 items",
    ]  # fmt: skip
    assert not said  # of the plan before, which the fixture has read


def test_the_optimiser_grows_neither_memory_nor_time_with_the_batch() -> None:
    found = Measured(
        memory={2: 900}, passes={2: 520}, held=400, paces={2: (5.0, 1.0)},
    )  # fmt: skip
    assert _line(found) == (400.0, 60.0)  # copies of the optimiser at its step are no activations
    assert step_seconds(found, 20) == 1.0 + 4.0 * 10
    found.seconds = [3.0, 9.0, 4.0]
    assert step_seconds(found, 20) == 4.0
    assert step_seconds(Measured(), 20) is None


def test_a_full_disk_is_told_before_the_run(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: usage)
    status, facts = plan()
    assert status == 2
    assert "are free at runs/ssl4eo_croma" in facts["problems"][0]
    assert "Set run_dir to another disk, or callbacks.checkpoint" in facts["problems"][0]


def test_the_page_has_a_line_for_everything(plan: Plan) -> None:
    _, facts = plan()
    words = [line.split()[0] for line in list(lines(facts))[1:]]
    assert words == [
        "device", "items", "batch", "tokens", "parameters", "memory", "reading", "time", "disk",
    ]  # fmt: skip


def test_the_switches_belong_to_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", *RECIPE, "--plan"]) == 2
    assert "--plan is for fit" in capsys.readouterr().err
    assert main(["fit", *RECIPE, "--json"]) == 2
    assert "--json for --plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("AtomicCheckpoint", {}, 3),
        ("AtomicCheckpoint", {"keep_last": -1, "every_n_epochs": 10}, 5),
        ("ModelCheckpoint", {"save_top_k": 2, "save_last": True}, 3),
        ("ModelCheckpoint", {"save_top_k": -1}, 50),
        ("ExportBackbone", {}, 0),
    ],
)
def test_checkpoints_that_lie_there_at_once(
    name: str, given: dict[str, Any], kept: int, tmp_path: Path
) -> None:
    asked = Asked(name="a", run_dir=tmp_path, max_epochs=50)
    assert planning._kept(name, given, asked) == kept


def _facts(**memory: Any) -> dict[str, Any]:
    return {
        "batch": {
            "global": 64, "devices": 2, "accumulate": 1, "per_device": 32, "is_divisible": True,
        },
        "items": {"train": 1000, "val": 0},
        "disk": {"run_bytes": 1, "free_bytes": 2},
        "memory": {
            "bytes_per_device": 100, "available_bytes": 60, "failed_at": None, "largest_batch": 10,
            **memory,
        },
    }  # fmt: skip


def test_accumulation_that_is_proposed_divides_the_batch() -> None:
    (problem,) = problems_of(_facts())
    assert "needs about 100 B, of 60 B free; 10 fit" in problem
    # 32 items in steps of at most 10: 4 batches of 8 on each of 2 devices are 64
    assert "Set trainer.accumulate_grad_batches=4," in problem
    assert "data.init_args.global_batch_size=20" in problem


def test_what_never_fits_and_what_ran_out_of_memory_is_told() -> None:
    (problem,) = problems_of(_facts(largest_batch=0))
    assert "with the smallest batch too. Use model.init_args.execution.gradient" in problem
    (problem,) = problems_of(_facts(bytes_per_device=None, failed_at=2, largest_batch=0))
    assert problem.startswith("a step of 2 items did not fit, of 60 B free")
    (problem,) = problems_of(_facts(bytes_per_device=50, failed_at=32, largest_batch=30))
    assert "a step of 32 items did not fit, of 60 B free; 30 fit" in problem
    assert problems_of(_facts(bytes_per_device=50)) == []


def test_tokens_of_two_dates_before_an_encoder_of_images_are_those_of_both() -> None:
    s2 = Modality(name="s2", kind="image", channels=("B04", "B08"), value_unit="dn")
    sizes = ViTArchitecture(width=12, depth=1, heads=2)
    backbone = ViTBackbone({"s2": s2}, sizes, 4, normalization="scale(10000)")
    model: Any = SimpleNamespace(backbone=backbone)
    one = {"s2": torch.rand(3, 2, 8, 16)}
    assert _tokens(model, one) == {"s2": 8}
    two = {
        "s2": torch.rand(3, 2, 2, 8, 16), "s2.valid": torch.ones(3, 2, 8, 16, dtype=torch.bool),
        "s2.dates": torch.zeros(3, 2, dtype=torch.int32),
    }  # fmt: skip
    assert _tokens(model, two) == {"s2": 16}
    assert backbone.training


@pytest.mark.slow
def test_a_plan_of_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", "recipes/finetune_tiles.yaml", "--model.tuning.mode=frozen"]
    assert main(["fit", *words, "--plan", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    own = facts["parameters"]
    assert own["frozen"] == own["backbone"] > 100 * own["trained"] > 0
    assert facts["tokens"] == {"he": 64}
