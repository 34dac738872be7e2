"""Pictures of what a reconstructing method sees, misses and paints."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image

from domainssl.callbacks._common import first_items, observing, run_folder
from domainssl.callbacks._picture import panel

__all__ = ["ReconstructionPanels"]

logger = logging.getLogger(__name__)
_PANEL = 2  # stands in the seed, so that every panel shows the same masks


class ReconstructionPanels(Callback):
    """Writes input, masked and predicted of a few held-out items per modality.

    PNG files `panels/step_<n>_<modality>.png` in the run's folder, and images
    `reconstruction/<modality>` in loggers that take them. The items and masks are the same every
    time. Optical bands are shown in natural colour, radar as VV, VH and their difference, other
    modalities as their first three or only channel; the 2nd and 98th percentile of the input
    stretch all three pictures.

    Args:
        every_n_epochs: Epochs between panels; the end of the run always gets one.
        items: Items per panel.
    """

    def __init__(self, every_n_epochs: int = 10, items: int = 4) -> None:
        self.every_n_epochs = every_n_epochs
        self.items = items
        self._batch: dict[str, Any] | None = None
        self._is_held_out = False
        self._shown_at = -1

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first held-out items."""
        if not self._is_held_out and not trainer.sanity_checking and batch_idx == 0:
            self._batch, self._is_held_out = first_items(batch, self.items), True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep training items for runs without validation."""
        if self._batch is None:
            self._batch = first_items(batch, self.items)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw every n-th epoch."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the final state."""
        if self._shown_at != trainer.global_step:
            self._show(trainer, pl_module)

    def _show(self, trainer: Trainer, module: Any) -> None:
        if self._batch is None:
            return
        with observing(module):  # every rank takes part: the loss may gather
            draws = module.draw(self._batch, module.generators(_PANEL, 0))
            with trainer.precision_plugin.forward_context():
                step = module(self._batch, draws, outputs=True)
        pictures = step.outputs.get("reconstruction")
        self._shown_at = trainer.global_step
        if not pictures:
            logger.info("%s reconstructs nothing; no panels are drawn.", type(module).__name__)
            self._batch = None
            return
        if trainer.is_global_zero:
            for name, columns in pictures.items():
                title = f"{name}, step {trainer.global_step}"
                picture = panel(columns, module.backbone.modalities[name], title)
                self._write(trainer, name, picture)

    def _write(self, trainer: Trainer, name: str, picture: np.ndarray) -> None:
        folder = run_folder(trainer) / "panels"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step_{trainer.global_step:07d}_{name}.png"
        part = path.with_name(f".{path.name}")
        Image.fromarray(picture).save(part, format="PNG")
        part.replace(path)
        for target in trainer.loggers:
            add_image = getattr(getattr(target, "experiment", None), "add_image", None)
            if add_image is not None:
                add_image(f"reconstruction/{name}", picture, trainer.global_step, dataformats="HWC")
