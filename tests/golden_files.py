"""Golden files: numbers made by running the published code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from domainssl.nn.masking import Masking

__all__ = [
    "FOLDER",
    "IS_OURS",
    "Golden",
    "close",
    "close_gradient",
    "golden_files",
    "mask_from_keep",
]

IS_OURS = "DOMAINSSL_GOLDEN_DIR" not in os.environ
FOLDER = Path(os.environ.get("DOMAINSSL_GOLDEN_DIR", Path(__file__).parent / "golden"))


def golden_files(prefix: str) -> list[Path]:
    """Return the golden files of a method; none is a failure of the test that asks."""
    return sorted(FOLDER.glob(f"{prefix}_*.safetensors"))


def mask_from_keep(keep: Tensor, tokens: int) -> Masking:
    """Return the masking that keeps given tokens.

    Args:
        keep: Indices of the visible tokens, int64 (B, K), all different in an item.
        tokens: Number of tokens N.
    """
    place = torch.full((len(keep), tokens), keep.shape[1], device=keep.device)
    ranks = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    place = place.scatter(1, keep, ranks)  # visible tokens by their rank, hidden ones behind
    restore = place.argsort(dim=1, stable=True).argsort(dim=1)
    return Masking(keep, restore, restore >= keep.shape[1])


class Golden:
    """One golden file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        self.config: dict[str, Any] = self.facts["config"]
        self.tensors = load_file(path)
        self.values: dict[str, float] = self.facts.get("values", {})

    def has(self, name: str) -> bool:
        return name in self.tensors or name in self.values

    def __getitem__(self, name: str) -> Tensor:
        self.need(self.has(name), name)
        found = self.tensors.get(name)
        return torch.tensor(self.values[name]) if found is None else found

    def need(self, found: bool, name: str) -> None:
        """Fail on an incomplete file of ours, skip what a foreign one does not have."""
        if not found:
            assert not IS_OURS, f"{name} is missing in {self.path.name}"
            pytest.skip(f"this golden file has no {name}")

    def below(self, prefix: str) -> dict[str, Tensor]:
        found = {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}
        for name, value in self.values.items():
            if name.startswith(prefix):
                found.setdefault(name.removeprefix(prefix), torch.tensor(value))
        return found

    def names(self, prefix: str) -> list[str]:
        return sorted({n.removeprefix(prefix).split("/")[0] for n in self.below(prefix)} - {""})


def close(ours: Tensor, golden: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(
        ours, golden.to(ours.dtype).reshape(ours.shape), rtol=rtol, atol=atol
    )


def close_gradient(ours: Tensor | None, golden: Tensor, share: float = 1e-4) -> None:
    assert ours is not None
    assert ours.shape == golden.shape
    assert float((ours - golden).abs().max()) <= max(1e-7, share * float(golden.abs().max()))
