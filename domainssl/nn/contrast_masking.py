"""Choose which tokens of several contrasts stay visible, with a random share for every contrast."""

from __future__ import annotations

import torch
from torch import Tensor

from domainssl.nn.masking import Masking

__all__ = ["contrast_masking", "drop_contrasts", "random_shares"]


def random_shares(noise: Tensor, usable: Tensor) -> Tensor:
    """Return shares of usable contrasts from Dirichlet(1, ..., 1), (B, M); zero for the others.

    Args:
        noise: Uniform in [0, 1), (B, M).
        usable: bool (B, M).
    """
    weight = -torch.log1p(-noise.clamp(max=1 - 1e-7)) * usable
    return weight / weight.sum(1, keepdim=True).clamp(min=1e-12)


def drop_contrasts(noise: Tensor, present: Tensor, probability: float) -> Tensor:
    """Return the contrasts that stay, bool (B, M): of those present, at least one.

    Args:
        noise: Uniform in [0, 1), (B, M).
        present: bool (B, M).
        probability: Of dropping a contrast.
    """
    last = noise.masked_fill(~present, -1).argmax(1, keepdim=True)
    stays = (noise >= probability).scatter(1, last, True)
    return stays & present


def contrast_masking(
    shares: Tensor, noise: Tensor, noise_all: Tensor, budget: Tensor, usable: Tensor, kept: int
) -> Masking:
    """Keep a budget of tokens, dealt to the contrasts by shares.

    Inside a contrast tokens are drawn uniformly. Rounded shares may miss the budget by a few: the
    balance is drawn from all hidden tokens, or hidden, uniformly.

    Args:
        shares: Share of every contrast, (B, M).
        noise: Uniform, (B, M, N).
        noise_all: Uniform, (B, M·N).
        budget: Visible tokens of every item, int64 (B,).
        usable: bool (B, M); tokens of other contrasts come last.
        kept: Length of `Masking.keep`, at least the largest budget.

    Source: MultiMAE (Bachmann et al. 2022) and BM-MAE, released code. Shares larger than a contrast
    are cut to it and the rest is dealt uniformly, where the code draws them again.
    """
    counts = (shares * budget.unsqueeze(1)).round().long()
    hidden = noise.argsort(dim=2) >= counts.unsqueeze(2)  # (B, M, N)
    order = hidden.flatten(1) + noise_all
    order = order + 2 * (~usable).repeat_interleave(noise.shape[2], dim=1)
    shuffle = order.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    return Masking(shuffle[:, :kept], restore, restore >= budget.unsqueeze(1))
