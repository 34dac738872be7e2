"""Values that change over a run: momentum, weight decay and the teacher's temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from domainssl.errors import ConfigError

__all__ = ["Progress", "TeacherTemperature", "cosine"]


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Optimiser steps done.
        total_steps: Of the whole run.
        epoch: Epochs done.
        total_epochs: Of the whole run.
    """

    step: int = 0
    total_steps: int = 1
    epoch: int = 0
    total_epochs: int = 1


def cosine(start: float, end: float, step: float, total: float) -> float:
    """Return the value at a step of half a cosine from `start` to `end`, reached after `total`."""
    share = min(1.0, step / max(1, total))
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))


@dataclass(frozen=True, kw_only=True)
class TeacherTemperature:
    """The temperature of a teacher, constant or rising linearly first.

    Attributes:
        warmup: Value of the first epoch or step.
        final: Value after the warm-up.
        warmup_fraction: Share of the run that the warm-up takes.
        warmup_epochs: The same as a number of epochs; wins over `warmup_fraction`.

    Raises:
        ConfigError: A value lies outside its range.
    """

    warmup: float = 0.04
    final: float = 0.07
    warmup_fraction: float = 0.3
    warmup_epochs: int | None = None

    def __post_init__(self) -> None:
        for name in ("warmup", "final"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"teacher_temperature.{name}: got {getattr(self, name)!r}, expected more than "
                    "0; 0.04 to 0.07 are usual."
                )
        if not 0 <= self.warmup_fraction <= 1:
            raise ConfigError(
                f"teacher_temperature.warmup_fraction: got {self.warmup_fraction!r}, expected a "
                "share in [0, 1]."
            )

    def at(self, progress: Progress, every: Literal["epoch", "step"]) -> float:
        """Return the value now, changing with every epoch or with every step.

        Both ends of the warm-up are reached: the first unit has `warmup`, its last `final`.
        """
        done, total = progress.epoch, progress.total_epochs
        if every == "step":
            done, total = progress.step, progress.total_steps
        units = round(self.warmup_fraction * total)
        if self.warmup_epochs is not None:
            per_epoch = progress.total_steps / max(1, progress.total_epochs)
            units = round(self.warmup_epochs * (per_epoch if every == "step" else 1))
        if done >= units:
            return self.final
        return self.warmup + (self.final - self.warmup) * (done / max(1, units - 1))
