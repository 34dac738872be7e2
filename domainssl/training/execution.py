"""How a run computes: seed, speed and memory, and what is checked on the way."""

from __future__ import annotations

from dataclasses import dataclass

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError
from domainssl.nn.attention import AttentionPath
from domainssl.nn.blocks import compile_blocks, set_attention_path

__all__ = ["Execution", "apply_execution"]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Seed, speed and memory of a run, and what it refuses.

    Attributes:
        seed: Seed of everything random in the module, zero or more.
        gradient_checkpointing: Recompute the backbone's blocks in the backward pass: about a
            third more computation, and activations of one block at a time.
        compile: Compile the backbone's transformer blocks (`torch.compile`); the first steps
            take minutes.
        attention: `fused`, `flex` (bias computed inside the kernel, for CUDA) or `math`.
        check_units: Look at the first batches and refuse values in another unit than the model's.
        allow_accumulation: Let a method that compares the items of a batch run with
            `accumulate_grad_batches` > 1, though it then compares those of one part only.
    """

    seed: int = 0
    gradient_checkpointing: bool = False
    compile: bool = False
    attention: AttentionPath = "fused"
    check_units: bool = True
    allow_accumulation: bool = False

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(
                f"model.init_args.execution.seed: got {self.seed}, expected zero or more."
            )


def apply_execution(backbone: Backbone, execution: Execution) -> None:
    """Set up the blocks of a backbone; called once, before training."""
    backbone.set_gradient_checkpointing(execution.gradient_checkpointing)
    set_attention_path(backbone, execution.attention)
    if execution.compile:
        compile_blocks(backbone)
