"""Masked autoencoding with convolutional encoders: fill in hidden cubes of images and volumes.

Source: nnssl (Wald et al. 2025, arXiv 2410.23132, "MAE" of the residual encoder U-Net).

One training step: hide cubes of every item (`draw`), set them to zero in the normalised input,
encode what is left, decode it with a light U-Net decoder that sees the encoder's maps of all
resolutions, and compare with the input where it was hidden.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from domainssl.backbones.bands import BandPolicy
from domainssl.backbones.encoders.backbone import EncoderBackbone, EncoderSizes
from domainssl.backbones.encoders.residual import ConvNormAct
from domainssl.backbones.registry import load_initial
from domainssl.distributed import global_mean
from domainssl.errors import ConfigError
from domainssl.modality import (
    Batch,
    Modality,
    as_modalities,
    check_batch,
    present_mask,
    sides_of,
    valid_mask,
)
from domainssl.nn.blocks import blocks_of
from domainssl.nn.masking import kept_count, mask_from_noise
from domainssl.nn.patching import grid_of, unpatchify
from domainssl.objectives.base import Generators, Objective, Step
from domainssl.options import MethodOptions, as_dataclass, decide, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["ConvEncoding", "ConvMAE", "ConvMAEOptions"]

_PUBLISHED = Optimization(
    optimizer="sgd", lr=1e-2, momentum=0.99, weight_decay=3e-5, warmup_fraction=0.0,
    fall="polynomial", clip=12.0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ConvEncoding:
    """What the backbone is built from.

    Attributes:
        encoder: `resenc`, `monai:resnet18` (10 to 200), `monai:swin`, or a timm ResNet for images;
            one for all modalities or one per modality.
        sizes: Sizes of encoders whose name does not settle them; the default of `resenc` is
            nnssl's ResEnc-L.
        normalization: Form for all modalities, or one per modality.
        weights: Start from this export or checkpoint.
        bands: Where the bands differ from those of the weights: `strict` refuses, `subset` keeps
            the weights of the bands that are there, `average` gives new ones averaged weights.
    """

    encoder: str | dict[str, str] = "resenc"
    sizes: EncoderSizes = field(default_factory=EncoderSizes)
    normalization: str | dict[str, str] = "zscore"
    weights: str | None = None
    bands: BandPolicy = "strict"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", as_dataclass(EncoderSizes, self.sizes))


@dataclass(frozen=True, kw_only=True)
class ConvMAEOptions(MethodOptions):
    """Where the released code and good sense differ; None follows `reference`."""

    channel_sum: bool | None = option(
        ours=False,
        reference=True,
        text="Errors of the channels of a voxel are added instead of averaged (released code); "
        "equal for one channel.",
    )
    region: Literal["masked", "all"] | None = option(
        ours="masked",
        reference="masked",
        text="Where the error counts: in hidden voxels, or everywhere (AMAES).",
    )


class ConvMAE(Objective):
    """Pretrain a convolutional `EncoderBackbone` by filling in hidden cubes.

    Every modality has its own encoder, decoder and masks.

    Args:
        modalities: Images or volumes; linked from the DataModule by the CLI.
        encoding: Encoder, scaling, initial weights.
        mask_size: Side of a hidden cube in pixels or voxels, one number or one per axis.
        mask_ratio: Share of the cubes that are hidden.
        context_size: Size of the window, one number or one per axis.
        options: Single choices, and whether the released code decides the others.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: A modality, an encoder or a size cannot be used.
    """

    backbone: EncoderBackbone

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: ConvEncoding = ConvEncoding(),
        mask_size: int | tuple[int, ...] = 16,
        mask_ratio: float = 0.75,
        context_size: int | tuple[int, ...] = 160,
        options: ConvMAEOptions = ConvMAEOptions(),
        optimization: Optimization = _PUBLISHED,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__(optimization=optimization, execution=execution, context_size=context_size)
        self.options = decide(ConvMAEOptions, options)
        if not 0 < mask_ratio < 1:
            raise ConfigError(
                f"model.init_args.mask_ratio: got {mask_ratio!r}, expected a share in (0, 1)."
            )
        self.mask_ratio = mask_ratio
        self.mask_size = mask_size
        known = as_modalities(modalities)
        encoding = as_dataclass(ConvEncoding, encoding)
        self.backbone = _backbone(encoding, known)
        self.decoders = nn.ModuleDict()
        for name, modality in known.items():
            self._check(modality, context_size)
            self.decoders[name] = _Decoder(
                modality.spatial_dims, self.backbone.levels(name), modality.num_channels
            )

    def _check(self, modality: Modality, context: int | tuple[int, ...]) -> None:
        name, kind = modality.name, modality.kind
        if kind not in ("image", "volume"):
            raise ConfigError(
                f"ConvMAE takes images and volumes; modality {name!r} is of kind {kind!r}. "
                "Choose one date of it (dates: {mode: one})."
            )
        levels = self.backbone.levels(name)
        if not levels:
            raise ConfigError(
                f"model.init_args.encoding.encoder: that of {name!r} has maps of one size only and "
                "no place for a U-Net decoder. Choose resenc, monai:resnet18 or a timm ResNet, or "
                "train a transformer with MAE."
            )
        where, axes = "model.init_args.context_size", modality.spatial_dims
        size = modality.size or sides_of(context, axes, where)
        grid_of(size, self._mask_sides(axes), f"{where}: cubes of mask_size")
        grid_of(size, levels[-1][1], f"{where}: deepest map of {name!r}")

    def setup(self, stage: str) -> None:
        """Refuse execution that the encoders do not know, besides the checks of every objective."""
        if self.execution.attention != "fused":
            raise ConfigError(
                "model.init_args.execution.attention: convolutional encoders have none to choose; "
                "leave it at 'fused'."
            )
        if self.execution.compile and not blocks_of(self.backbone):
            raise ConfigError(
                "model.init_args.execution.compile: acts on the blocks of resenc and monai:swin; "
                "the ResNets of timm and MONAI take compile: false."
            )
        super().setup(stage)

    def _mask_sides(self, axes: int) -> tuple[int, ...]:
        return sides_of(self.mask_size, axes, "model.init_args.mask_size")

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the modality's encoder and decoder."""
        yield from super().modality_parameters(name)
        yield from self.decoders[name].parameters()

    def draw(self, batch: Batch, generators: Generators) -> dict[str, Tensor]:
        """Choose the cubes to hide, bool (B, N) per modality, cubes in row-major order."""
        hidden = {}
        for name, modality in self.backbone.modalities.items():
            x = batch[name]
            size = x.shape[-modality.spatial_dims :]
            cubes = math.prod(grid_of(size, self._mask_sides(len(size)), f"batch.{name}"))
            noise = torch.rand(len(x), cubes, generator=generators.local, device=x.device)
            hidden[name] = mask_from_noise(noise, kept_count(cubes, self.mask_ratio)).removed
        return hidden

    def forward(self, batch: Batch, draws: Mapping[str, Tensor], outputs: bool = False) -> Step:
        """Compute the error of every modality; invalid voxels and absent items do not count."""
        check_batch(batch, self.backbone.modalities, training=True)
        x = self.backbone.normalize(batch)
        hidden = {name: self.voxels(cubes, x[name]) for name, cubes in draws.items()}
        seen = {name: torch.where(mask.unsqueeze(1), 0.0, x[name]) for name, mask in hidden.items()}
        maps = self.backbone.encode_pyramid({**x, **seen})
        losses, pictures = {}, {}
        for name, modality in self.backbone.modalities.items():
            predicted = self.decoders[name](maps[name])
            present = present_mask(batch, name).view(-1, *[1] * modality.spatial_dims)
            counted = valid_mask(batch, modality) & present
            if self.options.region == "masked":
                counted = counted & hidden[name]
            losses[f"reconstruction_{name}"] = self._error(predicted, x[name], counted)
            if outputs:
                nothing = torch.where(hidden[name].unsqueeze(1), float("nan"), x[name])
                pictures[name] = {
                    "input": x[name], "visible": nothing, "predicted": predicted.float().detach(),
                }  # fmt: skip
        return Step(losses, {"reconstruction": pictures} if outputs else {})

    def voxels(self, cubes: Tensor, x: Tensor) -> Tensor:
        """Spread a mask of cubes over their voxels.

        Args:
            cubes: bool (B, N), row-major.
            x: What is masked, (B, C, *S).

        Returns:
            bool (B, *S).
        """
        size = tuple(x.shape[2:])
        sides = self._mask_sides(len(size))
        tokens = cubes.unsqueeze(-1).expand(-1, -1, math.prod(sides))
        return unpatchify(tokens, grid_of(size, sides), sides).squeeze(1)

    def _error(self, predicted: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        """Average the squared error of the voxels that count over the global batch."""
        with torch.autocast(predicted.device.type, enabled=False):
            error = (predicted.float() - target.float()).square()
            each = error.sum(1) if self.options.channel_sum else error.mean(1)
            weight = counted.float()
            return global_mean((each * weight).sum(), weight.sum())


class _Decoder(nn.Module):
    """A U-Net decoder with one convolution per level; maps of a pyramid -> (B, C, *S)."""

    def __init__(self, dims: int, levels: Sequence[tuple[int, int]], channels: int) -> None:
        super().__init__()
        up = nn.ConvTranspose3d if dims == 3 else nn.ConvTranspose2d
        self.ups, self.convs = nn.ModuleList(), nn.ModuleList()
        for (inputs, stride), (outputs, finer) in itertools.pairwise(reversed(levels)):
            ratio = stride // finer
            self.ups.append(up(inputs, outputs, ratio, ratio))
            self.convs.append(ConvNormAct(dims, 2 * outputs, outputs))
        width, stride = levels[0]
        self.last_up = up(width, width, stride, stride) if stride > 1 else nn.Identity()
        self.out = (nn.Conv3d if dims == 3 else nn.Conv2d)(width, channels, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Decode from the coarsest map to the grid of the input."""
        x = maps[-1]
        finer = reversed(maps[:-1])
        for up, conv, skip in zip(self.ups, self.convs, finer, strict=True):
            x = conv(torch.cat([up(x), skip], 1))
        out: Tensor = self.out(self.last_up(x))
        return out


def _backbone(encoding: ConvEncoding, known: dict[str, Modality]) -> EncoderBackbone:
    if encoding.weights is None:
        return EncoderBackbone(
            known,
            encoder=encoding.encoder,
            sizes=encoding.sizes,
            normalization=encoding.normalization,
        )
    loaded, _ = load_initial(
        EncoderBackbone, encoding.weights, None, modalities=known, arguments={},
        same=("modalities",), bands=encoding.bands,
    )  # fmt: skip
    return loaded
