"""Batch normalisation whose statistics are those of the global batch, on any device.

torch's SyncBatchNorm has no CPU kernel, cannot leave absent items out, and keeps no record of what
is a recomputation. The statistics here are float32 sums over all ranks, with their exact gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainssl._torch import BatchNormBase
from domainssl.distributed import all_reduce_sum, is_distributed

__all__ = ["GlobalBatchNorm", "convert_batch_norm", "counted_rows", "current_rows", "recomputing"]

_rows: ContextVar[Tensor | None] = ContextVar("counted_rows", default=None)
_is_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)


@contextmanager
def counted_rows(rows: Tensor | None) -> Iterator[None]:
    """Let only some items count in the statistics of every `GlobalBatchNorm` called inside.

    Args:
        rows: bool (B,); False items are normalised but do not count. None counts all.
    """
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def current_rows() -> Tensor | None:
    """Return the rows of the innermost `counted_rows`."""
    return _rows.get()


@contextmanager
def recomputing(rows: Tensor | None) -> Iterator[None]:
    """Repeat a forward pass for its gradient: the same rows count, running buffers stay."""
    token = _is_recomputing.set(True)
    try:
        with counted_rows(rows):
            yield
    finally:
        _is_recomputing.reset(token)


def _per_channel(values: Tensor, ndim: int) -> Tensor:
    return values.view(1, -1, *[1] * (ndim - 2))


def _summed(x: Tensor, per_rank: bool) -> Tensor:
    return x if per_rank else all_reduce_sum(x)


def _statistics(x: Tensor, rows: Tensor, per_rank: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel over the counted rows of all ranks, and their number.

    Every row is measured by itself, which reads `x` once, and rows are put together in float64: the
    result does not depend on how rows are dealt to ranks.
    """
    exact = x.dtype if x.device.type == "mps" else torch.float64
    size, weight, spread = 1, rows.to(exact), x.new_zeros(())
    if x.ndim > 2:
        size = x[0, 0].numel() if len(x) else 1
        spread, x = torch.var_mean(x.flatten(2), 2, correction=0)
    x = x.to(exact)
    sums = _summed(torch.cat([weight @ x, weight.sum().view(1)]), per_rank)
    count = sums[-1].clamp(min=1)
    mean = sums[:-1] / count
    var = _summed(weight @ ((x - mean).square() + spread), per_rank) / count
    return mean, var, sums[-1] * size


class _BatchNorm(torch.autograd.Function):
    """`(x - mean) / sqrt(var + eps) * scale + shift` over the counted rows of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        eps: float,
        per_rank: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = x if x.dtype == torch.float64 else x.float()
        mean, var, count = (t.to(values.dtype) for t in _statistics(values, rows, per_rank))
        # without any row a scale of 1, so that a deep network stays finite
        divisor = torch.where(count > 0, var + eps, 1.0)
        scale, shift = (None if p is None else p.to(values.dtype) for p in (scale, shift))
        # what F.batch_norm calls; that one refuses eps=0 in torch 2.11
        cudnn = torch.backends.cudnn.enabled
        out = torch.batch_norm(values, scale, shift, mean, divisor, False, 0.0, 0.0, cudnn)
        ctx.save_for_backward(x, rows, mean, divisor, count, scale)
        ctx.per_rank = per_rank
        ctx.mark_non_differentiable(mean, var, count)
        return out.to(x.dtype), mean, var, count

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, Tensor | None, Tensor | None, None, None]:
        x, rows, mean, divisor, count, scale = ctx.saved_tensors
        values, grad = x.to(mean.dtype), grads[0].to(mean.dtype)
        inverse = divisor.rsqrt()
        # torch's kernel with fixed statistics: `grad * scale / sqrt(divisor)` and both sums. It
        # reads the statistics from the last two tensors on CUDA, from the two before on a CPU.
        fixed, by_unit, total = torch.ops.aten.native_batch_norm_backward(
            grad, values, torch.ones_like(mean) if scale is None else scale, mean, divisor,
            mean, inverse, False, 0.0, [True, True, True],
        )  # fmt: skip
        sums = _summed(torch.stack([total, by_unit]), ctx.per_rank) / count.clamp(min=1)
        factor = inverse if scale is None else inverse * scale
        slope = -factor * sums[1] * inverse
        start = -factor * sums[0] - slope * mean
        through = torch.addcmul(_per_channel(start, x.ndim), values, _per_channel(slope, x.ndim))
        weight = rows.to(mean.dtype).view(-1, *[1] * (x.ndim - 1))
        out = torch.addcmul(fixed, through, weight).to(x.dtype)
        if scale is None:
            return out, None, None, None, None, None
        return out, None, by_unit.to(scale.dtype), total.to(scale.dtype), None, None


class GlobalBatchNorm(nn.Module):
    """Batch normalisation over all ranks; buffers and names are those of torch's BatchNorm.

    Args:
        width: Channels.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics.
        affine: Scale and shift afterwards.

    Attributes:
        per_rank: Statistics are those of this rank's items alone, as in torch's BatchNorm.

    With a single process and without `counted_rows` it is torch's own kernel, on a CPU also for
    maps whose rows all count.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, width: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True
    ) -> None:
        super().__init__()
        self.eps, self.momentum, self.per_rank = eps, momentum, False
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Normalise every channel.

        Args:
            x: (B, C) or (B, C, ...).
            rows: bool (B,), True where the item counts; None takes those of `counted_rows`.

        Returns:
            The shape and dtype of x.
        """
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        rows = _rows.get() if rows is None else rows
        is_alone = self.per_rank or not is_distributed()
        if is_alone and x.numel() > x.shape[1]:
            # whether all rows of a map count is looked up on a CPU only, where nobody waits for it
            is_map = x.ndim > 2 and x.device.type == "cpu"
            if rows is None or (is_map and bool(rows.all())):
                return self._native(x)
        if rows is None:
            rows = torch.ones(len(x), dtype=torch.bool, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            out, mean, var, count = cast(
                tuple[Tensor, Tensor, Tensor, Tensor],
                _BatchNorm.apply(x, rows, self.weight, self.bias, self.eps, self.per_rank),
            )
            self._update(mean, var, count)
            return out

    def _native(self, x: Tensor) -> Tensor:
        is_first = not _is_recomputing.get()
        if is_first:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x,
            self.running_mean if is_first else self.running_mean.clone(),
            self.running_var if is_first else self.running_var.clone(),
            self.weight,
            self.bias,
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        if _is_recomputing.get():
            return
        unbiased = var * (count / (count - 1).clamp(min=1))
        share = self.momentum * (count > 0).to(mean.dtype)  # an empty batch changes nothing
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share.to(self.running_mean.dtype))
        self.running_var.lerp_(
            unbiased.to(self.running_var.dtype), share.to(self.running_var.dtype)
        )
        self.num_batches_tracked.add_((count > 0).long())


def convert_batch_norm(module: nn.Module) -> int:
    """Replace every torch BatchNorm below `module`, with its weights; return how many there were.

    Raises:
        TypeError: One of them is a subclass that computes something else as well.
    """
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, BatchNormBase):
                continue
            if type(child) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                raise TypeError(f"{name}: {type(child).__name__} is no plain batch normalisation.")
            own = GlobalBatchNorm(
                child.num_features, child.eps, child.momentum or 0.1, affine=child.affine
            )
            own.load_state_dict(child.state_dict())
            setattr(parent, name, own)
            count += 1
    return count
