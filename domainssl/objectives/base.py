"""What every pretraining method shares beyond training: draws, a pure forward pass, features.

A method implements `draw`, `forward` and, where it keeps a teacher or a queue, `after_step`.
Everything random happens in `draw`; `forward` is a function of the batch and the draws.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from torch import Tensor

from domainssl.backbones.base import Features
from domainssl.errors import ConfigError
from domainssl.modality import Batch
from domainssl.training.module import Generators, Step, TrainingModule
from domainssl.training.optimization import Optimization

__all__ = ["Generators", "Objective", "Optimization", "Step"]

logger = logging.getLogger(__name__)


class Objective(TrainingModule):
    """Base of all pretraining methods.

    A subclass calls `super().__init__`, builds its backbone and assigns it to `self.backbone`.

    Its arguments are those of `TrainingModule`: `optimization`, `execution`, `context_size`.
    """

    contrastive: ClassVar[bool] = False
    self_distilling: ClassVar[bool] = False  # learns from a teacher of its own
    forward_methods: ClassVar[tuple[str, ...]] = ("features", "embed")

    def draw(self, batch: Batch, generators: Generators) -> Any:
        """Return every random choice of one step as tensors."""
        raise NotImplementedError(f"{type(self).__name__} must implement draw(batch, generators).")

    def forward(self, batch: Batch, draws: Any, outputs: bool = False) -> Step:
        """Compute the losses of a batch from its draws, and `Step.outputs` on request."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward(batch, draws).")

    def embed(self, features: Features) -> dict[str, Tensor]:
        """Return vectors (B, E) per modality in the space the method compares modalities in.

        Evaluation retrieves across modalities with them; the base returns pooled features.
        """
        return {n: v for n, v in features.pooled.items() if n in self.backbone.modalities}

    # -- the loop ---------------------------------------------------------------------------

    def compute(self, batch: Batch, generators: Generators) -> Step:
        """Draw, then compute the losses."""
        step: Step = self(batch, self.draw(batch, generators))
        return step

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Features:
        """Return the backbone's features."""
        return self.features(batch)

    def setup(self, stage: str) -> None:
        """Compare the method with trainer and data before anything is computed."""
        super().setup(stage)
        if stage == "fit":
            self._check_accumulation()

    def _check_accumulation(self) -> None:
        parts = self.trainer.accumulate_grad_batches
        if parts == 1 or not self.contrastive:
            return
        text = (
            f"accumulate_grad_batches is {parts}: {type(self).__name__} contrasts items within one "
            f"forward pass, so its contrastive batch is 1/{parts} of global_batch_size"
        )
        if not self.execution.allow_accumulation:
            raise ConfigError(
                f"trainer.{text}. Use more devices, or execution.gradient_checkpointing for a "
                "larger batch, or accept it with model.init_args.execution.allow_accumulation: "
                "true."
            )
        logger.warning("%s; allowed by execution.allow_accumulation.", text)
