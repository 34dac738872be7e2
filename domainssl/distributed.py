"""Collectives that autograd understands; nothing else in the library calls torch.distributed.

The rule behind all of them: a loss on W ranks with B items each has the value and the gradient
of one process with W·B items. Data-parallel training averages gradients over ranks, so

* a gathered tensor sums the incoming gradients of all ranks and hands back the local slice;
* a mean over items is `W · (local sum) / (global count)` on every rank (`global_mean`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from domainssl.errors import DomainSSLError

__all__ = [
    "Gather",
    "RankError",
    "RowLayout",
    "all_gather_objects",
    "all_reduce_any",
    "all_reduce_max",
    "all_reduce_sum",
    "barrier",
    "gather",
    "global_mean",
    "is_distributed",
    "is_lost_connection",
    "rank",
    "row_layout",
    "world_size",
]

Gather = Literal["grad", "detach", "none"]

_LOST = (  # what gloo, NCCL and torch's store say when a peer is gone or silent
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "wait timeout",
    "remote process exited",
    "Watchdog caught collective operation timeout",
    "recvValue failed",
    "sendBytes failed",
)


class RankError(DomainSSLError, RuntimeError):
    """Another rank of the run is gone or silent."""


def is_lost_connection(error: BaseException) -> bool:
    """Tell whether a collective failed because another rank has ended or does not answer."""
    text = str(error)
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or any(
        words in text for words in _LOST
    )


def is_distributed() -> bool:
    """True when a process group with more than one rank is running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all ranks; nothing happens in a single process."""
    if is_distributed():
        dist.barrier()


@dataclass(frozen=True)
class RowLayout:
    """How the rows of one step are dealt to the ranks.

    Attributes:
        sizes: Number of rows of every rank.
        start: Position of the first local row among the rows of all ranks.
    """

    sizes: tuple[int, ...]
    start: int = 0

    @property
    def total(self) -> int:
        """Number of rows of all ranks together."""
        return sum(self.sizes)


def row_layout(rows: Tensor) -> RowLayout:
    """Ask every rank for its number of rows, once per step: the answer waits for the device.

    Args:
        rows: Local rows, (B, ...); their values do not matter.
    """
    if not is_distributed():
        return RowLayout((len(rows),))
    mine = torch.tensor([len(rows)], dtype=torch.int64, device=rows.device)
    every = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(every, mine)
    sizes = tuple(int(n) for n in torch.cat(every).tolist())
    return RowLayout(sizes, sum(sizes[: rank()]))


def _gather_rows(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Concatenate rows of all ranks; ranks may hold different numbers of rows."""
    longest = max(sizes)
    padded = x.contiguous()
    if len(x) < longest:
        padded = torch.cat([x, x.new_zeros((longest - len(x), *x.shape[1:]))])
    as_bytes = padded.dtype is torch.bool
    buffer = padded.to(torch.uint8) if as_bytes else padded
    every = [torch.empty_like(buffer) for _ in sizes]
    dist.all_gather(every, buffer)
    rows = torch.cat([part[:n] for part, n in zip(every, sizes, strict=True)])
    return rows.to(torch.bool) if as_bytes else rows


class _GatherRows(torch.autograd.Function):
    """All-gather forward; sum over ranks and slice backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: RowLayout) -> Tensor:
        ctx.span = (layout.start, layout.start + len(x))
        return _gather_rows(x, layout.sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        start, stop = ctx.span
        return total[start:stop], None


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def gather(x: Tensor, mode: Gather = "grad", layout: RowLayout | None = None) -> Tensor:
    """Concatenate the rows of all ranks, in rank order.

    Args:
        x: Local rows, (B, ...); B may differ between ranks.
        mode: `grad` carries gradients to every rank, `detach` returns constants (in a single
            process too), `none` returns `x` itself.
        layout: What `row_layout` said in this step; None asks the ranks again.

    Returns:
        Rows of all ranks, (sum of B, ...).
    """
    if mode == "none":
        return x
    if mode == "detach":
        x = x.detach()
    if not is_distributed():
        return x
    layout = layout or row_layout(x)
    if mode == "grad" and x.is_floating_point():
        rows: Tensor = _GatherRows.apply(x, layout)
        return rows
    return _gather_rows(x, layout.sizes)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Return the sum of `x` over all ranks; differentiable."""
    if not is_distributed():
        return x
    total: Tensor = _AllReduceSum.apply(x)
    return total


def all_reduce_any(flags: Tensor) -> Tensor:
    """Return, per entry of a bool tensor, whether it is True on any rank."""
    if not is_distributed():
        return flags
    counts = flags.to(torch.int32)
    dist.all_reduce(counts)
    return counts > 0


def all_reduce_max(x: Tensor) -> Tensor:
    """Return, per entry, the largest value of all ranks; no gradient passes."""
    if not is_distributed():
        return x.detach()
    largest = x.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """Divide a local sum by the global count so that the mean over ranks is the global mean.

    Args:
        total: Local sum with gradient, ().
        count: Local number of terms, (); no gradient is taken through it.

    Returns:
        `W · total / (count over all ranks)`; a zero that is connected to `total` when no rank
        has a term.
    """
    everywhere = count.detach().to(total.dtype)
    if is_distributed():
        everywhere = everywhere.clone()
        dist.all_reduce(everywhere)
    return total * (world_size() / everywhere.clamp(min=torch.finfo(total.dtype).tiny))


def all_gather_objects(value: Any) -> list[Any]:
    """Return a small picklable value of every rank, in rank order."""
    if not is_distributed():
        return [value]
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, value)
    return every
