"""Sine-cosine positions averaged over the cells that a patch covers on a common fine grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from domainssl.errors import ConfigError

__all__ = ["metric_positions"]


def metric_positions(
    grid: Sequence[int],
    cells: Sequence[int],
    width: int,
    *,
    reserved: int = 8,
    device: torch.device | None = None,
) -> Tensor:
    """Encode patches of any size on one footprint in the units of a fine grid over it.

    The fine grid holds `[sin(x w), cos(x w), sin(y w), cos(y w)]` per cell with
    `w_k = 10000^(-k/(n-1))`, and a patch is the mean over its cells: equal places on the ground
    get equal codes whatever the resolution. Every axis is averaged on its own, because the terms
    of x do not depend on y. The last axis comes first: column, row of images, z, y, x of volumes.

    Args:
        grid: Number of patches along each axis, (h, w) or (x, y, z).
        cells: Cells of the fine grid along each axis; where they are no multiple of the patches,
            the fine grid is resized linearly to the nearest multiple.
        width: Length of a code, a multiple of 4 and at least `reserved + 4` per axis. What cannot
            be divided over the axes is zero, before the reserved end.
        reserved: Zeros at the end of every code, for other encodings.
        device: Where to compute.

    Returns:
        float32 (N, width), the last axis of the grid fastest.

    Raises:
        ConfigError: The width does not fit.

    Source: MAESTRO (arXiv 2508.10894), released code; the table is not stored here.
    """
    axes = len(grid)
    if width % 4 or width < reserved + 4 * axes:
        raise ConfigError(
            f"Positions of width {width} in {axes} axes: expected a multiple of 4 of at least "
            f"{reserved + 4 * axes}."
        )
    waves = (width - reserved) // (2 * axes)
    codes = []
    for axis in reversed(range(axes)):
        code = _axis(grid[axis], cells[axis], waves, device)
        shape = [1] * axes
        shape[axis] = grid[axis]
        codes.append(code.view(*shape, -1).expand(*grid, -1))
    rest = codes[0].new_zeros(*grid, width - 2 * axes * waves)
    return torch.cat([*codes, rest], dim=-1).flatten(0, -2).float()


def _axis(patches: int, cells: int, waves: int, device: torch.device | None) -> Tensor:
    """Codes along one axis, float64 (patches, 2 * waves)."""
    k = torch.arange(waves, dtype=torch.float64, device=device)
    at = torch.arange(cells, dtype=torch.float64, device=device)
    phase = at.unsqueeze(1) * 10000 ** (-k / (waves - 1))
    fine = torch.cat([phase.sin(), phase.cos()], dim=1)
    if cells % patches:
        size = patches * max(1, round(cells / patches))
        fine = F.interpolate(fine.T.unsqueeze(0), size, mode="linear", align_corners=False)[0].T
    return fine.reshape(patches, -1, 2 * waves).mean(1)
