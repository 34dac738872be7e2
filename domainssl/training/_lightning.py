"""Private API of Lightning, all of it: an upgrade that moves something fails here and in one test.

Private API of torch stands in `domainssl/_torch.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

__all__ = [
    "CheckpointHooks",
    "CLIHooks",
    "OneGroupStrategy",
    "TransferHook",
    "attached_trainer",
    "is_accumulating",
    "is_end_of_short_epoch",
    "is_last_batch",
    "is_logging_step",
    "record_hyperparameters",
    "repeat_validation",
    "validation_follows",
]


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Return the trainer of a module, None outside a run, where `module.trainer` raises."""
    return module._trainer


def record_hyperparameters(module: LightningModule, arguments: Mapping[str, Any]) -> None:
    """Set what checkpoints hold as `hyper_parameters`, without asking the caller's frame."""
    module._set_hparams(copy.deepcopy(dict(arguments)))


def is_logging_step(trainer: Trainer) -> bool:
    """True while the current training step is one whose metrics go to the loggers."""
    return bool(trainer._logger_connector.should_update_logs)


def is_accumulating(trainer: Trainer) -> bool:
    """True while the last batch was not the end of an optimiser step."""
    return bool(trainer.fit_loop._should_accumulate())


def validation_follows(trainer: Trainer) -> bool:
    """Tell, at the end of a training batch, whether a validation comes next."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def is_last_batch(trainer: Trainer) -> bool:
    """Tell whether the batch that was trained on is the last of its epoch."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def is_end_of_short_epoch(trainer: Trainer) -> bool:
    """Tell whether an epoch ends that has fewer batches than lie between two logging steps."""
    every: Any = getattr(trainer, "log_every_n_steps", 1)
    return bool(every > trainer.num_training_batches) and is_last_batch(trainer)


def repeat_validation(trainer: Trainer) -> None:
    """Let a checkpoint of the middle of a validation say that none of it was done.

    Lightning goes on with a validation that a checkpoint shows within a batch, and counts its
    batches from there; here it is the first one.
    """
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    for tracker in (progress.total, progress.current):
        tracker.reset()
        tracker.ready = tracker.started = 1
    progress.is_last_batch = False


class TransferHook(LightningModule):
    """A module that sees every batch while it is still on the CPU."""

    def look_at_batch(self, batch: Any, dataloader_idx: int) -> None:
        """Look at a batch before it moves to the device."""

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Lightning calls this for every batch, whoever owns the hook of the public name."""
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        self.look_at_batch(batch, dataloader_idx)
        return batch


class OneGroupStrategy(ModelParallelStrategy):
    """Puts all devices of all nodes into one data-parallel group.

    Lightning's own strategy takes one group per node when its sizes are `auto`.
    """

    def setup_environment(self) -> None:
        """Set the size of the group once the number of processes is known."""
        self._data_parallel_size: Any = self.num_nodes * self.num_processes
        super().setup_environment()


class CheckpointHooks(ModelCheckpoint):
    """ModelCheckpoint with public names for the moments around a saved file."""

    def can_save(self, trainer: Trainer) -> bool:
        """False during a sanity check, `fast_dev_run`, or where this step is saved already."""
        return not self._should_skip_saving_checkpoint(trainer)

    def save_now(self, trainer: Trainer) -> None:
        """Save the current step and renew `last`."""
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def after_save(self, trainer: Trainer, path: str) -> None:
        """Follow a file that was written."""

    @staticmethod
    def link_last(trainer: Trainer, path: str, link: str) -> None:
        """Make `link` another name of the newest file."""
        ModelCheckpoint._link_checkpoint(trainer, path, link)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self.after_save(trainer, filepath)

    def _link_checkpoint(self, trainer: Trainer, filepath: str, linkpath: str) -> None:  # type: ignore[override]
        self.link_last(trainer, filepath, linkpath)


class CLIHooks:
    """For a LightningCLI that builds everything first and runs its verb when told to."""

    def run_verb(self, verb: str) -> None:
        """Run what was built."""
        super()._run_subcommand(verb)  # type: ignore[misc]

    def _run_subcommand(self, subcommand: str) -> None:
        """Wait for `run_verb`."""

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: the model compares it with the checkpoint."""
