"""The folder of one run, and what is recorded about it before training begins."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from domainssl.errors import ConfigError

__all__ = [
    "free_metrics_folder",
    "git_revision",
    "keep_earlier",
    "new_run_dir",
    "refuse_used_folder",
    "versions",
    "write_json",
]

RUN_DIR_VARIABLE = "DOMAINSSL_RUN_DIR"
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


def new_run_dir(name: str, verb: str, explicit: str | None = None) -> Path:
    """Choose the folder of this run; the same one on all its processes.

    Processes that a launcher starts later find it in the environment. A SLURM job keeps its
    folder when it is requeued, so that it finds the checkpoint it left.
    """
    if explicit:
        return Path(explicit).expanduser()
    if not is_first_process() and RUN_DIR_VARIABLE in os.environ:
        return Path(os.environ[RUN_DIR_VARIABLE])
    suffix = "" if verb == "fit" else f"_{verb}"
    base = Path("runs") / name
    job = os.environ.get("SLURM_JOB_ID")
    if job and os.environ.get("SLURM_NTASKS", "1") != "1":
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

    Raises:
        ConfigError: The folder holds a run.
    """
    is_requeued = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    if is_requeued or not is_first_process() or not (folder / "run.json").exists():
        return
    raise ConfigError(
        f"run_dir {str(folder)!r} holds a run already. Choose another folder, or continue that "
        "run with --ckpt_path=last."
    )


def free_metrics_folder(folder: Path) -> str:
    """Return where a run's CSV goes inside its folder: a resumed run keeps the earlier file."""
    if not (folder / "metrics.csv").exists():
        return ""
    count = 1
    while (folder / f"resumed_{count}" / "metrics.csv").exists():
        count += 1
    return f"resumed_{count}"


def keep_earlier(path: Path) -> None:
    """Give a file that is about to be written again a numbered name: `run.1.json`."""
    if path.exists():
        count = 1
        while path.with_suffix(f".{count}{path.suffix}").exists():
            count += 1
        path.replace(path.with_suffix(f".{count}{path.suffix}"))


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


def write_json(path: Path, data: object) -> None:
    """Write JSON completely or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def command_line() -> list[str]:
    """Return the words this process was started with."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
