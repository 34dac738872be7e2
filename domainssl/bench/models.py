"""The model that the subjects measure: CROMA in its published sizes, on made-up pixels."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from domainssl.backbones.croma import PUBLISHED_MODALITIES
from domainssl.bench.report import Settings
from domainssl.modality import Batch, Modality
from domainssl.objectives.base import Objective
from domainssl.objectives.croma import CROMA, CROMAEncoding

__all__ = [
    "PeakMemory",
    "autocast",
    "batch_size",
    "croma",
    "forward_backward",
    "made_up_batch",
    "peak_memory",
]

_PATCH = 8


def modalities(side: int) -> dict[str, Modality]:
    """Return radar and optical as published, in windows of `side` pixels."""
    return {name: replace(m, size=(side, side)) for name, m in PUBLISHED_MODALITIES.items()}


def batch_size(settings: Settings) -> int:
    """Return the items per step: small on a CPU, enough to fill a GPU there."""
    full = 64 if settings.device.startswith("cuda") else 4
    return settings.pick(full, 2, settings.batch)


def croma(settings: Settings, side: int = 120) -> CROMA:
    """Return CROMA-base (in quick runs CROMA-tiny) in training mode on the device."""
    from domainssl.nn.blocks import set_attention_path

    torch.manual_seed(0)
    encoding = CROMAEncoding(size="tiny" if settings.quick else "base", patch_size=_PATCH)
    known: dict[str, Any] = {n: m.to_dict() for n, m in modalities(side).items()}
    model = CROMA(known, encoding, context_size=side)
    set_attention_path(model.backbone, settings.attention)
    return model.to(settings.device).train()


def made_up_batch(count: int, side: int, device: str) -> Batch:
    """Return plausible values of both sensors, (B, C, side, side), all valid."""
    generator = torch.Generator().manual_seed(0)
    batch: Batch = {"id": [f"item{i}" for i in range(count)]}
    for name, modality in modalities(side).items():
        assert modality.mean is not None and modality.std is not None
        noise = torch.randn(count, modality.num_channels, side, side, generator=generator)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (modality.mean, modality.std))
        low = 0.0 if modality.value_unit == "dn" else -math.inf  # which training checks
        batch[name] = (noise * std + mean).clamp(min=low).to(device)
    return batch


def autocast(settings: Settings) -> Any:
    """Return the autocast of the chosen precision."""
    if settings.precision != "bf16":
        return nullcontext()
    return torch.autocast(settings.device.partition(":")[0], torch.bfloat16)


def forward_backward(
    model: Objective, batch: Batch, settings: Settings, attention: Any = nullcontext
) -> Callable[..., Tensor]:
    """Return one training step without the optimiser, the same draws in every call.

    Args:
        model: The objective; gradients are overwritten, or with `step(keep=True)` added to.
        batch: What it learns from.
        settings: Precision.
        attention: Makes the context in which the step runs.
    """
    draws = model.draw(batch, model.generators(0, 0))

    def step(keep: bool = False) -> Tensor:
        if not keep:
            model.zero_grad(set_to_none=True)
        with attention():
            with autocast(settings):
                loss = torch.stack(list(model(batch, draws).losses.values())).sum()
            loss.backward()
        return loss.detach()

    return step


def peak_memory(run: Callable[[], Any], device: str) -> int:
    """Return the most bytes of tensors that `run` held at once, beyond those held before it."""
    meter = PeakMemory(device)
    meter.start()
    try:
        run()
    finally:
        most = meter.stop()
    return most


_MARK = "domainssl: mark of PeakMemory"


class PeakMemory:
    """Measures the most bytes of tensors that are held at once between `start` and `stop`.

    On a CPU torch's profiler counts, which must neither start nor stop while an operation that it
    has seen begin, such as a step of an optimiser, has not ended: `mark` divides the time instead.

    Args:
        device: Where the tensors are.

    Attributes:
        until_mark: After `stop`, the most bytes before `mark`; None if that was not called.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.until_mark: int | None = None
        self._before = 0
        self._open = ExitStack()
        self._profiler: Any = None

    def start(self) -> None:
        """Begin to count."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return
        from torch.profiler import ProfilerActivity, profile

        # Counts what torch's allocator hands out and takes back: exact, whatever else runs.
        self._open.enter_context(_no_native_messages())
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._open.enter_context(self._profiler)

    def mark(self) -> None:
        """End the part of which `until_mark` tells."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
            self.until_mark = torch.cuda.max_memory_allocated(self.device) - self._before
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with torch.profiler.record_function(_MARK):
            pass

    def stop(self) -> int:
        """Return the most bytes beyond those held at the start."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
            most = torch.cuda.max_memory_allocated(self.device) - self._before
            return most if self.until_mark is None else max(most, self.until_mark)
        self._open.close()
        events = self._profiler.profiler.kineto_results.events()
        self._profiler = None
        held = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
            elif event.name() == _MARK:
                self.until_mark = most
        return most


@contextmanager
def _no_native_messages() -> Iterator[None]:
    """Drop what the profiler's C++ part tells stderr: sessions, devices that are not there."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
