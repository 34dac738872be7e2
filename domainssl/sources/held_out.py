"""Which part of the data is held out for validation."""

from __future__ import annotations

from dataclasses import dataclass

from domainssl.errors import ConfigError

__all__ = ["HeldOut"]


@dataclass(frozen=True)
class HeldOut:
    """Which part is held out for validation.

    Attributes:
        val_fraction: Fraction of the blocks, drawn once; neighbours of the same site may be in
            both parts.
        sites: Names of sites held out as a whole; `val_fraction` then does not count.
        gap: Training blocks nearer than this to a held-out one are left out, in metres on maps.
        seed: Seed of the draw, apart from the data's seed.
    """

    val_fraction: float = 0.1
    sites: tuple[str, ...] = ()
    gap: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1 or self.gap < 0:
            raise ConfigError(
                f"data.init_args.held_out: got val_fraction={self.val_fraction!r}, "
                f"gap={self.gap!r}; expected 0 <= val_fraction < 1 and gap >= 0."
            )
