"""CLIP between two image modalities: each vector is to find its partner in the batch.

Source: Radford et al. 2021, in the form of the SSL4EO baselines: fixed temperature, and in the
released code one direction only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from domainssl.errors import ConfigError
from domainssl.losses.contrastive import info_nce
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

__all__ = ["CLIP", "CLIPOptions"]


@dataclass(frozen=True)
class CLIPOptions(MethodOptions):
    """Where the paper, the released code and good sense differ; None follows `reference`."""

    symmetric: bool | None = option(
        ours=False,
        reference=False,
        text="Both directions (CLIP paper), or only from the first modality to the second "
        "(released baseline).",
    )


class CLIP(_JointEmbedding):
    """Pretrain an `EncoderBackbone` with InfoNCE between one view of each modality.

    Args:
        modalities: Two modalities by name; linked from the DataModule by the CLI.
        encoding: Encoders, normalisation and weights to start from.
        projector: Widths of the projector's linear layers; the last is the embedding's.
        temperature: Divides the cosines; 1 as in the published baseline, 0.07 is more usual.
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
        projector: tuple[int, ...] = (512, 128),
        temperature: float = 1.0,
        views: dict[str, Views] | None = None,
        context_size: int | tuple[int, ...] = 224,
        view_size: int | tuple[int, ...] | None = None,
        options: CLIPOptions = CLIPOptions(),
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
        if temperature <= 0:
            raise ConfigError(f"model.init_args.temperature: got {temperature}, expected > 0.")
        self.options = decide(CLIPOptions, options)
        self.temperature = temperature
        self.make_heads(projector, shared=False, last_norm=True)

    def forward(self, batch: Batch, draws: ViewDraws, outputs: bool = False) -> Step:
        """Compute InfoNCE; items that lack a modality do not count."""
        pair = self.project_pair(batch, draws)
        loss = info_nce(
            pair.first,
            pair.second,
            torch.tensor(1 / self.temperature, device=pair.both.device),
            present=pair.both,
            symmetric=bool(self.options.symmetric),
            layout=pair.layout,
        )
        return self.step({"contrastive": loss}, pair, outputs)
