"""How weights are updated: AdamW, LARS or SGD, no decay where it harms, warm-up, then a fall."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from domainssl.errors import ConfigError
from domainssl.options import as_dataclass
from domainssl.training.lars import LARS
from domainssl.training.schedules import cosine

__all__ = ["Optimization", "clip_gradients", "decay_weights", "make_optimizer", "parameter_groups"]

_NO_DECAY_NAMES = ("token", "position", "temperature")
_NO_DECAY_PARTS = ("norm", "gamma")  # DINOv2
_POWER = 0.9
_BLOCK = re.compile(r"(?:^|\.)(?:blocks\.|layer\d+\.)(\d+)\.")
# of Swin, ResNet, ConvNeXt and nnU-Net's encoder: `layers1.0.blocks.1`, `layer1.0`, `stages.0`
_STAGE = re.compile(r"(?:^|\.)(?:stages|layers?)\.?(\d+)c?\.")
_PATCH_EMBEDDING = {"embed", "patch_embed"}
_FIRST_LAYER = _PATCH_EMBEDDING | {
    "class_token", "cls_token", "mask_token", "position_table", "pos_embed", "date_embed",
    "stem", "conv1", "bn1",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
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
        final_lr_fraction: Rate that the schedule would reach one step after the last, as a share
            of `lr`.
        fall: How the rate falls after the warm-up: half a `cosine`, or `polynomial`, the remaining
            share of steps to the power of 0.9 (nnU-Net, nnssl).
        optimizer: `adamw`, `lars` (layer-wise rates, as Barlow Twins and DeCUR use it with
            ResNets), or `sgd` (nnU-Net, nnssl, MoCo); `betas` and `eps` have no meaning in the
            last two.
        lr_bias: With `lars`, the rate of biases, norms and other vectors; None takes `lr`.
        momentum: With `lars` and `sgd`.
        nesterov: With `sgd`, Nesterov's momentum (nnU-Net, nnssl) instead of plain (MoCo).
        warmup_start: The first step has a share of `lr` that fits the line through zero before it
            (`above_zero`), or a rate of zero (`zero`, as DINO and its family).
        final_weight_decay: Weight decay of the last step, reached by half a cosine; None keeps it
            constant.
        decay_rule: Which parameters are never decayed: vectors and everything called token,
            position or temperature (`no_tokens`), biases and vectors (`vectors`, DINO), or names
            that end in `bias` or hold `norm` or `gamma` (`names`, DINOv2).
        layer_decay: Learning rate of a block as a share of that of the block after it, over all
            stages of Swin and of convolutional networks; 1 for equal rates, 0.9 in DINOv2.
        patch_embedding_lr: Share of the learning rate that the patch embedding has; 0.2 in DINOv2.
        clip: Largest norm of a gradient; None takes `trainer.gradient_clip_val`.
        clip_by: Whose norm it is: every parameter's own (`tensor`; DINO, iBOT, SimDINO), that of
            the backbone and that of every other part (`part`; DINOv2), or of all (`all`).

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
    fall: Literal["cosine", "polynomial"] = "cosine"
    optimizer: Literal["adamw", "lars", "sgd"] = "adamw"
    lr_bias: float | None = None
    momentum: float = 0.9
    nesterov: bool = True
    warmup_start: Literal["above_zero", "zero"] = "above_zero"
    final_weight_decay: float | None = None
    decay_rule: Literal["no_tokens", "vectors", "names"] = "no_tokens"
    layer_decay: float = 1.0
    patch_embedding_lr: float = 1.0
    clip: float | None = None
    clip_by: Literal["tensor", "part", "all"] = "all"

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
            "fall": (self.fall in ("cosine", "polynomial"), "'cosine' or 'polynomial'"),
            "optimizer": (self.optimizer in ("adamw", "lars", "sgd"), "'adamw', 'lars' or 'sgd'"),
            "lr_bias": (self.lr_bias is None or self.lr_bias > 0, "a positive number or null"),
            "momentum": (0 <= self.momentum < 1, "a share in [0, 1)"),
            "warmup_start": (self.warmup_start in ("above_zero", "zero"), "'above_zero' or 'zero'"),
            "final_weight_decay": (
                self.final_weight_decay is None or self.final_weight_decay >= 0,
                "zero or more, or null",
            ),
            "decay_rule": (
                self.decay_rule in ("no_tokens", "vectors", "names"),
                "'no_tokens', 'vectors' or 'names'",
            ),
            "layer_decay": (0 < self.layer_decay <= 1, "a share in (0, 1]"),
            "patch_embedding_lr": (0 <= self.patch_embedding_lr <= 1, "a share in [0, 1]"),
            "clip": (self.clip is None or self.clip > 0, "a positive number or null"),
            "clip_by": (self.clip_by in ("tensor", "part", "all"), "'tensor', 'part' or 'all'"),
            "final_lr_fraction": (0 <= self.final_lr_fraction <= 1, "a share in [0, 1]"),
        }
        for name, (is_fine, expected) in checks.items():
            value = getattr(self, name)
            if not is_fine or (isinstance(value, float) and math.isinf(value)):
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

    def scale(self, step: float, total_steps: int) -> float:
        """Return the learning rate of optimiser step `step` (from 0) as a share of `lr`."""
        warmup = self.warmup_steps
        if warmup is None:
            warmup = round(self.warmup_fraction * total_steps)
        warmup = min(warmup, total_steps)
        if step < warmup:
            if self.warmup_start == "zero":
                return step / max(1, warmup - 1)
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, total_steps - warmup)
        progress = min(1.0, progress)
        share = 0.5 * (1 + math.cos(math.pi * progress))
        if self.fall == "polynomial":
            share = (1 - progress) ** _POWER
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * share


def _is_free(name: str, parameter: nn.Parameter, rule: str) -> bool:
    """Tell whether a parameter is never decayed."""
    if rule == "names":
        return name.endswith(".bias") or any(word in name for word in _NO_DECAY_PARTS)
    if parameter.ndim < 2 or name.endswith(".bias"):
        return True
    own_name = name.rpartition(".")[2]
    return rule == "no_tokens" and any(word in own_name for word in _NO_DECAY_NAMES)


def _place(name: str) -> tuple[int, int] | None:
    """Return stage and block of a parameter, from the input on; None where it is in neither.

    Blocks of encoders side by side have equal places. What a stage has beside its blocks, such as
    its downsampling, counts as its first block.
    """
    stage, block = _STAGE.search(name), _BLOCK.search(name)
    if stage is None and block is None:
        return None
    if stage and block and stage.start() > block.start():
        stage = None  # a layer inside of a block
    return (int(stage[1]) if stage else 0, int(block[1]) if block else 0)


def _rate_shares(names: Sequence[str], options: Optimization) -> dict[str, float]:
    """Return every parameter's share of the learning rate."""
    if options.layer_decay == 1 and options.patch_embedding_lr == 1:
        return dict.fromkeys(names, 1.0)
    found = {name: _place(name) for name in names if name.startswith("backbone.")}
    order = {place: i for i, place in enumerate(sorted({p for p in found.values() if p}))}
    blocks = {name: order[place] for name, place in found.items() if place}
    if options.layer_decay < 1 and not blocks:
        raise ConfigError(
            f"optimization.layer_decay: got {options.layer_decay!r}, but the backbone has no "
            "transformer blocks and no stages. Set it to 1."
        )
    depth = len(order)
    shares = {}
    for name in names:
        parts = set(name.split("."))
        layers = 0  # above this one: the last norm, heads and everything else have none
        if name in blocks:
            layers = depth - blocks[name]
        elif name in found and parts & _FIRST_LAYER:
            layers = depth + 1
        share = options.layer_decay**layers
        if name in found and parts & _PATCH_EMBEDDING:
            share *= options.patch_embedding_lr
        shares[name] = share
    return shares


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], options: Optimization
) -> list[dict[str, Any]]:
    """Split trainable parameters by weight decay, and by learning rate where rates differ.

    Args:
        named: Names and parameters; frozen ones are left out.
        options: See `Optimization.decay_rule`, `layer_decay` and `patch_embedding_lr`.

    Returns:
        Groups for an optimiser, in a stable order: the decayed ones, then as many without decay,
        by falling learning rate; two where all rates are equal.

    Raises:
        ConfigError: Rates differ by layer, and there are no transformer blocks.
    """
    trained = {name: parameter for name, parameter in named if parameter.requires_grad}
    shares = _rate_shares(list(trained), options)
    order = sorted(set(shares.values()) or {1.0}, reverse=True)
    groups: list[dict[str, Any]] = []
    for is_free in (False, True):
        for share in order:
            chosen = [
                parameter
                for name, parameter in trained.items()
                if shares[name] == share
                and _is_free(name, parameter, options.decay_rule) == is_free
            ]
            group = {"params": chosen, "weight_decay": 0.0 if is_free else options.weight_decay}
            groups.append(group if share == 1 else {**group, "lr": options.lr * share})
    return groups


def decay_weights(
    groups: Sequence[dict[str, Any]], options: Optimization, step: int, total_steps: int
) -> None:
    """Set the weight decay of a step in the decayed half of `parameter_groups`."""
    if options.final_weight_decay is None:
        return
    value = cosine(options.weight_decay, options.final_weight_decay, step, total_steps)
    for group in groups[: len(groups) // 2]:
        group["weight_decay"] = value


def clip_gradients(named: Iterable[tuple[str, nn.Parameter]], options: Optimization) -> None:
    """Shorten gradients whose norm is larger than `clip`; see `Optimization.clip_by`."""
    if options.clip is None:
        return
    owners: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.grad is not None:
            owner = {"tensor": name, "part": name.split(".")[0], "all": ""}[options.clip_by]
            owners.setdefault(owner, []).append(parameter)
    for parameters in owners.values():
        nn.utils.clip_grad_norm_(parameters, options.clip)


def make_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], options: Optimization
) -> torch.optim.Optimizer:
    """Build the optimiser that `options` ask for, over the groups of `parameter_groups`."""
    groups = parameter_groups(named, options)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)
    if options.optimizer == "sgd":
        nesterov = options.nesterov and options.momentum > 0  # torch refuses one without the other
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=nesterov)
    bias = options.lr if options.lr_bias is None else options.lr_bias
    for group in groups[len(groups) // 2 :]:
        group["lr"] = bias * group.get("lr", options.lr) / options.lr
        group["adapt"] = False
    return LARS(groups, lr=options.lr, momentum=options.momentum)
