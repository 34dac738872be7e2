"""Similarities that have to stay, and the spread of predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from domainssl.losses.latent import gram_anchoring, spread_penalty

MODES = ("none", "remove_neg", "teacher_only_intended", "teacher_only_as_released")


@pytest.mark.parametrize("mode", MODES)
def test_gram_anchoring(golden_dir: Path, mode: Any) -> None:
    tensors, case = load_file(golden_dir / "losses.safetensors"), f"gram_anchoring_{mode}"
    student = tensors[f"{case}/input/student"].clone().requires_grad_()
    loss = gram_anchoring(student, tensors[f"{case}/input/teacher"], mode)
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensors[f"{case}/loss"], rtol=1e-9, atol=0)
    grad = tensors[f"{case}/grad/student"]
    torch.testing.assert_close(student.grad, grad, rtol=1e-8, atol=1e-10)


def test_the_spread_of_fewer_than_two_rows_costs_nothing() -> None:
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    few = spread_penalty(rows, torch.tensor([True, False, False, False]), 2.0)
    few.backward()
    assert float(few.detach()) == 0.0
    assert rows.grad is not None and not rows.grad.any()
    all_of = spread_penalty(rows, torch.ones(4, dtype=torch.bool), 2.0)
    expected = (2.0 - (rows.var(0) + 1e-6).sqrt()).relu().mean()
    torch.testing.assert_close(all_of, expected)
