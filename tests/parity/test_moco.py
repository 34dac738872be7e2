"""MoCo v2 and v3 against numbers made by running the published code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_files import Golden, close, golden_files
from ranks import run_ranks
from torch import Tensor, nn

from domainssl.backbones.base import Features
from domainssl.backbones.vit_tokens import moco_codes
from domainssl.distributed import rank, world_size
from domainssl.losses.contrastive import info_nce
from domainssl.modality import Modality
from domainssl.nn.norm import GlobalBatchNorm
from domainssl.objectives.base import Step
from domainssl.objectives.moco import (
    MoCoV2,
    MoCoV2Head,
    MoCoV2Options,
    MoCoV3,
    MoCoV3Head,
    MoCoV3Options,
)  # fmt: skip
from domainssl.objectives.student_parts import StudentArchitecture, StudentEncoding
from domainssl.training.optimization import Optimization
from domainssl.training.schedules import Progress, cosine

GOLDEN = ("moco",)
FILES = golden_files("moco")


def test_golden_files_exist() -> None:
    assert FILES, "no moco_*.safetensors"


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def near(ours: Tensor, expected: Tensor) -> None:
    """Compare logits, features, queue and state."""
    bound = 2e-5 * max(1.0, float(expected.abs().max()))
    assert ours.shape == expected.shape
    assert float((ours.detach() - expected).abs().max()) <= bound


def near_gradient(ours: Tensor | None, expected: Tensor) -> None:
    assert ours is not None
    bound = max(1e-7, 2e-4 * float(expected.abs().max()))
    assert float((ours - expected).abs().max()) <= bound


class StandIn(nn.Module):
    """The golden file's backbone: a convolution with a batch norm, or a linear layer."""

    def __init__(self, state: dict[str, Tensor], per_rank: bool) -> None:
        super().__init__()
        if "conv1.weight" in state:
            width, channels = state["conv1.weight"].shape[:2]
            self.conv1 = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
            self.bn1 = GlobalBatchNorm(width)
            self.bn1.per_rank = per_rank
        else:
            width, channels = state["body.weight"].shape
            self.body = nn.Linear(channels, width)
        own = self.state_dict()
        self.load_state_dict({name: state[name] for name in own})

    def encode(self, view: dict[str, Tensor]) -> Features:
        x = view["m"]
        if hasattr(self, "body"):
            vector = self.body(x).tanh()
        else:
            vector = F.relu(self.bn1(self.conv1(x))).mean((2, 3))
        return Features(pooled={"m": vector})


def common(golden: Golden) -> dict[str, Any]:
    """Return arguments for a small model whose backbone is replaced."""
    return {
        "modalities": {"m": Modality(
            name="m", kind="image", channels=("a",), value_unit="arbitrary", size=(8, 8)
        )},
        "encoding": StudentEncoding(
            encoder="transformer", patch_size=8, normalization="identity",
            architecture=StudentArchitecture(width=golden.config["width"] * 4, depth=1, heads=1),
        ),
        "context_size": 8,
    }  # fmt: skip


def under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def load_head(head: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    head.load_state_dict({n: t.reshape(head.state_dict()[n].shape)
                          for n, t in under(state, prefix).items()})  # fmt: skip


def moco_v2(golden: Golden, state: dict[str, Tensor]) -> MoCoV2:
    """Return our objective in the state of the golden file, before its first step."""
    c = golden.config
    query, answer = under(state, "encoder_q."), under(state, "encoder_k.")
    model = MoCoV2(
        **common(golden),
        head=MoCoV2Head(hidden=len(query["fc.0.weight"]), dim=c["dim"]),
        queue=c["queue"],
        momentum=c["m"],
        temperature=c["T"],
        options=MoCoV2Options(reference=True),
    )
    shuffles = model.options.batch_norm == "shuffled"
    width = query["fc.0.weight"].shape[1]
    model.head, head = (MoCoV2Head(hidden=len(query["fc.0.weight"]), dim=c["dim"]).build(width)
                        for _ in range(2))  # fmt: skip
    model.backbone = StandIn(query, shuffles)  # type: ignore[assignment]
    model.make_teacher(head=head)
    model.teacher["backbone"] = StandIn(answer, shuffles).requires_grad_(False)
    load_head(model.head, query, "fc.")
    load_head(head, answer, "fc.")
    model.queue.keys.copy_(state["queue"].T)
    model.queue.pointer.copy_(state["queue_ptr"])
    return model.train()


def run_v2(golden: Golden, prefix: str, queue_of: str) -> None:
    """Run the steps below a prefix and compare what the file holds."""
    model = moco_v2(golden, golden.below(f"{queue_of}state/"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=golden.config["lr"], momentum=0.9, weight_decay=1e-4)
    model.move_teacher(model.momentum)  # the reference moves it between queries and keys
    for number in range(len([n for n in golden.names(prefix) if n.startswith("step")])):
        step = f"{prefix}step{number}/"
        query, answer = golden[f"{step}in/query"], golden[f"{step}in/key"]
        shuffle = golden.below(f"{queue_of}step{number}/").get("shuffle")
        present = torch.ones(len(query), dtype=torch.bool)
        optimizer.zero_grad()
        losses, kept = model.compare({"m": query}, {"m": answer}, present, shuffle)
        rtol = 1e-5 if number == 0 else 1e-4
        close(losses["contrastive"].detach(), golden[f"{step}loss"], rtol=rtol)
        near(kept["logits"], golden[f"{step}logits"])
        found = golden.below(step)
        if "query_features" in found:
            near(kept["queries"], found["query_features"])
        names = {"encoder_k.conv1": "teacher.backbone.conv1", "encoder_k.bn1":
                 "teacher.backbone.bn1", "encoder_k.fc": "teacher.head"}  # fmt: skip
        tensors = model.state_dict()
        for name, tensor in found.items():
            for theirs, ours in names.items():
                if name.startswith(theirs):
                    near(tensors[name.replace(theirs, ours)], tensor)
        losses["contrastive"].backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for name, tensor in under(found, "grad/encoder_q.").items():
            own = name.replace("fc.", "head.") if name.startswith("fc.") else f"backbone.{name}"
            near_gradient(gradients[own], tensor)
        if world_size() == 1:  # the two ranks made their steps without an optimiser
            optimizer.step()
        with torch.no_grad():
            model.after_step(Step({}, {"keys": kept["keys"], "present": present}))
        near(model.queue.keys.T, golden[f"{queue_of}step{number}/queue"])
        assert torch.equal(model.queue.pointer, golden[f"{queue_of}step{number}/ptr"])


def test_v2_steps(golden: Golden) -> None:
    run_v2(golden, "v2/", "v2/")


def v2_on_a_rank(path: str) -> None:
    golden = Golden(Path(path))
    run_v2(golden, f"two_ranks/rank{rank()}/v2/", "two_ranks/rank0/v2/")


def test_v2_on_two_ranks(golden: Golden) -> None:
    golden.need(bool(golden.below("two_ranks/rank1/v2/")), "two_ranks/")
    run_ranks(v2_on_a_rank, str(golden.path))


# -- MoCo v3 ----------------------------------------------------------------------------------


def moco_v3(golden: Golden, state: dict[str, Tensor]) -> tuple[MoCoV3, str]:
    """Return our objective in the state of the golden file, and what it calls the projector."""
    c = golden.config
    base, answer = under(state, "base_encoder."), under(state, "momentum_encoder.")
    place = "fc." if any(n.startswith("fc.") for n in base) else "head."
    projector = [t for n, t in under(base, place).items() if t.ndim == 2]
    model = MoCoV3(
        **common(golden),
        head=MoCoV3Head(hidden=c["mlp3"], dim=c["dim3"], layers=len(projector)),
        momentum=c["m3"][0],
        temperature=c["T3"],
        options=MoCoV3Options(predictor_norm="never" if place == "fc." else "always"),
    )
    model.backbone = StandIn(base, per_rank=False)  # type: ignore[assignment]
    model.backbone.embed_dim = {"m": projector[0].shape[1]}  # type: ignore[assignment]
    sizes = MoCoV3Head(hidden=c["mlp3"], dim=c["dim3"], layers=len(projector))
    model._make_heads(sizes, is_resnet=place == "fc.")
    model.teacher["backbone"] = StandIn(answer, per_rank=False).requires_grad_(False)
    load_head(model.head, base, place)
    load_head(model.teacher["head"], answer, place)
    load_head(model.predictor, state, "predictor.")
    return model.train(), place


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_v3_steps(golden: Golden, kind: str) -> None:
    golden.need(bool(golden.below(f"v3/{kind}/")), f"v3/{kind}/")
    model, place = moco_v3(golden, golden.below(f"v3/{kind}/state/"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=golden.config["lr"])
    for number, momentum in enumerate(golden.config["m3"]):
        step = f"v3/{kind}/step{number}/"
        golden.need(bool(golden.below(step)), step)
        first, second = golden[f"{step}in/x1"], golden[f"{step}in/x2"]
        present = torch.ones(len(first), dtype=torch.bool)
        optimizer.zero_grad()
        with torch.no_grad():
            model.move_teacher(momentum)
        losses, kept = model.compare({"m": first}, {"m": second}, present)
        close(losses["contrastive"].detach(), golden[f"{step}loss"],
              rtol=1e-5 if number == 0 else 1e-4)  # fmt: skip
        for name, ours in zip(("q1", "q2"), kept["queries"], strict=True):
            near(ours, golden[f"{step}{name}"])
        for name, ours in zip(("k1", "k2"), kept["both_keys"], strict=True):
            near(ours, golden[f"{step}{name}"])
        losses["contrastive"].backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found, tensors = golden.below(step), model.state_dict()

        def own(name: str) -> str:
            for theirs, ours in (("base_encoder.", ""), ("momentum_encoder.", "teacher.")):
                if name.startswith(f"{theirs}{place}"):
                    return name.replace(f"{theirs}{place}", f"{ours}head.")
                name = name.replace(theirs, f"{ours}backbone.")
            return name

        for name, tensor in under(found, "grad/").items():
            near_gradient(gradients[own(name)], tensor)
        for name, tensor in under(found, "after/").items():
            near(tensors[own(name)], tensor)
        optimizer.step()


def v3_on_a_rank(path: str) -> dict[str, Tensor]:
    golden = Golden(Path(path))
    c, here = golden.config, f"two_ranks/rank{rank()}/v3/"
    query = golden[f"{here}q"].clone().requires_grad_()
    loss = 2 * c["T3"] * info_nce(
        query, golden[f"{here}k"], torch.tensor(1 / c["T3"]),
        gather_keys="detach", symmetric=False,
    )  # fmt: skip
    loss.backward()
    assert query.grad is not None
    return {"loss": loss.detach(), "grad": query.grad}


def test_v3_contrast_on_two_ranks(golden: Golden) -> None:
    golden.need(bool(golden.below("two_ranks/rank1/v3/")), "two_ranks/")
    for number, found in enumerate(run_ranks(v3_on_a_rank, str(golden.path))):
        close(found["loss"], golden[f"two_ranks/rank{number}/v3/loss"])
        near_gradient(found["grad"], golden[f"two_ranks/rank{number}/v3/grad_q"])


def test_v3_position_tables(golden: Golden) -> None:
    tables = golden.below("v3/position_table/")
    golden.need(bool(tables), "v3/position_table/")
    for name, table in tables.items():
        height, width = (int(n) for n in name.split("x"))
        near(moco_codes((height, width), golden.config["table_dim"]), table[0, 1:])
        assert not table[0, 0].any()


def test_v3_schedules(golden: Golden) -> None:
    s, epochs = golden.config["sched"], golden["schedule/epoch"].tolist()
    total = s["epochs"]
    momentum = [cosine(s["moco_m"], 1.0, epoch, total) for epoch in epochs]
    expected = golden["schedule/v3_momentum"]
    close(torch.tensor(momentum, dtype=torch.float64), expected, rtol=1e-12, atol=0)
    # the warm-up here reaches its end one step earlier, so the fall is compared
    rates = Optimization(lr=s["lr"], warmup_steps=s["warmup"], warmup_start="zero")
    for epoch, rate in zip(epochs, golden["schedule/v3_lr"].tolist(), strict=True):
        if epoch >= s["warmup"]:
            assert s["lr"] * rates.scale(epoch, total) == pytest.approx(rate, rel=1e-12)
        else:
            line = Optimization(lr=s["lr"], warmup_steps=s["warmup"] + 1, warmup_start="zero")
            assert s["lr"] * line.scale(epoch, total) == pytest.approx(rate, rel=1e-12)


def test_the_key_encoder_follows_before_the_step_that_uses_it(golden: Golden) -> None:
    s = golden.config["sched"]
    model, _ = moco_v3(golden, golden.below("v3/vit/state/"))
    model.momentum, model.progress = s["moco_m"], Progress(step=3, total_steps=10)
    assert model.momentum_now() == cosine(s["moco_m"], 1.0, 4, 10)
