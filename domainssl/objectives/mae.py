"""MAE: masked autoencoders over the patches of an image, a series or a volume.

Source: He et al., CVPR 2022 (arXiv 2111.06377), and its released code; for volumes the model is
MONAI's MaskedAutoEncoderViT, which comes without a loss.

One training step: hide most patches (`draw`), encode the visible ones, put mask tokens in the
places of the others, and reconstruct their values with a light decoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from domainssl.backbones.bands import BandPolicy
from domainssl.backbones.base import Features, LoadReport
from domainssl.backbones.vit import ViTBackbone, per_date
from domainssl.errors import ConfigError, WeightsError
from domainssl.losses.reconstruction import masked_patch_mse, patch_statistics
from domainssl.modality import Batch, Modality, as_modalities, present_mask, sides_of, valid_mask
from domainssl.nn.masking import kept_count, mask_from_noise
from domainssl.nn.patching import grid_of, hidden_and_seen, patchify, unpatchify
from domainssl.objectives.base import Generators, Objective, Step
from domainssl.objectives.mae_parts import (
    SIZES,
    MAEArchitecture,
    MAEDecoder,
    Size,
    build_vit,
    decoder_tensors,
    decoder_to_reference,
)
from domainssl.options import MethodOptions, as_dataclass, decide, named_sizes, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["MAE", "MAEArchitecture", "MAEDraws", "MAEEncoding", "MAEOptions"]

# Base rate 1.5e-4 per 256 items at the published global batch of 4096; 40 of 800 epochs warm up.
_PUBLISHED = Optimization(
    lr=1.5e-4 * 4096 / 256, weight_decay=0.05, betas=(0.9, 0.95), warmup_fraction=0.05
)
_LEAST_VALID = 0.5  # of a patch's values, for the patch to be reconstructed


@dataclass(frozen=True, kw_only=True)
class MAEEncoding:
    """What the backbone is built from.

    Attributes:
        size: Named size: `tiny` (tests), `small`, `base`, `large` or `huge`.
        architecture: Explicit sizes over the named one.
        patch_size: Side of a patch in pixels or voxels, one number or one per axis.
        normalization: Form of the modality.
        weights: Start from these released or exported weights.
        bands: Where the bands differ from those of the weights: `strict` refuses, `subset` keeps
            the weights of the bands that are there, `average` gives new ones averaged weights.
    """

    size: Size = "base"
    architecture: MAEArchitecture = field(default_factory=MAEArchitecture)
    patch_size: int | tuple[int, ...] = 16
    normalization: str | dict[str, str] = "zscore"
    weights: str | None = None
    bands: BandPolicy = "strict"


@dataclass(frozen=True, kw_only=True)
class MAEOptions(MethodOptions):
    """Where the released code and good sense differ; None follows `reference`."""

    target_norm: Literal["patch", "none", "by_unit"] | None = option(
        ours="by_unit",
        reference="patch",
        text="Standardise every target patch, or not; `by_unit` does not for CT (`hu`), where "
        "patches of air have no variance but noise.",
    )
    pixel_validity: bool | None = option(
        ours=True,
        reference=False,
        text="Leave invalid values out of target statistics and loss, and patches of which less "
        "than half is valid.",
    )


@dataclass(frozen=True, kw_only=True)
class MAEDraws:
    """Random choices of one step.

    Attributes:
        keep: Indices of the encoded tokens in shuffled order, int64 (B, K).
        restore: Place of every token in the shuffled order, int64 (B, N).
        seen: bool (B, K); False tokens only fill up the row of a series with fewer dates.
        removed: True where a token is hidden, bool (B, N).
    """

    keep: Tensor
    restore: Tensor
    seen: Tensor
    removed: Tensor


class MAE(Objective):
    """Pretrain a `ViTBackbone` on one modality by reconstructing hidden patches.

    Args:
        modalities: One image, series or volume, by name; linked from the DataModule by the CLI.
        encoding: Sizes, patch, normalisation and weights of the backbone, sizes of the decoder.
        context_size: Size of the window in pixels or voxels, one number or one per axis,
            multiples of the patch.
        mask_ratio: Share of patches hidden.
        options: Single choices, and whether the released code decides the others.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modality or sizes cannot be used.
    """

    backbone: ViTBackbone

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: MAEEncoding = MAEEncoding(),
        context_size: int | tuple[int, ...] = 224,
        mask_ratio: float = 0.75,
        options: MAEOptions = MAEOptions(),
        optimization: Optimization = _PUBLISHED,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__(optimization=optimization, execution=execution, context_size=context_size)
        self.options = decide(MAEOptions, options)
        if not 0 <= mask_ratio < 1:
            raise ConfigError(
                f"model.init_args.mask_ratio: got {mask_ratio!r}, expected 0 <= ratio < 1."
            )
        self.mask_ratio = mask_ratio
        encoding = as_dataclass(MAEEncoding, encoding)
        sizes = named_sizes(SIZES, encoding.size, encoding.architecture, "MAE")
        known = as_modalities(modalities)
        self.backbone, state = _make_backbone(known, encoding, sizes, context_size)
        self._check_context(context_size)
        modality = self.backbone.modality
        values = modality.num_channels * math.prod(self.backbone.patch_size)
        self.decoder = MAEDecoder(self.backbone, values, sizes)
        if state:
            self.load_pretraining_parts(state)

    def _check_context(self, context_size: int | tuple[int, ...]) -> None:
        where = "model.init_args.context_size"
        size = sides_of(context_size, self.backbone.modality.spatial_dims, where)
        grid_of(size, self.backbone.patch_size, where)

    def draw(self, batch: Batch, generators: Generators) -> MAEDraws:
        """Hide patches; of a series, the same share of the patches of its real dates."""
        grid = self.backbone.grid(batch)
        tokens, values = math.prod(grid), batch[self.backbone.name]
        noise = torch.rand(len(values), tokens, generator=generators.local, device=values.device)
        kept = kept_count(tokens, self.mask_ratio)
        frames = self.backbone.token_frames(batch)
        if frames is None:
            masking = mask_from_noise(noise, kept)
            return MAEDraws(
                keep=masking.keep,
                restore=masking.restore,
                seen=torch.ones_like(masking.keep, dtype=torch.bool),
                removed=masking.removed,
            )
        masking = mask_from_noise(noise + ~frames, kept)  # padded dates come last
        share = (frames.sum(1, keepdim=True) * (1 - self.mask_ratio)).long().clamp(min=1)
        seen = torch.arange(kept, device=values.device) < share
        return MAEDraws(
            keep=masking.keep,
            restore=masking.restore,
            seen=seen,
            removed=masking.restore >= share.clamp(max=kept),
        )

    def forward(self, batch: Batch, draws: MAEDraws, outputs: bool = False) -> Step:
        """Reconstruct hidden patches; items without the modality do not count."""
        name = self.backbone.name
        x = self.backbone.normalize(batch)
        features = self.backbone.encode_seen(x, draws.keep, draws.seen)
        prediction = self.predict(x, features, draws)
        patches, valid = self._targets(x)
        mean, scale = self._statistics(patches, valid)
        target = (patches.float() - mean) / scale
        if valid is not None:
            target = torch.where(valid, target, 0.0)
        loss = masked_patch_mse(prediction, target, draws.removed & self._counted(x), valid)
        if not outputs:
            return Step({"reconstruction": loss})
        pictures = self._pictures(patches, prediction.float() * scale + mean, draws, features)
        embeddings = {name: features.pooled[name].detach()}
        return Step(
            {"reconstruction": loss},
            {"reconstruction": {name: pictures}, "embeddings": embeddings},
        )

    def predict(self, x: Mapping[str, Any], features: Features, draws: MAEDraws) -> Tensor:
        """Return the decoder's values of every patch, (B, N, P), in units of the target."""
        name = self.backbone.name
        out: Tensor = self.decoder(
            features.cls.get(name),
            features.tokens[name],
            draws.seen,
            draws.restore,
            features.grid[name],
            x,
            self.backbone,
        )
        return out

    def _targets(self, x: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return normalised patches (B, N, P), channels last, and which values are valid."""
        modality = self.backbone.modality
        patches = self.backbone.patches(x[modality.name])
        if not self.options.pixel_validity:
            return patches, None
        mask = valid_mask(x, modality)
        cut = per_date(
            modality, mask, lambda v: patchify(v.unsqueeze(1).float(), self.backbone.patch_size)
        )
        return patches, cut.repeat_interleave(modality.num_channels, dim=-1) > 0

    def _statistics(self, patches: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        norm = self.options.target_norm
        if norm == "by_unit":
            norm = "none" if self.backbone.modality.value_unit == "hu" else "patch"
        if norm == "patch":
            return patch_statistics(patches, valid)
        return patches.new_zeros(()), patches.new_ones(())

    def _counted(self, x: Mapping[str, Any]) -> Tensor:
        """Return the patches that may be reconstructed, bool (B, N)."""
        if self.options.pixel_validity:
            counted = self.backbone.fraction_valid(x) >= _LEAST_VALID
        else:
            counted = present_mask(x, self.backbone.name).unsqueeze(1)
        frames = self.backbone.token_frames(x)
        return counted if frames is None else counted & frames

    def _pictures(
        self, seen: Tensor, predicted: Tensor, draws: MAEDraws, features: Features
    ) -> dict[str, Tensor]:
        """Return input, visible (NaN where hidden) and predicted in the modality's layout."""
        shown = hidden_and_seen(seen, predicted, draws.removed)
        grid, patch = features.grid[self.backbone.name], self.backbone.patch_size
        if self.backbone.modality.kind != "series":
            return {kind: unpatchify(t, grid, patch) for kind, t in shown.items()}
        frames, places = grid[0], grid[1:]
        return {
            kind: unpatchify(t.unflatten(1, (frames, -1)).flatten(0, 1), places, patch).unflatten(
                0, (-1, frames)
            )
            for kind, t in shown.items()
        }

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield all parameters: there is one modality."""
        yield from self.parameters()

    # -- reference files --------------------------------------------------------------------

    def load_pretraining_parts(self, state: Mapping[str, Any]) -> LoadReport:
        """Fill the decoder from a pretraining file of MAE or MONAI.

        Args:
            state: What the file holds; its encoder is not looked at.

        Raises:
            WeightsError: The file has some of the decoder's tensors and lacks others, or shapes
                differ.
        """
        found = decoder_tensors(state, self.backbone)
        own = self.decoder.state_dict()
        missing = tuple(n for n in own if n not in found)
        wrong = [n for n in own if n in found and found[n].shape != own[n].shape]
        if missing or wrong:
            raise WeightsError(
                f"Decoder of the pretraining file: missing {list(missing[:5])}, of another shape "
                f"{wrong[:5]}. Give the sizes of the run it comes from."
            )
        self.decoder.load_state_dict({n: found[n] for n in own})
        return LoadReport(tuple(own), (), tuple(n for n in found if n not in own))

    def to_reference(self) -> dict[str, Tensor]:
        """Return encoder and decoder as MAE's or MONAI's pretraining class has them."""
        final = "norm" if self.backbone.layout == "timm" else None
        encoder = self.backbone.to_reference(final_norm=final)
        return encoder | decoder_to_reference(self.decoder, self.backbone)


def _make_backbone(
    known: dict[str, Modality],
    encoding: MAEEncoding,
    sizes: MAEArchitecture,
    context_size: int | tuple[int, ...],
) -> tuple[ViTBackbone, dict[str, Any]]:
    """Build or load the backbone; also return a file's content if it holds a decoder."""
    names = ("width", "depth", "heads", "hidden", "layout", "qkv_bias", "positions")
    architecture = {n: getattr(sizes, n) for n in names if getattr(sizes, n) is not None}
    variant: dict[str, Any] = {
        "architecture": architecture,
        "patch_size": encoding.patch_size,
        "normalization": encoding.normalization,
        "image_size": context_size if sizes.positions == "learned" else None,
    }
    backbone, state = build_vit(known, variant, encoding.weights, encoding.bands)
    return backbone, state if any("decoder_pred" in n for n in state) else {}
