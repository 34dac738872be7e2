"""Write the backbone that a run has trained, in the form everybody uses afterwards."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from domainssl.arguments import class_of, plain
from domainssl.backbones.card import export_backbone
from domainssl.callbacks._common import run_folder

__all__ = ["ExportBackbone"]

logger = logging.getLogger(__name__)


class ExportBackbone(Callback):
    """Writes `backbone.safetensors` and its card when training ends.

    Args:
        folder: Where; the run's folder `backbone` by default.
        licence: Licence of the weights, noted on the card.
    """

    def __init__(self, folder: str | None = None, licence: str = "unspecified") -> None:
        self.folder = folder
        self.licence = licence
        self.written: Path | None = None

    def target(self, trainer: Trainer) -> Path:
        """Return the folder that the export goes to."""
        return Path(self.folder) if self.folder else run_folder(trainer) / "backbone"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, unless a loss was not finite."""
        module: Any = pl_module
        module.check_finite()
        backbone = _gathered(module.get_submodule(module.exported))
        if trainer.is_global_zero:
            card = export_backbone(
                backbone,
                self.target(trainer),
                licence=self.licence,
                provenance=_provenance(trainer, module),
                overwrite=True,
            )
            self.written = card.parent
        trainer.strategy.barrier("export")


def _provenance(trainer: Trainer, module: Any) -> dict[str, Any]:
    identity = getattr(getattr(trainer, "datamodule", None), "identity", None)
    arguments = {k: v for k, v in module.arguments.items() if k != "modalities"}
    return {
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
