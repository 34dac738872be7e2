"""Choose the dates of a series that matter most, without sizes that depend on the data."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ChosenDates", "filter_dates"]


class ChosenDates(NamedTuple):
    """Dates of every item.

    Attributes:
        positions: int64 (B, K); kept ones first, in ascending order.
        kept: bool (B, K); False where an item has fewer than K dates.
    """

    positions: Tensor
    kept: Tensor


def filter_dates(
    attention: Tensor, candidates: Tensor, share: float, *, drops_last: bool = False
) -> ChosenDates:
    """Keep the dates whose attention lies strictly above the quantile `1 - share`.

    An item with candidates keeps at least the one with the most attention.

    Args:
        attention: Attention of every date, (B, T).
        candidates: bool (B, T); other dates are neither measured nor kept.
        share: Share of the dates to keep; 1 keeps all candidates.
        drops_last: Leave the last candidate out, and keep none where no date is above the
            quantile, as the published code of OmniSat does.

    Returns:
        At most `max(1, ceil(share · (T - 1)))` dates per item.
    """
    dates = attention.shape[1]
    position = torch.arange(dates, device=attention.device)
    if drops_last:
        last = torch.where(candidates, position, -1).amax(1, keepdim=True)
        candidates = candidates & (position != last)
    score = torch.where(candidates, attention.float(), -1.0)
    if share >= 1:
        kept, count = candidates, dates
    else:
        ascending = torch.where(candidates, attention.float(), math.inf).sort(1).values
        number = candidates.sum(1, keepdim=True)
        place = (number - 1).clamp(min=0) * (1 - share)
        low = place.floor()
        bounds = [ascending.gather(1, p.long()) for p in (low, place.ceil())]
        threshold = torch.lerp(bounds[0], bounds[1], (place - low).to(score.dtype))
        kept = candidates & (score > threshold)
        if not drops_last:
            best = torch.zeros_like(kept).scatter(1, score.argmax(1, keepdim=True), value=True)
            kept = kept | (best & candidates & ~kept.any(1, keepdim=True))
        count = min(dates, max(1, math.ceil(share * (dates - 1) - 1e-9)))
    order = torch.where(kept, position, position + dates).argsort(1)  # kept first, by date
    index = order[:, :count]
    return ChosenDates(index, kept.gather(1, index))
