"""Every recipe's objective computes on a CUDA device what it computes on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import build, every_recipe, synthetic_batch, to_device
from torch import Tensor

from domainssl.nn.norm import GlobalBatchNorm
from domainssl.objectives.base import Generators

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def full_float32() -> Any:
    """Compare in float32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision(before)


def _normalised(device: str, affine: bool, shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3 + 2).to(device).requires_grad_()
    weights = torch.randn(shape, generator=generator).to(device)
    norm = GlobalBatchNorm(shape[1], affine=affine).to(device)
    rows = torch.tensor([True, False, True, True, True], device=device)
    out = norm(x, rows)
    gradients = torch.autograd.grad((out * weights).sum(), [x, *norm.parameters()])
    return [out, norm.running_mean, norm.running_var, *gradients]


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7, 8), (5, 4, 3, 5, 6)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_over_some_rows_is_that_of_the_cpu(affine: bool, shape: tuple[int, ...]) -> None:
    for found, wanted in zip(
        _normalised("cuda", affine, shape), _normalised("cpu", affine, shape), strict=True
    ):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", every_recipe())
def test_a_step_gives_the_losses_and_gradients_of_the_cpu(recipe: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = build(recipe).to(device).train()
        batch = synthetic_batch(model)
        draws = model.draw(
            batch, Generators(torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))
        )
        torch.manual_seed(3)
        step = model(to_device(batch, device), to_device(draws, device))
        torch.stack(list(step.losses.values())).sum().backward()
        norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
        found.append(({n: loss.item() for n, loss in step.losses.items()}, norms))
    (losses, norms), (others, their_norms) = found
    assert others == pytest.approx(losses, rel=1e-3, abs=1e-5)
    assert their_norms.keys() == norms.keys()
    total = sum(n**2 for n in norms.values()) ** 0.5
    assert sum(n**2 for n in their_norms.values()) ** 0.5 == pytest.approx(total, rel=1e-2)


@pytest.mark.parametrize("recipe", every_recipe())
def test_random_choices_are_drawn_on_the_device(recipe: str) -> None:
    model = build(recipe).cuda().train()
    batch = to_device(synthetic_batch(model), "cuda")
    generators = Generators(
        torch.Generator("cuda").manual_seed(1), torch.Generator("cuda").manual_seed(2)
    )
    with torch.autocast("cuda", torch.bfloat16):
        step = model(batch, model.draw(batch, generators))
    assert all(loss.isfinite() and loss.device.type == "cuda" for loss in step.losses.values())
