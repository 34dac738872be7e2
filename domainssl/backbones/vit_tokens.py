"""What tokens of a plain vision transformer carry: places, dates, a class token before them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from domainssl.errors import DataError, WeightsError
from domainssl.modality import Modality, key, sides_of
from domainssl.nn.alibi import KeyMask
from domainssl.nn.blocks import Transformer
from domainssl.nn.dates import date_encoding, decimal_year
from domainssl.nn.patching import grid_coordinates
from domainssl.nn.positions import sincos_positions

__all__ = [
    "date_codes",
    "grid_of_table",
    "moco_codes",
    "per_date",
    "position_codes",
    "transform",
]

# Axes by their place in the code: MAE and MONAI put the column first, MONAI's 3D table x after y.
_AXIS_ORDER = {2: (1, 0), 3: (1, 0, 2)}


def position_codes(grid: tuple[int, ...], width: int, device: torch.device | None = None) -> Tensor:
    """Return the sine-cosine table of MAE (2D) and MONAI (2D and 3D), float32 (N, width)."""
    coords = grid_coordinates(grid, device=device)
    return sincos_positions(coords, width, order=_AXIS_ORDER[len(grid)])


def moco_codes(grid: tuple[int, int], width: int) -> Tensor:
    """Return the sine-cosine table of MoCo v3's files, float32 (N, width).

    Its first half follows the slow index of tokens that are counted column by column; on square
    grids that is the row of tokens counted as everywhere else.
    """
    return sincos_positions(grid_coordinates((grid[1], grid[0])), width, order=(0, 1))


def date_codes(x: Mapping[str, Any], name: str) -> Tensor:
    """Encode the dates of a series against their mean, float32 (B, T, 8); zero on padded ones.

    Raises:
        DataError: The batch has no dates.
    """
    days = x.get(key(name, "dates"))
    if days is None:
        raise DataError(
            f"batch.{name}.dates is missing: the tokens of a series carry their date, int32 (B, T) "
            "days since 1970-01-01. Rasters have it from their files, or from a day in "
            "their names, such as x_20200501.tif."
        )
    frames = x.get(key(name, "frames"), torch.ones_like(days, dtype=torch.bool))
    weight = frames.double()
    mean = (days * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    code = date_encoding(days, x.get(key(name, "hours")), decimal_year(mean.round().long()))
    return torch.where(frames.unsqueeze(-1), code, 0.0)


def transform(
    transformer: Transformer, first: Tensor | None, tokens: Tensor, attended: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Run blocks over tokens with one more before them.

    Args:
        transformer: The blocks.
        first: The class token, (1, 1, E) or (B, 1, E); None for none.
        tokens: (B, N, E).
        attended: bool (B, N); nothing attends to False tokens. None attends to all.

    Returns:
        The class token, (B, E) or None, and the others, (B, N, E).
    """
    if first is not None:
        first = first.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([first, tokens], dim=1)
        if attended is not None:
            attended = torch.cat([torch.ones_like(attended[:, :1]), attended], dim=1)
    out = transformer(tokens, None if attended is None else KeyMask(attended))
    return (None, out) if first is None else (out[:, 0], out[:, 1:])


def per_date(modality: Modality, x: Tensor, cut: Any) -> Tensor:
    """Apply `cut`, (items, ...) -> (items, N, ...), and join the tokens of a series' dates."""
    if modality.kind != "series":
        found: Tensor = cut(x)
        return found
    flat: Tensor = cut(x.flatten(0, 1))
    return flat.unflatten(0, x.shape[:2]).flatten(1, 2)


def grid_of_table(
    tokens: int,
    modality: Modality,
    patch: tuple[int, ...],
    image_size: int | tuple[int, ...] | None,
) -> tuple[int, ...]:
    """Return the grid of a table: that of the size given or of the data, else equal sides."""
    dims = modality.spatial_dims
    side = round(tokens ** (1 / dims))
    if image_size is not None:
        candidates = [sides_of(image_size, dims, "image_size")]
    else:
        candidates = [modality.size] if modality.size else []
        candidates.append(tuple(side * p for p in patch))
    grids = [tuple(s // p for s, p in zip(c, patch, strict=True)) for c in candidates]
    for grid in grids:
        if math.prod(grid) == tokens:
            return grid
    raise WeightsError(
        f"The file has positions of {tokens} patches; images of {candidates[0]} have "
        f"{math.prod(grids[0])} of {patch}. Give the image_size and patch_size of the weights."
    )
