"""DINO, iBOT and DINOv2 against numbers made by running the published code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import IS_OURS, Golden, close, close_gradient, golden_files
from ranks import run_ranks
from torch import Tensor, nn

from domainssl.backbones.vit import ViTBackbone
from domainssl.distributed import rank
from domainssl.losses.self_distillation import (
    centered_softmax,
    class_distillation,
    koleo,
    moved_center,
    patch_distillation,
    sinkhorn,
)
from domainssl.nn.heads import PrototypeHead
from domainssl.nn.positions import resized_positions
from domainssl.objectives.base import Step
from domainssl.objectives.dino import DINO, DINOHead, DINOOptions, DINOTeacher
from domainssl.objectives.student_parts import Crops, StudentArchitecture, StudentEncoding
from domainssl.objectives.student_teacher import CropTokens
from domainssl.training.optimization import Optimization
from domainssl.training.schedules import Progress, TeacherTemperature, cosine

GOLDEN = ("dino_ibot", "ibot_step")
FILES = {prefix: golden_files(prefix) for prefix in GOLDEN}


@pytest.mark.parametrize("prefix", GOLDEN)
def test_golden_files_exist(prefix: str) -> None:
    assert FILES[prefix], f"no {prefix}_*.safetensors"


@pytest.fixture(params=FILES["dino_ibot"], ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(params=FILES["ibot_step"], ids=lambda path: path.stem)
def steps(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def temperature(c: dict[str, Any], epoch: int, kind: str = "teacher") -> float:
    """Return the teacher's temperature as DINO and iBOT set it, once per epoch."""
    chosen = TeacherTemperature(
        warmup=c[f"warmup_{kind}_temp"],
        final=c[f"{kind}_temp"],
        warmup_epochs=c["warmup_teacher_temp_epochs"],
    )
    return chosen.at(Progress(epoch=epoch, total_epochs=c["epochs"]), "epoch")


# -- DINO -------------------------------------------------------------------------------------


def test_temperature_rises_once_per_epoch(golden: Golden) -> None:
    for kind, name in (
        ("teacher", "dino/teacher_temp_schedule"),
        ("teacher", "ibot/teacher_temp_schedule"),
        ("teacher_patch", "ibot/teacher_patch_temp_schedule"),
    ):
        ours = [temperature(golden.config, e, kind) for e in range(golden.config["epochs"])]
        close(torch.tensor(ours, dtype=torch.float64), golden[name], rtol=1e-12, atol=0)


def test_dino_loss_centre_and_gradient_over_steps(golden: Golden) -> None:
    c = golden.config
    center = torch.zeros(c["K"])
    for step, epoch in enumerate(c["dino_epochs_run"]):
        student = golden["dino/student"][step].clone().requires_grad_()
        teacher = golden["dino/teacher"][step]
        probabilities = centered_softmax(teacher, center, temperature(c, epoch))
        loss = class_distillation(
            student.unflatten(0, (-1, c["B"])),
            probabilities.unflatten(0, (2, c["B"])),
            temperature=c["student_temp"],
        )
        loss.backward()
        close(loss.detach(), golden["dino/loss"][step])
        close_gradient(student.grad, golden["dino/grad_student"][step])
        count = torch.tensor(float(len(teacher)))
        center = moved_center(center, teacher.sum(0), count, c["center_momentum"])
        close(center, golden["dino/center"][step])


def head_of(state: dict[str, Tensor], *, normalized: bool = True) -> PrototypeHead:
    """Build a head of the sizes that a state dict has, and fill it."""
    layers = [t for n, t in state.items() if n.startswith("mlp.") and t.ndim == 2]
    bottleneck = state["last_layer.weight_v"].shape[1]
    last2 = state.get("last_layer2.weight_v")
    is_shared = last2 is None or torch.equal(last2, state["last_layer.weight_v"])
    head = PrototypeHead(
        layers[0].shape[1],
        hidden=layers[0].shape[0] if len(layers) > 1 else 1,
        bottleneck=bottleneck,
        prototypes=len(state["last_layer.weight_v"]),
        patch_prototypes=None if is_shared or last2 is None else len(last2),
        layers=len(layers),
        batch_norm=any("running_mean" in n for n in state),
        trains_scale=not normalized,
    )
    own = head.state_dict()
    head.load_state_dict({n: t.reshape(own[n].shape) for n, t in state.items() if n in own})
    assert not set(own) - set(state)
    return head


HEADS = ("plain", "bn", "free_last", "one_layer", "two_layers")


@pytest.mark.parametrize("name", HEADS)
def test_head(golden: Golden, name: str) -> None:
    if not golden.below(f"head/{name}/"):
        assert not IS_OURS
        pytest.skip("not in this file")
    state = golden.below(f"head/{name}/state/")
    head = head_of(state, normalized=name != "free_last")
    x = golden[f"head/{name}/in"].clone().requires_grad_()
    out = head(x)
    close(out.detach(), golden[f"head/{name}/out"])
    (out * golden[f"head/{name}/weight_out"]).sum().backward()
    close_gradient(x.grad, golden[f"head/{name}/grad_in"])
    expected = golden.below(f"head/{name}/grad/")
    assert {n for n, p in head.named_parameters() if p.grad is not None} == set(expected)
    rounding = 1e-6 * max(float(t.abs().max()) for t in expected.values())
    for own, parameter in head.named_parameters():
        if parameter.grad is None:
            continue
        if float(expected[own].abs().max()) < rounding:
            # a bias that a batch norm takes away again: zero but for the rounding of both
            assert float(parameter.grad.abs().max()) < rounding
        else:
            close_gradient(parameter.grad, expected[own])


@pytest.mark.parametrize("name", ["shared", "separate"])
def test_ibot_head(golden: Golden, name: str) -> None:
    head = head_of(golden.below(f"ibot_head/{name}/state/"))
    tokens = golden[f"ibot_head/{name}/in"]
    close(head(tokens[:, 0]).detach(), golden[f"ibot_head/{name}/out_cls"])
    close(head.patches(tokens[:, 1:]).detach(), golden[f"ibot_head/{name}/out_patch"])


def test_dino_schedules(golden: Golden) -> None:
    s = golden.config["schedule"]
    total = s["epochs"] * s["iters"]
    rates = Optimization(
        lr=s["lr"],
        warmup_steps=s["warmup"] * s["iters"],
        warmup_start="zero",
        final_lr_fraction=s["min_lr"] / s["lr"],
    )
    momentum = golden["schedule/dino_momentum"]
    decay = golden["schedule/dino_weight_decay"]
    ours = {
        "dino_lr": [s["lr"] * rates.scale(step, total) for step in range(total)],
        "dino_momentum": [cosine(s["momentum"], 1.0, step, total) for step in range(total)],
    }
    assert float(momentum[0]) == s["momentum"]
    for name, values in ours.items():
        expected = golden[f"schedule/{name}"]
        close(torch.tensor(values, dtype=torch.float64), expected, rtol=1e-12, atol=0)
    # the json does not say where weight decay starts and ends: the first value is the start, and
    # the end follows from the last one
    start, last = float(decay[0]), float(decay[-1])
    share = cosine(1.0, 0.0, total - 1, total)
    end = (last - start * share) / (1 - share)
    found = [cosine(start, end, step, total) for step in range(total)]
    close(torch.tensor(found, dtype=torch.float64), decay, rtol=1e-9, atol=0)


def test_dinov2_temperature_rises_with_every_step(golden: Golden) -> None:
    s, expected = golden.config["schedule"], golden["schedule/v2_teacher_temp"]
    warmup = s["temp_epochs"] * s["iters"]
    chosen = TeacherTemperature(
        warmup=float(expected[0]), final=float(expected[-1]), warmup_epochs=s["temp_epochs"]
    )
    assert warmup < len(expected)
    total, epochs = len(expected), len(expected) // s["iters"]
    ours = [
        chosen.at(Progress(step=i, total_steps=total, total_epochs=epochs), "step")
        for i in range(total)
    ]
    close(torch.tensor(ours, dtype=torch.float64), expected, rtol=1e-12, atol=0)


# -- iBOT -------------------------------------------------------------------------------------


def patch_rows(mask: Tensor) -> Tensor:
    """Return one over the number of masked patches of each image at masked patches, else 0."""
    return mask / mask.sum(-1, keepdim=True).clamp(min=1)


def test_ibot_loss_centres_and_gradients(golden: Golden) -> None:
    c = golden.config
    center, patch_center = torch.zeros(c["K"]), torch.zeros(c["Kp"])
    for step, epoch in enumerate(c["ibot_epochs_run"]):
        cls, patch, local = (
            golden[f"ibot/student_{n}"][step].clone().requires_grad_()
            for n in ("cls", "patch", "local")
        )
        teacher, teacher_patch = (golden[f"ibot/teacher_{n}"][step] for n in ("cls", "patch"))
        mask = golden["ibot/mask"][step].flatten(0, 1).flatten(1)
        targets = centered_softmax(teacher, center, temperature(c, epoch))
        student = torch.cat([cls, local]).unflatten(0, (-1, c["B"]))
        found = c["lambda1"] * class_distillation(
            student, targets.unflatten(0, (2, c["B"])), temperature=c["student_temp"]
        )
        warm = temperature(c, epoch, "teacher_patch")
        patch_targets = centered_softmax(teacher_patch, patch_center, warm)
        patch_loss = c["lambda2"] * patch_distillation(
            patch.flatten(0, 1),
            patch_targets.flatten(0, 1),
            patch_rows(mask).flatten(),
            torch.tensor(float(len(mask))),
            temperature=c["student_temp"],
        )
        (found + patch_loss).backward()
        close(found.detach(), golden["ibot/cls"][step])
        close(patch_loss.detach(), golden["ibot/patch"][step])
        close((found + patch_loss).detach(), golden["ibot/loss"][step])
        close_gradient(cls.grad, golden["ibot/grad_student_cls"][step])
        close_gradient(local.grad, golden["ibot/grad_student_local"][step])
        close_gradient(patch.grad, golden["ibot/grad_student_patch"][step])
        rows = torch.tensor(float(len(teacher)))
        center = moved_center(center, teacher.sum(0), rows, c["center_momentum"])
        every = teacher_patch.flatten(0, 1)
        rows = torch.tensor(float(len(every)))
        patch_center = moved_center(patch_center, every.sum(0), rows, c["center_momentum2"])
        close(center, golden["ibot/center"][step])
        close(patch_center, golden["ibot/patch_center"][step])


# -- DINOv2 -----------------------------------------------------------------------------------


def test_dinov2_centre_is_used_then_updated(golden: Golden) -> None:
    c, center = golden.config, torch.zeros(golden.config["K"])
    for step, teacher in enumerate(golden["v2/center/teacher"]):
        close(center, golden["v2/center/center"][step])
        close(
            centered_softmax(teacher, center, c["v2_teacher_temp"]), golden["v2/center/probs"][step]
        )
        rows = torch.tensor(float(len(teacher)))
        center = moved_center(center, teacher.sum(0), rows, c["center_momentum"])
    close(center, golden["v2/center/center"][-1])


def test_sinkhorn_and_its_loss(golden: Golden) -> None:
    c = golden.config
    teacher = golden["v2/sinkhorn/teacher"]
    for name in golden.names("v2/sinkhorn/"):
        if name.startswith("probs_"):
            count = int(name.removeprefix("probs_"))
            found = sinkhorn(teacher, c["v2_teacher_temp"], iterations=count)
            close(found, golden[f"v2/sinkhorn/{name}"])
            close(found.sum(1), torch.ones(len(found)))
    student = golden["v2/sinkhorn/student"].clone().requires_grad_()
    targets = sinkhorn(teacher, c["v2_teacher_temp"]).unflatten(0, (2, -1))
    views = student.unflatten(0, (2, -1))
    # the file's sum has the two pairs of equal views as well, and no division
    loss = 2 * (class_distillation(views, targets) + class_distillation(views, targets.flip(0)))
    loss.backward()
    close(loss.detach(), golden["v2/sinkhorn/loss_all_pairs"])
    close_gradient(student.grad, golden["v2/sinkhorn/grad_student"])


def test_dinov2_patch_loss_and_centre(golden: Golden) -> None:
    c = golden.config
    mask, rows = golden["v2/patch/mask"], golden["v2/patch/rows"]
    weight = patch_rows(mask)
    assert torch.equal(mask.flatten().nonzero().flatten(), rows)
    images = torch.tensor(float(len(mask)))
    student = golden["v2/patch/student"].clone().requires_grad_()
    teacher = golden["v2/patch/teacher"].flatten(0, 1)
    none = torch.zeros(c["Kp"])
    targets = centered_softmax(teacher, none, c["v2_teacher_temp"])
    dense = patch_distillation(
        student.flatten(0, 1), targets, weight.flatten(), images, temperature=c["student_temp"]
    )
    dense.backward()
    close(dense.detach(), golden["v2/patch/loss_dense"])
    close_gradient(student.grad, golden["v2/patch/grad_student"])
    few = student.detach().flatten(0, 1)[rows].requires_grad_()
    some = (few, targets[rows], weight.flatten()[rows], images)
    close(patch_distillation(*some).detach(), golden["v2/patch/loss_masked_softmax"])
    even = sinkhorn(teacher[rows], c["v2_teacher_temp"])
    close(even, golden["v2/patch/sinkhorn_probs"])
    loss = patch_distillation(few, even, weight.flatten()[rows], images)
    loss.backward()
    close(loss.detach(), golden["v2/patch/loss_masked_sinkhorn"])
    close_gradient(few.grad, golden["v2/patch/grad_rows_sinkhorn"])
    count = torch.tensor(float(len(rows)))
    moved = moved_center(none, teacher[rows].sum(0), count, c["center_momentum"])
    close(moved, golden["v2/patch/center_after"])


def test_koleo(golden: Golden) -> None:
    x = golden["v2/koleo/in"].clone().requires_grad_()
    loss = koleo(x)
    loss.backward()
    close(loss.detach(), golden["v2/koleo/loss"])
    close_gradient(x.grad, golden["v2/koleo/grad"])
    close(koleo(golden["v2/koleo/in_duplicate"]), golden["v2/koleo/loss_duplicate"])


# -- two ranks --------------------------------------------------------------------------------


def of_this_rank(path: str) -> dict[str, Tensor]:
    """Compute what the file holds of this rank."""
    golden = Golden(Path(path))
    c, here = golden.config, f"two_ranks/rank{rank()}"
    student = golden[f"{here}/student"].clone().requires_grad_()
    teacher, patch = golden[f"{here}/teacher"], golden[f"{here}/patch"]
    zero = torch.zeros(teacher.shape[1])
    said = golden.facts["groups"]["two_ranks/rankR/*"]  # temperatures stand in words alone
    warm = float(re.findall(r"\(temp ([0-9.]+)\)", said)[0])
    [(even, rounds)] = re.findall(r"at temp ([0-9.]+), (\d+) iterations", said)
    targets = centered_softmax(teacher, zero, warm)
    loss = class_distillation(
        student.unflatten(0, (-1, len(teacher) // 2)),
        targets.unflatten(0, (2, -1)),
        temperature=c["student_temp"],
    )
    loss.backward()
    assert student.grad is not None
    count, rows = torch.tensor(float(len(teacher))), torch.tensor(float(len(patch)))
    momentum = c["center_momentum"]
    return {
        "loss": loss.detach(),
        "grad_student": student.grad,
        "center": moved_center(zero, teacher.sum(0), count, momentum, "per_rank"),
        "patch_center": moved_center(zero, patch.sum(0), rows, momentum, "per_rank"),
        "sinkhorn_cls": sinkhorn(teacher, float(even), iterations=int(rounds)),
        "sinkhorn_patch": sinkhorn(patch, float(even), iterations=int(rounds)),
    }


def test_two_ranks(golden: Golden) -> None:
    found = run_ranks(of_this_rank, str(golden.path))
    for index, ours in enumerate(found):
        for name, value in ours.items():
            expected = golden[f"two_ranks/rank{index}/{name}"]
            if name == "grad_student":
                close_gradient(value, expected)
            else:
                close(value, expected)


# -- positions --------------------------------------------------------------------------------


def test_position_tables_for_other_grids(steps: Golden) -> None:
    c, table = steps.config, steps["positions/table"]
    side = (c["table_side"],) * 2
    for grid in c["table_targets"]:
        name = "x".join(str(n) for n in grid)
        for method, how in (
            ("dino_ibot", "offset"),
            ("dinov2_offset", "offset"),
            ("dinov2_antialias", "antialias"),
        ):
            ours = resized_positions(table, side, grid, prefix=1, how=how)  # type: ignore[arg-type]
            close(ours, steps[f"positions/{method}/{name}"], rtol=0, atol=1e-5)


def test_logits_are_the_same_whichever_side_is_scaled() -> None:
    torch.manual_seed(0)
    head = PrototypeHead(4, hidden=4, bottleneck=3, prototypes=5).double().last_layer
    rows = torch.ones(7, 3, dtype=torch.float64)
    many = head(rows)
    few = torch.cat([head(row[None]) for row in rows])  # fewer rows than the bottleneck is wide
    assert isinstance(head, nn.Module)
    close(few, many, rtol=1e-6, atol=1e-7)
    ours = [torch.autograd.grad(out.square().sum(), head.weight_v)[0] for out in (few, many)]
    close(ours[0], ours[1], rtol=1e-5, atol=1e-6)
    unit = torch.nn.functional.normalize(head.weight_v.detach(), dim=1)
    close(many.detach(), rows @ unit.T, rtol=1e-6, atol=1e-7)


def test_frozen_scales_are_one() -> None:
    head = PrototypeHead(4, hidden=4, bottleneck=3, prototypes=5)
    assert isinstance(head.last_layer, nn.Module)
    assert not head.last_layer.weight_g.requires_grad
    close(head.last_layer.weight_g.detach(), torch.ones(5, 1))


# -- the objectives themselves ----------------------------------------------------------------


def objective(golden: Golden, name: str) -> DINO:
    """Build a DINO whose heads are those of a file; its backbone is not used."""
    c, wanted = golden.config, golden.config["objectives"][name]
    is_separate = wanted["separate_head"]
    model = DINO(
        {"x": some_image(1, 16)},
        encoding=StudentEncoding(
            size="tiny",
            architecture=StudentArchitecture(width=c["D"], depth=1, heads=1),
            patch_size=4,
            normalization="identity",
        ),
        crops=Crops(local_count=c["V"]),
        head=DINOHead(
            prototypes=c["K"],
            patch_prototypes=c["Kp"] if is_separate else None,
            hidden=c["hidden"],
            bottleneck=c["bottleneck"],
        ),
        teacher=DINOTeacher(
            temperature=TeacherTemperature(final=wanted["teacher_temp"], warmup_fraction=0),
            patch_temperature=TeacherTemperature(final=wanted["teacher_temp"], warmup_fraction=0),
            student_temperature=c["student_temp"],
            center_momentum=c["center_momentum"],
        ),
        loss_weights={
            "cls": wanted["dino_weight"],
            "patch": wanted["ibot_weight"],
            "koleo": wanted["koleo"],
        },
        context_size=16,
        options=DINOOptions(
            centering={"centering": "center", "sinkhorn_knopp": "sinkhorn"}[wanted["centering"]],  # type: ignore[arg-type]
            patch_head="separate" if is_separate else "shared",
            trains_scale=True,
        ),
    )
    for who, owner in (("student", model), ("teacher", model.teacher)):
        for theirs, ours in (("dino_head", "head"), ("ibot_head", "patch_head")):
            state = golden.below(f"objective/{name}/state/{who}.{theirs}.")
            if state:
                owner.get_submodule(ours).load_state_dict(state)
    return model


def some_image(channels: int, size: int) -> dict[str, Any]:
    return {
        "name": "x", "kind": "image", "channels": [f"c{i}" for i in range(channels)],
        "value_unit": "arbitrary", "size": [size, size],
    }  # fmt: skip


def test_dinov2_objectives(golden: Golden) -> None:
    for name, wanted in golden.config["objectives"].items():
        model, b = objective(golden, name), golden.config["B"]
        for step in range(wanted["steps"]):
            here = f"objective/{name}/step{step}"
            inputs = {
                n: golden[f"{here}/in/{n}"].clone().requires_grad_(n.startswith("student"))
                for n in (
                    "student_cls", "student_local", "student_patch", "teacher_cls", "teacher_patch",
                )
            }  # fmt: skip
            mask = golden[f"{here}/in/mask"].unflatten(0, (2, b))
            tokens = CropTokens(
                student=torch.cat(
                    [inputs["student_cls"], inputs["student_local"]]
                ).unflatten(0, (-1, b)),
                teacher=inputs["teacher_cls"].unflatten(0, (2, b)),
                student_patches=inputs["student_patch"].unflatten(0, (2, b)),
                teacher_patches=inputs["teacher_patch"].unflatten(0, (2, b)),
                mask=mask,
                present=torch.ones(b, dtype=torch.bool),
                most_hidden=int(mask.sum()) + 2,
            )  # fmt: skip
            losses, kept = model.terms(tokens)
            total = torch.stack(list(losses.values())).sum()
            model.zero_grad()
            total.backward()
            logged = golden.below(f"{here}/logged/")
            close(total.detach(), golden[f"{here}/total"])
            close(losses["patch"].detach() / 2, logged["ibot_loss"] * wanted["ibot_weight"])
            close(losses["koleo"].detach() / 2, logged["koleo_loss"])
            both = logged["dino_global_crops_loss"] + logged["dino_local_crops_loss"]
            close(losses["cls"].detach(), both * wanted["dino_weight"])
            for parameter, gradient in golden.below(f"{here}/grad/").items():
                if parameter in inputs:
                    close_gradient(inputs[parameter].grad, gradient)
                else:
                    head, rest = parameter.split(".", 1)
                    ours = {"dino_head": "head", "ibot_head": "patch_head"}[head]
                    close_gradient(model.get_parameter(f"{ours}.{rest}").grad, gradient)
            for term, center in (("class", model.center), ("patch", model.patch_center)):
                moved = moved_center(
                    center, kept[f"{term}_total"], kept[f"{term}_count"],
                    golden.config["center_momentum"],
                )  # fmt: skip
                center.copy_(moved)
        if wanted["centering"] == "centering":
            close(model.center, golden[f"objective/{name}/center_after"])
            close(model.patch_center, golden[f"objective/{name}/patch_center_after"])


# -- complete steps of iBOT -------------------------------------------------------------------


def ibot(golden: Golden) -> DINO:
    """Build the model of a file, student and teacher filled."""
    c, m = golden.config, golden.config["model"]
    assert not m["init_values"], "layer scale"
    model = DINO(
        {"x": some_image(m["in_chans"], m["img_size"])},
        encoding=StudentEncoding(
            size="tiny",
            architecture=StudentArchitecture(
                width=m["embed_dim"], depth=m["depth"], heads=m["num_heads"],
                hidden=int(m["embed_dim"] * m["mlp_ratio"]),
            ),
            patch_size=m["patch_size"],
            normalization="identity",
        ),
        crops=Crops(local_count=c["V"], local_size=tuple(c["local_size"])),
        head=DINOHead(
            prototypes=c["K"], hidden=c["hidden"], bottleneck=c["bottleneck"],
            frozen_epochs=c["freeze_last_layer"],
        ),
        teacher=DINOTeacher(
            momentum=c["momentum"],
            temperature=temperatures(c, "teacher"),
            patch_temperature=temperatures(c, "teacher_patch"),
        ),
        loss_weights={"cls": 1.0, "patch": 1.0},
        context_size=m["img_size"],
        options=DINOOptions(
            reference=True,
            patch_head="shared" if c["shared_head"] else "last_layer",
            teacher_patch_head="shared" if c["shared_head_teacher"] else "same",
        ),
        optimization=Optimization(clip=c["clip"], clip_by="tensor"),
    )  # fmt: skip
    for who, owner in (("student", model), ("teacher", model.teacher)):
        state = golden.below(f"state/{who}/")
        backbone = owner.get_submodule("backbone")
        filled, report = ViTBackbone.from_reference({"teacher": state}, backbone_arguments(model))
        assert not report.missing or report.missing == ("mask_token",)
        backbone.load_state_dict(filled.state_dict())
        head = owner.get_submodule("head")
        own = head.state_dict()
        head.load_state_dict({n: state[f"head.{n}"] for n in own})
    return model


def backbone_arguments(model: DINO) -> dict[str, Any]:
    return dict(model.backbone.arguments)


def temperatures(c: dict[str, Any], kind: str) -> TeacherTemperature:
    return TeacherTemperature(
        warmup=c[f"warmup_{kind}_temp"],
        final=c[f"{kind}_temp"],
        warmup_epochs=c["warmup_teacher_temp_epochs"],
    )


def ours_of(name: str) -> str:
    """Return our name of a parameter of the file."""
    for theirs, ours in (
        ("masked_embed", "mask_token"), ("cls_token", "class_token"),
        ("pos_embed", "position_table"), ("patch_embed.proj", "embed"),
        ("attn.qkv", "attention.qkv"), ("backbone.blocks", "backbone.transformer.blocks"),
        ("backbone.norm", "backbone.transformer.norm"),
    ):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def near(ours: Tensor, golden: Tensor) -> None:
    """Compare outputs at the tolerance of the file."""
    bound = 5e-5 * max(1.0, float(golden.abs().max()))
    assert float((ours - golden.reshape(ours.shape)).abs().max()) <= bound


def test_complete_ibot_steps(steps: Golden) -> None:
    c, model = steps.config, ibot(steps)
    items, views = c["batch"], 2 + c["V"]
    present = torch.ones(items, dtype=torch.bool)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for step in range(c["steps"]):
        here = f"step{step}"
        model.progress = Progress(
            step=0, total_steps=10**12, epoch=c["epoch_of_step"][step], total_epochs=c["epochs"]
        )
        crops = [steps[f"{here}/in/view{i}"] for i in range(views)]
        large, small = ({"x": torch.cat(part)} for part in (crops[:2], crops[2:]))
        mask = steps[f"{here}/in/mask"].flatten(2)
        tokens = model.tokens(large, small, mask, present, int(mask.sum()))
        student = model.head(tokens.student.flatten(0, 1))
        near(student[: 2 * items], steps[f"{here}/student_cls"])
        near(student[2 * items :], steps[f"{here}/student_local"])
        near(
            model.head.patches(tokens.student_patches.flatten(0, 1)), steps[f"{here}/student_patch"]
        )
        head = model.teacher["head"]
        near(head(tokens.teacher.flatten(0, 1)), steps[f"{here}/teacher_cls"])
        near(head.patches(tokens.teacher_patches.flatten(0, 1)), steps[f"{here}/teacher_patch"])
        losses, kept = model.terms(tokens)
        total = torch.stack(list(losses.values())).sum()
        rtol = 1e-5 if step == 0 else 1e-4
        close(losses["cls"].detach(), steps[f"{here}/loss_cls"], rtol=rtol)
        close(losses["patch"].detach(), steps[f"{here}/loss_patch"], rtol=rtol)
        close(total.detach(), steps[f"{here}/loss"], rtol=rtol)
        model.zero_grad()
        total.backward()
        for name in c["grads"]:
            same_gradient(trained[ours_of(name)], steps[f"{here}/grad/{name}"])
        model.configure_gradient_clipping(torch.optim.SGD(trained.values()))
        clipped = steps.below(f"{here}/grad_clipped/")
        for name in c["grads"]:
            if name in clipped:
                same_gradient(trained[ours_of(name)], clipped[name])
            else:
                assert trained[ours_of(name)].grad is None
        with torch.no_grad():
            for parameter in trained.values():
                if parameter.grad is not None:
                    parameter -= c["lr"] * parameter.grad
            model.after_step(Step(losses, kept))
        close(model.center, steps[f"{here}/center"], atol=5e-5)
        close(model.patch_center, steps[f"{here}/patch_center"], atol=5e-5)
        for name, expected in steps.below(f"{here}/after/").items():
            who, rest = name.split(".", 1)
            owner = model if who == "student" else model.teacher
            near(owner.get_parameter(ours_of(rest)), expected)


def same_gradient(parameter: nn.Parameter, expected: Tensor) -> None:
    assert parameter.grad is not None
    close_gradient(parameter.grad.reshape(expected.shape), expected, share=2e-4)
