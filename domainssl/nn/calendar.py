"""Days since 1970-01-01 on the calendar of a method, and sinusoids of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from torch import Tensor

from domainssl.errors import ConfigError
from domainssl.options import as_dataclass

__all__ = ["Calendar", "calendars_of", "date_sinusoids", "day_of_year"]


@dataclass(frozen=True)
class Calendar:
    """How a method counts days.

    Attributes:
        origin: `day_of_year`, or the date (YYYY-MM-DD) that is day 0.
        length: Days of the calendar; the base of the sinusoids.

    Raises:
        ConfigError: `origin` is neither, or `length` is below 2.
    """

    origin: str = "day_of_year"
    length: int = 367

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ConfigError(f"calendar.length: got {self.length}, expected at least 2 days.")
        if self.origin != "day_of_year":
            try:
                date.fromisoformat(self.origin)
            except ValueError as error:
                raise ConfigError(
                    f"calendar.origin: got {self.origin!r}, expected 'day_of_year' or a date such "
                    "as '2018-09-01'."
                ) from error

    def days(self, dates: Tensor) -> Tensor:
        """Count days: days since 1970-01-01, any shape -> int64 days of this calendar."""
        if self.origin == "day_of_year":
            return day_of_year(dates)
        start = (date.fromisoformat(self.origin) - date(1970, 1, 1)).days
        return dates.long() - start


def calendars_of(given: Calendar | Mapping[str, Any], names: Iterable[str]) -> dict[str, Calendar]:
    """Return a calendar per modality.

    Args:
        given: One for all, or one by name; modalities without one count the days of the year.
        names: Modalities.
    """
    known = list(names)
    if isinstance(given, Mapping) and given and set(given) <= set(known):
        return {n: as_dataclass(Calendar, given.get(n, Calendar())) for n in known}
    return dict.fromkeys(known, as_dataclass(Calendar, given))


def day_of_year(dates: Tensor) -> Tensor:
    """Return 1..366 of days since 1970-01-01 in the proleptic Gregorian calendar.

    Source: H. Hinnant, "chrono-compatible low-level date algorithms" (years begin in March).
    """
    z = dates.long() + 719468
    era = z.div(146097, rounding_mode="floor")
    day = z - era * 146097
    year = (day - day // 1460 + day // 36524 - day // 146096) // 365
    since_march = day - (365 * year + year // 4 - year // 100)
    # January and February belong to the year before; only later months see this year's leap day.
    is_leap = (year % 4 == 0) & ((year % 100 != 0) | (year == 0))
    after = since_march + 60 + is_leap.long()
    return torch.where(since_march >= 306, since_march - 305, after)


def date_sinusoids(days: Tensor, width: int, base: float) -> Tensor:
    """Return `sin` (even i) or `cos` (odd i) of `days / base^(2 floor(i/2) / width)`.

    Args:
        days: Days of a calendar, any shape.
        width: Number of values i.
        base: Length of the calendar.

    Returns:
        float32 (..., width).
    """
    index = torch.arange(width, device=days.device)
    exponent = 2 * index.div(2, rounding_mode="floor").float() / width
    angle = days.float().unsqueeze(-1) / torch.pow(float(base), exponent)
    return torch.where(index % 2 == 0, angle.sin(), angle.cos())
