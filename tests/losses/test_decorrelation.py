"""Losses between embeddings: golden values, both correlation forms, masks, two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from domainssl.distributed import rank, world_size
from domainssl.losses.contrastive import info_nce, nt_xent
from domainssl.losses.decorrelation import (
    barlow_twins,
    decur_cross,
    local_gradient,
    redundancy,
    standardize,
    vicreg,
)


def _vicreg(a: Tensor, b: Tensor, present: Tensor | None = None, **options: Any) -> Tensor:
    terms = vicreg(a, b, present=present, **options)
    return 25 * terms.invariance + 25 * terms.variance + terms.covariance


def _decur(a: Tensor, b: Tensor, present: Tensor | None = None, **options: Any) -> Tensor:
    a, b = standardize(a, present), standardize(b, present)
    return torch.stack(decur_cross(a, b, 5, present=present, **options)).sum()


def _clip(a: Tensor, b: Tensor, present: Tensor | None = None) -> Tensor:
    return info_nce(a, b, torch.tensor(1.0), present=present, symmetric=False)


def _nt_xent(a: Tensor, b: Tensor, present: Tensor | None = None) -> Tensor:
    return nt_xent(a, b, 0.5, present=present)


def _barlow(a: Tensor, b: Tensor, present: Tensor | None = None, **options: Any) -> Tensor:
    return barlow_twins(a, b, present=present, **options)


LOSSES = {
    "nt_xent": _nt_xent,
    "barlow_twins": _barlow,
    "vicreg": _vicreg,
    "decur": _decur,
    "clip": _clip,
}
CORRELATING = ("barlow_twins", "vicreg", "decur")


def _pair(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shared = torch.randn(rows, width, generator=generator, dtype=dtype)
    noise = torch.randn(2, rows, width, generator=generator, dtype=dtype)
    a, b = shared + 0.5 * noise[0], shared + 0.5 * noise[1]
    return a.requires_grad_(), b.requires_grad_()


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, Tensor]:
    assert json.loads((golden_dir / "losses.json").read_text())["tolerances"]
    return load_file(golden_dir / "losses.safetensors")


@pytest.mark.parametrize("name", ["nt_xent", "barlow_twins", "vicreg"])
@pytest.mark.parametrize(
    ("dtype", "loss_rtol", "grad_bound"), [(torch.float64, 1e-9, 1e-8), (torch.float32, 2e-5, 1e-3)]
)
@pytest.mark.parametrize("form", ["gram", "matrix"])
def test_golden_values(
    golden: dict[str, Tensor],
    name: str,
    dtype: torch.dtype,
    loss_rtol: float,
    grad_bound: float,
    form: str,
) -> None:
    a, b = (golden[f"{name}/input/{n}"].to(dtype, copy=True).requires_grad_() for n in "ab")
    options = {"form": form} if name in CORRELATING else {}
    loss = LOSSES[name](a, b, **options)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(golden[f"{name}/loss"]), rel=loss_rtol)
    for x, n in ((a, "a"), (b, "b")):
        expected = golden[f"{name}/grad/{n}"]
        assert x.grad is not None
        bound = grad_bound * float(expected.abs().max())
        assert float((x.grad.double() - expected).abs().max()) <= bound


@pytest.mark.parametrize("name", CORRELATING)
@pytest.mark.parametrize(("rows", "width"), [(6, 40), (40, 9)])
def test_both_correlation_forms_agree(name: str, rows: int, width: int) -> None:
    results = []
    for form in ("gram", "matrix", "auto"):
        a, b = _pair(rows, width)
        loss = LOSSES[name](a, b, form=form)
        loss.backward()
        results.append((loss.detach(), a.grad, b.grad))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6 * float(y.abs().max()))


def test_the_gram_form_never_holds_a_matrix_of_the_width() -> None:
    width, rows = 4096, 16
    a, b = _pair(rows, width)
    largest = 0

    def note(x: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, note):
        redundancy(a, b).weighted(0.1).backward()
    assert largest <= rows * width


@pytest.mark.parametrize("name", LOSSES)
def test_absent_rows_change_nothing(name: str) -> None:
    a, b = _pair(8, 12)
    present = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    whole = LOSSES[name](a, b, present)
    part = LOSSES[name](a[present], b[present], None)
    torch.testing.assert_close(whole, part, rtol=1e-5, atol=1e-6)
    whole.backward()
    for x in (a, b):
        assert x.grad is not None
        assert float(x.grad[~present].abs().max()) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_without_any_pair_the_loss_is_a_connected_zero(name: str) -> None:
    a, b = _pair(4, 6)
    loss = LOSSES[name](a, b, torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert float(loss) == 0
    for x in (a, b):
        assert x.grad is not None
        assert float(x.grad.abs().max()) == 0


def test_all_dimensions_common_is_barlow_twins_and_none_drives_all_to_zero() -> None:
    a, b = _pair(12, 6)
    x, y = standardize(a), standardize(b)
    common, unique = decur_cross(x, y, 6)
    torch.testing.assert_close(common, barlow_twins(a, b))
    assert float(unique) == 0
    common, unique = decur_cross(x, y, 0)
    correlation = x.T @ y / 12
    expected = correlation.square().sum() * 0.0051
    expected = expected + (1 - 0.0051) * correlation.diagonal().square().sum()
    torch.testing.assert_close(unique, expected)
    assert float(common) == 0


def test_correlations_between_common_and_unique_dimensions_do_not_count() -> None:
    a, b = (standardize(x).detach() for x in _pair(32, 6))
    before = decur_cross(a, b, 3)
    swapped = torch.cat([b[:, :3], b[:, 3:].flip(0)], dim=1)  # other unique rows, same columns
    after = decur_cross(a, swapped, 3)
    assert torch.equal(before[0], after[0])
    assert not torch.isclose(before[1], after[1])


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_items_does_not_matter(name: str) -> None:
    a, b = _pair(8, 12)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(LOSSES[name](a, b), LOSSES[name](a[order], b[order]))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_stay_float32_under_autocast(name: str) -> None:
    a, b = (x.detach().bfloat16() for x in _pair(8, 12))
    exact = LOSSES[name](a.float(), b.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = LOSSES[name](a, b)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, rtol=1e-5, atol=1e-6)


SIZES = (5, 2)
ABSENT = (3, 6)


def _one(name: str, start: int, stop: int, options: dict[str, Any]) -> tuple[Tensor, ...]:
    a, b = _pair(sum(SIZES), 10)
    present = torch.ones(sum(SIZES), dtype=torch.bool)
    present[list(ABSENT)] = False
    loss = LOSSES[name](a[start:stop], b[start:stop], present[start:stop], **options)
    loss.backward()
    assert a.grad is not None and b.grad is not None
    return loss.detach(), a.grad, b.grad


def _cases() -> list[tuple[str, dict[str, Any]]]:
    forms = ("gram", "matrix", "auto")
    return [(name, {"form": form}) for name in CORRELATING for form in forms] + [
        (name, {}) for name in LOSSES if name not in CORRELATING
    ]


def on_a_rank() -> list[tuple[Tensor, ...]]:
    start = sum(SIZES[: rank()])
    results = []
    for name, options in _cases():
        tensors = _one(name, start, start + SIZES[rank()], options)
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor /= world_size()
        results.append(tensors)
    a, b = _pair(6, 4)
    local_gradient(redundancy(a, b).diagonal).backward()
    exact = _pair(6, 4)
    redundancy(*exact).diagonal.backward()
    assert a.grad is not None and exact[0].grad is not None
    results.append((a.grad, exact[0].grad))
    return results


def test_two_ranks_equal_one_process_in_value_and_gradient() -> None:
    results = run_ranks(on_a_rank)[0]
    for (name, options), found in zip(_cases(), results, strict=False):
        for x, y in zip(found, _one(name, 0, sum(SIZES), options), strict=True):
            bound = 1e-5 * float(y.abs().max()) + 1e-7
            assert float((x - y).abs().max()) <= bound, (name, options)
    local, exact = results[-1]
    torch.testing.assert_close(2 * local, exact)


def test_the_gram_form_keeps_nothing_of_the_size_of_its_inputs_for_the_gradient() -> None:
    a, b = _pair(8, 512)
    own = {a.data_ptr(), b.data_ptr()}
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    present = torch.arange(8) != 3
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        redundancy(a, b, present=present, form="gram").weighted(0.1).backward()
    assert {x.data_ptr() for x in kept} >= own
    assert max(x.numel() for x in kept if x.data_ptr() not in own) <= 512
