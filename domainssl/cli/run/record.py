"""Save what is needed to repeat a run, and say at its start what will happen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from rich.markup import escape

from domainssl.arguments import plain
from domainssl.callbacks.evaluation import OnlineEvaluation
from domainssl.callbacks.export import ExportBackbone
from domainssl.cli.config import catalog
from domainssl.cli.config.nodes import dump
from domainssl.cli.console import console
from domainssl.cli.run.rundir import (
    command_line,
    git_revision,
    keep_earlier,
    remove_start,
    versions,
)
from domainssl.datamodules.base import DomainDataModule
from domainssl.errors import ConfigError, counted
from domainssl.files import write_json
from domainssl.tasks.base import Task
from domainssl.tasks.starting import tell_start

__all__ = ["RunRecord"]

_TUNINGS = {
    "full": "full (all weights)",
    "frozen": "frozen (the head alone)",
    "lora": "lora (low-rank additions and the head)",
}


class RunRecord(SaveConfigCallback):
    """Writes `config.yaml` and `run.json` into the run's folder before the first step.

    Args:
        parser: The parser that read the configuration.
        config: The parsed configuration.
        folder: The run's folder.
        resolved: The configuration to save, defaults included.
        facts: What else `run.json` holds.

    Attributes:
        has_begun: Whether a batch was trained on.
        completed: Folder of the export that a run which was at its end had not got to.
    """

    def __init__(
        self,
        parser: Any,
        config: Any,
        folder: Path,
        resolved: dict[str, Any],
        facts: dict[str, Any],
    ) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder
        self.resolved = resolved
        self.facts = facts
        self.has_begun = False
        self.completed: Path | None = None
        self._before: set[Path] = set()
        self._kept: dict[Path, Path] = {}

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write both files and describe data and model; runs on the first rank only."""
        datamodule = getattr(trainer, "datamodule", None)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "# The resolved configuration of this run; run it again with:\n"
        text += f"# python -m domainssl fit --config {self.folder / 'config.yaml'}\n"
        for name in ("config.yaml", "run.json"):
            kept = keep_earlier(self.folder / name)
            if kept is not None:
                self._kept[kept] = self.folder / name
        (self.folder / "config.yaml").write_text(text + dump(self.resolved), encoding="utf-8")
        identity = getattr(datamodule, "identity", None)
        record = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": [_shown(word, datamodule) for word in command_line()],
            **self.facts,
            "versions": versions(),
            "git": git_revision(catalog.package_folder()),
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "device": str(pl_module.device),
            "data": plain(identity()) if callable(identity) else None,
        }
        write_json(self.folder / "run.json", record)
        _introduce(trainer, pl_module, self.folder, stage, self.facts.get("ckpt_path"))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note that there is something to keep."""
        self.has_begun = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what a run was killed before, between its last checkpoint and its end."""
        callbacks: list[Any] = getattr(trainer, "callbacks", [])
        exports = [c for c in callbacks if isinstance(c, ExportBackbone)]
        if self.has_begun or not trainer.ckpt_path or not exports:
            return
        is_missing = not all(export.card(trainer).exists() for export in exports)
        if trainer.strategy.broadcast(is_missing):
            for callback in callbacks:
                if isinstance(callback, OnlineEvaluation | ExportBackbone):
                    callback.on_train_end(trainer, pl_module)
            self.completed = exports[0].written

    def look(self) -> None:
        """Note what is in the folder; called before the run, with the folder's lock held."""
        self._before = set(self.folder.rglob("*"))

    def take_back(self) -> None:
        """Leave the folder as it was, after a run that was not continued."""
        remove_start(self.folder, self._before, self._kept)


def _shown(word: str, datamodule: Any) -> str:
    """Return a word of the command line without what the data withhold."""
    if not any(text in word for text in getattr(datamodule, "withheld", ())):
        return word
    option, mark, _ = word.partition("=")
    return f"{option}=(withheld)" if mark and option.startswith("--") else "(withheld)"


def _introduce(
    trainer: Trainer, module: LightningModule, folder: Path, stage: str, ckpt_path: object
) -> None:
    screen = console()
    datamodule = getattr(trainer, "datamodule", None)
    for position, line in enumerate(_data_lines(datamodule, module)):
        screen.print(f"[bold]{'data' if position == 0 else '':<8}[/]", line, markup=True)
    screen.print(f"[bold]{'model':<8}[/]", _model_line(module))
    if isinstance(module, Task):
        screen.print(f"[bold]{'start':<8}[/]", escape(_start_line(ckpt_path, module, stage)))
    if stage == "test" and isinstance(datamodule, DomainDataModule):
        screen.print(f"[bold]{'tested':<8}[/]", _tested_line(datamodule))
    if stage == "fit":
        screen.print(f"[bold]{'training':<8}[/]", _training_line(trainer, datamodule))
    kept = "configuration, versions, metrics" + ", checkpoints" * (stage == "fit")
    screen.print(f"[bold]{'run':<8}[/]", f"{folder}  ({kept})")


def _model_line(module: LightningModule) -> str:
    total = sum(p.numel() for p in module.parameters())
    line = f"{type(module).__name__}, {_millions(total)} parameters"
    backbone = getattr(module, "backbone", None)
    if backbone is not None:
        kept = sum(p.numel() for p in backbone.parameters())
        line += f", of which {_millions(kept)} are the backbone {type(backbone).__name__}"
    return line


def _data_lines(datamodule: Any, module: Any) -> list[str]:
    """Return what data tell of themselves, with the classes of the map where a task learns those.

    Scenes may have labels besides; data whose maps have names of their own tell them already.
    """
    describe = getattr(datamodule, "describe", None)
    lines = [str(line) for line in describe()] if callable(describe) else []
    is_told = any(line.startswith("segmentation maps:") for line in lines)
    if is_told or not isinstance(module, Task) or module.classes_from != "mask_classes":
        return lines
    own = f"classes of the map: {escape(', '.join(module.classes))}"
    return [own if line.startswith("labels:") else line for line in lines]


def _tested_line(data: DomainDataModule) -> str:
    """Return which items are measured, and why where there are others."""
    if data.tested_split == "test":
        return f"the {sum(data.source('test').sizes)} items of the test split"
    try:
        unused = sum(data.source("test").sizes)
    except ConfigError:
        return "val, the held-out items that fit validates on: the data have no test split"
    return f"val, the held-out items that fit validates on: the {unused} of test have no labels"


def _start_line(ckpt_path: object, task: Task, stage: str) -> str:
    """Return the weights that a task starts from, and what of its backbone is trained."""
    line = tell_start(task.arguments["backbone"])
    if ckpt_path:
        line = f"the checkpoint {ckpt_path}"
    return f"{line}; tuning: {_TUNINGS[task.tuning.mode]}" if stage == "fit" else line


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 100_000 else f"{count:,}"


def _training_line(trainer: Trainer, datamodule: Any) -> str:
    length = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        length.append(counted(trainer.max_epochs, "epoch"))
    if trainer.max_steps > 0:
        length.append(f"at most {trainer.max_steps} steps")
    batch = getattr(datamodule, "global_batch_size", None)
    if batch is not None:
        length.append(f"{batch} samples per step")
    device = type(trainer.accelerator).__name__.removesuffix("Accelerator")
    count = trainer.world_size
    length.append(f"{count} x {device}, {trainer.precision}")
    return ", ".join(length)
