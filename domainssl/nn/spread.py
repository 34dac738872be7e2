"""How many directions vectors use."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["effective_rank"]


def effective_rank(x: Tensor, present: Tensor | None = None, *, eps: float = 1e-7) -> Tensor:
    """Return the exponential of the entropy of the normalised singular values.

    Args:
        x: Vectors in float32 or float64, (N, E).
        present: bool (N,); False vectors do not count. None counts all.
        eps: Added to the shares, as in the paper.

    Returns:
        From 1 to min(N, E), (); NaN where a vector is not finite.

    Source: RankMe, Garrido et al., ICML 2023 (arXiv 2210.02885), eq. 1 and 2.
    """
    if present is not None:
        x = torch.where(present.unsqueeze(-1), x, 0.0)
    finite = torch.isfinite(x).all()
    values = torch.linalg.svdvals(torch.where(finite, x, 0.0))  # or it would not converge
    share = values / values.sum().clamp(min=torch.finfo(x.dtype).tiny) + eps
    return torch.where(finite, (-(share * share.log()).sum()).exp(), torch.nan)
