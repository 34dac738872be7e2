"""Notice losses that are not finite without waiting for the device, and refuse other resumes."""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from domainssl.arguments import plain
from domainssl.distributed import all_gather_objects, all_reduce_any
from domainssl.errors import ConfigError, DomainSSLError

__all__ = ["FiniteGuard", "NotFiniteError", "check_resume", "check_weights"]

logger = logging.getLogger(__name__)
_MAX_IDS = 16  # of one batch, in the message


class NotFiniteError(DomainSSLError, ArithmeticError):
    """A loss or a weight is NaN or infinite."""


class FiniteGuard:
    """Remember the first batch in which a loss term was not finite.

    `watch` runs in every training step and only queues work on the device; `check` waits for the
    device and is called at the logging interval and before a checkpoint is written.
    """

    def __init__(self, keep: int = 4096) -> None:
        self._terms: tuple[str, ...] = ()
        self._first_bad: Tensor | None = None  # (terms,) int64, counter of the batch or -1
        self._ids: deque[tuple[int, list[str]]] = deque(maxlen=keep)

    def watch(self, losses: Mapping[str, Tensor], counter: int, ids: Sequence[Any]) -> None:
        """Note the loss terms of one batch.

        Args:
            losses: Scalar loss per term, the same terms in every batch.
            counter: Number of the batch, from 0.
            ids: Ids of its items.
        """
        terms = tuple(losses)
        values = torch.stack([loss.detach().float().reshape(()) for loss in losses.values()])
        if self._first_bad is None or terms != self._terms:
            self._terms = terms
            self._first_bad = torch.full_like(values, -1, dtype=torch.int64)
        is_new = ~torch.isfinite(values) & (self._first_bad < 0)
        self._first_bad = self._first_bad.masked_fill(is_new, counter)
        self._ids.append((counter, [str(i) for i in ids]))

    def check(self, step: int) -> None:
        """Raise on every rank when any rank has met a loss that is not finite.

        Args:
            step: Optimiser steps done, for the message.

        Raises:
            NotFiniteError: With the terms, the batch and the ids of its items.
        """
        if self._first_bad is None:
            return
        is_bad = all_reduce_any(self._first_bad >= 0)
        if not bool(is_bad.any()):
            self._ids.clear()
            return
        raise NotFiniteError(self._message(step))

    def _message(self, step: int) -> str:
        assert self._first_bad is not None
        found = {
            term: counter
            for term, counter in zip(self._terms, self._first_bad.tolist(), strict=True)
            if counter >= 0
        }
        first = min(found.values(), default=-1)
        ids = next((ids for counter, ids in self._ids if counter == first), [])
        every = all_gather_objects((found, ids))  # ranks without a finding take part, too
        reports = [(terms, names) for terms, names in every if terms]
        lines = []
        for terms, names in reports:
            first = min(terms.values())
            at_first = [term for term, counter in terms.items() if counter == first]
            shown = ", ".join(names[:_MAX_IDS]) + (", …" if len(names) > _MAX_IDS else "")
            lines.append(
                f"loss {' and '.join(repr(t) for t in at_first)} in training batch {first} "
                f"(ids: {shown or 'the batch carries none'})"
            )
        return (
            f"Not finite: {'; '.join(lines)}; noticed after optimiser step {step}. "
            "No checkpoint was written since. Look at these items with `inspect`; if they are "
            "fine, lower model.init_args.optimization.lr, lengthen the warm-up, set "
            "trainer.gradient_clip_val, or use bf16-mixed instead of 16-mixed, and resume from the "
            "last checkpoint."
        )


def check_weights(named: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Raise on every rank when any rank holds a weight that is not finite.

    Args:
        named: Names and tensors; sharded tensors count with their local part.
        step: Optimiser steps done, for the message.

    Raises:
        NotFiniteError: With the names of the first weights concerned.
    """
    names, flags = [], []
    for name, tensor in named:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if local.is_floating_point():
            names.append(name)
            flags.append(~torch.isfinite(local.detach()).all())
    if not flags:
        return
    is_bad = all_reduce_any(torch.stack(flags))
    if bool(is_bad.any()):
        bad = [n for n, flag in zip(names, is_bad.tolist(), strict=True) if flag]
        raise NotFiniteError(
            f"Not finite: {len(bad)} weights, first {', '.join(bad[:5])}, after optimiser step "
            f"{step}, while the losses were. A gradient overflowed: set trainer.gradient_clip_val "
            "or lower model.init_args.optimization.lr, and resume from the last checkpoint. "
            "No checkpoint was written."
        )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Lay nested mappings out with dotted keys; lists stay as they are."""
    if isinstance(value, Mapping) and value:
        flat: dict[str, Any] = {}
        for name, item in value.items():
            flat.update(_flatten(item, f"{prefix}.{name}" if prefix else str(name)))
        return flat
    return {prefix: value}


def check_resume(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    *,
    may_change: Iterable[str],
    constructor: Any,
) -> None:
    """Refuse to resume a checkpoint with other arguments than it was trained with.

    Args:
        saved: `hyper_parameters` of the checkpoint.
        current: Arguments of the objective that is about to continue.
        may_change: Names of arguments that may differ.
        constructor: The objective's `__init__`; an argument that the checkpoint does not know
            counts as its default.

    Raises:
        ConfigError: With every difference.
    """
    parameters = inspect.signature(constructor).parameters.items()
    defaults = _flatten(
        {n: plain(p.default) for n, p in parameters if p.default is not inspect.Parameter.empty}
    )
    old, new = _flatten(saved), _flatten(current)
    allowed = tuple(may_change)
    lines = []
    for name in sorted(old.keys() | new.keys()):
        top = name.split(".")[0]
        if top in allowed or name in allowed or name.startswith("_"):
            continue
        if name not in old and name in defaults and defaults[name] == new.get(name):
            continue
        before, now = old.get(name, "(not there)"), new.get(name, "(not there)")
        if before != now:
            lines.append(f"  {name}: checkpoint {before!r}, configuration {now!r}")
    if lines:
        raise ConfigError(
            "The checkpoint was trained with other model arguments than the configuration has:\n"
            + "\n".join(lines)
            + "\nResuming continues the same run, so give the checkpoint's values; to train on "
            "from its weights with other settings, start a new run with "
            "model.init_args.encoding.weights "
            f"set to this file. These may differ: {', '.join(allowed)}."
        )
