"""Which weights of a backbone a task trains: all, none, or low-rank additions to its layers."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

from torch import nn

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError, nearest, require
from domainssl.nn.blocks import blocks_of

__all__ = ["Tuning", "apply_tuning", "merge_adapters"]

_MODES = ("full", "frozen", "lora")
_WHERE = "model.init_args.tuning"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is trained of the backbone; the head always is.

    Attributes:
        mode: `full` trains all of it. `frozen` trains nothing of it and leaves its batch norms and
            dropout in evaluation mode. `lora` trains low-rank additions to linear layers of its
            blocks, and needs peft.
        layer_decay: With `full`, learning rate of a block as a share of that of the block after it,
            such as 0.75; None takes `optimization.layer_decay`.
        lora_rank: Rank of the additions.
        lora_alpha: They are scaled by `lora_alpha / lora_rank`.
        lora_targets: Shell patterns of the names of linear layers inside the blocks, such as
            `*qkv`; empty takes all of them.

    Raises:
        ConfigError: A value lies outside its range.
    """

    mode: Literal["full", "frozen", "lora"] = "full"
    layer_decay: float | None = None
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        if self.mode not in _MODES:
            raise ConfigError(
                f"{_WHERE}.mode: got {self.mode!r}, expected one of {_MODES}."
                f"{nearest(self.mode, _MODES)}"
            )
        if self.lora_rank < 1 or self.lora_alpha <= 0:
            raise ConfigError(
                f"{_WHERE}: got lora_rank {self.lora_rank!r} and lora_alpha {self.lora_alpha!r}, "
                "expected a rank of 1 or more and a positive number."
            )
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ConfigError(
                f"{_WHERE}.layer_decay: got {self.layer_decay!r}, expected a share in (0, 1]."
            )
        if self.layer_decay is not None and self.mode != "full":
            raise ConfigError(
                f"{_WHERE}.layer_decay: got {self.layer_decay!r} with mode {self.mode!r}, where no "
                "block has a learning rate. Set mode: full, or leave layer_decay out."
            )


def apply_tuning(backbone: Backbone, tuning: Tuning) -> None:
    """Freeze the backbone, or add adapters to it, in place.

    Raises:
        ConfigError: No linear layer of its blocks fits `lora_targets`.
        MissingExtraError: `lora` is asked for and peft is not installed.
    """
    if tuning.mode == "full":
        return
    backbone.requires_grad_(False)
    if tuning.mode == "lora":
        _add_adapters(backbone, tuning)


def _add_adapters(backbone: Backbone, tuning: Tuning) -> None:
    inside = {id(part) for block in blocks_of(backbone) for part in block.modules()}
    linear = [
        name
        for name, part in backbone.named_modules()
        if type(part) is nn.Linear and id(part) in inside
    ]
    patterns = tuning.lora_targets or ("*",)
    chosen = [name for name in linear if any(fnmatch(name, pattern) for pattern in patterns)]
    if not chosen:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(
            f"{_WHERE}.lora_targets: {list(patterns)} fits no linear layer in the blocks of "
            f"{type(backbone).__name__}. "
            + (f"They end in {', '.join(ends)}." if ends else "It has none: set mode: full.")
        )
    peft = require("peft", "finetune")
    config = peft.LoraConfig(
        r=tuning.lora_rank, lora_alpha=tuning.lora_alpha, target_modules=chosen, lora_dropout=0.0
    )
    peft.inject_adapter_in_model(config, backbone)


def merge_adapters(backbone: Backbone) -> None:
    """Add the adapters of `lora` to the weights they belong to, and remove them."""
    adapted: list[tuple[str, Any]] = [
        (name, part) for name, part in backbone.named_modules() if hasattr(part, "get_base_layer")
    ]
    for name, part in adapted:
        part.merge()
        owner, _, own = name.rpartition(".")
        setattr(backbone.get_submodule(owner), own, part.get_base_layer())
