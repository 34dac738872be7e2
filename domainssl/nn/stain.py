"""Amounts of dyes in colours: hematoxylin, eosin and DAB, after Beer and Lambert.

density = -log(colour) = amounts @ HED, where colour lies in (0, 1] and white means no dye.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HED", "hed_jitter"]

# optical density in red, green and blue per unit of hematoxylin, eosin, DAB (before normalising)
HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
_DARKEST = 1e-6


def hed_jitter(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Change how much of each dye there is, item by item.

    Args:
        x: Colours in [0, 1], (B, 3, *S).
        gain: Factor per dye, (B, 3).
        shift: Added per dye, in optical density, (B, 3).

    Returns:
        Colours in [0, 1], (B, 3, *S).

    Source: Ruifrok and Johnston, 2001 (stain vectors); Tellez et al., 2018 (arXiv 1808.05896). Here
    colours are in [0, 1] and black is 1e-6, so that gain 1 and shift 0 change nothing.
    """
    with torch.autocast(x.device.type, enabled=False):
        dyes = torch.tensor(HED, device=x.device)
        dyes = dyes / dyes.norm(dim=1, keepdim=True)
        density = -x.float().clamp(min=_DARKEST).log()
        amounts = torch.einsum("bc...,cd->bd...", density, torch.linalg.inv(dyes))
        each = (*gain.shape, *[1] * (x.ndim - 2))
        amounts = gain.float().view(each) * amounts + shift.float().view(each)
        return torch.einsum("bd...,dc->bc...", amounts, dyes).neg().exp().clamp(0, 1)
