"""ViTAutoEnc: restore a volume from a corrupted copy, and recognise it in two of them.

Source: MONAI's ViTAutoEnc and its self-supervised tutorial (volumes of 96 voxels, L1 and NT-Xent).

One training step: corrupt the crop twice (`draw` has the boxes), encode both copies, decode them
with two transposed convolutions, and compare the first with the crop and both with each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from domainssl.backbones.bands import BandPolicy
from domainssl.backbones.base import Features, LoadReport
from domainssl.backbones.vit import ViTBackbone
from domainssl.distributed import RowLayout, all_reduce_sum, global_mean, row_layout, world_size
from domainssl.errors import ConfigError, WeightsError
from domainssl.losses.contrastive import nt_xent
from domainssl.modality import (
    Batch,
    Modality,
    as_modalities,
    key,
    present_mask,
    sides_of,
    valid_mask,
)
from domainssl.nn.cutout import Boxes, box_mask
from domainssl.objectives.base import Generators, Objective, Step
from domainssl.objectives.mae_parts import build_vit
from domainssl.options import MethodOptions, as_dataclass, decide, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = [
    "Corruption",
    "ViTAutoEncArchitecture",
    "ViTAutoEncDraws",
    "ViTAutoEncEncoding",
    "ViTAutoEncOptions",
    "ViTAutoEncSSL",
]

# Adam at a constant rate, as the tutorial has it.
_PUBLISHED = Optimization(lr=1e-4, weight_decay=0.0, warmup_fraction=0.0, final_lr_fraction=1.0)


@dataclass(frozen=True, kw_only=True)
class ViTAutoEncArchitecture:
    """Sizes.

    Attributes:
        width: Token width.
        depth: Blocks.
        heads: Attention heads.
        hidden: Width of the feed-forward layers; None is four times the width.
        qkv_bias: Queries, keys and values have a bias.
        positions: `learned` for one size of crop, or `sincos`.
        channels: Channels between the two transposed convolutions of the decoder.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int | None = None
    qkv_bias: bool = False
    positions: Literal["sincos", "learned"] = "learned"
    channels: int = 16


@dataclass(frozen=True, kw_only=True)
class ViTAutoEncEncoding:
    """What the backbone is built from.

    Attributes:
        architecture: Sizes.
        patch_size: Side of a patch, one number or one per axis; a square number, 4, 9 or 16.
        normalization: Form of the modality.
        weights: Start from these weights, with the decoder where the file has one.
        bands: Where the bands differ from those of the weights: `strict` refuses, `subset` keeps
            the weights of the bands that are there, `average` gives new ones averaged weights.
    """

    architecture: ViTAutoEncArchitecture = field(default_factory=ViTAutoEncArchitecture)
    patch_size: int | tuple[int, ...] = 16
    normalization: str | dict[str, str] = "zscore"
    weights: str | None = None
    bands: BandPolicy = "strict"


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """What is done to a copy; sides in voxels, cut to the crop.

    Attributes:
        boxes: Boxes of a copy, which are filled with noise, or are all that is left of it.
        filled_sides: Smallest and largest side of a box that is filled.
        left_sides: Smallest and largest side of a box that is left.
        shuffle_probability: Share of copies whose voxels are shuffled locally.
        shuffled_boxes: Boxes in which voxels change places.
        shuffled_side: Their side.
    """

    boxes: int = 6
    filled_sides: tuple[int, int] = (5, 32)
    left_sides: tuple[int, int] = (20, 64)
    shuffle_probability: float = 0.8
    shuffled_boxes: int = 10
    shuffled_side: int = 8

    def __post_init__(self) -> None:
        for name in ("filled_sides", "left_sides"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ConfigError(
                    f"model.init_args.corruption.{name}: got {[low, high]}, expected a smallest "
                    "and a largest side."
                )


@dataclass(frozen=True, kw_only=True)
class ViTAutoEncOptions(MethodOptions):
    """Where the tutorial and good sense differ; None follows `reference`."""

    contrast_of: Literal["pooled", "voxels"] | None = option(
        ours="pooled",
        reference="voxels",
        text="Contrast the pooled tokens of the two copies, or their restored voxels.",
    )
    contrast_gather: Literal["grad", "none"] | None = option(
        ours="grad",
        reference="none",
        text="Candidates of the contrast: the copies of all ranks, or those of the own one.",
    )
    pixel_validity: bool | None = option(
        ours=True,
        reference=False,
        text="Leave invalid voxels out of the restoration loss.",
    )


@dataclass(frozen=True, kw_only=True)
class ViTAutoEncDraws:
    """Random choices of one step, for two copies of every item.

    Attributes:
        start: First voxel of every box, int64 (B, 2, K, D).
        stop: One past the last one, int64 (B, 2, K, D).
        is_left: True where all but the boxes is filled, bool (B, 2).
        noise: What is filled in, as a share of the crop's range, (B, 2, C, *S).
        shuffle_start: First voxel of every shuffled box, int64 (B, 2, Q, D).
        shuffle_order: Where its voxels come from, int64 (B, 2, Q, C, P).
    """

    start: Tensor
    stop: Tensor
    is_left: Tensor
    noise: Tensor
    shuffle_start: Tensor
    shuffle_order: Tensor


class ViTAutoEncDecoder(nn.Module):
    """Two transposed convolutions from tokens to voxels, without an activation between them."""

    def __init__(self, width: int, between: int, outputs: int, patch: tuple[int, ...]) -> None:
        super().__init__()
        steps = tuple(math.isqrt(side) for side in patch)
        if any(step * step != side for step, side in zip(steps, patch, strict=True)):
            raise ConfigError(
                f"model.init_args.encoding.patch_size: got {list(patch)}; two equal steps lead "
                "back to voxels, so every side must be a square number, such as 4, 9 or 16."
            )
        conv: Any = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[len(patch)]
        self.first = conv(width, between, kernel_size=steps, stride=steps)
        self.second = conv(between, outputs, kernel_size=steps, stride=steps)

    def forward(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """(B, N, E) -> (B, C, *S)."""
        out: Tensor = self.second(self.first(tokens.transpose(1, 2).unflatten(2, grid)))
        return out


class ViTAutoEncSSL(Objective):
    """Pretrain a `ViTBackbone` on volumes or images by restoring and contrasting corrupted copies.

    Args:
        modalities: One volume or image, by name; linked from the DataModule by the CLI.
        encoding: Sizes, patch, normalisation and weights of the backbone.
        context_size: Size of the window in voxels, one number or one per axis, multiples of the
            patch.
        corruption: What is done to the copies.
        temperature: Divides the cosines of the contrast.
        options: Single choices, and whether the tutorial decides the others.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modality or sizes cannot be used.
    """

    contrastive: ClassVar[bool] = True
    backbone: ViTBackbone

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: ViTAutoEncEncoding = ViTAutoEncEncoding(),
        context_size: int | tuple[int, ...] = 96,
        corruption: Corruption = Corruption(),
        temperature: float = 0.05,
        options: ViTAutoEncOptions = ViTAutoEncOptions(),
        optimization: Optimization = _PUBLISHED,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__(optimization=optimization, execution=execution, context_size=context_size)
        if temperature <= 0:
            raise ConfigError(
                f"model.init_args.temperature: got {temperature}, expected a positive number."
            )
        self.temperature = temperature
        self.options = decide(ViTAutoEncOptions, options)
        self.corruption = as_dataclass(Corruption, corruption)
        encoding = as_dataclass(ViTAutoEncEncoding, encoding)
        sizes = as_dataclass(ViTAutoEncArchitecture, encoding.architecture)
        known = as_modalities(modalities)
        architecture = {**vars(sizes), "class_token": False, "layout": "monai"}
        between = architecture.pop("channels")
        variant: dict[str, Any] = {
            "architecture": architecture,
            "patch_size": encoding.patch_size,
            "image_size": context_size,
            "normalization": encoding.normalization,
        }
        self.backbone, state = build_vit(known, variant, encoding.weights, encoding.bands)
        modality = self.backbone.modality
        if modality.kind == "series":
            raise ConfigError(
                f"ViTAutoEncSSL takes volumes and images; {modality.name!r} is a series. Choose "
                "one date in the DataModule, or MAE, which takes series."
            )
        size = sides_of(context_size, modality.spatial_dims, "model.init_args.context_size")
        self.backbone.grid_of(size, "model.init_args.context_size")
        self.decoder = ViTAutoEncDecoder(
            sizes.width, between, modality.num_channels, self.backbone.patch_size
        )
        if any("conv3d_transpose" in name for name in state):
            self.load_pretraining_parts(state)

    # -- draws ------------------------------------------------------------------------------

    def draw(self, batch: Batch, generators: Generators) -> ViTAutoEncDraws:
        """Draw boxes, noise and orders of two copies of every item."""
        x, c, generator = batch[self.backbone.name], self.corruption, generators.local
        size, device = torch.tensor(x.shape[2:], device=x.device), x.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(len(x), 2, *shape, generator=generator, device=device)

        is_left = uniform() < 0.5
        place = (c.boxes, len(size))
        filled, left = (
            _whole(uniform(*place), *(size.clamp(max=n) for n in sides))
            for sides in (c.filled_sides, c.left_sides)
        )
        sides = torch.where(is_left[..., None, None], left, filled)
        start = _whole(uniform(*place), torch.zeros_like(size), size - sides)
        shuffled = size.clamp(max=c.shuffled_side)
        voxels = math.prod(min(n, c.shuffled_side) for n in x.shape[2:])
        order = uniform(c.shuffled_boxes, x.shape[1], voxels).argsort(-1)
        stays = uniform() >= c.shuffle_probability
        own = torch.arange(voxels, device=device)
        return ViTAutoEncDraws(
            start=start,
            stop=start + sides,
            is_left=is_left,
            noise=uniform(*x.shape[1:]),
            shuffle_start=_whole(
                uniform(c.shuffled_boxes, len(size)), torch.zeros_like(size), size - shuffled
            ),
            shuffle_order=torch.where(stays[..., None, None, None], own, order),
        )

    def corrupt(self, x: Mapping[str, Any], draws: ViTAutoEncDraws) -> Tensor:
        """Return two corrupted copies of the normalised values, (B, 2, C, *S)."""
        values = x[self.backbone.name]
        copies = values.unsqueeze(1).expand(-1, 2, *values.shape[1:]).flatten(0, 1)
        size, axes = values.shape[2:], values.ndim - 2
        every = tuple(range(1, axes + 2))
        low, high = copies.amin(every, keepdim=True), copies.amax(every, keepdim=True)
        noise = low + draws.noise.flatten(0, 1) * (high - low)
        start = draws.start.flatten(0, 1)
        used = torch.ones(start.shape[:2], dtype=torch.bool, device=start.device)
        inside = box_mask(Boxes(start, draws.stop.flatten(0, 1), used), size)
        filled = inside ^ draws.is_left.flatten().view(-1, *[1] * axes)
        copies = torch.where(filled.unsqueeze(1), noise, copies).flatten(2)
        grid = torch.cartesian_prod(
            *(
                torch.arange(min(n, self.corruption.shuffled_side), device=start.device)
                for n in size
            )
        ).view(-1, axes)
        starts, orders = draws.shuffle_start.flatten(0, 1), draws.shuffle_order.flatten(0, 1)
        for box in range(starts.shape[1]):  # one after another: later boxes see earlier ones
            place = starts[:, box].unsqueeze(1) + grid  # (2B, P, D)
            flat = torch.zeros_like(place[..., 0])
            for axis, side in enumerate(size):
                flat = flat * side + place[..., axis]
            flat = flat.unsqueeze(1).expand(-1, copies.shape[1], -1)
            moved = copies.gather(2, flat).gather(2, orders[:, box])
            copies = copies.scatter(2, flat, moved)
        out = copies.view(len(values), 2, *values.shape[1:])
        valid = valid_mask(x, self.backbone.modality)[:, None, None]
        return torch.where(valid, out, 0.0)

    # -- the step ---------------------------------------------------------------------------

    def forward(self, batch: Batch, draws: ViTAutoEncDraws, outputs: bool = False) -> Step:
        """Restore the first copy and contrast both; items without the modality do not count."""
        layout = row_layout(batch[self.backbone.name])
        x = self.backbone.normalize(batch)
        return self.compare(x, self.corrupt(x, draws), layout, outputs)

    def compare(
        self, x: Mapping[str, Any], copies: Tensor, layout: RowLayout, outputs: bool = False
    ) -> Step:
        """Return the losses `r` and `c r` of two copies, (B, 2, C, *S), of the values in `x`."""
        name, options = self.backbone.name, self.options
        present = present_mask(x, name)
        features, restored = self.restore(x, copies)
        pooled = features.pooled[name].unflatten(0, (-1, 2))
        vectors = pooled if options.contrast_of == "pooled" else restored.flatten(2)
        contrast = nt_xent(
            vectors[:, 0],
            vectors[:, 1],
            self.temperature,
            present=present,
            gather_keys=options.contrast_gather or "grad",
            layout=layout,
        )
        recon = self._over_ranks(self._distance(x, restored[:, 0], present))
        losses = {
            "reconstruction": recon,
            "contrastive": recon * self._over_ranks(contrast),
        }
        if not outputs:
            return Step(losses)
        shown = {"input": x[name], "visible": copies[:, 0], "predicted": restored[:, 0].float()}
        pictures = {name: {kind: value.detach() for kind, value in shown.items()}}
        embeddings = {name: pooled[:, 0].detach()}
        return Step(losses, {"reconstruction": pictures, "embeddings": embeddings})

    def restore(self, x: Mapping[str, Any], copies: Tensor) -> tuple[Features, Tensor]:
        """Encode and decode copies (B, V, C, *S): features of B · V items, values (B, V, C, *S)."""
        name, views = self.backbone.name, copies.shape[1]
        both = {name: copies.flatten(0, 1)}
        for companion in ("valid", "present"):
            if key(name, companion) in x:
                both[key(name, companion)] = x[key(name, companion)].repeat_interleave(views, 0)
        features = self.backbone.encode(both)
        restored = self.decoder(features.tokens[name], features.grid[name])
        return features, restored.unflatten(0, (-1, views))

    def _distance(self, x: Mapping[str, Any], restored: Tensor, present: Tensor) -> Tensor:
        """Return the mean absolute error over the voxels that count, of all ranks."""
        error = (restored.float() - x[self.backbone.name]).abs().mean(1)  # (B, *S)
        counted = present.view(-1, *[1] * (error.ndim - 1)).expand_as(error)
        if self.options.pixel_validity:
            counted = counted & valid_mask(x, self.backbone.modality)
        weight = counted.float()
        return global_mean((error * weight).sum(), weight.sum())

    def _over_ranks(self, loss: Tensor) -> Tensor:
        """Return the value over all ranks, of which each has a part, for use in a product."""
        return all_reduce_sum(loss) / world_size()

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield all parameters: there is one modality."""
        yield from self.parameters()

    # -- reference files --------------------------------------------------------------------

    def load_pretraining_parts(self, state: Mapping[str, Any]) -> LoadReport:
        """Fill the decoder from a state dict of MONAI's ViTAutoEnc.

        Raises:
            WeightsError: A tensor is missing or has another shape.
        """
        own = self.decoder.state_dict()
        names = {n: _reference_name(n) for n in own}
        wrong = [t for n, t in names.items() if t not in state or state[t].shape != own[n].shape]
        if wrong:
            raise WeightsError(
                f"Decoder of the file: {wrong} are missing or have another shape. Give the "
                "patch_size and architecture.channels of the run it comes from."
            )
        self.decoder.load_state_dict({n: state[t] for n, t in names.items()})
        return LoadReport(tuple(own), (), ())

    def to_reference(self) -> dict[str, Tensor]:
        """Return the weights as MONAI's ViTAutoEnc has them."""
        decoder = {_reference_name(n): t for n, t in self.decoder.state_dict().items()}
        return self.backbone.to_reference() | decoder


def _whole(uniform: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return whole numbers from `low` to `high`, both included, from shares in [0, 1)."""
    return low + (uniform * (high - low + 1)).long().minimum(high - low)


def _reference_name(own: str) -> str:
    return own.replace("first.", "conv3d_transpose.").replace("second.", "conv3d_transpose_1.")
