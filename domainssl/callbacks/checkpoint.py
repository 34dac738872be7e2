"""Checkpoints that are complete or not there, however a run ends."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from domainssl.errors import ConfigError, DomainSSLError
from domainssl.files import PART, new_file, sync_folder
from domainssl.training._lightning import (
    CheckpointHooks,
    is_last_batch,
    repeat_validation,
    validation_follows,
)

__all__ = ["AtomicCheckpoint", "AtomicCheckpointIO", "CheckpointError"]

logger = logging.getLogger(__name__)


class CheckpointError(DomainSSLError, OSError):
    """A checkpoint could not be written."""


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:
        raise CheckpointError(_failed(target, error)) from error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a hidden name beside the target, synchronises, then renames.

    A crash or a full disk leaves the previous checkpoint, and at worst a hidden `*.part-*` file
    that no resume looks at. Addresses such as `s3://` keep Lightning's own transaction.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: The file could not be written; nothing is left of it.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        with _explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with new_file(target, durable=True) as file, _explained(target):
                torch.save(checkpoint, file)
                file.flush()  # what fails is told with the space that the half file leaves
                os.fsync(file.fileno())


def _failed(path: Path, error: BaseException) -> str:
    reason = _of_the_system(error)
    with suppress(OSError):
        free = shutil.disk_usage(path.parent).free / 1e6
        return (
            f"Checkpoint {str(path)!r} was not written: {reason}. {free:.0f} MB were free there. "
            "Nothing is left of it and earlier checkpoints are untouched; make room (or point "
            "run_dir elsewhere) and resume with --ckpt_path last."
        )
    return f"Checkpoint {str(path)!r} was not written: {reason}. Its folder cannot be used."


def _of_the_system(error: BaseException) -> str:
    """Return what the system said: torch puts a position in its archive in the place of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)


class AtomicCheckpoint(CheckpointHooks):
    """Saves `step_<n>.ckpt` and `last.ckpt`, atomically, and keeps the newest few.

    `last.ckpt` is a second name (hard link) of the newest file, so it never points to nothing.
    For a best checkpoint by a metric add Lightning's ModelCheckpoint beside it; with this
    callback in the run its files are written atomically too.

    Args:
        dirpath: Folder; the run's folder `checkpoints` by default.
        every_n_epochs: Save at the end of every n-th epoch; 0 for never.
        every_n_train_steps: Save after every n-th optimiser step too; 0 for never.
        keep_last: How many of the newest files stay; -1 for all.
        save_on_exception: Save when the run is interrupted, too.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_epochs: int = 1,
        every_n_train_steps: int = 0,
        keep_last: int = 2,
        save_on_exception: bool = False,
    ) -> None:
        _check_counts(keep_last, every_n_epochs, every_n_train_steps)
        super().__init__(
            dirpath=dirpath,
            filename="step_{step:07d}",
            auto_insert_metric_name=False,
            save_top_k=-1,  # retention is ours: it must hold after a resume, too
            save_last="link",
            save_on_exception=save_on_exception,
            every_n_train_steps=every_n_train_steps or None,
            every_n_epochs=None if every_n_train_steps else every_n_epochs,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self.keep_last = keep_last
        self._epochs_between, self._steps_between = every_n_epochs, every_n_train_steps
        self._is_overdue = False  # a checkpoint that waits for the end of a validation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, make writing atomic and clear what a crash left."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        strategy = trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.is_global_zero:
            for part in Path(str(self.dirpath)).glob(f".*{PART}*"):
                part.unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after every n-th step, and what SIGTERM leaves the time for.

        Where a validation follows, the checkpoint waits for its end: a run that goes on with one
        from before would take the validation for done.
        """
        every = self._steps_between
        is_due = every > 0 and trainer.global_step % every == 0
        if validation_follows(trainer):
            self._is_overdue |= is_due
        elif is_due or _is_terminated(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what has waited for a validation within an epoch."""
        if (self._is_overdue or _is_terminated(trainer)) and not is_last_batch(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch, besides the interval in steps."""
        every = self._epochs_between
        is_due = every > 0 and (trainer.current_epoch + 1) % every == 0
        if is_due or self._is_overdue or _is_terminated(trainer):
            self._save(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save on an interruption; after an error of ours the state is not worth saving.

        From what SIGTERM leaves in a validation, a resume does all of it anew.
        """
        if isinstance(exception, SIGTERMException):
            if trainer.world_size == 1:
                if trainer.validating:
                    repeat_validation(trainer)
                self._save(trainer)
        elif not isinstance(exception, DomainSSLError):
            super().on_exception(trainer, pl_module, exception)

    def _save(self, trainer: Trainer) -> None:
        if not self.can_save(trainer):
            return
        self._is_overdue = False
        for target in trainer.loggers:  # what was logged before belongs to the checkpoint
            target.save()
        self.save_now(trainer)

    def after_save(self, trainer: Trainer, path: str) -> None:
        """Remove the oldest files beyond `keep_last`."""
        if trainer.is_global_zero and self.keep_last > 0:
            found = Path(str(self.dirpath)).glob("step_*.ckpt")
            paths = sorted(found, key=lambda file: file.stat().st_mtime_ns)
            for old in paths[: -self.keep_last]:
                _remove(old)

    @staticmethod
    def link_last(trainer: Trainer, path: str, link: str) -> None:
        """Give the newest checkpoint its second name in one step."""
        if trainer.is_global_zero:
            last = Path(link)
            part = last.with_name(f".{last.name}{PART}{os.getpid()}")
            _name_again(Path(path), part)
            if last.is_dir() and not last.is_symlink():
                shutil.rmtree(last)
            part.replace(last)
            sync_folder(last.parent)
        trainer.strategy.barrier()


def _check_counts(keep_last: int, every_n_epochs: int, every_n_train_steps: int) -> None:
    """Refuse what is no number of files or no interval."""
    if keep_last == 0 or keep_last < -1:
        raise ConfigError(
            f"AtomicCheckpoint.keep_last: got {keep_last}, expected 1 or more, or -1 for all."
        )
    for name, every in (
        ("every_n_epochs", every_n_epochs),
        ("every_n_train_steps", every_n_train_steps),
    ):
        if every < 0:
            raise ConfigError(
                f"AtomicCheckpoint.{name}: got {every}, expected 1 or more, or 0 for never."
            )


def _is_terminated(trainer: Trainer) -> bool:
    """Tell whether SIGTERM came; other ranks may not know yet, and saving takes all of them."""
    return trainer.received_sigterm and trainer.world_size == 1


def _name_again(target: Path, name: Path) -> None:
    """Make `name` another name of a file, or point it to a folder of shards."""
    name.unlink(missing_ok=True)
    try:
        if target.is_dir():
            name.symlink_to(target.name)
        else:
            os.link(target, name)
    except OSError:  # file systems without links
        if target.is_dir():
            shutil.copytree(target, name)
        else:
            shutil.copyfile(target, name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
