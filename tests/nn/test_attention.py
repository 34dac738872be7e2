"""Attention and its distance bias."""

from __future__ import annotations

import pytest
import torch

from domainssl.nn import attention as attention_module
from domainssl.nn.alibi import DistanceBias, alibi_slopes
from domainssl.nn.attention import attention
from domainssl.nn.patching import grid_coordinates


def _inputs(grid: tuple[int, ...], heads: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    tokens = int(torch.tensor(grid).prod())
    q, k, v = torch.randn(3, 2, heads, tokens, 8, generator=generator)
    return q, k, v


def _bias(grid: tuple[int, ...], heads: int = 3) -> DistanceBias:
    coords = grid_coordinates(grid).unsqueeze(0)
    return DistanceBias(coords, coords, alibi_slopes(heads))


@pytest.mark.parametrize("grid", [(5, 7), (3, 4, 2)])
def test_fused_and_written_out_attention_agree_in_2d_and_3d(grid: tuple[int, ...]) -> None:
    q, k, v = _inputs(grid)
    fused = attention(q, k, v, _bias(grid))
    torch.testing.assert_close(fused, attention(q, k, v, _bias(grid), path="math"))
    torch.testing.assert_close(fused, attention(q, k, v, _bias(grid), path="flex"))


def test_bias_is_minus_slope_times_distance() -> None:
    bias = _bias((2, 3), heads=2).full(torch.float32)[0]
    slopes = alibi_slopes(2)
    torch.testing.assert_close(bias[:, 0, 5], -slopes * 5**0.5)
    assert (bias.diagonal(dim1=1, dim2=2) == 0).all()


def test_attention_by_rows_equals_the_whole_in_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = (6, 5)
    whole, rows = (tuple(x.requires_grad_() for x in _inputs(grid)) for _ in range(2))
    attention(*whole, _bias(grid)).square().sum().backward()
    monkeypatch.setattr(attention_module, "_MAX_BIAS_ELEMENTS", 3 * 30 * 7)
    blocks: list[int] = []
    original = DistanceBias.rows

    def counted(self: DistanceBias, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        blocks.append(stop - start)
        return original(self, start, stop, dtype)

    monkeypatch.setattr(DistanceBias, "rows", counted)
    out = attention(*rows, _bias(grid))
    assert max(blocks) == 7
    out.square().sum().backward()
    for a, b in zip(whole, rows, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_large_grid_never_asks_for_the_whole_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: DistanceBias, dtype: torch.dtype) -> torch.Tensor:
        raise AssertionError("the whole bias was materialised")

    monkeypatch.setattr(DistanceBias, "full", refuse)
    heads, grid = 16, (64, 64)
    q = torch.randn(1, heads, 4096, 4)
    with torch.no_grad():
        out = attention(q, q, q, _bias(grid, heads))
    assert out.shape == q.shape


def test_invalid_keys_are_never_attended_to() -> None:
    q, k, v = _inputs((2, 3))
    coords = grid_coordinates((2, 3)).unsqueeze(0)
    valid = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    bias = DistanceBias(coords, coords, alibi_slopes(3), key_valid=valid)
    before = attention(q, k, v, bias)
    changed = v.clone()
    changed[0, :, 4:] += 100
    torch.testing.assert_close(before, attention(q, k, v, bias, path="flex"))
    after = attention(q, k, changed, bias)
    torch.testing.assert_close(before[0], after[0])
    assert before.isfinite().all()  # the item without any valid key included
