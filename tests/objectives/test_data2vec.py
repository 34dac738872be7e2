"""data2vec: who learns and is kept, what is hidden and counts, what is predicted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from domainssl import export_backbone
from domainssl.errors import ConfigError
from domainssl.modality import Batch, Modality
from domainssl.nn.block_masks import BlockMasks
from domainssl.objectives.base import Generators
from domainssl.objectives.data2vec import (
    Data2Vec,
    Data2VecArchitecture,
    Data2VecEncoding,
    Data2VecLoss,
    Data2VecOptions,
    Data2VecTargets,
    Data2VecTeacher,
)
from domainssl.training.execution import Execution
from domainssl.training.schedules import Progress

SIZE = 32
SMALL = Data2VecArchitecture(width=24, depth=4, heads=2, drop_path=0.0, attention_dropout=0.0)


def some(bands: int, kind: str = "image") -> dict[str, Modality]:
    names = tuple(f"b{n}" for n in range(bands))
    return {
        "m": Modality(
            name="m", kind=kind, channels=names, value_unit="arbitrary", size=(SIZE, SIZE)
        )
    }


def made(bands: int = 2, **changes: Any) -> Data2Vec:
    torch.manual_seed(0)
    encoding = Data2VecEncoding(
        size="tiny", architecture=SMALL, patch_size=8, normalization="identity",
        weights=changes.pop("weights", None),
    )  # fmt: skip
    given = {"masks": BlockMasks(fraction=1.0, ratio=(0.5, 0.5), least_tokens=2), **changes}
    return Data2Vec(some(bands), encoding, context_size=SIZE, **given)


def batch_of(bands: int = 2, items: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return {"m": torch.randn(items, bands, SIZE, SIZE, generator=generator)}


def generators(seed: int = 1) -> Generators:
    return Generators(*(torch.Generator().manual_seed(seed + i) for i in (0, 1)))


@pytest.mark.parametrize("bands", [13, 12, 2])
def test_the_student_learns_and_is_what_users_get(bands: int) -> None:
    model, batch = made(bands), batch_of(bands)
    step = model(batch, model.draw(batch, generators()))
    step.losses["regression"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in model.teacher.parameters())
    with torch.no_grad():
        next(iter(model.backbone.parameters())).add_(1.0)
    model.eval()
    assert model.exported == "backbone"
    assert torch.equal(model.features(batch).pooled["m"], model.backbone(batch).pooled["m"])


def test_as_many_patches_are_hidden_as_in_the_released_code() -> None:
    torch.manual_seed(0)
    large = some(1)
    large["m"] = dataclasses.replace(large["m"], size=(224, 224))
    encoding = Data2VecEncoding(size="tiny", architecture=SMALL, normalization="identity")
    model = Data2Vec(large, encoding)
    batch = {"m": torch.zeros(500, 1, 1, 1).expand(-1, 1, 224, 224)}
    mask = model.draw(batch, generators()).mask
    assert mask is not None and mask.shape == (500, 1, 196)
    hidden = mask.sum((1, 2)).float()
    # 2000 draws of the released generator: mean 119.5, 109 to 120, exactly 120 in 68 %
    assert abs(float(hidden.mean()) - 119.5) < 0.2 and int(hidden.max()) == 120
    assert int(hidden.min()) >= 105 and abs(float((hidden == 120).float().mean()) - 0.68) < 0.08


def test_only_hidden_patches_that_saw_something_count() -> None:
    batch = batch_of()
    batch["m.valid"] = torch.ones(4, SIZE, SIZE, dtype=torch.bool)
    batch["m.valid"][0] = False
    batch["m.present"] = torch.tensor([True, False, True, True])
    counts = {}
    for reference in (False, True):
        model = made(options=Data2VecOptions(reference=reference))
        draws = model.draw(batch, generators())
        assert draws.mask is not None
        counted = model(batch, draws).outputs["counted"].view(4, -1)
        assert torch.equal(counted[2:], draws.mask[2:, 0]) and not counted[1].any()
        counts[reference] = int(counted[0].sum())
    assert counts == {False: 0, True: int(draws.mask[0].sum())}


def test_the_prediction_does_not_see_what_is_hidden() -> None:
    model, mask = made(), torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    x = batch_of(items=1)
    other = {"m": x["m"].clone()}
    other["m"][:, :, 8:16, 8:16] += 100.0  # patch 5
    assert torch.equal(model.predict(x, mask), model.predict(other, mask))
    assert not torch.equal(
        model.compare(x, mask)[1]["target"], model.compare(other, mask)[1]["target"]
    )


def test_the_momentum_rises_in_a_straight_line() -> None:
    model = made(teacher=Data2VecTeacher(momentum=0.9, first_momentum=0.5, momentum_steps=4))
    found = []
    for step in (0, 1, 4, 9):
        model.progress = Progress(step=step, total_steps=10)
        found.append(model.momentum_now())
    assert found == pytest.approx([0.5, 0.6, 0.9, 0.9])
    assert Data2VecTeacher().at(0) == 0.9998


def test_targets_are_the_upper_half_of_the_blocks() -> None:
    assert made().layers == (2, 3)
    assert made(targets=Data2VecTargets(layers=(0,), output="fc")).layers == (0,)


def test_weights_start_student_and_teacher(tmp_path: Path) -> None:
    source = made()
    with torch.no_grad():
        source.backbone.cls_token.fill_(3.0)
    export_backbone(source.backbone, tmp_path)
    model = made(weights=str(tmp_path))
    assert float(model.backbone.cls_token.detach().mean()) == 3.0
    assert float(model.teacher.get_parameter("backbone.cls_token").mean()) == 3.0


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        (lambda: {"targets": Data2VecTargets(layers=(4,))}, "targets.layers"),
        (lambda: {"targets": Data2VecTargets(output="all")}, "targets.output"),  # type: ignore[arg-type]
        (lambda: {"loss": Data2VecLoss(beta=0.0)}, "loss.beta"),
        (lambda: {"teacher": Data2VecTeacher(momentum=1.5)}, "teacher.momentum"),
        (lambda: {"teacher": Data2VecTeacher(momentum_steps=-1)}, "momentum_steps"),
        (lambda: {"view_size": 20}, "view_size"),
    ],
)
def test_values_out_of_range_are_refused(changes: Any, where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        made(**changes())


def test_other_data_and_other_attention_are_refused() -> None:
    with pytest.raises(ConfigError, match="one image"):
        encoding = Data2VecEncoding(normalization="identity")
        Data2Vec(some(2, "series"), encoding, context_size=SIZE)
    model = made(execution=Execution(attention="math"))
    with pytest.raises(ConfigError, match=r"execution\.attention"):
        model.setup("fit")
