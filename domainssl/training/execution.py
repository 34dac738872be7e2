"""How an objective computes, which changes speed and memory but not what it learns."""

from __future__ import annotations

from dataclasses import dataclass

from domainssl.backbones.base import Backbone
from domainssl.nn.attention import AttentionPath
from domainssl.nn.blocks import compile_blocks, set_attention_path

__all__ = ["Execution", "apply_execution"]


@dataclass(frozen=True)
class Execution:
    """Speed and memory of a run.

    Attributes:
        gradient_checkpointing: Recompute the backbone's blocks in the backward pass: about a
            third more computation, and activations of one block at a time.
        compile: Compile the backbone's transformer blocks (`torch.compile`); the first steps
            take minutes.
        attention: `fused`, `flex` (bias computed inside the kernel, for CUDA) or `math`.
    """

    gradient_checkpointing: bool = False
    compile: bool = False
    attention: AttentionPath = "fused"


def apply_execution(backbone: Backbone, execution: Execution) -> None:
    """Set up the blocks of a backbone; called once, before training."""
    backbone.set_gradient_checkpointing(execution.gradient_checkpointing)
    set_attention_path(backbone, execution.attention)
    if execution.compile:
        compile_blocks(backbone)
