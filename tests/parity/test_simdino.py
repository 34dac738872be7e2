"""SimDINO and SimDINOv2 against numbers made by running the published code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import IS_OURS, Golden, close, close_gradient, golden_files
from ranks import run_ranks
from torch import Tensor

from domainssl.distributed import rank
from domainssl.losses.coding_rate import coding_rate, masked_agreement, view_agreement
from domainssl.nn.heads import BottleneckHead
from domainssl.objectives.simdino import SimDINO, SimDINOHead, SimDINOOptions
from domainssl.objectives.student_parts import Crops, StudentArchitecture, StudentEncoding
from domainssl.objectives.student_teacher import CropTokens

GOLDEN = ("simdino",)
FILES = [path for prefix in GOLDEN for path in golden_files(prefix)]


def test_golden_files_exist() -> None:
    assert FILES


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def mcr(
    c: dict[str, Any], student: Tensor, teacher: Tensor, *, version: str, expansion_of: str,
    reduce: bool = True, **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Compute both terms of one file's loss from rows, view-major."""
    items = c["B"]
    views, targets = student.unflatten(0, (-1, items)), teacher.unflatten(0, (-1, items))
    agree = view_agreement(views, targets, normalize=version == "v1", **options)
    z = views[: len(targets)]
    if expansion_of == "1":
        z = (z + targets) / 2
    rate = coding_rate(z, eps=c["eps" if version == "v1" else "eps_v2"], reduce=reduce)
    return {"comp": agree, "expa": rate, "loss": -c["coeff"] * agree - rate}


@pytest.mark.parametrize("kind", ["0", "1"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_loss(golden: Golden, version: str, kind: str) -> None:
    student = golden["loss/student"].clone().requires_grad_()
    found = mcr(golden.config, student, golden["loss/teacher"], version=version, expansion_of=kind)
    found["loss"].backward()
    for name, value in found.items():
        close(value.detach(), golden[f"loss/{version}/expa{kind}/{name}"])
    close_gradient(student.grad, golden[f"loss/{version}/expa{kind}/grad_student"])


def test_pairs_of_equal_views_are_added_but_not_counted(golden: Golden) -> None:
    found = mcr(
        golden.config, golden["loss/student"], golden["loss/teacher"], version="v2",
        expansion_of="1", same_view=True,
    )  # fmt: skip
    for name in ("comp", "loss"):
        close(found[name], golden[f"loss/v2/with_diagonal/{name}"])


def test_logged_agreement_of_global_views(golden: Golden) -> None:
    teacher = golden["loss/teacher"].unflatten(0, (2, -1))
    student = golden["loss/student"].unflatten(0, (-1, golden.config["B"]))[:2]
    found = view_agreement(student, teacher, normalize=False)
    for kind in ("0", "1"):
        close(found, golden[f"loss/v2/expa{kind}/global_comp"])


def test_raw_features(golden: Golden) -> None:
    for name, version in (("v1", "v1"), ("v2_normalizes", "v2")):
        student = golden["raw/student"].clone().requires_grad_()
        teacher, given = golden["raw/teacher"], student
        if name == "v2_normalizes":
            given, teacher = (torch.nn.functional.normalize(x, dim=-1) for x in (student, teacher))
        found = mcr(golden.config, given, teacher, version=version, expansion_of="1")
        found["loss"].backward()
        for term, value in found.items():
            close(value.detach(), golden[f"raw/{name}/{term}"])
        close_gradient(student.grad, golden[f"raw/{name}/grad_student"])


def test_patch_loss(golden: Golden) -> None:
    mask = golden["patch/mask"]
    weight = (mask / mask.sum(-1, keepdim=True).clamp(min=1)).flatten()
    student = golden["patch/student"].clone().requires_grad_()
    images = torch.tensor(float(len(mask)))
    teacher = golden["patch/teacher"].flatten(0, 1)
    loss = masked_agreement(student.flatten(0, 1), teacher, weight, images)
    loss.backward()
    close(loss.detach(), golden["patch/loss_dense"])
    close(loss.detach(), golden["patch/loss_masked"])
    close_gradient(student.grad, golden["patch/grad_student"])


def head_of(state: dict[str, Tensor], *, normalize: bool = True) -> BottleneckHead:
    layers = [t for n, t in state.items() if n.startswith("mlp.") and t.ndim == 2]
    head = BottleneckHead(
        layers[0].shape[1], layers[0].shape[0], layers[-1].shape[0], layers=len(layers),
        batch_norm=any("running_mean" in n for n in state), normalize=normalize,
    )  # fmt: skip
    own = head.state_dict()
    head.load_state_dict({n: t.reshape(own[n].shape) for n, t in state.items()})
    return head


def test_heads(golden: Golden) -> None:
    names = golden.names("head/")
    assert names or not IS_OURS
    for name in names:
        head = head_of(
            golden.below(f"head/{name}/state/"), normalize=not name.endswith("not_normalized")
        )
        close(head(golden[f"head/{name}/in"]).detach(), golden[f"head/{name}/out"])


def test_rate_of_orthogonal_columns(golden: Golden) -> None:
    z, eps = golden["hand/orthogonal"], float(golden["hand/expansion_eps"])
    close(coding_rate(z.unsqueeze(0), eps=eps), golden["hand/expansion"])
    m, p = z.shape
    by_hand = (p + m) / (p * m) * p / 2 * torch.log(torch.tensor(1 + 1 / eps))
    close(coding_rate(z.unsqueeze(0), eps=eps), by_hand)


def of_this_rank(path: str) -> dict[str, Tensor]:
    """Compute what the file holds of this rank."""
    golden = Golden(Path(path))
    here, found = f"two_ranks/rank{rank()}", {}
    for reduced in ("0", "1"):
        for kind in ("0", "1"):
            student = golden[f"{here}/student"].clone().requires_grad_()
            terms = mcr(
                golden.config, student, golden[f"{here}/teacher"], version="v1",
                expansion_of=kind, reduce=reduced == "1",
            )  # fmt: skip
            terms["loss"].backward()
            assert student.grad is not None
            group = f"reduce{reduced}/expa{kind}"
            found |= {f"{group}/{name}": value.detach() for name, value in terms.items()}
            found[f"{group}/grad_student"] = student.grad
    return found


def test_two_ranks(golden: Golden) -> None:
    for index, ours in enumerate(run_ranks(of_this_rank, str(golden.path))):
        for name, value in ours.items():
            expected = golden[f"two_ranks/rank{index}/{name}"]
            if name.endswith("grad_student"):
                close_gradient(value, expected)
            else:
                close(value, expected)


def test_the_mean_over_ranks_is_one_process_with_all_rows(golden: Golden) -> None:
    c = golden.config
    rows = {
        who: torch.cat(
            [golden[f"two_ranks/rank{r}/{who}"].unflatten(0, (-1, c["B"])) for r in (0, 1)], 1
        )
        for who in ("student", "teacher")
    }
    for kind in ("0", "1"):
        whole = mcr(
            {**c, "B": 2 * c["B"]}, rows["student"].flatten(0, 1), rows["teacher"].flatten(0, 1),
            version="v1", expansion_of=kind,
        )  # fmt: skip
        mean = sum(golden[f"two_ranks/rank{r}/reduce1/expa{kind}/loss"] for r in (0, 1)) / 2
        close(whole["loss"], torch.as_tensor(mean))


def objective(golden: Golden, name: str) -> SimDINO:
    """Build a SimDINO whose heads are those of a file; its backbone is not used."""
    c, wanted = golden.config, golden.config["objectives"][name]
    image = {"name": "x", "kind": "image", "channels": ["a"], "value_unit": "arbitrary"}
    model = SimDINO(
        {"x": image},
        encoding=StudentEncoding(
            size="tiny",
            architecture=StudentArchitecture(width=c["D"], depth=1, heads=1),
            patch_size=4,
            normalization="identity",
        ),
        crops=Crops(local_count=c["V"]),
        head=SimDINOHead(
            hidden=c["hidden"], bottleneck=c["bottleneck"], separate_patches=wanted["separate_head"]
        ),
        eps=c["eps_v2"],
        loss_weights={
            "compression": wanted["coeff"],
            "patch": wanted["ibot_weight"],
            "koleo": wanted["koleo"],
        },
        context_size=16,
        options=SimDINOOptions(
            expansion_of="mean" if wanted["expa_type"] else "student", agreement="product"
        ),
    )
    for who, owner in (("student", model), ("teacher", model.teacher)):
        for theirs, ours in (("dino_head", "head"), ("ibot_head", "patch_head")):
            state = golden.below(f"objective/{name}/state/{who}.{theirs}.")
            if state:
                owner.get_submodule(ours).load_state_dict(state)
    return model


def test_simdinov2_objectives(golden: Golden) -> None:
    for name, wanted in golden.config["objectives"].items():
        model, b, here = objective(golden, name), golden.config["B"], f"objective/{name}"
        inputs = {
            n: golden[f"{here}/in/{n}"].clone().requires_grad_(n.startswith("student"))
            for n in (
                "student_cls", "student_local", "student_patch", "teacher_cls", "teacher_patch",
            )
        }  # fmt: skip
        mask = golden[f"{here}/in/mask"].unflatten(0, (2, b))
        student = torch.cat([inputs["student_cls"], inputs["student_local"]])
        tokens = CropTokens(
            student=student.unflatten(0, (-1, b)),
            teacher=inputs["teacher_cls"].unflatten(0, (2, b)),
            student_patches=inputs["student_patch"].unflatten(0, (2, b)),
            teacher_patches=inputs["teacher_patch"].unflatten(0, (2, b)),
            mask=mask,
            present=torch.ones(b, dtype=torch.bool),
            most_hidden=int(mask.sum()) + 3,
        )
        losses, _ = model.terms(tokens)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        logged = golden.below(f"{here}/logged/")
        close(total.detach(), logged["total_loss"])
        close(-losses["compression"].detach() / wanted["coeff"], logged["dino_mcr_comp_loss"])
        close(-losses["expansion"].detach(), logged["dino_mcr_expa_loss"])
        close(losses["patch"].detach() / wanted["ibot_weight"], logged["ibot_comp_loss"])
        for parameter, gradient in golden.below(f"{here}/grad/").items():
            if parameter in inputs:
                close_gradient(inputs[parameter].grad, gradient)
            else:
                head, rest = parameter.split(".", 1)
                ours = {"dino_head": "head", "ibot_head": "patch_head"}[head]
                close_gradient(model.get_parameter(f"{ours}.{rest}").grad, gradient)
