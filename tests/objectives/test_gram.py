"""Gram anchoring of DINO: what is compared, when the anchor is taken, and that runs resume."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from domainssl.errors import ConfigError
from domainssl.losses.latent import gram_anchoring
from domainssl.modality import Batch, Modality
from domainssl.nn.views import Views
from domainssl.objectives.base import Generators
from domainssl.objectives.dino import DINO, DINOHead, DINOTeacher
from domainssl.objectives.gram import GramAnchor, on_grid
from domainssl.objectives.student_parts import Crops, StudentArchitecture, StudentEncoding
from domainssl.training.schedules import Progress

SIZE = 16
_SMALL = StudentArchitecture(width=16, depth=1, heads=2)


def made(weight: float = 1.0, encoder: str = "vit", **gram: Any) -> DINO:
    torch.manual_seed(0)
    image = Modality(
        name="m", kind="image", channels=("a", "b"), value_unit="arbitrary", size=(SIZE, SIZE)
    )
    encoding = StudentEncoding(
        encoder=encoder, size="tiny", architecture=_SMALL, patch_size=4, normalization="identity"
    )
    return DINO(
        {"m": image.to_dict()},
        encoding,
        crops=Crops(local_count=0, first=Views(), second=Views()),
        head=DINOHead(prototypes=8, hidden=8, bottleneck=4, frozen_epochs=0),
        teacher=DINOTeacher(momentum=0.5),
        loss_weights={"gram": weight},
        gram=GramAnchor(**gram),
        context_size=SIZE,
    )


def batch_of(seed: int = 0) -> Batch:
    return {"m": torch.randn(3, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))}


def step_of(model: DINO, batch: Batch, seed: int = 1) -> Any:
    random = Generators(*(torch.Generator().manual_seed(seed + i) for i in (0, 1)))
    return model(batch, model.draw(batch, random))


def trained(model: DINO, steps: range) -> list[Tensor]:
    """Train for some steps of a run, and return the term of each."""
    terms = []
    for number in steps:
        model.progress = Progress(step=number, total_steps=6)
        step = step_of(model, batch_of(number), seed=number)
        model.zero_grad()
        torch.stack(list(step.losses.values())).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
            model.after_step(step)
        terms.append(step.losses["gram"].detach())
    return terms


def test_the_term_is_that_of_the_students_patches_and_the_anchors() -> None:
    model, batch = made(weight=3.0, scale=1), batch_of()
    assert model.anchor is not None
    assert float(step_of(model, batch).losses["gram"].detach()) == 0.0  # all three are equal still
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(parameter))
            )
    random = Generators(*(torch.Generator().manual_seed(n) for n in (1, 2)))
    draws = model.draw(batch, random)
    step = model(batch, draws)
    cut = [{"m": crop["m"]} for crop in model.cut_crops(batch, draws.views)]
    ours, theirs = (
        torch.cat([net.encode(crop).tokens["m"] for crop in cut])  # type: ignore[operator]
        for net in (model.backbone, model.anchor["backbone"])
    )
    expected = 3.0 * gram_anchoring(ours, theirs)
    torch.testing.assert_close(step.losses["gram"], expected)
    step.losses["gram"].backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.anchor.parameters())
    assert sum(float(p.grad.abs().sum()) for p in model.backbone.parameters() if p.grad is not None)


def test_patches_without_data_and_absent_items_do_not_count() -> None:
    torch.manual_seed(0)
    student, anchor = torch.randn(2, 2, 4, 8)
    counted = torch.tensor([[True, True, False, True], [False] * 4])
    expected = gram_anchoring(student[:1, [0, 1, 3]], anchor[:1, [0, 1, 3]])
    torch.testing.assert_close(gram_anchoring(student, anchor, counted=counted), expected)
    model, batch = made(), batch_of()
    batch["m.present"] = torch.tensor([True, False, True])
    other = {**batch, "m": batch["m"].clone()}
    other["m"][1] = 9.0
    assert torch.equal(step_of(model, batch).losses["gram"], step_of(model, other).losses["gram"])


def test_when_the_anchor_is_taken() -> None:
    gram = GramAnchor(start_steps=3, refresh_every=2, max_refreshes=2)
    assert [step for step in range(20) if gram.is_taken(step)] == [3, 5, 7]
    gram = GramAnchor(start_steps=3, refresh_every=5, max_refreshes=None)
    assert [step for step in range(20) if gram.is_taken(step)] == [3, 8, 13, 18]


def test_the_anchor_is_the_teacher_of_its_step_and_the_term_waits_for_it() -> None:
    model = made(start_steps=2, refresh_every=2, max_refreshes=1)
    assert model.anchor is not None
    terms = trained(model, range(2))
    assert [float(term) for term in terms] == [0.0, 0.0]
    second = [p.clone() for p in model.teacher["backbone"].parameters()]
    assert all(map(torch.equal, model.anchor.parameters(), second))
    assert float(trained(model, range(2, 3))[0]) > 0
    assert all(map(torch.equal, model.anchor.parameters(), second))
    trained(model, range(3, 4))  # refreshed before step 4
    assert all(map(torch.equal, model.anchor.parameters(), model.teacher["backbone"].parameters()))
    fourth = [p.clone() for p in model.anchor.parameters()]
    trained(model, range(4, 6))
    assert all(map(torch.equal, model.anchor.parameters(), fourth))  # once


def test_a_resumed_run_goes_on_exactly() -> None:
    model = made(start_steps=1, refresh_every=3)
    trained(model, range(3))
    saved = copy.deepcopy(model.state_dict())
    assert any(name.startswith("anchor.backbone.") for name in saved)
    expected = trained(model, range(3, 6))
    again = made(start_steps=1, refresh_every=3)
    again.load_state_dict(saved)
    assert all(map(torch.equal, trained(again, range(3, 6)), expected))
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_features_are_resized_to_the_grid() -> None:
    plane = torch.arange(8.0).repeat(8, 1).flatten().view(1, 64, 1)
    halved = on_grid(plane, (8, 8), (4, 4)).view(4, 4)
    torch.testing.assert_close(halved[1, 1:3], torch.tensor([2.5, 4.5]))
    assert on_grid(torch.zeros(2, 4 * 4 * 2, 3), (4, 4, 2), (2, 2, 1)).shape == (2, 4, 3)


def test_without_the_term_there_is_no_anchor() -> None:
    assert made(weight=0.0).anchor is None
    with pytest.raises(ConfigError, match=r"loss_weights\.gram"):
        made(encoder="transformer")


@pytest.mark.parametrize("name", ["start_steps", "refresh_every", "max_refreshes", "scale"])
def test_values_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"gram\.{name}"):
        GramAnchor(**{name: -1})
