"""The folder of one run, and what is recorded about it before training begins."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from domainssl.errors import ConfigError

__all__ = [
    "free_metrics_folder",
    "git_revision",
    "keep_earlier",
    "last_checkpoint",
    "new_run_dir",
    "own_checkpoint",
    "refuse_used_folder",
    "remove_start",
    "sole_writer",
    "versions",
]

logger = logging.getLogger(__name__)

RUN_DIR_VARIABLE = "DOMAINSSL_RUN_DIR"
_AT_START = ("config.yaml", "run.json", "metrics.csv", "hparams.yaml", "events.out.tfevents")
_LIBRARIES = (
    "domainssl",
    "torch",
    "lightning",
    "numpy",
    "zarr",
    "numcodecs",
    "safetensors",
    "jsonargparse",
    "torchgeo",
    "monai",
    "rasterio",
)


def is_first_process() -> bool:
    """Return True on the process that writes, as far as the environment tells."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return all(rank in ("", "0") for rank in ranks)


def new_run_dir(
    name: str, verb: str, explicit: str | None = None, auto_resume: bool = False
) -> Path:
    """Choose the folder of this run; the same one on all its processes.

    Processes that a launcher starts later find it in the environment. A SLURM job keeps its
    folder when it is requeued, so that it finds the checkpoint it left.

    Args:
        name: Name of the run.
        verb: The verb of the command line.
        explicit: The folder that the user chose.
        auto_resume: A job of a single task keeps its folder, too; without it such a job may be
            an interactive one with many runs.
    """
    if explicit:
        return Path(explicit).expanduser()
    if not is_first_process() and RUN_DIR_VARIABLE in os.environ:
        return Path(os.environ[RUN_DIR_VARIABLE])
    suffix = "" if verb == "fit" else f"_{verb}"
    base = Path("runs") / name
    job = os.environ.get("SLURM_JOB_ID")
    if job and (auto_resume or os.environ.get("SLURM_NTASKS", "1") != "1"):
        return base / f"slurm_{job}{suffix}"
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    folder = base / f"{stamp}{suffix}"
    count = 1
    while folder.exists():
        count += 1
        folder = base / f"{stamp}-{count}{suffix}"
    return folder


def refuse_used_folder(folder: Path) -> None:
    """Refuse to start a new run in the folder of another; a requeued job is the same run.

    A start that failed before anything was trained leaves records only and does not count.

    Raises:
        ConfigError: The folder holds a run.
    """
    is_requeued = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    has_trained = _checkpoints(folder) or (folder / "metrics.csv").exists()
    if is_requeued or not is_first_process() or not has_trained:
        return
    raise ConfigError(
        f"run_dir {str(folder)!r} holds a run already. Choose another folder, or continue that "
        "run with --ckpt_path=last."
    )


def own_checkpoint(folder: Path, name: str | None = None) -> tuple[Path, Path] | None:
    """Return the folder of the run to go on with and its newest checkpoint, None for a new run.

    Besides `checkpoints/last.ckpt` this is what Lightning leaves when SLURM takes the machine
    away, `hpc_ckpt_<n>.ckpt`.

    Args:
        folder: Folder of this run.
        name: Where the folder is not known beforehand, name of the run: the newest run of that
            name is looked at.
    """
    if name is not None and not _checkpoints(folder) and is_first_process():
        base = Path("runs") / name
        runs = [path.parent.parent for path in base.glob("*/checkpoints/last.ckpt")]
        folder = max(runs, key=lambda run: _age(_checkpoints(run)[-1]), default=folder)
    found = _checkpoints(folder)
    return (folder, found[-1]) if found else None


def _checkpoints(folder: Path) -> list[Path]:
    """Return what a run can go on from, the newest last."""
    found = [folder / "checkpoints" / "last.ckpt", *folder.glob("hpc_ckpt_*.ckpt")]
    return sorted((path for path in found if path.exists()), key=_age)


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns


def last_checkpoint(folder: Path, name: str | None) -> Path:
    """Return the newest checkpoint of this run's folder, else of the earlier runs of its name.

    Args:
        folder: Folder of this run.
        name: Name of the run; None where the user has named the folder, which alone counts then.

    Raises:
        ConfigError: There is none.
    """
    found = _checkpoints(folder)
    if not found and name is None:
        raise ConfigError(
            f"--ckpt_path last: run_dir {str(folder)!r} holds no checkpoint. Name the file, or "
            "start without --ckpt_path."
        )
    if not found:
        base = Path("runs") / str(name)
        found = sorted(base.glob("*/checkpoints/last.ckpt"), key=_age)
        if not found:
            raise ConfigError(
                f"--ckpt_path last: no checkpoints/last.ckpt in {str(base)!r} or in the run's "
                "folder. Name the file, or start without --ckpt_path."
            )
    return found[-1]


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a run's folder against other runs; the lock goes when the process does.

    A run that goes on in a folder whose first run is still alive would mix both.

    Raises:
        ConfigError: Another process holds the folder.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    # lockf, because its locks are not inherited: data workers outlive a killed run by seconds
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ConfigError(
                f"run_dir {str(folder)!r}: another process is writing this run at the moment. "
                "Wait for its end, or give this run a folder of its own with --run_dir."
            ) from error
        except OSError as error:
            logger.debug("%s: the file system has no locks (%s)", folder, error)
        yield


def free_metrics_folder(folder: Path) -> str:
    """Return where a run's CSV goes inside its folder: a resumed run keeps the earlier file."""
    if not (folder / "metrics.csv").exists():
        return ""
    count = 1
    while (folder / f"resumed_{count}" / "metrics.csv").exists():
        count += 1
    return f"resumed_{count}"


def keep_earlier(path: Path) -> Path | None:
    """Give a file that is about to be written again a numbered name: `run.1.json`.

    Returns:
        The new name, None where there is no such file.
    """
    if not path.exists():
        return None
    count = 1
    while path.with_suffix(f".{count}{path.suffix}").exists():
        count += 1
    return path.replace(path.with_suffix(f".{count}{path.suffix}"))


def remove_start(folder: Path, before: Set[Path], kept: Mapping[Path, Path]) -> None:
    """Take away what a start without a step has written into a run's folder.

    Args:
        folder: The run's folder.
        before: What was in it before; everything else of `_AT_START` is removed.
        kept: Files that got another name, with their names of before.
    """
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path in before or path in kept:
            continue
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif path.is_file() and path.name.startswith(_AT_START):
            path.unlink()
    for path, name in kept.items():
        path.replace(name)
    if before <= {folder / ".lock"} and [path.name for path in folder.glob("*")] == [".lock"]:
        (folder / ".lock").unlink()
        folder.rmdir()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide results."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "domainssl" not in found:
        from domainssl import __version__

        found["domainssl"] = __version__
    return found


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Return commit and whether files differ from it, or None outside a git checkout."""
    command = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run(
            [*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        status = subprocess.run(
            [*command, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "has_local_changes": bool(status.stdout.strip())}


def command_line() -> list[str]:
    """Return the words this process was started with."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
