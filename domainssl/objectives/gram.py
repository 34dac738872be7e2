"""Gram anchoring: similarities between the patches of an image stay those of an earlier teacher.

Source: DINOv3 (Simeoni et al. 2025, arXiv 2508.10104), section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from domainssl.errors import ConfigError

__all__ = ["GramAnchor", "on_grid"]

Mode = Literal["none", "remove_neg", "teacher_only_intended", "teacher_only_as_released"]


@dataclass(frozen=True, kw_only=True)
class GramAnchor:
    """When the anchor is taken, and how it sees a crop; with `loss_weights.gram` above 0.

    Attributes:
        start_steps: Steps before the term counts; the anchor is the teacher of that step.
        refresh_every: Steps after which the anchor becomes the teacher of that time.
        max_refreshes: How often it does; None for no end.
        scale: Size of the anchor's crop over that of the large crops, a whole number; its features
            are resized to their grid.
        mode: Which similarities are set to zero first; see `losses.latent.gram_anchoring`.

    Raises:
        ConfigError: A value lies outside its range.
    """

    start_steps: int = 0
    refresh_every: int = 10_000
    max_refreshes: int | None = 3
    scale: int = 2
    mode: Mode = "none"

    def __post_init__(self) -> None:
        modes = ("none", "remove_neg", "teacher_only_intended", "teacher_only_as_released")
        checks = {
            "start_steps": (self.start_steps >= 0, "0 or more"),
            "refresh_every": (self.refresh_every >= 1, "1 or more"),
            "max_refreshes": (
                self.max_refreshes is None or self.max_refreshes >= 0, "0 or more, or null",
            ),
            "scale": (self.scale >= 1, "a whole number, 1 or more"),
            "mode": (self.mode in modes, f"one of {', '.join(modes)}"),
        }  # fmt: skip
        for name, (is_fine, expected) in checks.items():
            if not is_fine:
                raise ConfigError(
                    f"model.init_args.gram.{name}: got {getattr(self, name)!r}, expected "
                    f"{expected}."
                )

    def is_taken(self, step: int) -> bool:
        """Tell whether the anchor becomes the teacher before a step, counted from 0."""
        count, rest = divmod(step - self.start_steps, self.refresh_every)
        last = math.inf if self.max_refreshes is None else self.max_refreshes
        return rest == 0 and 0 <= count <= last


def on_grid(tokens: Tensor, grid: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Resize features to another grid, without antialiasing.

    Args:
        tokens: Features in row-major order, (B, N, E).
        grid: Patches along each of the two or three axes, N in all.
        wanted: Patches along each axis of the result.

    Returns:
        (B, M, E), bicubic in 2D and linear in 3D.
    """
    if tuple(grid) == tuple(wanted):
        return tokens
    maps = tokens.transpose(1, 2).unflatten(2, tuple(grid)).float()
    mode = "bicubic" if len(wanted) == 2 else "trilinear"
    return F.interpolate(maps, size=tuple(wanted), mode=mode).flatten(2).transpose(1, 2)
