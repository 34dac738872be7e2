"""Fully sharded training (FSDP2) of a training module, on GPUs and on gloo CPU processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from domainssl.backbones.base import Backbone
from domainssl.nn.blocks import blocks_of

__all__ = ["shard"]


def shard(
    module: nn.Module, backbone: Backbone, mesh: DeviceMesh, forward_methods: Sequence[str]
) -> None:
    """Shard every block, the backbone, and the rest of the module.

    Calls must enter through the module (`forward`, `validation_step`, `features`, …): it is
    the root that gathers what belongs to no block. The backbone's own entry points, which a
    module calls instead of `forward`, are registered as forward methods.

    Args:
        module: The root.
        backbone: Its backbone.
        mesh: One-dimensional mesh of the data-parallel ranks.
        forward_methods: The module's own entry points besides `forward`.
    """
    options: dict[str, Any] = {"mesh": mesh}
    for block in blocks_of(module):
        fully_shard(block, **options)
    fully_shard(backbone, **options)
    for name in backbone.forward_methods:
        register_fsdp_forward_method(backbone, name)
    fully_shard(module, **options)
    for name in forward_methods:
        register_fsdp_forward_method(module, name)
