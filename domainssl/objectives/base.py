"""What every pretraining method shares: optimiser, randomness, logging, guards, resume.

A method implements `draw`, `forward` and, where it keeps a teacher or a queue, `after_step`.
Everything random happens in `draw`; `forward` is a function of the batch and the draws.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor, nn

from domainssl.arguments import Recorded, class_of, plain
from domainssl.backbones.base import Backbone, Features
from domainssl.distributed import all_reduce_sum, rank, world_size
from domainssl.errors import ConfigError
from domainssl.modality import Batch, Modality, as_modalities
from domainssl.options import as_dataclass
from domainssl.training.execution import Execution, apply_execution
from domainssl.training.guard import FiniteGuard, check_resume, check_weights
from domainssl.training.optimization import Optimization, make_optimizer
from domainssl.training.presence import PresenceRecord
from domainssl.units import UnitCheck

__all__ = ["Generators", "Objective", "Optimization", "Step"]

logger = logging.getLogger(__name__)

_SHARED = 2**32 - 1  # stands where the rank stands in the seed
_VALIDATION = 1


@dataclass(frozen=True)
class Step:
    """What one forward pass of an objective returns.

    Attributes:
        losses: Scalar float32 loss per term; their sum is minimised.
        outputs: On request `reconstruction` {modality: {"input", "visible", "predicted":
            (B, C, *S) in normalised units}} and `embeddings` {modality: (B, E)}; besides what
            `after_step` needs.
    """

    losses: dict[str, Tensor]
    outputs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Generators:
    """Sources of randomness of one step, on the objective's device.

    Attributes:
        local: Differs between ranks.
        shared: Equal on all ranks.
    """

    local: torch.Generator
    shared: torch.Generator


class Objective(Recorded, LightningModule):
    """Base of all pretraining methods.

    A subclass calls `super().__init__`, builds its backbone and assigns it to `self.backbone`.

    Args:
        optimization: Optimiser and schedule, or a mapping of its arguments.
        seed: Seed of everything random in the method.
        allow_accumulation: Let a contrastive method run with `accumulate_grad_batches` > 1,
            though its negatives then come from one part of the batch only.
        execution: Speed and memory: gradient checkpointing, compilation, kind of attention.
        context_size: Side in pixels or voxels of what the DataModule yields, None for any.
        check_units: Look at the first batches and refuse values in another unit than the model's.
    """

    backbone: Backbone
    contrastive: ClassVar[bool] = False
    resume_may_change: ClassVar[tuple[str, ...]] = (
        "weights",
        "allow_accumulation",
        "execution",
        "check_units",
    )

    def __init__(
        self,
        *,
        optimization: Optimization | Mapping[str, Any] | None = None,
        seed: int = 0,
        allow_accumulation: bool = False,
        execution: Execution | Mapping[str, Any] | None = None,
        context_size: int | tuple[int, ...] | None = None,
        check_units: bool = True,
    ) -> None:
        super().__init__()
        if seed < 0:
            raise ConfigError(f"model.init_args.seed: got {seed}, expected zero or more.")
        self.optimization = Optimization.of(optimization)
        self.seed = seed
        self.allow_accumulation = allow_accumulation
        self.execution = as_dataclass(Execution, execution or Execution())
        self.context_size = context_size
        self.check_units = check_units
        self.total_steps: int | None = None
        if "optimization" in self.arguments:
            self.arguments["optimization"] = plain(self.optimization)
        self._set_hparams(copy.deepcopy(self.arguments))
        self._batch_counter = 0
        self._is_sharded = False
        self._guard = FiniteGuard()
        self._last_step: Step | None = None
        self._presence = PresenceRecord()
        self._units: UnitCheck | None = None

    # -- what a method implements -----------------------------------------------------------

    def draw(self, batch: Batch, generators: Generators) -> Any:
        """Return every random choice of one step as tensors."""
        raise NotImplementedError(f"{type(self).__name__} must implement draw(batch, generators).")

    def forward(self, batch: Batch, draws: Any, outputs: bool = False) -> Step:
        """Compute the losses of a batch from its draws, and `Step.outputs` on request."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward(batch, draws).")

    def after_step(self, step: Step) -> None:
        """Change what changes after the optimiser: teachers, centres, queues.

        Called once per optimiser step, before anything can save a checkpoint; `step` is that of
        the last batch, detached.
        """

    def check(self, modalities: Mapping[str, Modality]) -> None:
        """Refuse modalities the method cannot use; the base asks the backbone.

        Raises:
            ConfigError: Naming the modality and what was expected.
        """
        self.backbone.check(modalities)

    def embed(self, features: Features) -> dict[str, Tensor]:
        """Return vectors (B, E) per modality in the space the method compares modalities in.

        Evaluation retrieves across modalities with them; the base returns pooled features.
        """
        return {n: v for n, v in features.pooled.items() if n in self.backbone.modalities}

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield what is trained by this modality alone; a method adds its decoders and heads."""
        yield from self.backbone.modality_parameters(name)

    # -- the loop ---------------------------------------------------------------------------

    def generators(self, *key_parts: int) -> Generators:
        """Seed both generators and the global one from the seed and `key_parts`.

        The global generator (dropout) follows the local one.
        """
        local, dropout = _seeds(self.seed, *key_parts, rank())
        shared, _ = _seeds(self.seed, *key_parts, _SHARED)
        torch.manual_seed(dropout)
        return Generators(
            torch.Generator(self.device).manual_seed(local),
            torch.Generator(self.device).manual_seed(shared),
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the summed loss of one batch."""
        counter = self._batch_counter
        self._batch_counter += 1
        draws = self.draw(batch, self.generators(0, counter))
        self._presence.note(batch, list(self.backbone.modalities), self.device)
        step: Step = self(batch, draws)
        self._guard.watch(step.losses, counter, batch.get("id", ()))
        self._last_step = Step({k: v.detach() for k, v in step.losses.items()}, step.outputs)
        total = torch.stack([loss.float() for loss in step.losses.values()]).sum()
        if self._is_logging_step():
            self._log_training(self._last_step.losses)
        return total

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss with the same draws in every epoch, so that epochs compare."""
        with torch.random.fork_rng(devices=self._cuda_devices()):
            draws = self.draw(batch, self.generators(_VALIDATION, dataloader_idx, batch_idx))
            step: Step = self(batch, draws)
        total = torch.stack([loss.float() for loss in step.losses.values()]).sum()
        size = self._batch_size(batch)
        common: dict[str, Any] = {"on_epoch": True, "sync_dist": True, "batch_size": size}
        self.log("val/loss", total, prog_bar=True, add_dataloader_idx=False, **common)
        for name, loss in step.losses.items():
            self.log(f"val/loss/{name}", loss, add_dataloader_idx=False, **common)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Features:
        """Return the backbone's features."""
        return self.features(batch)

    def features(self, batch: Batch) -> Features:
        """Return the backbone's features; the entry for callbacks, sharded or not."""
        features: Features = self.backbone(batch)
        return features

    def configure_model(self) -> None:
        """Shard the model where the strategy has a device mesh (`ModelParallelStrategy`)."""
        if self.device_mesh is not None and not self._is_sharded:
            from domainssl.training.sharding import shard

            self._is_sharded = True
            shard(self, self.backbone, self.device_mesh["data_parallel"])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the method follow; a checkpoint saved after the batch holds both."""
        if self.total_steps is None:
            raise RuntimeError(
                f"{type(self).__name__}.on_train_start must call super().on_train_start(): "
                "the schedule does not know the number of steps."
            )
        super().optimizer_step(*args, **kwargs)
        assert self._last_step is not None
        with torch.no_grad():
            self.after_step(self._last_step)
        self._last_step = None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep weights of modalities that no rank has seen untouched by momentum and decay."""
        for name in self._presence.absent(list(self.backbone.modalities)):
            for parameter in self.modality_parameters(name):
                parameter.grad = None

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Look at the guard where the run waits for the device anyway."""
        if self._is_logging_step():
            self.check_finite()

    def check_finite(self) -> None:
        """Raise on all ranks when a loss was not finite since the start.

        Raises:
            NotFiniteError: Naming term, step and ids.
        """
        self._guard.check(self.trainer.global_step)

    # -- optimiser and schedule -------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule per optimiser step."""
        options = self.optimization
        optimizer = make_optimizer(self.named_parameters(), options)

        def scale(step: int) -> float:
            return 0.0 if self.total_steps is None else options.scale(step, self.total_steps)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Learn how long the run is, now that the loaders exist, and set the learning rate.

        Reading `trainer.estimated_stepping_batches` earlier would build the loaders before the
        DataModule's state is restored, and drop it (pytorch-lightning#21765).
        """
        self.total_steps = self._count_steps()
        for config in self.trainer.lr_scheduler_configs:
            schedule = config.scheduler
            rates = [
                base * self.optimization.scale(schedule.last_epoch, self.total_steps)
                for base in schedule.base_lrs
            ]
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates

    def _count_steps(self) -> int:
        trainer = self.trainer
        limits = [float(trainer.max_steps)] if trainer.max_steps >= 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            batches = trainer.num_training_batches
            per_epoch = (
                math.ceil(batches / trainer.accumulate_grad_batches)
                if math.isfinite(batches)
                else math.inf
            )
            limits.append(per_epoch * trainer.max_epochs)
        total = min(limits, default=math.inf)
        if not math.isfinite(total):
            raise ConfigError(
                "The length of the run is not known, and the learning rate follows it: "
                f"got trainer.max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps} and "
                f"{trainer.num_training_batches} batches per epoch. Set trainer.max_steps."
            )
        return max(1, int(total))

    # -- checks before the run --------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compare the method with trainer and data before anything is computed."""
        self._check_precision()
        if stage == "fit":
            self._check_accumulation()
        datamodule = getattr(self.trainer, "datamodule", None)
        modalities = getattr(datamodule, "modalities", None)
        if modalities:
            self.check(as_modalities(modalities))
        found = getattr(datamodule, "context_size", None)
        if None not in (found, self.context_size) and not _is_same(found, self.context_size):
            raise ConfigError(
                f"data yields windows of {found} pixels, but model.init_args.context_size is "
                f"{self.context_size}. Set both to the same value."
            )
        stated = getattr(datamodule, "units_stated", ())
        self._units = UnitCheck(self.backbone.modalities, stated) if self.check_units else None
        apply_execution(self.backbone, self.execution)

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Look at the units of the first batches, while they are on the CPU.

        Lightning calls this for every batch, whoever owns the hook of the same name.
        """
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        if self._units is not None:
            stage = str(getattr(self.trainer.state.stage, "value", ""))
            self._units.look(batch, f"{stage} ({dataloader_idx})" if dataloader_idx else stage)
        return batch

    def _check_precision(self) -> None:
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and not precision.startswith(("32", "64")):
            raise ConfigError(
                f"trainer.precision is {precision!r}: weights, statistics and input would be "
                "half precision, which rounds digital numbers before they are normalised. "
                "Use bf16-mixed, 16-mixed or 32-true."
            )

    def _check_accumulation(self) -> None:
        parts = self.trainer.accumulate_grad_batches
        if parts == 1 or not self.contrastive:
            return
        text = (
            f"accumulate_grad_batches is {parts}: {type(self).__name__} contrasts items within one "
            f"forward pass, so its contrastive batch is 1/{parts} of global_batch_size"
        )
        if not self.allow_accumulation:
            raise ConfigError(
                f"trainer.{text}. Use more devices, or execution.gradient_checkpointing for a "
                "larger batch, or accept it with model.init_args.allow_accumulation: true."
            )
        logger.warning("%s; allowed by allow_accumulation.", text)

    # -- checkpoints ------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the batch counter; raise before a file exists when a loss or weight is not finite."""
        if self.trainer.state.fn == "fit":
            self.check_finite()
            check_weights(self.named_parameters(), self.trainer.global_step)
        checkpoint["objective"] = {"batches": self._batch_counter}
        checkpoint["backbone"] = {
            "name": class_of(self.backbone).__name__,
            "arguments": copy.deepcopy(self.backbone.arguments),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the batch counter; a run continues with the arguments it began with."""
        if self._trainer is not None and self._trainer.state.fn == "fit":
            check_resume(
                checkpoint.get("hyper_parameters", {}),
                self.arguments,
                may_change=self.resume_may_change,
                constructor=type(self).__init__,
            )
        self._batch_counter = int(checkpoint.get("objective", {}).get("batches", 0))

    # -- helpers ----------------------------------------------------------------------------

    def _is_logging_step(self) -> bool:
        trainer = self._trainer
        if trainer is None:
            return False
        return bool(trainer._logger_connector.should_update_logs)

    def _log_training(self, losses: Mapping[str, Tensor]) -> None:
        """Log the mean over ranks of every term and of their sum, with one collective."""
        values = torch.stack([loss.float() for loss in losses.values()])
        values = all_reduce_sum(values) / world_size()
        self.log("train/loss", values.sum(), prog_bar=True, batch_size=1)
        for name, value in zip(losses, values, strict=True):
            self.log(f"train/loss/{name}", value, prog_bar=True, batch_size=1)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("train/lr", float(rate), batch_size=1)

    def _batch_size(self, batch: Batch) -> int:
        return len(next(batch[name] for name in self.backbone.modalities if name in batch))

    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []


def _seeds(*parts: int) -> tuple[int, int]:
    """Return two independent 63-bit seeds."""
    words = np.random.SeedSequence(parts).generate_state(2, np.uint64)
    return int(words[0] >> np.uint64(1)), int(words[1] >> np.uint64(1))


def _is_same(size: Any, other: Any) -> bool:
    """Compare sizes axis by axis, in order; a number stands for all axes."""
    if isinstance(size, int):
        size, other = other, size
    if isinstance(other, int):
        return size == other if isinstance(size, int) else set(size) == {other}
    return tuple(size) == tuple(other)
