"""Fully sharded training (FSDP2) of an objective, on GPUs and on gloo CPU processes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from domainssl.backbones.base import Backbone
from domainssl.nn.blocks import TransformerBlock

__all__ = ["shard"]


def shard(objective: nn.Module, backbone: Backbone, mesh: DeviceMesh) -> None:
    """Shard every transformer block, the backbone, and the rest of the objective.

    Calls must enter through the objective (`forward`, `validation_step`, `features`, …): it is
    the root that gathers what belongs to no block. The backbone's own entry points, which a
    method calls instead of `forward`, are registered as forward methods.

    Args:
        objective: The root module.
        backbone: Its backbone.
        mesh: One-dimensional mesh of the data-parallel ranks.
    """
    options: dict[str, Any] = {"mesh": mesh}
    for module in objective.modules():
        if isinstance(module, TransformerBlock):
            fully_shard(module, **options)
    fully_shard(backbone, **options)
    for name in backbone.forward_methods:
        register_fsdp_forward_method(backbone, name)
    fully_shard(objective, **options)
    for name in ("features", "embed"):
        register_fsdp_forward_method(objective, name)
