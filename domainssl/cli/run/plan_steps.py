"""A few real steps of a run: their time, and the most memory they hold."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from domainssl.bench.models import PeakMemory
from domainssl.modality import Modality, key

__all__ = ["Measured", "Phase", "StepMeter", "first_items", "held_bytes", "with_batches"]

TIMED = 3  # steps whose time is measured, after others have warmed up
_KINDS = {"warm": "to warm up", "memory": "for its memory", "time": "for its time"}


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One step to take.

    Attributes:
        items: Size of its batch.
        kind: `warm` is not measured, `memory` and `time` say what is.
    """

    items: int
    kind: str


@dataclass(kw_only=True)
class Measured:
    """What the steps so far have told.

    Attributes:
        memory: Bytes held at once, parameters and states included, by size of the batch.
        seconds: Of the steps that were timed.
        optimizer_bytes: State of the optimiser.
        tokens: Tokens of one item, by modality and `joint`.
        failed_at: Size of the batch that did not fit, if one did not.
        paces: Seconds of the last step by size of the batch, and those of them in the optimiser.
        held: Bytes at the start of a measured step, without the batch.
        passes: Bytes held at once by forward and backward pass, by size of the batch.
        fits: Whether a step of the whole batch is expected to fit.
    """

    memory: dict[int, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    optimizer_bytes: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    failed_at: int | None = None
    paces: dict[int, tuple[float, float]] = field(default_factory=dict)
    held: int = 0
    passes: dict[int, int] = field(default_factory=dict)
    fits: bool = True


def first_items(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the first items of a batch."""
    return {
        name: value[:count] if isinstance(value, Tensor | list) else value
        for name, value in batch.items()
    }


def held_bytes(module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> int:
    """Return the bytes of parameters, gradients, buffers and the states of optimisers."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [p.grad for p in module.parameters() if p.grad is not None]
    for optimizer in optimizers:
        tensors += _states(optimizer)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if _is_tensor(v)]


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


class StepMeter(Callback):
    """Measures the steps of a training whose batches are those of `phases`.

    Args:
        phases: What to measure of each step, in order.
        slow_s: Seconds of a first step after which the steps end with the next one.
        tell: Is told of every step before it is taken.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        slow_s: float = math.inf,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.phases = list(phases)
        self._slow_s, self._tell = slow_s, tell
        self._updating: float | None = None
        self.found = Measured()
        self._meter: PeakMemory | None = None
        self._held = 0
        self._begun = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to count."""
        phase, device = self.phases[batch_idx], str(pl_module.device)
        place = f"step {batch_idx + 1} of {len(self.phases)}"
        self._tell(f"{place}: {phase.items} items, {_KINDS[phase.kind]}")
        self.found.failed_at = phase.items  # until its end
        if batch_idx == 0:
            self.found.tokens = _tokens(pl_module, batch)
        if phase.kind == "memory":
            self._held = held_bytes(pl_module, trainer.optimizers) + _batch_bytes(batch)
            if device.startswith("cuda"):
                self._held = torch.cuda.memory_allocated(device)
            self.found.held = self._held - _batch_bytes(batch)
            self._meter = PeakMemory(device)
            self._meter.start()
        self._updating = None
        _wait(device)
        self._begun = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Tell what grows with the batch apart from the optimiser, which does not."""
        if self._meter is not None and self._updating is None:
            self._meter.mark()
        _wait(str(pl_module.device))
        self._updating = self._updating or time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note what was measured."""
        phase = self.phases[batch_idx]
        _wait(str(pl_module.device))
        now = time.perf_counter()
        update = 0.0 if self._updating is None else now - self._updating
        self.found.paces[phase.items] = (now - self._begun, update)
        if phase.kind == "time":
            self.found.seconds.append(now - self._begun)
        if self._meter is not None:
            self.found.memory[phase.items] = self._held + self._meter.stop()
            if self._meter.until_mark is not None:
                self.found.passes[phase.items] = self._held + self._meter.until_mark
            self._meter = None
        if batch_idx == 0 and now - self._begun > self._slow_s:
            self.phases = self.phases[:2]
        if batch_idx + 1 == len(self.phases):
            trainer.should_stop = True
        states = [t for optimizer in trainer.optimizers for t in _states(optimizer)]
        self.found.optimizer_bytes = sum(t.untyped_storage().nbytes() for t in states)
        self.found.failed_at = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End a measurement that a step did not survive."""
        if self._meter is not None:
            self._meter.stop()
            self._meter = None


def _tokens(model: LightningModule, batch: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens of one item of a batch on the device."""
    backbone: Any = getattr(model, "backbone", None)
    if backbone is None:
        return {}
    few, dates = _one_date(first_items(batch, 1), backbone.modalities)
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad():
        features = backbone.encode(backbone.normalize(few))
    backbone.train(was_training)
    return {name: dates * int(tokens.shape[1]) for name, tokens in features.tokens.items()}


def _one_date(
    batch: dict[str, Any], modalities: Mapping[str, Modality]
) -> tuple[dict[str, Any], int]:
    """Return the first date where a task shows several to an encoder of images, and their number.

    Change between two dates does so.
    """
    dates = 1
    for name, modality in modalities.items():
        value = batch.get(name)
        if isinstance(value, Tensor) and value.ndim == len(modality.axes.split()) + 1:
            dates = value.shape[1]
            valid = batch.get(key(name, "valid"))
            batch = {n: v for n, v in batch.items() if not n.startswith(f"{name}.")}
            batch[name] = value[:, 0]
            if valid is not None:
                batch[key(name, "valid")] = valid[:, 0]
    return batch, dates


def _batch_bytes(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else ()
    return sum(v.untyped_storage().nbytes() for v in values if isinstance(v, Tensor))


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


class _Batches:
    """Batches in order; a list would be taken for several loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class _Held(LightningDataModule):
    """A DataModule that yields given batches, and is the real one in everything else."""

    def __init__(self, inner: LightningDataModule, batches: Sequence[Any]) -> None:
        super().__init__()
        self.inner, self.batches = inner, _Batches(batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def train_dataloader(self) -> _Batches:
        """Return the batches."""
        return self.batches

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Do what the real one does."""
        return self.inner.on_before_batch_transfer(batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Do what the real one does."""
        return self.inner.on_after_batch_transfer(batch, dataloader_idx)


def with_batches(inner: LightningDataModule, batches: Sequence[Any]) -> LightningDataModule:
    """Return a DataModule that trains on given batches and is `inner` in everything else.

    Args:
        inner: The real one, set up.
        batches: What its stream would yield.
    """
    return _Held(inner, batches)
