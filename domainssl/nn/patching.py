"""Cut grids into patches and back, in 2D and 3D alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from domainssl.errors import DataError

__all__ = ["grid_coordinates", "grid_of", "patch_fraction", "patchify", "unpatchify"]


def grid_of(size: Sequence[int], patch_size: int, name: str = "input") -> tuple[int, ...]:
    """Return the number of patches along each axis.

    Raises:
        DataError: A side is not a multiple of the patch size, or that is no size.
    """
    if patch_size < 1:
        raise DataError(f"patch_size: got {patch_size}, expected 1 or more.")
    if any(side % patch_size or side == 0 for side in size):
        raise DataError(
            f"{name}: spatial size {tuple(size)} is not a multiple of the patch size "
            f"{patch_size}; crop or resize it, for example to "
            f"{tuple(max(1, side // patch_size) * patch_size for side in size)}."
        )
    return tuple(side // patch_size for side in size)


def grid_coordinates(grid: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return the position of every token in patch units, (N, D), last axis fastest."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def patchify(x: Tensor, patch_size: int, *, channels_first: bool = False) -> Tensor:
    """Cut a grid into tokens.

    Args:
        x: (B, C, H, W) or (B, C, X, Y, Z).
        patch_size: Side of a patch in pixels or voxels.
        channels_first: Order inside a token: `(c, p, p)` as several 2D references have it,
            or `(p, p, c)`, the project's own order.

    Returns:
        Tokens, (B, N, P·C) with P pixels per patch; tokens in row-major order of the grid.
    """
    grid_of(x.shape[2:], patch_size)
    if x.ndim == 4:
        order = "c p q" if channels_first else "p q c"
        pattern = f"b c (h p) (w q) -> b (h w) ({order})"
        return rearrange(x, pattern, p=patch_size, q=patch_size)
    order = "c p q r" if channels_first else "p q r c"
    pattern = f"b c (x p) (y q) (z r) -> b (x y z) ({order})"
    return rearrange(x, pattern, p=patch_size, q=patch_size, r=patch_size)


def unpatchify(
    tokens: Tensor, grid: Sequence[int], patch_size: int, *, channels_first: bool = False
) -> Tensor:
    """Undo `patchify`: (B, N, P·C) -> (B, C, H, W) or (B, C, X, Y, Z)."""
    if len(grid) == 2:
        order = "c p q" if channels_first else "p q c"
        h, w = grid
        return rearrange(
            tokens,
            f"b (h w) ({order}) -> b c (h p) (w q)",
            h=h,
            w=w,
            p=patch_size,
            q=patch_size,
        )
    order = "c p q r" if channels_first else "p q r c"
    cut = {"p": patch_size, "q": patch_size, "r": patch_size}
    sizes = dict(zip("xyz", grid, strict=True))
    return rearrange(tokens, f"b (x y z) ({order}) -> b c (x p) (y q) (z r)", **cut, **sizes)


def patch_fraction(mask: Tensor, patch_size: int) -> Tensor:
    """Return the share of True pixels per patch.

    Args:
        mask: bool, (B, H, W) or (B, X, Y, Z).
        patch_size: Side of a patch.

    Returns:
        Float share in [0, 1], (B, N).
    """
    tokens = patchify(mask.unsqueeze(1).float(), patch_size)
    assert tokens.shape[-1] == math.prod([patch_size] * (mask.ndim - 1))
    return tokens.mean(-1)
