"""SwinUNETR SSL: tell rotations, recognise two views of a crop, fill in what was cut out.

Source: Tang et al., CVPR 2022 (arXiv 2111.14791), and its released code.

One training step: take every crop twice, turn each by a multiple of 90 degrees, put boxes of noise
into it (`draw`), encode both with MONAI's SwinTransformer, and ask three heads on its deepest map:
the class of the rotation (cross-entropy), which views belong together (NT-Xent), and the turned
crop without the boxes (L1). The encoder loads into MONAI's SwinUNETR.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainssl.backbones.bands import BandPolicy
from domainssl.backbones.base import LoadReport
from domainssl.backbones.encoders.swin import SwinArchitecture
from domainssl.backbones.registry import load_initial
from domainssl.backbones.swin import STRIDE, SwinBackbone, fits_stride
from domainssl.backbones.swin_files import read_swin_file
from domainssl.distributed import global_mean, row_layout
from domainssl.errors import ConfigError, WeightsError
from domainssl.losses.contrastive import nt_xent
from domainssl.modality import (
    Batch,
    Modality,
    as_modalities,
    check_batch,
    key,
    present_mask,
    sides_of,
    valid_mask,
)
from domainssl.nn.cutout import Boxes, CutOut, box_mask, box_noise, draw_boxes
from domainssl.objectives.base import Generators, Objective, Step
from domainssl.objectives.terms import term_weights
from domainssl.options import MethodOptions, as_dataclass, decide, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["SwinDraws", "SwinEncoding", "SwinUNETRSSL", "SwinUNETRSSLOptions"]

_PUBLISHED = Optimization(lr=4e-4, weight_decay=1e-5, betas=(0.9, 0.999), warmup_steps=500)
_TERMS = ("rotation", "contrastive", "reconstruction")
_IN_UNIT = ("mean2std", "mean2std8", "scale", "window", "item", "batch")
_CENTRED = "zscore"  # boxes then hold noise of two deviations about the mean
_CLASSES = 4


@dataclass(frozen=True, kw_only=True)
class SwinEncoding:
    """What the backbone is built from.

    Attributes:
        architecture: Sizes; the published ones differ in `feature_size` alone: base 48, small 24,
            tiny 12.
        normalization: Form that brings values to [0, 1], where the noise of the boxes lies, or
            `zscore`: the noise then lies within two deviations of the mean.
        weights: Start from this export, checkpoint, `model_swinvit.pt`, or state dict of MONAI's
            SwinUNETR or of the research code.
        bands: Where the bands differ from those of the weights: `strict` refuses, `subset` keeps
            the weights of the bands that are there, `average` gives new ones averaged weights.
    """

    architecture: SwinArchitecture = SwinArchitecture()
    normalization: str = "window(-1000,1000)"
    weights: str | None = None
    bands: BandPolicy = "strict"

    def __post_init__(self) -> None:
        object.__setattr__(self, "architecture", as_dataclass(SwinArchitecture, self.architecture))


@dataclass(frozen=True, kw_only=True)
class SwinUNETRSSLOptions(MethodOptions):
    """Where the paper, the released code and good sense differ; None follows `reference`."""

    rotation_plane: Literal["xy", "yz"] | None = option(
        ours="xy",
        reference="yz",
        text="Plane of the rotation: axial (paper), or sagittal (released code, axes 2 and 3 of "
        "a crop in C, X, Y, Z).",
    )
    head_input: Literal["mean", "tokens"] | None = option(
        ours="mean",
        reference="tokens",
        text="What rotation and contrast are told from: the mean of the deepest map, or its first "
        "cell for the rotation and its second one for the contrast (released code).",
    )
    swap: bool | None = option(
        ours=False,
        reference=True,
        text="After the noise, put boxes of another item of the batch into each view, up to the "
        "same share again (released code).",
    )
    negatives: Literal["global", "local"] | None = option(
        ours="global",
        reference="local",
        text="Views that a view is told from: those of all ranks, or of its own rank.",
    )


@dataclass(frozen=True)
class SwinDraws:
    """Random choices of one step, one entry per view.

    Attributes:
        rotation: Quarter turns, int64 (B,).
        noise: Boxes and what is in them, (B, C, *S), normally distributed.
        swap: Boxes and, in [0, 1) as a share of the batch, the item they come from, (B,); empty
            without the option.
    """

    rotation: tuple[Tensor, ...]
    noise: tuple[tuple[Boxes, Tensor], ...]
    swap: tuple[tuple[Boxes, Tensor], ...]


class SwinUNETRSSL(Objective):
    """Pretrain the encoder of MONAI's SwinUNETR on volumes.

    Args:
        modalities: One volume; linked from the DataModule by the CLI.
        encoding: Sizes of the encoder, scaling, initial weights.
        temperature: Divides the cosines of the contrast.
        embedding: Width of the vectors that are contrasted.
        cutout: How the boxes are drawn.
        loss_weights: Weight of the terms `rotation`, `contrastive` and `reconstruction`.
        context_size: Size of the crop in voxels, one number or one per axis, divisible by 32 and
            one of them at least 64.
        options: Single choices, and whether the released code decides the others.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modality or a size cannot be used.
    """

    contrastive: ClassVar[bool] = True
    backbone: SwinBackbone

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: SwinEncoding = SwinEncoding(),
        temperature: float = 0.5,
        embedding: int = 512,
        cutout: CutOut = CutOut(),
        loss_weights: dict[str, float] | None = None,
        context_size: int | tuple[int, ...] = 96,
        options: SwinUNETRSSLOptions = SwinUNETRSSLOptions(),
        optimization: Optimization = _PUBLISHED,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__(optimization=optimization, execution=execution, context_size=context_size)
        self.options = decide(SwinUNETRSSLOptions, options)
        encoding = as_dataclass(SwinEncoding, encoding)
        if temperature <= 0:
            raise ConfigError(f"model.init_args.temperature: got {temperature}, expected > 0.")
        self.temperature = temperature
        self.cutout = as_dataclass(CutOut, cutout)
        self.loss_weights = term_weights(loss_weights, type(self).__name__, _TERMS)
        known = as_modalities(modalities)
        self._check_size(known, context_size)
        heads: dict[str, Tensor] = {}
        if encoding.weights is None:
            self.backbone = SwinBackbone(known, encoding.architecture, encoding.normalization)
        else:
            self.backbone, heads = _from_weights(encoding, known)
        self.name = self.backbone.name
        form = self.backbone.normalizer.forms[self.name]
        self._is_centred = form.name == _CENTRED
        if form.name not in (*_IN_UNIT, _CENTRED):
            raise ConfigError(
                f"model.init_args.encoding.normalization: {str(form)!r} does not give values in "
                f"[0, 1], where the noise of the boxes lies. Choose one of "
                f"{', '.join((*_IN_UNIT, _CENTRED))}."
            )
        width = self.backbone.embed_dim[self.name]
        self.rotation_head = nn.Linear(width, _CLASSES)
        self.contrastive_head = nn.Linear(width, embedding)
        channels = self.backbone.modalities[self.name].num_channels
        self.reconstruction_head = _reconstruction_head(width, channels)
        if heads:
            self.load_pretraining_parts(heads)

    def _check_size(self, known: Mapping[str, Modality], context: int | tuple[int, ...]) -> None:
        where = "model.init_args.context_size"
        if any(modality.kind != "volume" for modality in known.values()) or len(known) != 1:
            raise ConfigError(
                f"SwinUNETRSSL takes one volume; the data have "
                f"{ {name: m.kind for name, m in known.items()} }. Choose one in the DataModule."
            )
        size = sides_of(context, 3, where)
        better = fits_stride(size)
        if better is not None:
            raise ConfigError(
                f"{where}: {list(size)} is not divisible by {STRIDE}, which patch and mergings of "
                f"the SwinTransformer need. Set it, and the window of the data, to {list(better)}."
            )
        if max(size) < 2 * STRIDE:
            raise ConfigError(
                f"{where}: {list(size)} leaves one cell in the deepest map, which neither instance "
                f"norm nor the heads can use. Make one side {2 * STRIDE} or more."
            )
        first, second = self._plane
        if size[first] != size[second]:
            raise ConfigError(
                f"{where}: {list(size)} has no square in the plane "
                f"{self.options.rotation_plane!r} that is turned by 90 degrees. Make "
                f"{size[first]} and {size[second]} equal, or choose another "
                "options.rotation_plane."
            )

    @property
    def _plane(self) -> tuple[int, int]:
        """Spatial axes of the rotation."""
        return (0, 1) if self.options.rotation_plane == "xy" else (1, 2)

    def setup(self, stage: str) -> None:
        """Refuse what MONAI's attention cannot do, besides the checks of every objective."""
        if self.execution.attention != "fused":
            raise ConfigError(
                "model.init_args.execution.attention: the SwinTransformer is MONAI's and computes "
                "attention its own way; leave it at 'fused'."
            )
        super().setup(stage)

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield everything: there is one modality."""
        yield from self.parameters()

    # -- one step ---------------------------------------------------------------------------

    def draw(self, batch: Batch, generators: Generators) -> SwinDraws:
        """Draw rotation, boxes and noise of both views."""
        x, generator = batch[self.name], generators.local
        size, items, device = tuple(x.shape[2:]), len(x), x.device

        def boxes() -> Boxes:
            return draw_boxes(self.cutout, size, items, generator)

        views = range(2)
        turns = tuple(
            torch.randint(_CLASSES, (items,), generator=generator, device=device) for _ in views
        )
        noise = tuple(
            (boxes(), torch.randn(x.shape, generator=generator, device=device)) for _ in views
        )
        swap = tuple(
            (boxes(), torch.rand(items, generator=generator, device=device))
            for _ in views
            if self.options.swap
        )
        return SwinDraws(turns, noise, swap)

    def forward(self, batch: Batch, draws: SwinDraws, outputs: bool = False) -> Step:
        """Compute the terms; absent items count in none, invalid voxels not in the last."""
        check_batch(batch, self.backbone.modalities, training=True)
        modality = self.backbone.modalities[self.name]
        layout = row_layout(batch[self.name])
        present = present_mask(batch, self.name)
        x: Tensor = self.backbone.normalize(batch)[self.name]
        usable = valid_mask(batch, modality) & present.view(-1, 1, 1, 1)
        clean = torch.cat([self.rotate(x, turns) for turns in draws.rotation])
        valid = torch.cat([self.rotate(usable, turns) for turns in draws.rotation])
        views = torch.cat([self._corrupt(clean, draws, view) for view in range(2)])
        maps = self._deepest({
            self.name: views,
            key(self.name, "valid"): valid,
            key(self.name, "present"): present.repeat(2),
        })  # fmt: skip
        logits, vectors, predicted = self.heads(maps)
        losses = self.losses(
            logits, vectors, predicted,
            turns=torch.cat(draws.rotation), target=clean, valid=valid, present=present,
            layout=layout,
        )  # fmt: skip
        if not outputs:
            return Step(losses)
        items = len(x)
        pictures = {"input": clean, "visible": views, "predicted": predicted.float()}
        return Step(
            losses,
            {
                "reconstruction": {self.name: {n: p[:items].detach() for n, p in pictures.items()}},
                "embeddings": {self.name: vectors[:items].detach()},
            },
        )

    def rotate(self, x: Tensor, turns: Tensor) -> Tensor:
        """Turn every item by its number of quarter turns.

        Args:
            x: (B, C, X, Y, Z), or (B, X, Y, Z).
            turns: int64 (B,), 0 to 3.
        """
        plane = tuple(x.ndim - 3 + axis for axis in self._plane)
        out, chosen = x, turns.view(-1, *[1] * (x.ndim - 1))
        for count in range(1, _CLASSES):
            out = torch.where(chosen == count, torch.rot90(x, count, plane), out)
        return out

    def _corrupt(self, clean: Tensor, draws: SwinDraws, view: int) -> Tensor:
        """Put the boxes of a view into it; `clean` holds the items of both views."""
        items = len(clean) // 2
        x, size = clean[view * items : (view + 1) * items], tuple(clean.shape[2:])
        boxes, noise = draws.noise[view]
        filling = box_noise(boxes, noise, self.cutout)
        filling = 4 * filling - 2 if self._is_centred else filling
        x = torch.where(box_mask(boxes, size).unsqueeze(1), filling, x)
        if draws.swap:
            boxes, share = draws.swap[view]
            other = (share * items).long().clamp(max=items - 1)
            x = torch.where(box_mask(boxes, size).unsqueeze(1), x[other], x)
        return x

    def _deepest(self, x: Mapping[str, Tensor]) -> Tensor:
        """Return the deepest map of normalised views, (2B, E, *S / 32)."""
        features = self.backbone.encode(x)
        grid = features.grid[self.name]
        return features.tokens[self.name].transpose(1, 2).unflatten(2, grid)

    def heads(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotation logits (2B, 4), vectors (2B, K) and volumes (2B, C, *S) of maps."""
        tokens = maps.flatten(2)
        if self.options.head_input == "tokens":
            first, second = tokens[..., 0], tokens[..., 1]
        else:
            first = second = tokens.mean(2)
        # a 1³ convolution and interpolation commute: this way only C channels are enlarged
        *parts, enlarge, last = self.reconstruction_head
        volumes = maps
        for part in parts:
            volumes = part(volumes)
        volumes = enlarge(last(volumes))
        return self.rotation_head(first), self.contrastive_head(second), volumes

    def losses(
        self,
        logits: Tensor,
        vectors: Tensor,
        predicted: Tensor,
        *,
        turns: Tensor,
        target: Tensor,
        valid: Tensor | None = None,
        present: Tensor | None = None,
        layout: Any = None,
    ) -> dict[str, Tensor]:
        """Compute the weighted terms, first the items of view 1, then those of view 2.

        Args:
            logits: Of the rotation, (2B, 4).
            vectors: To contrast, (2B, K).
            predicted: Reconstruction, (2B, C, *S).
            turns: Class of the rotation, int64 (2B,).
            target: Turned crops without boxes, (2B, C, *S).
            valid: bool (2B, *S); False voxels are not reconstructed. None counts all.
            present: bool (B,); False items count in no term. None counts all.
            layout: Rows of every rank (`row_layout`).
        """
        items = len(vectors) // 2
        if present is None:
            present = torch.ones(items, dtype=torch.bool, device=vectors.device)
        weight = self.loss_weights
        with torch.autocast(vectors.device.type, enabled=False):
            both = present.repeat(2).float()
            terms = F.cross_entropy(logits.float(), turns, reduction="none")
            rotation = global_mean((terms * both).sum(), both.sum())
            counted = both.view(-1, *[1] * (target.ndim - 2)).expand(target[:, 0].shape)
            if valid is not None:
                counted = counted * valid
            error = (predicted.float() - target.float()).abs().mean(1)
            reconstruction = global_mean((error * counted).sum(), counted.sum())
        contrast = nt_xent(
            vectors[:items],
            vectors[items:],
            self.temperature,
            present=present,
            gather_keys="none" if self.options.negatives == "local" else "grad",
            layout=layout,
        )
        values = (rotation, contrast, reconstruction)
        return {name: weight[name] * v for name, v in zip(_TERMS, values, strict=True)}

    # -- reference files --------------------------------------------------------------------

    def load_pretraining_parts(self, heads: Mapping[str, Tensor]) -> LoadReport:
        """Fill the three heads from a file of the research code.

        Args:
            heads: `rotation_head.*`, `contrastive_head.*`, `conv.*`, without prefix.

        Raises:
            WeightsError: Tensors are missing or of other sizes.
        """
        own = {n: t for n, t in self.state_dict().items() if not n.startswith("backbone.")}
        renamed = {_own_name(n): t for n, t in heads.items()}
        wrong = [n for n in own if n not in renamed or renamed[n].shape != own[n].shape]
        if wrong:
            raise WeightsError(
                f"The heads of the file do not fit: {wrong[:3]} are missing or of another size. "
                "Set embedding and the channels of the data to those of the file, or keep the "
                "encoder of the file only."
            )
        self.load_state_dict({n: renamed[n] for n in own}, strict=False)
        return LoadReport(tuple(own), (), tuple(n for n in renamed if n not in own))

    def to_reference(self) -> dict[str, Any]:
        """Return the research code's layout: encoder under `swinViT.`, and the heads."""
        written = self.backbone.to_reference("monai")
        heads = {n: t for n, t in self.state_dict().items() if not n.startswith("backbone.")}
        named = {n.replace("reconstruction_head.", "conv."): t for n, t in heads.items()}
        return {**written, "state_dict": {**written["state_dict"], **named}}


def _own_name(name: str) -> str:
    return "reconstruction_head." + name.removeprefix("conv.") if name.startswith("conv.") else name


def _reconstruction_head(width: int, channels: int) -> nn.Sequential:
    """Five times convolution, instance norm, leaky ReLU and doubling; a last 1³ convolution."""
    parts: list[nn.Module] = []
    inputs = width
    for divisor in (2, 4, 8, 16, 16):
        outputs = width // divisor
        parts += [
            nn.Conv3d(inputs, outputs, 3, padding=1),
            nn.InstanceNorm3d(outputs),
            nn.LeakyReLU(),
            nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
        ]
        inputs = outputs
    return nn.Sequential(*parts, nn.Conv3d(inputs, channels, 1))


def _from_weights(
    encoding: SwinEncoding, known: dict[str, Modality]
) -> tuple[SwinBackbone, dict[str, Tensor]]:
    """Load the backbone, and the heads that a file of others may hold."""
    sizes = vars(encoding.architecture)
    is_default = sizes == {**vars(SwinArchitecture()), "merging": sizes["merging"]}
    wanted = {"merging": sizes["merging"]} if is_default else sizes
    loaded, content = load_initial(
        SwinBackbone, str(encoding.weights), "swin_unetr", modalities=known,
        arguments={"architecture": wanted, "normalization": encoding.normalization},
        same=("modalities",), bands=encoding.bands,
    )  # fmt: skip
    return loaded, read_swin_file(content).heads if content else {}
