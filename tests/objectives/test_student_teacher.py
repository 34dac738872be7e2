"""DINO and SimDINO: who learns and who follows, on images, series and volumes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from domainssl.distributed import rank
from domainssl.errors import ConfigError
from domainssl.modality import Batch, Modality
from domainssl.nn.views import Views
from domainssl.objectives.base import Generators
from domainssl.objectives.dino import DINO, DINOHead, DINOOptions, DINOTeacher
from domainssl.objectives.simdino import SimDINO, SimDINOHead
from domainssl.objectives.student_parts import Crops, StudentArchitecture, StudentEncoding
from domainssl.training.schedules import Progress

SIZES: dict[str, tuple[int, ...]] = {
    "image": (32, 24), "series": (32, 24), "volume": (16, 24, 8),
}  # fmt: skip
PATCHES = {"image": (8, 8), "series": (8, 8), "volume": (4, 4, 2)}


def some(kind: str) -> Modality:
    return Modality(
        name="m", kind=kind, channels=("a", "b"), value_unit="arbitrary", size=SIZES[kind]
    )  # type: ignore[arg-type]


def common(kind: str, **encoding: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    small = StudentArchitecture(width=24, depth=1, heads=2)
    form = "scale(4)" if kind == "volume" else "identity"  # volumes have photometric changes
    chosen = {"patch_size": PATCHES[kind], "normalization": form, **encoding}
    return {
        "modalities": {"m": some(kind)},
        "encoding": StudentEncoding(size="tiny", architecture=small, **chosen),
        "crops": Crops(local_count=2),
        "context_size": SIZES[kind],
    }


def dino(kind: str = "image", **changes: Any) -> DINO:
    encoding = changes.pop("encoding", {})
    sizes = DINOHead(prototypes=12, hidden=16, bottleneck=8)
    return DINO(**{**common(kind, **encoding), "head": sizes, **changes})


def simdino(kind: str = "image", **changes: Any) -> SimDINO:
    sizes = SimDINOHead(hidden=16, bottleneck=8)
    return SimDINO(**{**common(kind), "head": sizes, **changes})


def batch_of(kind: str, items: int = 4, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    frames = (3,) if kind == "series" else ()
    batch: Batch = {"m": torch.randn(items, *frames, 2, *SIZES[kind], generator=generator)}
    if frames:
        batch["m.dates"] = torch.arange(18000, 18270, 90, dtype=torch.int32).expand(items, -1)
        batch["m.frames"] = torch.ones(items, 3, dtype=torch.bool)
    return batch


def generators(seed: int = 1) -> Generators:
    return Generators(*(torch.Generator().manual_seed(seed + i) for i in (0, 1)))


def step_of(model: DINO | SimDINO, batch: Batch, seed: int = 1) -> Any:
    return model(batch, model.draw(batch, generators(seed)))


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("kind", SIZES)
def test_dino_with_masked_patches_trains_the_student_alone(kind: str) -> None:
    model = dino(kind, loss_weights={"patch": 1.0, "koleo": 0.1})
    step = step_of(model, batch_of(kind))
    assert set(step.losses) == {"cls", "patch", "koleo"}
    total(step.losses).backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trained)
    assert "backbone.mask_token" in trained


@pytest.mark.parametrize("kind", SIZES)
def test_simdino_trains_the_student_alone(kind: str) -> None:
    model = simdino(kind, loss_weights={"patch": 1.0})
    step = step_of(model, batch_of(kind))
    assert set(step.losses) == {"compression", "expansion", "patch"}
    total(step.losses).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.teacher.parameters())


def test_the_teacher_moves_by_its_share_and_is_what_users_get() -> None:
    model = dino(teacher=DINOTeacher(momentum=0.75))
    batch = batch_of("image")
    step = step_of(model, batch)
    with torch.no_grad():
        model.backbone.embed.weight += 1.0  # type: ignore[operator,union-attr]
        before = model.teacher.get_parameter("backbone.embed.weight").clone()
        model.after_step(step)
    after = model.teacher.get_parameter("backbone.embed.weight")
    torch.testing.assert_close(after - before, torch.full_like(after, 0.25))
    model.eval()
    teachers = model.teacher["backbone"](batch).pooled["m"]
    assert torch.equal(model.features(batch).pooled["m"], teachers)
    assert not torch.equal(model.backbone(batch).pooled["m"], teachers)
    assert model.exported == "teacher.backbone"


def test_momentum_rises_to_one_and_the_teacher_stays_in_evaluation_mode() -> None:
    model = dino(teacher=DINOTeacher(momentum=0.9))
    assert model.momentum_now() == pytest.approx(0.9)
    model.progress = Progress(step=50, total_steps=100)
    assert model.momentum_now() == pytest.approx(0.95)
    model.progress = Progress(step=100, total_steps=100)
    assert model.momentum_now() == 1.0
    model.train()
    assert model.training and not any(m.training for m in model.teacher.modules())


def test_centres_are_saved_and_follow_the_teachers_logits() -> None:
    model = dino(loss_weights={"patch": 1.0})
    step = step_of(model, batch_of("image"))
    mean = step.outputs["class_total"] / step.outputs["class_count"]
    model.after_step(step)
    torch.testing.assert_close(model.center, 0.1 * mean)
    assert {"center", "patch_center"} <= set(model.state_dict())


def test_a_resnet_serves_where_no_patch_is_hidden_and_running_statistics_follow() -> None:
    model = dino(
        encoding={"encoder": "resnet18", "patch_size": 8}, crops=Crops(local_count=1),
        teacher=DINOTeacher(momentum=0.5),
    )  # fmt: skip
    name = "backbone.encoders.m.net.bn1.running_mean"
    step = step_of(model, batch_of("image"))
    total(step.losses).backward()
    target = model.teacher.get_buffer(name).clone()
    model.after_step(step)
    moved = model.teacher.get_buffer(name)
    torch.testing.assert_close(moved, 0.5 * target + 0.5 * model.get_buffer(name))
    assert not torch.equal(moved, target)
    with pytest.raises(ConfigError, match="cannot hide patches"):
        dino(encoding={"encoder": "resnet18", "patch_size": 8}, loss_weights={"patch": 1.0})


def test_small_crops_of_a_series_share_a_date_where_the_options_say_so() -> None:
    batch = batch_of("series", items=64)
    dates = {}
    for kind in ("each", "one"):
        model = dino("series", options=DINOOptions(local_dates=kind), crops=Crops(local_count=3))
        dates[kind] = [view.date for view in model.draw(batch, generators()).views]
    assert torch.equal(dates["one"][3], dates["one"][2])
    assert torch.equal(dates["one"][4], dates["one"][2])
    assert not torch.equal(dates["each"][3], dates["each"][2])
    assert not torch.equal(dates["one"][1], dates["one"][2])


def test_prototypes_rest_in_the_first_epochs() -> None:
    model = dino()
    total(step_of(model, batch_of("image")).losses).backward()
    optimizer = torch.optim.SGD(model.parameters())
    model.progress = Progress(epoch=1, total_epochs=3)
    model.configure_gradient_clipping(optimizer)
    assert model.head.last_layer.weight_v.grad is not None
    model.progress = Progress(epoch=0, total_epochs=3)
    model.configure_gradient_clipping(optimizer)
    assert model.head.last_layer.weight_v.grad is None
    assert model.get_parameter("head.mlp.0.weight").grad is not None


def test_monitors_tell_a_teacher_that_gives_all_items_one_answer() -> None:
    model = dino()
    batch = batch_of("image")
    found = model.monitors(step_of(model, batch))
    assert float(found["teacher_rank"]) > 2
    assert 0 < float(found["teacher_entropy"]) <= float(found["prototype_entropy"]) <= 1
    with torch.no_grad():
        for part in (model.backbone, model.teacher["backbone"]):
            part.get_parameter("transformer.norm.weight").zero_()
    found = model.monitors(step_of(model, batch))
    assert float(found["teacher_rank"]) == pytest.approx(1, abs=1e-3)
    assert float(found["teacher_std"]) < 1e-3


def test_dates_volumes_and_values_that_do_not_fit_are_refused() -> None:
    two = {n: some("image") for n in ("m",)} | {
        "n": Modality(name="n", kind="image", channels=("a",), value_unit="arbitrary")
    }
    with pytest.raises(ConfigError, match="one modality"):
        dino(modalities=two)
    with pytest.raises(ConfigError, match=r"crops.first: photometric changes"):
        dino(crops=Crops(first=Views(blur_probability=0.5)))
    with pytest.raises(ConfigError, match="unknown term 'clas'"):
        dino(loss_weights={"clas": 1.0})
    with pytest.raises(ConfigError, match=r"views.flip: got \[0.5\]"):
        dino("volume", crops=Crops(first=Views(flip=(0.5,))))
    with pytest.raises(ConfigError, match="Make them equal, or choose same"):
        dino(
            head=DINOHead(prototypes=12, patch_prototypes=5, hidden=16, bottleneck=8),
            loss_weights={"patch": 1.0}, options=DINOOptions(reference=True),
        )  # fmt: skip


# -- two ranks --------------------------------------------------------------------------------


def two_steps(options: dict[str, Any]) -> dict[str, Tensor]:
    """Train two steps on this rank's half, gradients averaged; return teacher and centres."""
    model = dino(
        loss_weights={"patch": 1.0, "koleo": 0.1}, options=DINOOptions(**options),
        teacher=DINOTeacher(momentum=0.5),
    )  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    for seed in range(2):
        start, stop = ((0, 3), (3, 4))[rank()]
        batch = {n: t[start:stop] for n, t in batch_of("image", seed=seed).items()}
        step = step_of(model, batch, seed=seed + 10 * rank())
        model.zero_grad()
        total(step.losses).backward()
        with torch.no_grad():
            for parameter in trained:
                assert parameter.grad is not None
                torch.distributed.all_reduce(parameter.grad)
                parameter -= 0.05 * parameter.grad
            model.after_step(step)
    return {n: t.detach() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"reference": True}, {"centering": "sinkhorn"}])
def test_teacher_and_centres_are_equal_on_all_ranks(options: dict[str, Any]) -> None:
    first, second = run_ranks(two_steps, options)
    assert first.keys() == second.keys()
    assert float(first["center"].abs().max()) > 0
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
