"""Which part of the data is held out for validation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Self

from domainssl.errors import ConfigError

__all__ = ["HeldOut"]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Which part is held out for validation.

    Attributes:
        val_fraction: Fraction of the blocks (of the patients, where there are any), drawn once;
            neighbours of the same site may be in both parts.
        sites: Names of sites held out as a whole; `val_fraction` then does not count.
        patients: Names of patients whose exams are held out; `val_fraction` then does not count.
        slides: Names of slides that are held out; `val_fraction` then does not count.
        gap: Training blocks nearer than this to a held-out one are left out, in metres on maps.
        seed: Seed of the draw, apart from the data's seed.
    """

    val_fraction: float = 0.1
    sites: tuple[str, ...] = ()
    patients: tuple[str, ...] = ()
    slides: tuple[str, ...] = ()
    gap: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1 or self.gap < 0:
            raise ConfigError(
                f"data.init_args.held_out: got val_fraction={self.val_fraction!r}, "
                f"gap={self.gap!r}; expected 0 <= val_fraction < 1 and gap >= 0."
            )

    def of(self, used: Collection[str]) -> Self:
        """Return the rule as it is, if it says nothing that a DataModule has no use for.

        Raises:
            ConfigError: It does.
        """
        for item in fields(self):
            if item.name not in used and getattr(self, item.name) != item.default:
                raise ConfigError(
                    f"data.init_args.held_out.{item.name}: got {getattr(self, item.name)!r}, but "
                    f"these data are held out by {', '.join(used)}. Leave it out."
                )
        return self
