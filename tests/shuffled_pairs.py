"""Control of the learning tests: radar and optical images of different places."""

from __future__ import annotations

import torch

from domainssl.datamodules.ssl4eo import SSL4EOS12DataModule
from domainssl.modality import Batch

__all__ = ["ShuffledPairs"]


class ShuffledPairs(SSL4EOS12DataModule):
    """SSL4EO-S12 whose training batches give each radar image to another location.

    Held-out pairs stay as they are. Everything else is that of the real data: images, order,
    windows, and what either sensor shows.
    """

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Pass the radar images on by one item."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.trainer is None or not self.trainer.training:
            return batch
        radar = [name for name in batch if name == "s1" or name.startswith("s1.")]
        moved = {
            name: torch.roll(batch[name], 1, 0)
            for name in radar
            if isinstance(batch[name], torch.Tensor)
        }
        return {**batch, **moved}
