"""The precision that losses and lengths are computed in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["full"]


def full(x: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()
