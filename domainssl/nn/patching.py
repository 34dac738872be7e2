"""Cut grids into patches and back, in any number of axes; a patch may have a side per axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from domainssl.errors import DataError
from domainssl.modality import sides_of

__all__ = [
    "grid_coordinates",
    "grid_of",
    "hidden_and_seen",
    "patch_fraction",
    "patch_proportions",
    "patchify",
    "unpatchify",
]

_LETTERS = "abdefghijklmnop"  # of the axes in patterns; c is the channel


def grid_of(
    size: Sequence[int], patch_size: int | Sequence[int], name: str = "input"
) -> tuple[int, ...]:
    """Return the number of patches along each axis.

    Raises:
        DataError: A side is not a multiple of the patch's, or that is no size.
        ConfigError: The patch has sides for another number of axes.
    """
    patch = sides_of(patch_size, len(size), f"{name}: patch_size")
    if min(patch) < 1:
        raise DataError(f"patch_size: got {patch_size}, expected 1 or more.")
    if any(side % p or side == 0 for side, p in zip(size, patch, strict=True)):
        shown = patch[0] if len(set(patch)) == 1 else patch
        fitting = tuple(max(1, s // p) * p for s, p in zip(size, patch, strict=True))
        raise DataError(
            f"{name}: spatial size {tuple(size)} is not a multiple of the patch size "
            f"{shown}; crop or resize it, for example to {fitting}."
        )
    return tuple(side // p for side, p in zip(size, patch, strict=True))


def grid_coordinates(grid: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return the position of every token in patch units, (N, D), last axis fastest."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def patch_proportions(patch_size: int | Sequence[int], steps: Sequence[float]) -> tuple[float, ...]:
    """Return the sides of a patch in units of their median.

    Neighbours within a slice are then at distance 1, whatever the slice's thickness and direction.

    Args:
        patch_size: Side of a patch, one number or one per axis.
        steps: Length of a pixel or voxel along each axis.
    """
    sides = [p * step for p, step in zip(sides_of(patch_size, len(steps)), steps, strict=True)]
    unit = sorted(sides)[(len(sides) - 1) // 2]
    return tuple(side / unit for side in sides)


def _patterns(axes: int, channels_first: bool) -> tuple[str, str]:
    """Return the einops patterns of the whole grid and of its tokens."""
    cells, inner = _LETTERS[:axes], _LETTERS[axes : 2 * axes]
    values = " ".join(["c", *inner] if channels_first else [*inner, "c"])
    whole = " ".join(f"({cell} {within})" for cell, within in zip(cells, inner, strict=True))
    return f"batch c {whole}", f"batch ({' '.join(cells)}) ({values})"


def patchify(x: Tensor, patch_size: int | Sequence[int], *, channels_first: bool = False) -> Tensor:
    """Cut a grid into tokens.

    Args:
        x: (B, C, H, W) or (B, C, X, Y, Z).
        patch_size: Side of a patch in pixels or voxels, one number or one per axis.
        channels_first: Order inside a token: `(c, p, p)` as several 2D references have it,
            or `(p, p, c)`, the project's own order.

    Returns:
        Tokens, (B, N, P·C) with P pixels per patch; tokens in row-major order of the grid.
    """
    axes = x.ndim - 2
    grid_of(x.shape[2:], patch_size)
    whole, tokens = _patterns(axes, channels_first)
    inner = zip(_LETTERS[axes : 2 * axes], sides_of(patch_size, axes), strict=True)
    return rearrange(x, f"{whole} -> {tokens}", **dict(inner))


def unpatchify(
    tokens: Tensor,
    grid: Sequence[int],
    patch_size: int | Sequence[int],
    *,
    channels_first: bool = False,
) -> Tensor:
    """Undo `patchify`: (B, N, P·C) -> (B, C, H, W) or (B, C, X, Y, Z)."""
    axes = len(grid)
    whole, pattern = _patterns(axes, channels_first)
    sides = sides_of(patch_size, axes)
    sizes = dict(zip(_LETTERS[: 2 * axes], [*grid, *sides], strict=True))
    return rearrange(tokens, f"{pattern} -> {whole}", **sizes)


def patch_fraction(mask: Tensor, patch_size: int | Sequence[int]) -> Tensor:
    """Return the share of True pixels per patch.

    Args:
        mask: bool, (B, H, W) or (B, X, Y, Z).
        patch_size: Side of a patch, one number or one per axis.

    Returns:
        Float share in [0, 1], (B, N).
    """
    tokens = patchify(mask.unsqueeze(1).float(), patch_size)
    assert tokens.shape[-1] == math.prod(sides_of(patch_size, mask.ndim - 1))
    return tokens.mean(-1)


def hidden_and_seen(seen: Tensor, predicted: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    """Return what pictures of a reconstruction show, detached, in the layout of the patches.

    Args:
        seen: Patches, (..., P).
        predicted: Of the same shape.
        hidden: bool, without the last axis; True where the network did not see the patch.

    Returns:
        `input`, `visible` (NaN where hidden) and `predicted`, with seen patches in their places.
    """
    where = hidden.unsqueeze(-1)
    return {
        "input": seen.detach(),
        "visible": seen.masked_fill(where, float("nan")).detach(),
        "predicted": torch.where(where, predicted, seen).detach(),
    }
