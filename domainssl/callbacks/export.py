"""Write the backbone or task that a run has trained, in the form everybody uses afterwards."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from domainssl.arguments import class_of, plain
from domainssl.backbones.card import export_backbone
from domainssl.callbacks._common import run_folder
from domainssl.errors import ConfigError
from domainssl.screen import COMMAND
from domainssl.tasks.base import Task
from domainssl.tasks.export import export_task, whole_task

__all__ = ["ExportBackbone", "ExportTask"]

logger = logging.getLogger(__name__)


class ExportBackbone(Callback):
    """Writes `backbone.safetensors` and its card when training ends.

    Args:
        folder: Where; the run's folder `backbone` by default.
        licence: Licence of the weights, noted on the card.
    """

    what: ClassVar[str] = "backbone"

    def __init__(self, folder: str | None = None, licence: str = "unspecified") -> None:
        self.folder = folder
        self.licence = licence
        self.written: Path | None = None

    def card(self, trainer: Trainer) -> Path:
        """Return where the card goes, the last thing that is written."""
        return self.target(trainer) / f"{self.what}.json"

    def how_to_load(self, folder: str) -> list[str]:
        """Return the lines of Python that load what was written and use it."""
        return [
            "import torch",
            "from domainssl import load_backbone",
            f'backbone = load_backbone("{folder}")',
            "with torch.no_grad():",
            "    features = backbone(batch)  # raw physical values; features.pooled, .tokens",
        ]

    def next_commands(self, run: str, folder: str) -> list[str]:
        """Return commands for what was written by a run whose folder holds its configuration."""
        return [
            f"{COMMAND} evaluate {run} --output evaluation",
            f"{COMMAND} embed {folder} INPUT --output PATH",
        ]

    def target(self, trainer: Trainer) -> Path:
        """Return the folder that the export goes to."""
        return Path(self.folder) if self.folder else run_folder(trainer) / self.what

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, unless a loss was not finite."""
        module: Any = pl_module
        module.check_finite()
        whole = self._whole(module)
        if trainer.is_global_zero:
            card = self._write(
                whole,
                self.target(trainer),
                licence=self.licence,
                provenance=_provenance(trainer, module),
                overwrite=True,
            )
            self.written = card.parent
        trainer.strategy.barrier("export")

    def _whole(self, module: Any) -> Any:
        """Return what is written, with whole tensors; runs on all ranks."""
        if isinstance(module, Task):
            return whole_task(module).backbone
        return _gathered(module.get_submodule(module.exported))

    def _write(self, whole: Any, folder: Path, **facts: Any) -> Path:
        return export_backbone(whole, folder, **facts)


class ExportTask(ExportBackbone):
    """Writes `task.safetensors` and its card, with class names, when fine-tuning ends.

    Args:
        folder: Where; the run's folder `task` by default.
        licence: Licence of the weights, noted on the card.
    """

    what: ClassVar[str] = "task"

    def how_to_load(self, folder: str) -> list[str]:
        """Return the lines of Python that load what was written and use it."""
        return [
            "import torch",
            "from domainssl import load_task",
            f'task = load_task("{folder}")  # task.classes',
            "with torch.no_grad():",
            "    predicted = task.predictions(task.logits(batch))  # raw physical values",
        ]

    def next_commands(self, run: str, folder: str) -> list[str]:
        """Return commands for what was written by a run whose folder holds its configuration."""
        return [
            f"{COMMAND} test --config {run}/config.yaml --ckpt_path={run}/checkpoints/last.ckpt",
            f"{COMMAND} predict {folder} INPUT --output DIR",
        ]

    def _whole(self, module: Any) -> Any:
        if not isinstance(module, Task):
            raise ConfigError(
                f"callbacks: ExportTask writes tasks, and the run trains {type(module).__name__}. "
                "Use ExportBackbone."
            )
        return whole_task(module)

    def _write(self, whole: Any, folder: Path, **facts: Any) -> Path:
        return export_task(whole, folder, **facts)


def _provenance(trainer: Trainer, module: Any) -> dict[str, Any]:
    identity = getattr(getattr(trainer, "datamodule", None), "identity", None)
    arguments = {k: v for k, v in module.arguments.items() if k != "modalities"}
    began = {}
    if isinstance(module, Task):
        began = {"started_from": arguments["backbone"], "tuning": arguments["tuning"]}
    return {
        **began,
        "objective": class_of(module).__name__,
        "arguments": plain(arguments),
        "epochs": trainer.current_epoch,
        "optimizer_steps": trainer.global_step,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "data": plain(identity()) if callable(identity) else None,
    }


def _gathered(backbone: Any) -> Any:
    """Return the backbone with whole tensors, where a strategy has sharded them."""
    if not any(hasattr(p, "full_tensor") for p in backbone.parameters()):
        return backbone
    state = {
        name: t.full_tensor().cpu() if hasattr(t, "full_tensor") else t.cpu()
        for name, t in backbone.state_dict().items()
    }
    whole: nn.Module = class_of(backbone)(**backbone.arguments)
    whole.load_state_dict(state)
    return whole
