"""Have features collapsed: standard deviation and effective rank."""

from __future__ import annotations

import torch
from torch import Tensor

from domainssl.nn.spread import effective_rank

__all__ = ["embedding_std", "rankme"]


def embedding_std(features: Tensor) -> float:
    """Return the mean standard deviation per dimension of unit-length features, times sqrt(E).

    Args:
        features: (N, E).

    Returns:
        1 for directions that are spread evenly, 0 when all items are the same.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    return float(unit.std(0, correction=0).mean() * features.shape[1] ** 0.5)


def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """Return the exponential of the entropy of the normalised singular values.

    Args:
        features: (N, E).
        eps: Added to the shares, as in the paper.

    Returns:
        Effective rank, from 1 to min(N, E).

    Source: Garrido et al., ICML 2023 (arXiv 2210.02885), eq. 1 and 2.
    """
    return float(effective_rank(features.double(), eps=eps))
