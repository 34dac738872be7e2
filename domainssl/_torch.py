"""Private API of torch, all of it: an upgrade that moves something fails here and in one test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "BatchNormBase",
    "TorchDispatchMode",
    "compile_variants",
    "conv_with_bias",
    "end_workers",
    "follow",
    "has_ended_worker",
    "has_workers",
    "register_container",
    "resize_into",
    "set_rates",
    "shared_bytes",
]

BatchNormBase = nn.modules.batchnorm._BatchNorm


def compile_variants(limit: int) -> AbstractContextManager[None]:
    """Let the compiler keep up to `limit` variants of one function, torch's default being 8."""
    patch: Any = torch._dynamo.config.patch(recompile_limit=limit)  # type: ignore[no-untyped-call]
    context: AbstractContextManager[None] = patch
    return context


def conv_with_bias(layer: nn.Conv2d | nn.Conv3d, x: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a convolution, its padding mode included, with another bias than its own."""
    return layer._conv_forward(x, layer.weight, bias)


def end_workers(loader: Any) -> None:
    """End the worker processes of a DataLoader now, if it has any.

    Left to the garbage collector, an iterator in a reference cycle loses its queues before it can
    tell the workers, and waits 5 s for each of them.
    """
    if has_workers(loader):
        loader._iterator._shutdown_workers()


def follow(targets: Sequence[Tensor], sources: Sequence[Tensor], share: float) -> None:
    """Move targets towards sources in place: share · target + (1 - share) · source."""
    torch._foreach_mul_(list(targets), share)
    torch._foreach_add_(list(targets), list(sources), alpha=1 - share)


def has_ended_worker(loader: Any, timeout_s: float) -> bool:
    """Tell whether a worker process of a DataLoader is gone, or goes within `timeout_s`."""
    sentinels = [w.sentinel for w in loader._iterator._workers] if has_workers(loader) else []
    return bool(wait(sentinels, timeout=timeout_s))


def has_workers(loader: Any) -> bool:
    """Tell whether a DataLoader with persistent workers has started them."""
    return getattr(loader, "_iterator", None) is not None


def register_container(
    cls: type, flatten: Callable[[Any], Any], unflatten: Callable[..., Any], name: str
) -> None:
    """Let torch look for tensors inside instances of `cls`."""
    _pytree.register_pytree_node(cls, flatten, unflatten, serialized_type_name=name)


def resize_into(x: Tensor, out: Tensor) -> None:
    """Resize with antialiased bilinear interpolation into memory that is there.

    The operator behind `F.interpolate(mode="bilinear", antialias=True)`.

    Args:
        x: (B, C, h, w), contiguous.
        out: (B, C, H, W), contiguous.
    """
    size = list(out.shape[-2:])
    torch.ops.aten._upsample_bilinear2d_aa.out(x, size, False, None, None, out=out)


def set_rates(schedule: Any, rates: Sequence[float | Tensor]) -> None:
    """Set the current learning rates of a schedule and of the groups of its optimiser."""
    groups: Iterable[dict[str, Any]] = schedule.optimizer.param_groups
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = list(rates)


def shared_bytes(size: int) -> Tensor:
    """Return uint8 (size,) in memory that other processes can map, as torch's own collate does."""
    like = torch.empty(0, dtype=torch.uint8)
    return like.new(like._typed_storage()._new_shared(size, device="cpu"))
