"""What only a CUDA device can show: parity, FlexAttention, bfloat16, memory of large grids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import to_device
from grouped import grouped
from parity.test_croma import FILES, Golden
from torch import Tensor

from domainssl.backbones.croma import PUBLISHED_MODALITIES
from domainssl.bench.models import forward_backward, made_up_batch, peak_memory
from domainssl.bench.report import Settings
from domainssl.nn.alibi import DistanceBias, alibi_slopes
from domainssl.nn.attention import AttentionPath, attention
from domainssl.nn.blocks import set_attention_path
from domainssl.nn.patching import grid_coordinates
from domainssl.objectives.croma import CROMA, CROMAArchitecture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def full_float32() -> Any:
    """Compare in float32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def _inputs(
    items: int, heads: int, side: int, kept: int, head_width: int = 64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values that want gradients, and coordinates of kept tokens."""
    generator = torch.Generator().manual_seed(0)
    grid = grid_coordinates((side, side))
    chosen = torch.rand(2, items, side * side, generator=generator).argsort(-1)[..., :kept]
    q, k, v = (
        torch.randn(items, heads, kept, head_width, generator=generator).to(DEVICE).requires_grad_()
        for _ in range(3)
    )
    a, b = (grid[index].to(DEVICE) for index in chosen)
    return q, k, v, a, b


def _value_and_gradients(
    path: AttentionPath, q: Tensor, k: Tensor, v: Tensor, bias: DistanceBias
) -> list[Tensor]:
    out = attention(q, k, v, bias, path=path)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), (q, k, v))]


@pytest.mark.parametrize("kept", [64, 57])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("path", ["flex", "fused"])
def test_paths_agree_with_the_formula_in_value_and_gradient(
    path: AttentionPath, is_masked: bool, kept: int
) -> None:
    q, k, v, a, b = _inputs(3, 4, 16, kept)
    valid = None
    if is_masked:
        valid = torch.ones(3, kept, dtype=torch.bool, device=DEVICE)
        valid[0, kept // 2 :] = False
        valid[1] = False
    slopes = alibi_slopes(4).to(DEVICE)
    found = _value_and_gradients(path, q, k, v, DistanceBias(a, b, slopes, valid))
    wanted = _value_and_gradients("math", q, k, v, DistanceBias(a, b, slopes, valid))
    for name, got, expected in zip(("out", "q", "k", "v"), found, wanted, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=2e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def _croma(device: str, path: AttentionPath = "fused") -> CROMA:
    """A small CROMA with heads of 16 values, the least that FlexAttention takes on CUDA."""
    torch.manual_seed(0)
    sizes = CROMAArchitecture(width=64, depth=2, heads=4, decoder_width=32)
    known: dict[str, Any] = {n: m.to_dict() for n, m in PUBLISHED_MODALITIES.items()}
    model = CROMA(known, **grouped(size="tiny", architecture=sizes, context_size=64))
    set_attention_path(model.backbone, path)
    return model.to(device)


def _losses_and_gradients(
    model: CROMA, batch: dict[str, Any], draws: Any, device: str
) -> tuple[dict[str, float], dict[str, Tensor]]:
    step = model.to(device)(to_device(batch, device), to_device(draws, device))
    model.zero_grad()
    torch.stack(list(step.losses.values())).sum().backward()
    gradients = {n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None}
    return {name: loss.item() for name, loss in step.losses.items()}, gradients


def _assert_equal_on_both(
    model: CROMA, batch: dict[str, Any], draws: Any, path: AttentionPath = "fused"
) -> None:
    """Compare the plain path on the CPU, where FlexAttention has no gradients, with `path`."""
    losses, gradients = _losses_and_gradients(model, batch, draws, "cpu")
    set_attention_path(model.backbone, path)
    other, others = _losses_and_gradients(model, batch, draws, DEVICE)
    assert other == pytest.approx(losses, rel=1e-4)
    assert gradients.keys() == others.keys()
    for name, expected in gradients.items():
        torch.testing.assert_close(
            others[name], expected, rtol=1e-2, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_the_golden_model_gives_the_same_losses_and_gradients_as_on_the_cpu() -> None:
    for path in FILES:
        golden = Golden(path)
        _assert_equal_on_both(golden.build(), golden.batch(), golden.draws())


@pytest.mark.parametrize("path", ["fused", "flex"])
def test_croma_gives_the_same_losses_and_gradients_as_on_the_cpu(path: AttentionPath) -> None:
    model, batch = _croma("cpu"), made_up_batch(4, 64, "cpu")
    _assert_equal_on_both(model, batch, model.draw(batch, _cpu_generators()), path)


def _cpu_generators() -> Any:
    from domainssl.objectives.base import Generators

    return Generators(torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))


@pytest.mark.parametrize("path", ["fused", "flex"])
def test_a_bfloat16_step_is_close_to_float32_and_leaves_float32_gradients(
    path: AttentionPath,
) -> None:
    losses = []
    for precision in ("32", "bf16"):
        settings = Settings(device=DEVICE, quick=True, precision=precision)  # type: ignore[arg-type]
        model, batch = _croma(DEVICE, path), made_up_batch(4, 64, DEVICE)
        losses.append(forward_backward(model, batch, settings)().item())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    assert losses[1] == pytest.approx(losses[0], rel=3e-2)


@pytest.mark.parametrize("path", ["fused", "flex"])
def test_a_large_grid_never_holds_a_score_per_head_and_pair(path: AttentionPath) -> None:
    heads, side = 16, 64
    q, k, v, _, _ = _inputs(1, heads, side, side**2, head_width=48)
    coords = grid_coordinates((side, side)).to(DEVICE).unsqueeze(0)
    slopes = alibi_slopes(heads).to(DEVICE)

    def forward() -> None:
        with torch.no_grad():
            attention(q, k, v, DistanceBias(coords, coords, slopes), path=path)

    forward()  # compiles
    assert peak_memory(forward, DEVICE) < 0.5 * heads * side**4 * 4

    def backward() -> None:
        attention(q, k, v, DistanceBias(coords, coords, slopes), path=path).sum().backward()

    backward()
    assert peak_memory(backward, DEVICE) < 0.9 * heads * side**4 * 4
