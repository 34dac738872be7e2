"""Fixed sine-cosine position codes from coordinates, and learned tables for other grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from domainssl.errors import ConfigError

__all__ = ["PositionResizing", "resized_positions", "sincos_positions"]

PositionResizing = Literal["offset", "antialias"]


def sincos_positions(
    coords: Tensor,
    width: int,
    *,
    temperature: float = 10000.0,
    order: Sequence[int] | None = None,
) -> Tensor:
    """Encode coordinates in one, two or three dimensions.

    Every axis gets `width / D` values, `[sin(x·w), cos(x·w)]` with
    `w_i = temperature^(-i / (width / 2D))`; the last axis comes first (in 2D the first half of
    the vector encodes the column). Computed in float64.

    Args:
        coords: Positions in patch units, (..., D).
        width: Length of the code; a multiple of 2·D.
        temperature: Longest wavelength over 2 pi.
        order: Axes in the order of their parts of the code; None is the last axis first. MONAI
            has (1, 0) in 2D and (1, 0, 2) in 3D.

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
    for axis in reversed(range(axes)) if order is None else order:
        angle = coords[..., axis, None].double() * omega
        codes += [angle.sin(), angle.cos()]
    return torch.cat(codes, dim=-1).float()


def resized_positions(
    table: Tensor,
    source: Sequence[int],
    grid: Sequence[int],
    *,
    prefix: int = 0,
    how: PositionResizing = "offset",
) -> Tensor:
    """Fit a learned table of positions to another grid of patches.

    Args:
        table: (1, prefix + N, E), tokens in row-major order of `source`.
        source: Grid that the table was made for, (h, w) or (x, y, z).
        grid: The grid wanted; the table is returned as it is where both are equal.
        prefix: Leading tokens without a place (class token, registers), left alone.
        how: In 2D, bicubic with the sampling step `S / (n + 0.1)` (DINO, iBOT, and DINOv2
            without registers), or bicubic to the size with antialiasing (DINOv2 with registers,
            timm). In 3D linear interpolation to the size.

    Returns:
        (1, prefix + prod(grid), E).
    """
    if tuple(source) == tuple(grid):
        return table
    with torch.autocast(table.device.type, enabled=False):
        fixed, places = table[:, :prefix], table[:, prefix:].float()
        maps = places.unflatten(1, tuple(source)).movedim(-1, 1)
        if len(source) != 2:
            out = F.interpolate(maps, size=tuple(grid), mode="trilinear")
        elif how == "antialias":
            out = F.interpolate(maps, size=tuple(grid), mode="bicubic", antialias=True)
        else:
            # the factor itself gives the sampling positions, not only the size
            factors = tuple((n + 0.1) / s for n, s in zip(grid, source, strict=True))
            out = F.interpolate(maps, scale_factor=factors, mode="bicubic")
        return torch.cat([fixed, out.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
