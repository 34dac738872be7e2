"""Pictures of what a reconstructing method sees, misses and paints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from domainssl.callbacks._common import first_items, observing, run_folder
from domainssl.errors import ConfigError
from domainssl.evaluation.picture import panel
from domainssl.files import new_file
from domainssl.modality import Modality, key
from domainssl.nn.normalization import Normalizer

__all__ = ["ReconstructionPanels"]

logger = logging.getLogger(__name__)
_PANEL = 2  # stands in the seed, so that every panel shows the same masks


class ReconstructionPanels(Callback):
    """Writes input, what was visible, and the prediction of a few held-out items per modality.

    PNG files `panels/step_<n>_<modality>.png` in the run's folder, and images
    `reconstruction/<modality>` in loggers that take them. The items and masks are the same every
    time. Optical bands are shown in natural colour, radar as VV, VH and their difference, other
    modalities as their first three or only channel, volumes as their middle axial slice; the 2nd
    and 98th percentile of the input stretch all three pictures. Images of 8-bit colours, such as
    stained tissue, are shown in their own colours where the normalisation form can be undone.
    Every picture names its columns, its bands, and the item and date of each row.

    Args:
        every_n_epochs: Epochs between panels; the end of the run always gets one.
        items: Items per panel.
    """

    def __init__(self, every_n_epochs: int = 10, items: int = 4) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("items", items)):
            if value < 1:
                raise ConfigError(f"{type(self).__name__}.{name}: got {value}, expected 1 or more.")
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
                title = f"{name} after step {trainer.global_step}"
                modality = module.backbone.modalities[name]
                rows = row_labels(self._batch, modality, columns["input"])
                shown, limits = own_colours(columns, modality, module.backbone.normalizer)
                picture = panel(shown, modality, title, rows, limits=limits)
                self._write(trainer, name, picture)

    def _write(self, trainer: Trainer, name: str, picture: np.ndarray) -> None:
        folder = run_folder(trainer) / "panels"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step_{trainer.global_step:07d}_{name}.png"
        with new_file(path) as file:
            Image.fromarray(picture).save(file, format="PNG")
        for target in trainer.loggers:
            add_image = getattr(getattr(target, "experiment", None), "add_image", None)
            if add_image is not None:
                add_image(f"reconstruction/{name}", picture, trainer.global_step, dataformats="HWC")


def own_colours(
    columns: dict[str, Tensor], modality: Modality, normalizer: Normalizer
) -> tuple[dict[str, Tensor], tuple[float, float] | None]:
    """Return pictures of 8-bit colours before normalisation, and between which values they lie.

    Others, and those whose form cannot be undone, stay as they are, without limits.

    Args:
        columns: Normalised pictures, (B, C, H, W) of an image.
        modality: What they are.
        normalizer: What has normalised them.
    """
    if modality.kind != "image" or modality.value_unit != "rgb8":
        return columns, None
    if not normalizer.can_undo(modality.name):
        return columns, None
    return {n: normalizer.undo(x.float(), modality.name) for n, x in columns.items()}, (0.0, 255.0)


def row_labels(batch: Mapping[str, Any], modality: Modality, shown: Tensor) -> list[str]:
    """Return id and date of the items of a panel, or that they lack the modality.

    A series is shown on its middle date.

    Args:
        batch: The items.
        modality: Which of their pictures is shown.
        shown: The pictures, (B, C, *S) or (B, T, C, *S); dates other than the batch's cannot be
            told.
    """
    ids = [str(i) for i in batch.get("id") or [f"item {i}" for i in range(len(shown))]]
    present = batch.get(key(modality.name, "present"))
    if isinstance(present, Tensor):
        ids = [
            i if is_there else f"{i}, not there"
            for i, is_there in zip(ids, present.tolist(), strict=True)
        ]
    dates = batch.get(key(modality.name, "dates"))
    if not isinstance(dates, Tensor):
        return ids
    days = dates.reshape(len(ids), -1).cpu()
    count = days.shape[1]
    one_date = shown.ndim < 3 + modality.spatial_dims
    if modality.kind == "series" and (one_date or shown.shape[1] != count):
        return [f"{i}, one of {count} dates" for i in ids]
    middle = count // 2
    place = f" ({middle + 1} of {count} dates)" if count > 1 else ""
    found = [int(row[middle]) for row in days]
    return [
        f"{i}, {np.datetime64(day, 'D')}{place}" if day > 0 else f"{i}{place}"
        for i, day in zip(ids, found, strict=True)
    ]
