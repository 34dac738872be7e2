"""Run what was built, and explain the failures that libraries leave to be guessed."""

from __future__ import annotations

import atexit
import pickle
import subprocess
from pathlib import Path
from typing import Any

from domainssl.cli.console import console
from domainssl.errors import WeightsError

__all__ = ["execute"]

_GRACE_S = 5.0  # for other ranks to end by themselves


def execute(run: Any, path: object) -> None:
    """Run, and say in our words what Lightning and torch leave to be guessed.

    A run that cannot go on from its checkpoint, or is at its end already, leaves its folder as it
    was.

    Args:
        run: What `build` returns.
        path: The checkpoint to go on from, if any.

    Raises:
        WeightsError: The checkpoint holds pickled objects, or is cut off.
        RankError: Another rank is gone or silent.
        DataError: A data worker died while something else was computed.
    """
    record = run.record if run.verb == "fit" and path and run.trainer.is_global_zero else None
    if record is None:
        _execute(run, path)
        return
    record.look()
    try:
        _execute(run, path)
    finally:
        if not record.has_begun:
            record.take_back()
    if not record.has_begun:
        console().print(f"[bold]{'finished':<8}[/]", _finished(run.trainer, path, record.completed))


def _finished(trainer: Any, path: object, completed: Path | None) -> str:
    ends = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
    written = "nothing was written"
    if completed is not None:
        written = f"the backbone, which the run had not got to, was exported to {completed}"
    given = [f"trainer.{name}={end}" for name, end in ends.items() if end and end > 0]
    return (
        f"{path} stands at epoch {trainer.current_epoch}, step {trainer.global_step}, and the run "
        f"ends there ({', '.join(given) or 'no training batches'}): nothing was trained, "
        f"{written}. To go on, repeat the command with a larger number."
    )


def _execute(run: Any, path: object) -> None:
    from domainssl.distributed import RankError, is_lost_connection
    from domainssl.loading.workers import dead_worker

    if path and Path(str(path)).is_dir():  # whatever strategy reads it
        from domainssl.training.sharded_folder import check_sharded_folder

        check_sharded_folder(Path(str(path)))
    try:
        run.execute()
    except SystemExit as stop:  # Lightning leaves with 1 after an interrupt
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise
    except pickle.UnpicklingError as error:
        raise WeightsError(_pickled(path)) from error
    except (RuntimeError, EOFError) as error:
        if path and (isinstance(error, EOFError) or "PytorchStreamReader" in str(error)):
            raise WeightsError(_incomplete(path)) from error
        found = dead_worker(error)
        if found is not None:
            raise found from error
        if run.trainer.world_size > 1 and is_lost_connection(error):
            atexit.register(_end_ranks, run.trainer)  # after the message: they may have theirs
            raise RankError(
                f"Rank {run.trainer.global_rank} of {run.trainer.world_size} lost the others: one "
                f"of them has ended, or has not answered in time ({_first_line(error)}). What "
                "ended it stands in its own output; without a message there the system has "
                "killed it, most often for want of memory. Resume with --auto_resume."
            ) from error
        raise
    except BaseException as error:
        if path and _is_of_shards(error):
            raise WeightsError(_incomplete(path)) from error
        raise


def _is_of_shards(error: BaseException) -> bool:
    """Return whether torch could not read a checkpoint in a folder: no `Exception` of its own."""
    return type(error).__name__ == "CheckpointException"


def _end_ranks(trainer: Any) -> None:
    """End the ranks that this process has started: one that hangs would stay for ever."""
    for process in getattr(trainer.strategy.launcher, "procs", []):
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _incomplete(path: object) -> str:
    folder = Path(str(path)).parent
    others = sorted(p.name for p in folder.glob("*.ckpt") if not p.samefile(str(path)))
    advice = f"Beside it lie {', '.join(others)}." if others else "No other lies beside it."
    return (
        f"Checkpoint {str(path)!r} is not complete: it was cut off after it was written, by a "
        f"copy or by the disk. Name another one with --ckpt_path. {advice}"
    )


def _pickled(path: object) -> str:
    return (
        f"Checkpoint {str(path)!r} holds pickled Python objects, or is damaged, and was refused: "
        "unpickling would run whatever code it brings. Checkpoints of domainssl hold plain data "
        "only. For weights of others use model.init_args.encoding.weights with a safetensors "
        "file or a plain state dict."
    )
