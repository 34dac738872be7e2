"""Batch statistics over ranks, rows and devices."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from domainssl.distributed import rank, world_size
from domainssl.nn.norm import GlobalBatchNorm, convert_batch_norm, counted_rows, recomputing


def _input(shape: tuple[int, ...] = (6, 3, 4, 5)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 1


def _ours(width: int = 3) -> GlobalBatchNorm:
    norm = GlobalBatchNorm(width)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, width))  # type: ignore[union-attr]
        norm.bias.copy_(torch.linspace(-1, 1, width))  # type: ignore[union-attr]
    return norm


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5), (4, 3, 2, 3, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_torch(shape: tuple[int, ...], masked: bool) -> None:
    ours = _ours()
    theirs = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](3)
    theirs.load_state_dict(ours.state_dict())
    x, y = _input(shape).requires_grad_(), _input(shape).requires_grad_()
    rows = torch.ones(len(x), dtype=torch.bool) if masked else None
    a, b = ours(x, rows), theirs(y)
    torch.testing.assert_close(a, b)
    for out in (a, b):
        out.square().sin().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)
    for name, buffer in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], buffer)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(y))


def test_the_gradient_is_that_of_finite_differences() -> None:
    norm = GlobalBatchNorm(2).double()
    rows = torch.tensor([True, False, True, True])
    x = _input((4, 2, 3)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: norm(v, rows), (x,))


def test_rows_that_do_not_count_leave_statistics_alone() -> None:
    x = _input()
    other = x.clone()
    other[1] = 1e4
    rows = torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.bool)
    first, second = _ours(), _ours()
    with counted_rows(rows):
        a, b = first(x), second(other)
    assert torch.equal(a[rows], b[rows])
    assert torch.equal(first.running_mean, second.running_mean)
    torch.testing.assert_close(a[rows], _ours()(x[rows]))


def test_an_empty_batch_changes_no_buffer() -> None:
    norm = _ours()
    before = {n: t.clone() for n, t in norm.state_dict().items()}
    out = norm(_input(), torch.zeros(6, dtype=torch.bool))
    assert out.isfinite().all()
    assert all(torch.equal(t, before[n]) for n, t in norm.state_dict().items())


@pytest.mark.parametrize("masked", [False, True])
def test_recomputing_does_not_count_a_batch_twice(masked: bool) -> None:
    rows = torch.ones(6, dtype=torch.bool) if masked else None
    norm, plain = _ours(), _ours()
    x = _input().requires_grad_()

    def contexts() -> tuple[object, object]:
        return counted_rows(rows), recomputing(rows)

    checkpoint(norm, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
    with counted_rows(rows):
        plain(_input())
    assert int(norm.num_batches_tracked) == 1
    torch.testing.assert_close(norm.running_mean, plain.running_mean)


def test_converting_keeps_weights_names_and_results() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    before = {n: t.clone() for n, t in net.state_dict().items()}
    x = _input()
    expected = net(x)
    net.load_state_dict(before)
    assert convert_batch_norm(net) == 1
    assert isinstance(net[1], GlobalBatchNorm)
    assert net.state_dict().keys() == before.keys()
    torch.testing.assert_close(net(x), expected)


def _run(start: int, stop: int) -> list[Tensor]:
    norm = _ours()
    x = _input().requires_grad_()
    rows = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool)
    out = norm(x[start:stop], rows[start:stop])
    (out.sin().sum() * world_size()).backward()
    assert x.grad is not None and norm.weight is not None and norm.weight.grad is not None
    return [x.grad, norm.weight.grad, norm.running_mean, norm.running_var]


def on_a_rank() -> list[Tensor]:
    tensors = _run(*((0, 4), (4, 6))[rank()])
    for tensor in tensors:
        torch.distributed.all_reduce(tensor)
        tensor /= world_size()
    return tensors


def test_two_ranks_have_the_statistics_and_gradients_of_one() -> None:
    for x, y in zip(run_ranks(on_a_rank)[0], _run(0, 6), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
