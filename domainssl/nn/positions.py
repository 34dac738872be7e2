"""Fixed sine-cosine position codes from coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from domainssl.errors import ConfigError

__all__ = ["sincos_positions"]


def sincos_positions(coords: Tensor, width: int, *, temperature: float = 10000.0) -> Tensor:
    """Encode coordinates in one, two or three dimensions.

    Every axis gets `width / D` values, `[sin(x·w), cos(x·w)]` with
    `w_i = temperature^(-i / (width / 2D))`; the last axis comes first (in 2D the first half of
    the vector encodes the column). Computed in float64.

    Args:
        coords: Positions in patch units, (..., D).
        width: Length of the code; a multiple of 2·D.
        temperature: Longest wavelength over 2 pi.

    Returns:
        float32 (..., width).

    Raises:
        ConfigError: `width` cannot be divided over the axes.

    Source: MAE (He et al. 2022) as used by CROMA's decoder.
    """
    axes = coords.shape[-1]
    if width % (2 * axes):
        raise ConfigError(
            f"Position codes: width {width} cannot be divided over {axes} axes in sine and "
            f"cosine halves; choose a multiple of {2 * axes}."
        )
    half = width // (2 * axes)
    steps = torch.arange(half, dtype=torch.float64, device=coords.device)
    omega = temperature ** (-steps / half)
    codes = []
    for axis in reversed(range(axes)):
        angle = coords[..., axis, None].double() * omega
        codes += [angle.sin(), angle.cos()]
    return torch.cat(codes, dim=-1).float()
