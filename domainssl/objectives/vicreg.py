"""VICReg across modalities: equal vectors, spread dimensions, no correlations between them.

Source: Bardes et al. 2022, in the cross-modal form of the SSL4EO baselines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from domainssl.backbones.encoders.backbone import EncoderSizes
from domainssl.distributed import row_layout
from domainssl.losses.decorrelation import vicreg
from domainssl.modality import Batch, Modality
from domainssl.objectives.base import Step
from domainssl.objectives.decur import published_optimization
from domainssl.objectives.joint_embedding import (
    ViewDraws,
    Views,
    _JointEmbedding,
    common_arguments,
    with_outputs,
)
from domainssl.options import as_dataclass, decide, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["VICReg", "VICRegOptions"]


@dataclass(frozen=True)
class VICRegOptions:
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
        encoder: `transformer`, or a timm name such as `resnet50`, for both or per modality.
        sizes: Sizes of the encoder `transformer`.
        projector: Widths of the projector's linear layers; the last is the embedding's.
        invariance: Weight of the squared difference.
        variance: Weight of the hinge on the standard deviation.
        covariance: Weight of the squared covariances.
        views: How views are drawn, per modality; None takes the published pipelines.
        context_size: Size of the window that the DataModule yields, in pixels.
        view_size: Size of a view in pixels; None takes `context_size`.
        normalization: Form for both modalities, or one per modality.
        weights: Start from this export, checkpoint or published file.
        reference: Follow the released code where it differs from ours.
        options: Single choices, over `reference`.
        optimization: Optimiser and schedule; None takes LARS as published.
        seed: Seed of all draws.
        allow_accumulation: Accept gradient accumulation, which does not enlarge the batch that
            items are compared in.
        execution: Speed and memory.

    Raises:
        ConfigError: The modalities or sizes cannot be used.
    """

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoder: str | dict[str, str] = "resnet50",
        sizes: EncoderSizes = EncoderSizes(),
        projector: tuple[int, ...] = (8192, 8192, 8192),
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        views: dict[str, Views] | None = None,
        context_size: int | tuple[int, ...] = 224,
        view_size: int | tuple[int, ...] | None = None,
        normalization: str | dict[str, str] = "mean2std",
        weights: str | None = None,
        reference: bool = False,
        options: VICRegOptions = VICRegOptions(),
        optimization: Optimization | None = None,
        seed: int = 0,
        allow_accumulation: bool = False,
        execution: Execution = Execution(),
    ) -> None:
        arguments = {**common_arguments(locals()), "deformable_attention": "none"}
        arguments["optimization"] = optimization or published_optimization(encoder, "none")
        super().__init__(modalities, num_views=1, **arguments)
        self.options = decide(as_dataclass(VICRegOptions, options), reference)
        self.weights_of_terms = (invariance, variance, covariance)
        shared = bool(self.options.shared_projector)
        self.make_heads(projector, shared=shared)

    def forward(self, batch: Batch, draws: ViewDraws, outputs: bool = False) -> Step:
        """Compute the three terms; items that lack a modality do not count."""
        z, rows = {}, self.present(batch)
        layout = row_layout(rows[self.first])
        for name, vectors in self.encode_views(batch, draws).items():
            z[name] = self.project(vectors[0], name, rows[name])
        both = rows[self.first] & rows[self.second]
        divisor = None
        if self.options.covariance_divisor == "local":
            divisor = float(max(1, len(both) - 1))
        pair = z[self.first], z[self.second]
        terms = vicreg(*pair, present=both, divisor=divisor, layout=layout)
        losses = {
            name: weight * term
            for name, weight, term in zip(terms._fields, self.weights_of_terms, terms, strict=True)
        }
        return Step(losses, with_outputs(z) if outputs else {})
