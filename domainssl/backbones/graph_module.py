"""Backbones and tasks as functions of tensors to tensors, as exporters of graphs trace them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from domainssl.backbones.base import Backbone

__all__ = ["GraphModule", "Headed"]


class Headed(Protocol):
    """A fine-tuned model: a module with a backbone and a head."""

    @property
    def backbone(self) -> Backbone:
        """What makes features."""

    @property
    def kind(self) -> str:
        """What it predicts; `regression` predicts numbers."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of what it predicts."""

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return what it says of raw physical values, (B, K) or (B, K, *S)."""


class GraphModule(nn.Module):
    """A backbone, or a task, as a function of tensors to tensors.

    Args:
        whole: What to run.
        names: Modality of each input.
    """

    def __init__(self, whole: Backbone | Headed, names: Sequence[str]) -> None:
        super().__init__()
        self.whole: Any = whole
        self.names, self.outputs = list(names), list[str]()

    @property
    def backbone(self) -> Backbone:
        """What makes features."""
        found: Backbone = self.whole if isinstance(self.whole, Backbone) else self.whole.backbone
        return found

    @property
    def is_task(self) -> bool:
        """Whether it predicts, and gives no features."""
        return not isinstance(self.whole, Backbone)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in order."""
        batch = dict(zip(self.names, values, strict=True))
        if self.is_task:
            return (self.whole.logits(batch),)
        features = self.backbone.encode(self.backbone.normalize(batch))
        kinds = (name.rpartition(".") for name in self.outputs)
        return tuple(getattr(features, kind)[name] for name, _, kind in kinds)

    def find_outputs(self, example: Sequence[Tensor]) -> None:
        """Learn which features the backbone has for these inputs, such as `s2.pooled`."""
        if self.is_task:
            self.outputs = ["numbers" if self.whole.kind == "regression" else "logits"]
            return
        batch = dict(zip(self.names, example, strict=True))
        features = self.backbone.encode(self.backbone.normalize(batch))
        names = [*features.pooled, *(n for n in features.tokens if n not in features.pooled)]
        kinds = ("pooled", "tokens")
        self.outputs = [f"{n}.{k}" for n in names for k in kinds if n in getattr(features, k)]
