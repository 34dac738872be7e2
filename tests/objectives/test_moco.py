"""MoCo: who learns, what the queue holds, which season a view shows, what ranks share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.nn.functional import normalize

from domainssl import load_backbone
from domainssl.backbones.vit import ViTArchitecture, ViTBackbone
from domainssl.backbones.vit_tokens import moco_codes
from domainssl.distributed import rank
from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import Batch, Modality
from domainssl.nn.norm import GlobalBatchNorm
from domainssl.objectives.base import Generators
from domainssl.objectives.moco import (
    MoCoV2,
    MoCoV2Head,
    MoCoV2Options,
    MoCoV3,
    MoCoV3Head,
    MoCoV3Options,
)  # fmt: skip
from domainssl.objectives.moco_parts import KeyQueue, MoCoViews
from domainssl.objectives.student_parts import StudentArchitecture, StudentEncoding

SIZE = 32


def some(bands: int, kind: str = "series") -> dict[str, Modality]:
    names = tuple(f"b{n}" for n in range(bands))
    return {
        "m": Modality(
            name="m", kind=kind, channels=names, value_unit="arbitrary", size=(SIZE, SIZE)
        )
    }


def encoding(encoder: str) -> StudentEncoding:
    small = StudentArchitecture(width=24, depth=1, heads=2)
    return StudentEncoding(
        encoder=encoder, size="tiny", architecture=small, patch_size=8, positions="sincos",
        normalization="identity",
    )  # fmt: skip


def v2(encoder: str = "transformer", bands: int = 2, **changes: Any) -> MoCoV2:
    torch.manual_seed(0)
    given = {"head": MoCoV2Head(hidden=16, dim=8), "queue": 6, "context_size": SIZE, **changes}
    return MoCoV2(some(bands), encoding(encoder), **given)


def v3(encoder: str = "vit", bands: int = 2, **changes: Any) -> MoCoV3:
    torch.manual_seed(0)
    given = {"head": MoCoV3Head(hidden=16, dim=8), "context_size": SIZE, **changes}
    return MoCoV3(some(bands), encoding(encoder), **given)


def batch_of(bands: int = 2, items: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return {
        "m": torch.randn(items, 4, bands, SIZE, SIZE, generator=generator),
        "m.dates": torch.arange(18000, 18360, 90, dtype=torch.int32).expand(items, -1),
        "m.frames": torch.ones(items, 4, dtype=torch.bool),
    }


def generators(seed: int = 1) -> Generators:
    return Generators(*(torch.Generator().manual_seed(seed + i) for i in (0, 1)))


def step_of(model: MoCoV2 | MoCoV3, batch: Batch, seed: int = 1) -> Any:
    return model(batch, model.draw(batch, generators(seed)))


@pytest.mark.parametrize("bands", [13, 12, 2])
@pytest.mark.parametrize("make", [v2, v3])
def test_the_query_encoder_learns_and_is_what_users_get(make: Any, bands: int) -> None:
    model, batch = make(bands=bands), batch_of(bands)
    step = step_of(model, batch)
    step.losses["contrastive"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert model.exported == "backbone"
    with torch.no_grad():
        next(iter(model.backbone.parameters())).add_(1.0)
    model.eval()
    ours = model.features(batch).pooled["m"]
    assert torch.equal(ours, model.backbone(batch).pooled["m"])


def test_the_key_encoder_moves_by_its_share_and_keeps_its_own_batch_statistics() -> None:
    model = v2("resnet18", momentum=0.75)
    assert all(part.training for part in model.teacher.modules())
    step, name = step_of(model, batch_of()), "backbone.encoders.m.net."
    statistics = model.teacher.get_buffer(f"{name}bn1.running_mean").clone()
    assert statistics.any()  # its own batch has been measured
    with torch.no_grad():
        model.get_parameter(f"{name}conv1.weight").add_(1.0)
        before = model.teacher.get_parameter(f"{name}conv1.weight").clone()
        model.after_step(step)
    after = model.teacher.get_parameter(f"{name}conv1.weight")
    torch.testing.assert_close(after - before, torch.full_like(after, 0.25))
    assert torch.equal(model.teacher.get_buffer(f"{name}bn1.running_mean"), statistics)


def test_the_queue_holds_the_last_keys_and_absent_items_leave_none() -> None:
    queue = KeyQueue(6, 2, seed=0)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(6))
    keys = normalize(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    here = torch.ones(4, dtype=torch.bool)
    queue.add(keys[:4], here)
    assert int(queue.pointer) == 4 and torch.equal(queue.keys[:4], keys[:4])
    queue.add(keys[4:], torch.tensor([True, True, False, True]))
    assert int(queue.pointer) == 1
    assert torch.equal(queue.keys, torch.cat([keys[7:], keys[1:6]]))
    assert {"keys", "pointer"} == set(queue.state_dict())
    queue.add(torch.cat([keys, keys]), here.repeat(4))  # more than it holds
    assert torch.equal(queue.keys.sort(0)[0], keys[2:].sort(0)[0])


def test_a_step_puts_its_keys_into_the_queue() -> None:
    model, batch = v2(), batch_of()
    step = step_of(model, batch)
    model.after_step(step)
    assert torch.equal(model.queue.keys[:4], step.outputs["keys"])
    assert {"queue.keys", "queue.pointer"} <= set(model.state_dict())


@pytest.mark.parametrize("make", [v2, v3])
def test_seasons(make: Any) -> None:
    found: dict[str, list[tuple[int, int]]] = {}
    batch = batch_of(items=64)
    for seasons in ("augment", "random", "fixed"):
        first, second = make(views=MoCoViews(seasons=seasons)).draw(batch, generators()).views
        found[seasons] = list(zip(first.date.tolist(), second.date.tolist(), strict=True))
    pairs = set(found["augment"])
    assert {a for a, _ in pairs} == {b for _, b in pairs} == {0, 1, 2, 3} and len(pairs) > 10
    assert all(a == b for a, b in found["random"]) and len(set(found["random"])) == 4
    assert set(found["fixed"]) == {(0, 0)}
    with pytest.raises(ConfigError, match="seasons"):
        MoCoViews(seasons="none")  # type: ignore[arg-type]


def test_v3_keeps_patch_embeddings_random_and_ends_predictors_by_encoder() -> None:
    model = v3()
    assert not any(p.requires_grad for p in model.backbone.embed.parameters())  # type: ignore[operator, union-attr]
    assert isinstance(model.predictor[-1], GlobalBatchNorm)
    model = v3(options=MoCoV3Options(trains_patches=True))
    assert all(p.requires_grad for p in model.backbone.embed.parameters())  # type: ignore[operator, union-attr]
    resnet = v3("resnet18")
    assert not isinstance(resnet.predictor[-1], GlobalBatchNorm)
    assert sum(isinstance(part, torch.nn.Linear) for part in resnet.head) == 2


@pytest.mark.parametrize(
    ("changes", "where"), [({"queue": 0}, "queue"), ({"temperature": 0.0}, "temperature")]
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        v2(**changes)


def on_a_rank(shuffled: bool) -> dict[str, Any]:
    options = MoCoV2Options(reference=shuffled)
    model, whole = v2("resnet18", options=options), batch_of()
    here = slice(2 * rank(), 2 * rank() + 2)
    batch = {name: value[here] for name, value in whole.items()}
    draws = model.draw(batch, generators())
    shuffle = draws.shuffle
    step = model(batch, draws)
    model.after_step(step)
    return {
        "keys": step.outputs["keys"],
        "queue": model.queue.keys,
        "pointer": model.queue.pointer,
        "shuffle": torch.empty(0) if shuffle is None else shuffle,
    }


@pytest.mark.parametrize("shuffled", [False, True])
def test_ranks_hold_one_queue_in_the_order_of_ranks(shuffled: bool) -> None:
    first, second = run_ranks(on_a_rank, shuffled)
    assert torch.equal(first["queue"], second["queue"]) and int(first["pointer"]) == 4
    assert torch.equal(first["queue"][:4], torch.cat([first["keys"], second["keys"]]))
    assert torch.equal(first["shuffle"], second["shuffle"])
    assert len(first["shuffle"]) == (4 if shuffled else 0)


def test_one_process_encodes_keys_in_their_order() -> None:
    model = v2("resnet18", options=MoCoV2Options(reference=True))
    assert model.draw(batch_of(), generators()).shuffle is None


def test_files_of_v3_load_with_their_table(tmp_path: Any) -> None:
    image = some(3, "image")
    sizes = ViTArchitecture(width=24, depth=1, heads=2, positions="learned", pooling="class")
    source = ViTBackbone(image, sizes, patch_size=8, image_size=SIZE, normalization="identity")
    with torch.no_grad():
        assert source.position_table is not None
        source.position_table[0, 1:] = moco_codes((4, 4), 24)
        source.position_table[0, 0] = 0.0
    state: dict[str, Tensor] = {
        f"module.base_encoder.{n}": t for n, t in source.to_reference().items()
    }
    state["module.base_encoder.head.0.weight"] = torch.zeros(4, 24)
    state["module.momentum_encoder.cls_token"] = torch.zeros(1, 1, 24)
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "moco.pth")
    arguments: dict[str, Any] = {
        "architecture": {"width": 24, "depth": 1, "heads": 2, "pooling": "class"},
        "patch_size": 8, "normalization": "identity",
    }  # fmt: skip
    file, x = str(tmp_path / "moco.pth"), {"m": torch.randn(2, 3, SIZE, SIZE)}
    loaded = load_backbone("vit_tiny", weights=file, modalities=image, arguments=arguments)
    torch.testing.assert_close(loaded(x).pooled["m"], source.eval()(x).pooled["m"])
    arguments["architecture"]["positions"] = "sincos"
    with pytest.raises(WeightsError, match="MoCo v3"):
        load_backbone("vit_tiny", weights=file, modalities=image, arguments=arguments)
