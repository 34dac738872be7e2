"""Train recipes over seeds, each run in a process of its own, and keep what every run found.

A finished run leaves `learning.json` with all its metrics in `<runs>/<recipe>/seed_<n>/`. A call
that is killed, whenever, is taken up by the next one: finished runs are read, all others begin
anew. A run counts as the same when recipe text, package version and seed are equal.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from domainssl import __version__
from domainssl.errors import ConfigError, DataError
from domainssl.evaluation.criteria import Criterion, learning_criteria
from domainssl.files import write_json

__all__ = ["Finished", "Outcome", "Run", "read_outcome", "source_sha256", "train_all"]

_RESULT = "learning.json"
_LAST_LINES = 15


@dataclass(frozen=True)
class Outcome:
    """What one run measured on held-out items at its end.

    Attributes:
        metrics: Last value of every metric whose name begins with `val/`.
        items: Number of held-out items.
        contrastive: Whether the method compares items across modalities.
        self_distilling: Whether it learns from its own teacher.
    """

    metrics: dict[str, float]
    items: int
    contrastive: bool
    self_distilling: bool = False

    def criteria(self) -> list[Criterion]:
        """Judge the run."""
        return learning_criteria(self.metrics, self.items, self.contrastive, self.self_distilling)

    @property
    def has_learned(self) -> bool:
        """Whether every criterion is met."""
        return all(criterion.passed for criterion in self.criteria())

    @property
    def joint(self) -> str:
        """The features of all modalities together, or those of the only one."""
        prefix = "val/probe/"
        names = [key.removeprefix(prefix) for key in self.metrics if key.startswith(prefix)]
        return "joint" if "joint" in names else names[0]


def read_outcome(folder: str | Path) -> Outcome:
    """Read the folder of a run that `fit` has finished.

    Raises:
        DataError: The folder holds no metrics of `OnlineEvaluation`.
    """
    folder = Path(folder)
    metrics: dict[str, float] = {}
    logs = [folder / "metrics.csv", *folder.glob("resumed_*/metrics.csv")]
    for path in sorted((p for p in logs if p.is_file()), key=lambda p: p.stat().st_mtime_ns):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                metrics.update({k: float(v) for k, v in row.items() if k.startswith("val/") and v})
    if "val/items" not in metrics:
        raise DataError(
            f"{folder}: no metrics of held-out items. Expected the folder of a finished `fit` "
            "whose recipe has the callback OnlineEvaluation and the logger CSVLogger."
        )
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    module, _, name = config["model"]["class_path"].rpartition(".")
    objective = getattr(importlib.import_module(module), name)
    return Outcome(
        metrics=metrics,
        items=int(metrics["val/items"]),
        contrastive=bool(objective.contrastive),
        self_distilling=bool(objective.self_distilling),
    )


@cache
def source_sha256() -> str:
    """Return the hash of the code of this package."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for folder, _, files in sorted(os.walk(root, followlinks=True)):
        for path in sorted(Path(folder) / name for name in files if name.endswith(".py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Run:
    """A recipe and a seed.

    Attributes:
        recipe: Its file; the stem is its name.
        seed: Of everything random in the run.
    """

    recipe: Path
    seed: int

    @property
    def name(self) -> str:
        """Name of the recipe."""
        return self.recipe.stem

    def identity(self) -> dict[str, Any]:
        """Return what has to be equal for a finished run to stand for this one."""
        digest = hashlib.sha256(self.recipe.read_bytes()).hexdigest()
        return {
            "recipe_sha256": digest,
            "version": __version__,
            "source_sha256": source_sha256(),
            "seed": self.seed,
        }

    def folder(self, runs: Path) -> Path:
        """Return where the run writes."""
        return runs / self.name / f"seed_{self.seed}"

    def words(self, folder: Path) -> list[str]:
        """Return the command line of the run."""
        seeds = [
            f"--{key}={self.seed}"
            for key in ("seed_everything", "model.execution.seed", "data.seed")
        ]
        config = ["--config", str(self.recipe.resolve())]
        return ["fit", *config, f"--run_dir={folder}", "--trainer.accelerator=cpu", *seeds]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that has ended.

    Attributes:
        run: Which one.
        outcome: What it measured; None when it failed.
        cost: `cpu_seconds` and `wall_seconds`.
        surroundings: Content of the run's `run.json`: versions, git revision, data identity.
        error: Why it failed, with the end of its output.
        is_known: Whether an earlier call had finished it.
    """

    run: Run
    outcome: Outcome | None
    cost: dict[str, float] = field(default_factory=dict)
    surroundings: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    is_known: bool = False


def train_all(
    wanted: Sequence[Run],
    runs: Path,
    *,
    jobs: int = 1,
    restart: bool = False,
    report: Callable[[Finished], None] = lambda finished: None,
) -> list[Finished]:
    """Train what has not been trained yet, and return all runs in the order asked for.

    Args:
        wanted: Recipes and seeds.
        runs: Folder that keeps the runs of this and of earlier calls.
        jobs: Runs at the same time.
        restart: Train again what an earlier call has finished.
        report: Called in this thread for every run as soon as it has ended.

    Raises:
        ConfigError: Another call is using `runs`, or something else lies where a run would write.
    """
    runs.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(runs / ".lock", timeout=0):
            return _train_all(wanted, runs, jobs, restart, report)
    except Timeout as error:
        raise ConfigError(
            f"matrix --runs={runs}: another call is using this folder at the moment. Wait for "
            "its end, or name another folder."
        ) from error


def _train_all(
    wanted: Sequence[Run],
    runs: Path,
    jobs: int,
    restart: bool,
    report: Callable[[Finished], None],
) -> list[Finished]:
    known = {run: None if restart else _known(run, runs) for run in wanted}
    for run, before in known.items():
        if before is not None:
            report(before)
        else:
            _make_room(run.folder(runs))
    done = {run: before for run, before in known.items() if before is not None}
    processes = _Processes()
    with ThreadPoolExecutor(jobs) as pool:
        futures: dict[Future[Finished], Run] = {
            pool.submit(_train, run, run.folder(runs), processes): run
            for run in wanted
            if run not in done
        }
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                report(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end()
            raise
    return [done[run] for run in wanted]


class _Processes:
    """The processes at work, so that all of them can be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._has_ended = False

    def run(self, command: Sequence[str], log: Path) -> int:
        """Run a command to its end with its output in `log`, and return its exit status."""
        with log.open("wb") as output, self._lock:
            if self._has_ended:
                return 1
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end tells the run that this process is gone
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
            )
            self._alive.add(process)
        with process:
            status = process.wait()
        with self._lock:
            self._alive.discard(process)
        return status

    def end(self) -> None:
        """End those at work and start no others."""
        with self._lock:
            self._has_ended = True
            for process in self._alive:
                process.kill()


def _known(run: Run, runs: Path) -> Finished | None:
    """Return the run as an earlier call has finished it."""
    path = run.folder(runs) / _RESULT
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["identity"] != run.identity() or "outcome" not in content:
        return None
    outcome = Outcome(**content["outcome"])
    return Finished(
        run=run,
        outcome=outcome,
        cost=content["cost"],
        surroundings=content["surroundings"],
        is_known=True,
    )


def _make_room(folder: Path) -> None:
    """Remove what an unfinished or outdated run has left, and nothing else.

    Raises:
        ConfigError: The folder was not made by `matrix`.
    """
    if not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / _RESULT).is_file():
        raise ConfigError(
            f"matrix --runs: {folder} holds something that is no run of `matrix`. Move it "
            "away, or name another folder."
        )
    shutil.rmtree(folder)


def _train(run: Run, folder: Path, processes: _Processes) -> Finished:
    """Train in a new process, and keep the result."""
    identity = run.identity()
    folder.mkdir(parents=True)
    write_json(folder / _RESULT, {"identity": identity})
    cost, log = folder / "cost.json", folder / "output.log"
    command = [sys.executable, "-m", "domainssl.matrix.child", str(cost)]
    status = processes.run([*command, *run.words(folder)], log)
    if status != 0:
        return Finished(
            run=run, outcome=None, error=f"fit ended with status {status}.\n{_end(log)}"
        )
    try:
        outcome = read_outcome(folder)
        outcome.criteria()
    except DataError as error:
        return Finished(run=run, outcome=None, error=str(error))
    content = {
        "identity": identity,
        "recipe": run.name,
        "outcome": asdict(outcome),
        "cost": json.loads(cost.read_text(encoding="utf-8")),
        "surroundings": json.loads((folder / "run.json").read_text(encoding="utf-8")),
    }
    write_json(folder / _RESULT, content)
    return Finished(
        run=run, outcome=outcome, cost=content["cost"], surroundings=content["surroundings"]
    )


def _environment() -> dict[str, str]:
    """Return the environment of a run: one thread, and the modules that this process finds."""
    paths = [path or os.getcwd() for path in sys.path]
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _end(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([*lines[-_LAST_LINES:], f"All of it: {log}"])
