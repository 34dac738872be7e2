"""Analytic encodings of acquisition dates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "DATE_CHANNELS",
    "calendar",
    "date_encoding",
    "decimal_year",
    "encode_dates",
    "month_of",
]

DATE_CHANNELS = 8
_YEAR = 365.25
_MONTH_ENDS = (31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)  # last day of each, no leap year


def calendar(days: Tensor) -> tuple[Tensor, Tensor]:
    """Return year and day of the year (from 1) of days since 1970-01-01.

    Args:
        days: Integer tensor of any shape.

    Source: Hinnant, "chrono-Compatible Low-Level Date Algorithms" (proleptic Gregorian).
    """
    shifted = days.long() + 719468  # days since 0000-03-01
    era = shifted.div(146097, rounding_mode="floor")
    of_era = shifted - era * 146097
    year_of_era = (
        of_era
        - of_era.div(1460, rounding_mode="floor")
        + of_era.div(36524, rounding_mode="floor")
        - of_era.div(146096, rounding_mode="floor")
    ).div(365, rounding_mode="floor")
    leap_days = year_of_era.div(4, rounding_mode="floor") - year_of_era.div(
        100, rounding_mode="floor"
    )
    from_march = of_era - (365 * year_of_era + leap_days)
    year = year_of_era + 400 * era + (from_march >= 306).long()  # January starts at day 306
    before = year - 1
    leaps = (
        before.div(4, rounding_mode="floor")
        - before.div(100, rounding_mode="floor")
        + before.div(400, rounding_mode="floor")
    )
    start = 365 * before + leaps - 719162  # days from 0001-01-01 to 1970-01-01
    return year, days.long() - start + 1


def month_of(days: Tensor) -> Tensor:
    """Return the month, 0 for January to 11, of days since 1970-01-01, int64 of the same shape.

    Examples:
        >>> month_of(torch.tensor([0, 31, 58, 59, 789, 790])).tolist()  # 789: 29 February 1972
        [0, 1, 1, 2, 1, 2]
    """
    year, day = calendar(days)
    is_leap = (year % 4 == 0) & ((year % 100 != 0) | (year % 400 == 0))
    day = torch.where(is_leap & (day > _MONTH_ENDS[1]), day - 1, day)
    ends = torch.tensor(_MONTH_ENDS, device=days.device)
    return (day.unsqueeze(-1) > ends).sum(-1)


def encode_dates(year: Tensor, day: Tensor, hours: Tensor | None, reference: Tensor) -> Tensor:
    """Encode dates by their distance to a reference date, the season and the hour.

    `[diff] * 4, sin(2 pi doy), cos(2 pi doy), sin(2 pi h), cos(2 pi h)` with
    `doy = day / 365.25`, `h = hour / 24`, `diff = (year + doy) - reference`.

    Args:
        year: Year, (B, T).
        day: Day of the year from 1, (B, T).
        hours: Hour of the day, (B, T); None is midnight.
        reference: `year + doy` of the reference date, float32 (B, 1), see `decimal_year`.

    Returns:
        float32 (B, T, 8).

    Source: MAESTRO (arXiv 2508.10894), released code. Sums of years are rounded to float32
    before they are subtracted, as there: distances are exact to 1.2e-4 years.
    """
    season = day.to(torch.float32) / _YEAR
    distance = (year.to(torch.float32) + season) - reference
    turn = 2 * math.pi
    hour = torch.zeros_like(season) if hours is None else hours.to(torch.float32) / 24
    waves = [(turn * season).sin(), (turn * season).cos(), (turn * hour).sin(), (turn * hour).cos()]
    return torch.stack([distance] * 4 + waves, dim=-1)


def date_encoding(days: Tensor, hours: Tensor | None, reference: Tensor) -> Tensor:
    """Encode days since 1970-01-01, int (B, T), as `encode_dates` does: float32 (B, T, 8)."""
    return encode_dates(*calendar(days), hours, reference)


def decimal_year(days: Tensor) -> Tensor:
    """Return `year + day of the year / 365.25` in float32, of the shape of `days`."""
    year, day = calendar(days)
    return year.to(torch.float32) + day.to(torch.float32) / _YEAR
