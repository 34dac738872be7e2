"""Barlow Twins across modalities: equal dimensions correlate, different ones do not.

Source: Zbontar et al. 2021, in the cross-modal form of the SSL4EO baselines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from domainssl.losses.decorrelation import redundancy, standardize
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

__all__ = ["BarlowTwins", "BarlowTwinsOptions"]


@dataclass(frozen=True)
class BarlowTwinsOptions(MethodOptions):
    """Where the paper, the released code and good sense differ; None follows `reference`."""

    correlation_divisor: Literal["global", "4n"] | None = option(
        ours="global",
        reference="4n",
        text="What correlations are divided by: the number of items of all ranks, or four times "
        "the batch of one rank (released baseline, right on four ranks only).",
    )
    shared_projector: bool | None = option(
        ours=True,
        reference=True,
        text="One projector for both modalities, or one for each.",
    )


class BarlowTwins(_JointEmbedding):
    """Pretrain an `EncoderBackbone` with the Barlow Twins loss between one view of each modality.

    Args:
        modalities: Two modalities by name; linked from the DataModule by the CLI.
        encoding: Encoders, normalisation and weights to start from.
        projector: Widths of the projector's linear layers; the last is the embedding's.
        off_diagonal: Weight lambda of correlations off the diagonal.
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
        off_diagonal: float = 0.0051,
        views: dict[str, Views] | None = None,
        context_size: int | tuple[int, ...] = 224,
        view_size: int | tuple[int, ...] | None = None,
        options: BarlowTwinsOptions = BarlowTwinsOptions(),
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
        self.options = decide(BarlowTwinsOptions, options)
        self.off_diagonal = off_diagonal
        self.make_heads(projector, shared=bool(self.options.shared_projector))

    def forward(self, batch: Batch, draws: ViewDraws, outputs: bool = False) -> Step:
        """Compute the loss; items that lack a modality do not count."""
        pair = self.project_pair(batch, draws)
        a, b = (standardize(vectors, pair.both) for vectors in (pair.first, pair.second))
        divisor = None
        if self.options.correlation_divisor == "4n":
            divisor = 4.0 * len(pair.both)
        terms = redundancy(a, b, present=pair.both, divisor=divisor, layout=pair.layout)
        return self.step({"redundancy": terms.weighted(self.off_diagonal)}, pair, outputs)
