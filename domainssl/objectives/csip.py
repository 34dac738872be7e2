"""CSIP: an image of the ground finds the heights of the same place, and they find it.

Source: Corley et al., ICIP 2022 (contrastive surface-image pretraining, arXiv 2202.13251), and its
released code.

One training step: cut one view of every item, the same place in both modalities, and change the
values of each (`draw`); compare the projected vectors by InfoNCE with a learned temperature. Pixels
without a height are masked and filled with zero, never a height.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from domainssl.errors import ConfigError
from domainssl.losses.contrastive import info_nce
from domainssl.modality import Batch, Modality, as_modalities
from domainssl.objectives.base import Generators, Step
from domainssl.objectives.joint_embedding import (
    PairEncoding,
    ViewDraws,
    Views,
    _JointEmbedding,
)
from domainssl.options import MethodOptions, decide, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["CSIP", "CSIPOptions"]

_PUBLISHED = Optimization(
    lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), warmup_fraction=0.0, final_lr_fraction=1.0
)
_LARGEST_SCALE = 100.0  # CLIP's


@dataclasses.dataclass(frozen=True, kw_only=True)
class CSIPOptions(MethodOptions):
    """Where the paper, the released code and good sense differ; None follows `reference`."""

    symmetric: bool | None = option(
        ours=True,
        reference=False,
        text="Both directions (paper), or only from the first modality to the second (released "
        "code).",
    )
    bounded_scale: bool | None = option(
        ours=True,
        reference=False,
        text="Keep the learned factor on cosines at 100 or below, as CLIP does.",
    )


class CSIP(_JointEmbedding):
    """Pretrain an `EncoderBackbone` by pairing an image with the heights of its place.

    Args:
        modalities: Two by name, such as an image and heights; linked from the DataModule.
        encoding: Encoders, normalisation and weights to start from.
        dim: Width of the vectors that are compared.
        temperature: Divides the cosines at first; it is learned.
        views: How views are drawn, per modality; None takes the published ones. Place and flips
            are drawn as the first modality says, and are the same in both.
        context_size: Size of the window that the DataModule yields, in pixels.
        view_size: Size of a view in pixels; None takes `context_size`.
        options: Choices between our and the published behaviour.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modalities or sizes cannot be used.
    """

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: PairEncoding = PairEncoding(encoder="resnet18"),
        dim: int = 128,
        temperature: float = 0.07,
        views: dict[str, Views] | None = None,
        context_size: int | tuple[int, ...] = 512,
        view_size: int | tuple[int, ...] | None = None,
        options: CSIPOptions = CSIPOptions(),
        optimization: Optimization = _PUBLISHED,
        execution: Execution = Execution(),
    ) -> None:
        if temperature <= 0:
            raise ConfigError(f"model.init_args.temperature: got {temperature}, expected > 0.")
        known = as_modalities(modalities)
        for name, modality in known.items():
            if modality.kind == "series":
                raise ConfigError(
                    f"CSIP compares one image with another of its place; modality {name!r} is a "
                    "series. Choose one date of it (dates: {mode: one})."
                )
        usual = {name: _usual_view(m) for name, m in known.items()}
        super().__init__(
            modalities,
            encoding,
            views={**usual, **(views or {})},
            view_size=view_size,
            context_size=context_size,
            optimization=optimization,
            execution=execution,
        )
        self.options = decide(CSIPOptions, options)
        self.make_heads([dim], shared=False)
        start = torch.full((1,), -math.log(temperature))
        self.inverse_temperature = nn.Parameter(start)  # its logarithm

    def draw(self, batch: Batch, generators: Generators) -> ViewDraws:
        """Draw one view of every item: one place for both modalities, changes for each."""
        draws = super().draw(batch, generators)
        (place,) = draws[self.first]
        (other,) = draws[self.second]
        same = {name: getattr(place, name) for name in ("start", "extent", "flip")}
        return {**draws, self.second: (dataclasses.replace(other, **same),)}

    def forward(self, batch: Batch, draws: ViewDraws, outputs: bool = False) -> Step:
        """Compute InfoNCE; items that lack a modality do not count."""
        pair = self.project_pair(batch, draws)
        loss = info_nce(
            pair.first,
            pair.second,
            self.scale(),
            present=pair.both,
            symmetric=bool(self.options.symmetric),
            layout=pair.layout,
        )
        return self.step({"contrastive": loss}, pair, outputs)

    def scale(self) -> Tensor:
        """Return the factor on cosines, ()."""
        return self.inverse_temperature.float().exp().squeeze(0)

    def after_step(self, step: Step) -> None:
        """Keep the factor on cosines below CLIP's bound."""
        if self.options.bounded_scale:
            self.inverse_temperature.clamp_(max=math.log(_LARGEST_SCALE))

    def monitors(self, step: Step) -> Mapping[str, Tensor]:
        """Return the temperature."""
        return {"temperature": 1 / self.scale().detach()}


def _usual_view(modality: Modality) -> Views:
    """Return the released changes; those of colour are too small to be seen and left out."""
    if modality.value_unit in ("rgb8", "dn", "reflectance"):
        return Views(crop_area=(0.5, 1.0), grey_probability=0.2, blur_probability=0.2)
    return Views(crop_area=(0.5, 1.0), blur_probability=0.2)
