"""The steps that `fit --plan` takes: small ones first, whole ones where they are affordable."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from domainssl.cli.console import error_console
from domainssl.cli.run.plan_steps import (
    TIMED,
    Measured,
    Phase,
    StepMeter,
    first_items,
    with_batches,
)

__all__ = [
    "Bounds",
    "is_affordable",
    "memory_facts",
    "small_steps",
    "step_seconds",
    "tell",
    "whole_steps",
]

_SAFE = 0.9  # share of the device's memory that an estimate may take before it is tried
_WHOLE = ("warm", "memory", *("time",) * TIMED)
_BEGUN = time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How much is measured.

    Attributes:
        items: Sizes of small steps.
        slow_s: Seconds of the first step of the smallest size after which no larger one is taken.
        whole_s: Seconds that steps of whole batches may take together.
    """

    items: tuple[int, ...] = (2, 4)
    slow_s: float = 4.0
    whole_s: float = 30.0


def tell(text: str) -> None:
    """Say what a plan does now, with the seconds since the start."""
    seconds = time.perf_counter() - _BEGUN
    error_console().print(f"plan, {seconds:4.0f} s: {text}", markup=False, highlight=False)


def small_steps(run: Any, batch: Mapping[str, Any], size: int, bounds: Bounds) -> Measured:
    """Take steps of a few items each.

    Args:
        run: Trainer, model and data.
        batch: At least so many items.
        size: Items of a whole batch; steps that are no smaller are left to `whole_steps`.
        bounds: How much is measured.
    """
    few = [n for n in bounds.items if n < size]
    phases = [Phase(items=n, kind=kind) for n in few for kind in ("warm", "memory")]
    if not phases:
        return Measured()
    return _train(run, [first_items(batch, p.items) for p in phases], phases, bounds.slow_s)


def is_affordable(found: Measured, size: int, memory: int, bounds: Bounds) -> bool:
    """Whether steps of the whole batch fit, and end soon; notes in `found` if they do not fit."""
    if found.failed_at is not None:
        return False
    if not found.memory:  # nothing smaller than the batch was measured
        return True
    fixed, slope = _line(found)
    found.fits = fixed + slope * size <= _SAFE * memory
    return found.fits and len(_WHOLE) * (step_seconds(found, size) or 0.0) <= bounds.whole_s


def whole_steps(run: Any, batches: Sequence[Any], size: int, found: Measured) -> Measured:
    """Take steps of the whole batch, and add what they tell to what small ones have told."""
    phases = [Phase(items=size, kind=kind) for kind in _WHOLE]
    steps = [batches[index % len(batches)] for index in range(len(phases))]
    whole = _train(run, steps, phases, math.inf)
    whole.memory = {**found.memory, **whole.memory}
    whole.passes = {**found.passes, **whole.passes}
    return whole


def step_seconds(found: Measured, size: int) -> float | None:
    """Return the seconds of a step: the median, or the pace of small steps without the optimiser.

    None where no step was taken.
    """
    if found.seconds:
        return statistics.median(found.seconds)
    if not found.paces:
        return None
    items, (seconds, update) = max(found.paces.items())
    return update + (seconds - update) * size / items


def _train(run: Any, batches: list[Any], phases: list[Phase], slow_s: float) -> Measured:
    meter = StepMeter(phases, slow_s, tell)
    trainer = run.trainer
    trainer.callbacks[:] = [meter]
    trainer.fit_loop.max_epochs = trainer.current_epoch + 1
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # so that another size starts afresh
    with _out_of_memory_is_told(meter), warnings.catch_warnings():
        for text in (".*have no `val_dataloader`.*", ".*module.s. in eval mode.*"):
            warnings.filterwarnings("ignore", message=text)
        trainer.fit(run.model, datamodule=with_batches(run.datamodule, batches))
    trainer.fit_loop.epoch_progress.reset()
    return meter.found


@contextmanager
def _out_of_memory_is_told(meter: StepMeter) -> Iterator[None]:
    """Leave it to the plan to say that a step did not fit."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError):
        assert meter.found.failed_at is not None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) or meter.found.failed_at is None:
            raise


def _line(found: Measured) -> tuple[float, float]:
    """Return bytes that do not depend on the batch, and bytes per item.

    Through two sizes; of one, above what is held before the step, without the optimiser's own
    copies, which do not grow with the batch.
    """
    memory = found.memory
    (few, low), (many, high) = min(memory.items()), max(memory.items())
    if few < many:
        slope = max(1.0, (high - low) / (many - few))
        return max(0.0, low - slope * few), slope
    if few in found.passes:
        fixed = min(found.held, found.passes[few])
        return float(fixed), max(1.0, (found.passes[few] - fixed) / few)
    return 0.0, low / few


def memory_facts(found: Measured, size: int, available: int) -> dict[str, Any]:
    """Return the bytes that one device needs, and the largest batch that fits."""
    is_measured = size in found.memory
    if not found.memory:
        return {
            "bytes_per_device": None, "is_measured": False, "failed_at": found.failed_at,
            "largest_batch": 0, "available_bytes": available,
        }  # fmt: skip
    fixed, slope = _line(found)
    expected = max(fixed + slope * size, *found.memory.values())
    return {
        "bytes_per_device": round(found.memory[size] if is_measured else expected),
        "is_measured": is_measured,
        "measured_at": sorted(found.memory),
        "bytes_without_items": round(fixed),
        "bytes_per_item": round(slope),
        "largest_batch": max(0, math.floor((_SAFE * available - fixed) / slope)),
        "failed_at": found.failed_at,
        "available_bytes": available,
    }
