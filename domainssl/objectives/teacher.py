"""A teacher that follows what is trained: a running mean of its weights, never trained itself."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from domainssl._torch import follow
from domainssl.errors import ConfigError
from domainssl.objectives.base import Objective, Step
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization
from domainssl.training.schedules import Progress, cosine

__all__: list[str] = []


class _Taught(Objective):
    """Base of methods whose targets come from a running mean of what they train.

    A subclass builds its backbone and calls `make_teacher`.

    Args:
        momentum: Share of the teacher that a step keeps, at the start of the run; it rises to 1
            by half a cosine.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.
        context_size: Size of the window that the DataModule yields, None for any.
    """

    self_distilling: ClassVar[bool] = True
    moves_frozen: ClassVar[bool] = True  # weights that are not trained follow, too
    teacher: nn.ModuleDict

    def __init__(
        self,
        *,
        momentum: float,
        optimization: Optimization,
        execution: Execution,
        context_size: int | tuple[int, ...] | None,
    ) -> None:
        super().__init__(optimization=optimization, execution=execution, context_size=context_size)
        if not 0 <= momentum <= 1:
            raise ConfigError(
                f"model.init_args.momentum: got {momentum!r}, expected a share in [0, 1]."
            )
        self.momentum = momentum
        self.progress = Progress()

    def make_teacher(self, **parts: nn.Module) -> None:
        """Copy backbone and heads; the copies are never trained.

        Args:
            parts: Heads of the teacher by the name that the student's has in this module.
        """
        self.teacher = nn.ModuleDict({"backbone": copy.deepcopy(self.backbone), **parts})
        self.teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Keep the teacher in evaluation mode: no dropout, batch norms by running statistics."""
        super().train(mode)
        if hasattr(self, "teacher"):  # Lightning's constructor calls this before there is one
            self.teacher.eval()
        return self

    def momentum_now(self) -> float:
        """Return the share of the teacher that this step keeps."""
        return cosine(self.momentum, 1.0, self.progress.step, self.progress.total_steps)

    def after_step(self, step: Step) -> None:
        """Move the teacher, and what its batch norms measured, towards the student."""
        share = self.momentum_now()
        self.move_teacher(share)
        buffers = dict(self.named_buffers())
        for name, running in self.teacher.named_buffers():  # statistics of batch norms
            if name in buffers and running.is_floating_point():
                running.lerp_(buffers[name], 1 - share)

    def move_teacher(self, share: float) -> None:
        """Keep a share of the teacher's parameters; names that only one has stay alone."""
        student = dict(self.named_parameters())
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        for name, target in self.teacher.named_parameters():
            if name in student and (self.moves_frozen or student[name].requires_grad):
                ours.append(target)
                theirs.append(student[name].detach())
        follow(ours, theirs, share)

    # -- how far the run is -----------------------------------------------------------------

    def _note_progress(self) -> None:
        if self.total_steps is None:
            return
        trainer = self.trainer
        per_epoch = max(1.0, trainer.num_training_batches / trainer.accumulate_grad_batches)
        self.progress = Progress(
            step=trainer.global_step,
            total_steps=self.total_steps,
            epoch=trainer.current_epoch,
            total_epochs=max(1, math.ceil(self.total_steps / per_epoch)),
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Learn which step this is."""
        self._note_progress()

    def on_validation_start(self) -> None:
        """Learn which step it is, also where a resumed run begins with a validation."""
        self._note_progress()
