"""VICReg across modalities: equal vectors, spread dimensions, no correlations between them.

Source: Bardes et al. 2022, in the cross-modal form of the SSL4EO baselines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from domainssl.losses.decorrelation import vicreg
from domainssl.modality import Batch, Modality
from domainssl.objectives.base import Step
from domainssl.objectives.joint_embedding import (
    PairEncoding,
    ViewDraws,
    Views,
    _JointEmbedding,
)
from domainssl.options import MethodOptions, decide, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["VICReg", "VICRegOptions"]


@dataclass(frozen=True)
class VICRegOptions(MethodOptions):
    """Where the paper, the released code and good sense differ; None follows `reference`."""

    covariance_divisor: Literal["global", "local"] | None = option(
        ours="global",
        reference="local",
        text="What covariances are divided by: items of all ranks minus one, or the batch of one "
        "rank minus one (released baseline, W times too large on W ranks).",
    )
    shared_projector: bool | None = option(
        ours=True,
        reference=True,
        text="One projector for both modalities, or one for each.",
    )


class VICReg(_JointEmbedding):
    """Pretrain an `EncoderBackbone` with VICReg between one view of each modality.

    Args:
        modalities: Two modalities by name; linked from the DataModule by the CLI.
        encoding: Encoders, normalisation and weights to start from.
        projector: Widths of the projector's linear layers; the last is the embedding's.
        invariance: Weight of the squared difference.
        variance: Weight of the hinge on the standard deviation.
        covariance: Weight of the squared covariances.
        views: How views are drawn, per modality; None takes the published pipelines.
        context_size: Size of the window that the DataModule yields, in pixels.
        view_size: Size of a view in pixels; None takes `context_size`.
        options: Choices between our and the published behaviour.
        optimization: Optimiser and schedule; None takes LARS as published.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modalities or sizes cannot be used.
    """

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: PairEncoding = PairEncoding(),
        projector: tuple[int, ...] = (8192, 8192, 8192),
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        views: dict[str, Views] | None = None,
        context_size: int | tuple[int, ...] = 224,
        view_size: int | tuple[int, ...] | None = None,
        options: VICRegOptions = VICRegOptions(),
        optimization: Optimization | None = None,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__(
            modalities,
            encoding,
            views=views,
            view_size=view_size,
            context_size=context_size,
            optimization=optimization,
            execution=execution,
        )
        self.options = decide(VICRegOptions, options)
        self.weights_of_terms = (invariance, variance, covariance)
        self.make_heads(projector, shared=bool(self.options.shared_projector))

    def forward(self, batch: Batch, draws: ViewDraws, outputs: bool = False) -> Step:
        """Compute the three terms; items that lack a modality do not count."""
        pair = self.project_pair(batch, draws)
        divisor = None
        if self.options.covariance_divisor == "local":
            divisor = float(max(1, len(pair.both) - 1))
        terms = vicreg(
            pair.first, pair.second, present=pair.both, divisor=divisor, layout=pair.layout
        )
        losses = {
            name: weight * term
            for name, weight, term in zip(terms._fields, self.weights_of_terms, terms, strict=True)
        }
        return self.step(losses, pair, outputs)
