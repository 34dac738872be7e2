"""How weights are updated: AdamW or LARS without decay where it harms, warm-up, then a cosine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from domainssl.errors import ConfigError
from domainssl.options import as_dataclass
from domainssl.training.lars import LARS

__all__ = ["Optimization", "make_optimizer", "parameter_groups"]

_NO_DECAY_NAMES = ("token", "position", "temperature")


@dataclass(frozen=True)
class Optimization:
    """The optimiser and its learning rate over optimiser steps.

    Attributes:
        lr: Highest learning rate, reached at the end of the warm-up.
        weight_decay: Decay of matrices and kernels; biases, norms, tokens, positions and
            everything else with fewer than two axes are never decayed.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        warmup_fraction: Share of all optimiser steps with a linearly rising rate.
        warmup_steps: The same as a number of steps; wins over `warmup_fraction`.
        final_lr_fraction: Rate that the cosine would reach one step after the last, as a share of
            `lr`.
        optimizer: `adamw`, or `lars` (layer-wise rates, as Barlow Twins and DeCUR use it with
            ResNets; `betas` and `eps` have no meaning there).
        lr_bias: With `lars`, the rate of biases, norms and other vectors; None takes `lr`.
        momentum: With `lars`.

    Raises:
        ConfigError: A value lies outside its range.
    """

    lr: float = 1e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    warmup_fraction: float = 0.05
    warmup_steps: int | None = None
    final_lr_fraction: float = 0.0
    optimizer: Literal["adamw", "lars"] = "adamw"
    lr_bias: float | None = None
    momentum: float = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        checks = {
            "lr": (self.lr > 0, "a positive number"),
            "weight_decay": (self.weight_decay >= 0, "zero or more"),
            "betas": (
                len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
                "two numbers in [0, 1)",
            ),
            "eps": (self.eps > 0, "a positive number"),
            "warmup_fraction": (0 <= self.warmup_fraction < 1, "a share in [0, 1)"),
            "warmup_steps": (self.warmup_steps is None or self.warmup_steps >= 0, "zero or more"),
            "optimizer": (self.optimizer in ("adamw", "lars"), "'adamw' or 'lars'"),
            "lr_bias": (self.lr_bias is None or self.lr_bias > 0, "a positive number or null"),
            "momentum": (0 <= self.momentum < 1, "a share in [0, 1)"),
            "final_lr_fraction": (0 <= self.final_lr_fraction <= 1, "a share in [0, 1]"),
        }
        for name, (is_fine, expected) in checks.items():
            if not is_fine:
                raise ConfigError(
                    f"optimization.{name}: got {getattr(self, name)!r}, expected {expected}."
                )

    @classmethod
    def of(cls, value: Optimization | Mapping[str, Any] | None) -> Optimization:
        """Return `value` as Optimization; a mapping is read as constructor arguments.

        Raises:
            ConfigError: The mapping holds an unknown name.
        """
        return cls() if value is None else as_dataclass(cls, value)

    def scale(self, step: int, total_steps: int) -> float:
        """Return the learning rate of optimiser step `step` (from 0) as a share of `lr`."""
        warmup = self.warmup_steps
        if warmup is None:
            warmup = round(self.warmup_fraction * total_steps)
        warmup = min(warmup, total_steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, total_steps - warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Split trainable parameters into those with and those without weight decay.

    Args:
        named: Names and parameters; frozen ones are left out.
        weight_decay: Decay of the first group.

    Returns:
        Two groups for an optimiser, in a stable order. Not decayed: fewer than two axes (biases,
        norms, scales), and names that hold `token`, `position` or `temperature`.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        own_name = name.rpartition(".")[2]
        is_free = parameter.ndim < 2 or any(word in own_name for word in _NO_DECAY_NAMES)
        (free if is_free else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def make_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], options: Optimization
) -> torch.optim.Optimizer:
    """Build the optimiser that `options` ask for, over the groups of `parameter_groups`."""
    groups = parameter_groups(named, options.weight_decay)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)
    groups[1]["lr"] = options.lr if options.lr_bias is None else options.lr_bias
    groups[1]["adapt"] = False
    return LARS(groups, lr=options.lr, momentum=options.momentum)
