"""Hide whole modalities, dates, band groups and places before single tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

__all__ = ["TokenAxes", "first_usable", "hide_lowest", "structure_shapes", "structured_mask"]

TokenAxes = tuple[int, int, int, int]  # items, band groups, dates, places


def structure_shapes(axes: TokenAxes) -> dict[str, TokenAxes]:
    """Return the shape of the draw that hides each kind of structure.

    `modality` hides all tokens of an item, `bands` a band group on all dates, `dates` a date with
    all its places and band groups, `locations` a place on all dates and band groups.
    """
    items, groups, dates, places = axes
    return {
        "modality": (items, 1, 1, 1),
        "bands": (items, groups, 1, 1),
        "dates": (items, 1, dates, 1),
        "locations": (items, 1, 1, places),
    }


def structured_mask(
    axes: TokenAxes, draws: Mapping[str, Tensor], rates: Mapping[str, float]
) -> Tensor:
    """Hide structures whose draw lies below their rate.

    Args:
        axes: (B, G, D, L).
        draws: Uniform numbers per kind, shapes of `structure_shapes` after any leading axes.
        rates: Probability per kind; kinds without one hide nothing.

    Returns:
        True where hidden, bool (..., B, G * D * L).
    """
    lead: tuple[int, ...] = ()
    device = None
    for kind in rates:
        lead, device = tuple(draws[kind].shape[:-4]), draws[kind].device
    hidden = torch.zeros(*lead, *axes, dtype=torch.bool, device=device)
    for kind, rate in rates.items():
        hidden = hidden | (draws[kind] < rate)
    return hidden.flatten(-3)


def first_usable(passes: Tensor, valid: Tensor) -> Tensor:
    """Return, per row, the first pass that leaves a token; nothing hidden where none does.

    Args:
        passes: bool (R, B, N), True where hidden, in the order of drawing.
        valid: Tokens that count, bool (B, N).

    Returns:
        bool (B, N).
    """
    usable = (~passes & valid).any(-1)  # (R, B)
    first = usable.to(torch.uint8).argmax(0)
    chosen = passes.gather(0, first[None, :, None].expand(1, *passes.shape[1:]))[0]
    return chosen & usable.any(0).unsqueeze(1)


def hide_lowest(
    noise: Tensor,
    structure: Tensor,
    valid: Tensor,
    ratio: float,
    ties: Literal["random", "ordered"] = "random",
) -> Tensor:
    """Hide `round(ratio * n)` of the n valid tokens of a row, those of `structure` first.

    At least one valid token stays visible.

    Args:
        noise: Uniform numbers (B, N).
        structure: Tokens to hide first, bool (B, N).
        valid: Tokens that count, bool (B, N).
        ratio: Share to hide.
        ties: Which tokens stay visible where `structure` holds more than the share: random ones,
            or the last ones (`ordered`, as the released code sorts).

    Returns:
        True where hidden, bool (B, N).
    """
    if ties == "random":
        score = torch.where(structure, noise / 2, 0.5 + noise / 2)
    else:
        score = torch.where(structure, 0.0, noise)
    score = torch.where(valid, score, 2.0)
    rank = score.argsort(dim=1, stable=True).argsort(dim=1)
    count = valid.sum(1, keepdim=True)
    hide = (count.double() * ratio).round().long().minimum(count - 1)
    return (rank < hide) & valid
