"""Log how long the gradient is."""

from __future__ import annotations

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from domainssl.training._lightning import is_logging_step

__all__ = ["GradientNorm"]


class GradientNorm(Callback):
    """Logs `train/grad_norm`: the 2-norm over all gradients before clipping, at logging steps."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure after unscaling and before clipping."""
        if not is_logging_step(trainer):
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if hasattr(norm, "full_tensor"):  # sharded gradients
            norm = norm.full_tensor()
        pl_module.log("train/grad_norm", norm.float(), batch_size=1)
