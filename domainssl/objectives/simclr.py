"""SimCLR across modalities: the two modalities of an item are its two views.

Source: Chen et al. 2020, in the cross-modal form of the SSL4EO baselines.
"""

from __future__ import annotations

from typing import Any

from domainssl.backbones.encoders.backbone import EncoderSizes
from domainssl.distributed import row_layout
from domainssl.errors import ConfigError
from domainssl.losses.contrastive import nt_xent
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
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["SimCLR"]


class SimCLR(_JointEmbedding):
    """Pretrain an `EncoderBackbone` with NT-Xent between one view of each modality.

    Args:
        modalities: Two modalities by name; linked from the DataModule by the CLI.
        encoder: `transformer`, or a timm name such as `resnet50`, for both or per modality.
        sizes: Sizes of the encoder `transformer`.
        projector: Widths of the projector's linear layers; the last is the embedding's.
        temperature: Divides the cosines; 1 as in the published baseline, 0.1 is more usual.
        views: How views are drawn, per modality; None takes the published pipelines.
        context_size: Size of the window that the DataModule yields, in pixels.
        view_size: Size of a view in pixels; None takes `context_size`.
        normalization: Form for both modalities, or one per modality.
        weights: Start from this export, checkpoint or published file.
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
        projector: tuple[int, ...] = (512, 128),
        temperature: float = 1.0,
        views: dict[str, Views] | None = None,
        context_size: int | tuple[int, ...] = 224,
        view_size: int | tuple[int, ...] | None = None,
        normalization: str | dict[str, str] = "mean2std",
        weights: str | None = None,
        optimization: Optimization | None = None,
        seed: int = 0,
        allow_accumulation: bool = False,
        execution: Execution = Execution(),
    ) -> None:
        arguments = {**common_arguments(locals()), "deformable_attention": "none"}
        arguments["optimization"] = optimization or published_optimization(encoder, "none")
        super().__init__(modalities, num_views=1, **arguments)
        if temperature <= 0:
            raise ConfigError(f"model.init_args.temperature: got {temperature}, expected > 0.")
        self.temperature = temperature
        self.make_heads(projector, shared=False, last_norm=True)

    def forward(self, batch: Batch, draws: ViewDraws, outputs: bool = False) -> Step:
        """Compute NT-Xent; items that lack a modality do not count."""
        z, rows = {}, self.present(batch)
        layout = row_layout(rows[self.first])
        for name, vectors in self.encode_views(batch, draws).items():
            z[name] = self.project(vectors[0], name, rows[name])
        both = rows[self.first] & rows[self.second]
        pair = z[self.first], z[self.second]
        loss = nt_xent(*pair, self.temperature, present=both, layout=layout)
        return Step({"contrastive": loss}, with_outputs(z) if outputs else {})
