"""Hyper-MAE: reconstruct bands and patches that were hidden independently of each other.

Source: Si et al., "Towards Scalable Foundation Model for Multi-modal and Hyperspectral Geospatial
Data" (arXiv 2503.12843), section 3.3, and its released code.

One training step: hide bands, then patches, the same patches in all bands (`draw`); encode what is
left as a smaller grid of bands and patches; fill in mask tokens along both axes; reconstruct all
bands of all modalities with a light decoder.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from domainssl.backbones.bands import BandPolicy
from domainssl.backbones.base import LoadReport
from domainssl.backbones.less import (
    LESSArchitecture,
    LESSBackbone,
    SpectralTokens,
    blocks_from_reference,
    blocks_to_reference,
    take,
)
from domainssl.backbones.registry import load_initial
from domainssl.backbones.vit_files import tensors_of
from domainssl.distributed import all_reduce_any
from domainssl.errors import ConfigError, WeightsError
from domainssl.losses.reconstruction import patch_mse, patch_statistics
from domainssl.losses.spectral import hidden_bands_and_patches
from domainssl.modality import Batch, Modality, as_modalities, sides_of, valid_mask
from domainssl.nn.low_rank import LowRankBlocks
from domainssl.nn.masking import kept_count, mask_from_noise
from domainssl.nn.patching import grid_coordinates, grid_of, hidden_and_seen, patchify, unpatchify
from domainssl.objectives.base import Generators, Objective, Step
from domainssl.options import MethodOptions, as_dataclass, decide, named_sizes, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = [
    "HyperMAE",
    "HyperMAEArchitecture",
    "HyperMAEDraws",
    "HyperMAEEncoding",
    "HyperMAEOptions",
    "HyperMAEPass",
]

_PUBLISHED = Optimization(lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95), warmup_fraction=0.05)
_LEAST_VALID = 0.5  # of a patch's pixels, for the patch to be reconstructed
_LEAST_BANDS = 2  # kept, as published
Size = Literal["tiny", "small", "base"]


@dataclass(frozen=True, kw_only=True)
class HyperMAEArchitecture:
    """Sizes; None takes the value of the named size.

    Attributes:
        width: Token width of the encoder; a multiple of 4 and of `heads · channel_width`.
        depth: Blocks of the encoder.
        heads: Attention heads of the encoder.
        channel_width: Values per head of the attention over bands, in encoder and decoder.
        ranks: Pairs of attention maps per head whose products are added, in both.
        rank_values: The ranks share their values (first version), or each has its own (second).
        rank_reduction: The ranks are added (first version) or averaged (second).
        layer_scale: Initial factor of every residual branch and channel; None for no factors.
        dropout: Share dropped in attention and feed-forward layers while training.
        drop_path: Share of items whose branch is dropped in the last block; less in those before.
        pooling: `pooled` is the mean of the valid tokens, or the `class` token.
        decoder_width: Token width of the decoder; a multiple of 4 and of
            `decoder_heads · channel_width`.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
    """

    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    channel_width: int | None = None
    ranks: int | None = None
    rank_values: Literal["shared", "per_rank"] | None = None
    rank_reduction: Literal["sum", "mean"] | None = None
    layer_scale: float | None = None
    dropout: float | None = None
    drop_path: float | None = None
    pooling: Literal["mean", "class"] | None = None
    decoder_width: int | None = None
    decoder_depth: int | None = None
    decoder_heads: int | None = None


def _published(width: int, heads: int) -> HyperMAEArchitecture:
    return HyperMAEArchitecture(
        width=width, depth=12, heads=heads, decoder_width=512, decoder_depth=8, decoder_heads=16
    )


SIZES: dict[Size, HyperMAEArchitecture] = {
    "tiny": HyperMAEArchitecture(
        width=32, depth=2, heads=4, channel_width=2,
        decoder_width=32, decoder_depth=1, decoder_heads=4,
    ),
    "small": _published(384, 6),
    "base": _published(768, 12),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HyperMAEEncoding:
    """What the backbone is built from.

    Attributes:
        size: Named size: `tiny` (tests), `small` or `base`.
        architecture: Explicit sizes over the named one.
        patch_size: Side of a patch in pixels.
        radius_m: Patches attend to patches within this distance in metres, in encoder and decoder;
            None lets all see each other.
        normalization: Form, one for all or one per modality.
        weights: Start from a state dict of the released code, or from exported weights.
        bands: Where the bands differ from those of the weights: `strict` refuses, `subset` keeps
            those that are there, `wavelengths` takes any by their wavelengths.
    """

    size: Size = "base"
    architecture: HyperMAEArchitecture = field(default_factory=HyperMAEArchitecture)
    patch_size: int | tuple[int, ...] = 16
    radius_m: float | None = 640.0
    normalization: str | dict[str, str] = "mean2std"
    weights: str | None = None
    bands: BandPolicy = "strict"


@dataclass(frozen=True, kw_only=True)
class HyperMAEOptions(MethodOptions):
    """Where the released code and good sense differ; None follows `reference`."""

    inputs: Literal["together", "one_drawn", "each"] | None = option(
        ours="together",
        reference="together",
        text="What the encoder sees: all modalities; all, or one of them, drawn per step; or all "
        "and each alone, with the losses added (as many passes). Targets are always all.",
    )
    target_norm: Literal["patch", "none"] | None = option(
        ours="none",
        reference="none",
        text="Standardise every target patch, or not.",
    )
    pixel_validity: bool | None = option(
        ours=True,
        reference=False,
        text="Leave invalid pixels out of target statistics and loss, and patches of which less "
        "than half is valid.",
    )


@dataclass(frozen=True, kw_only=True)
class HyperMAEPass:
    """What one pass of the encoder sees.

    Attributes:
        keep_bands: Indices into the bands of the modalities it sees, int64 (B, K).
        restore_bands: Place of every band in the shuffled order, int64 (B, C).
        hidden_bands: bool (B, C).
        keep_patches: int64 (B, L).
        restore_patches: int64 (B, N).
        hidden_patches: bool (B, N).
    """

    keep_bands: Tensor
    restore_bands: Tensor
    hidden_bands: Tensor
    keep_patches: Tensor
    restore_patches: Tensor
    hidden_patches: Tensor


@dataclass(frozen=True, kw_only=True)
class HyperMAEDraws:
    """Random choices of one step.

    Attributes:
        passes: What each pass of the encoder sees, by the names of its modalities joined by `+`.
    """

    passes: dict[str, HyperMAEPass]


class HyperMAEDecoder(nn.Module):
    """A light LESS transformer from visible tokens to the pixels of every band and patch."""

    def __init__(self, backbone: LESSBackbone, sizes: HyperMAEArchitecture) -> None:
        super().__init__()
        assert sizes.decoder_width and sizes.decoder_depth and sizes.decoder_heads
        self.width, own = sizes.decoder_width, backbone.architecture
        self.embed = nn.Linear(backbone.width, self.width)
        self.mask_token = self._token()
        self.channel_mask_token = self._token()
        self.position_mask_token = self._token()
        self.transformer = LowRankBlocks(
            self.width, sizes.decoder_depth, sizes.decoder_heads, own.ratio, own.low_rank
        )
        pixels = backbone.patch_size[0] * backbone.patch_size[1]
        self.heads = nn.ModuleDict({n: nn.Linear(self.width, pixels) for n in backbone.modalities})
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def _token(self) -> nn.Parameter:
        return nn.Parameter(torch.empty(1, 1, 1, self.width).normal_(std=0.02))

    def forward(
        self,
        encoded: SpectralTokens,
        drawn: HyperMAEPass,
        wanted: tuple[str, ...],
        backbone: LESSBackbone,
    ) -> dict[str, Tensor]:
        """Predict every patch of every band, (B, C, N, P) per modality.

        Args:
            encoded: Visible tokens.
            drawn: Where they stand.
            wanted: Modalities to predict, in the order of the model; bands of those that the
                encoder did not see are hidden.
            backbone: What encoded it.
        """
        tokens = self._restored(self.embed(encoded.tokens), encoded, drawn)
        head, seen = tokens[:, :1], tokens[:, 1:].split(backbone.bands(encoded.names), dim=1)
        found = dict(zip(encoded.names, seen, strict=True))
        counts = backbone.bands(wanted)
        for name, count in zip(wanted, counts, strict=True):
            if name not in found:
                found[name] = self._hidden(tokens, count)
        tokens = torch.cat([head, *(found[name] for name in wanted)], dim=1)
        codes = backbone.codes(wanted, encoded.grid, self.width, tokens.device).to(tokens.dtype)
        near = backbone.near(grid_coordinates(encoded.grid, device=tokens.device))
        tokens = self.transformer(tokens + codes, near)[:, 1:, 1:]
        parts = zip(wanted, tokens.split(counts, dim=1), strict=True)
        return {name: self.heads[name](part) for name, part in parts}

    def _restored(self, tokens: Tensor, encoded: SpectralTokens, drawn: HyperMAEPass) -> Tensor:
        """Put the visible tokens in their places, (B, 1 + C, 1 + N, D), mask tokens elsewhere."""
        items, bands = tokens.shape[:2]
        missing = drawn.restore_patches.shape[1] - drawn.keep_patches.shape[1]
        first = self.channel_mask_token.expand(items, 1, missing, -1)
        others = self.mask_token.expand(items, bands - 1, missing, -1)
        filler = torch.cat([first, others], dim=1).to(tokens.dtype)
        places = take(torch.cat([tokens[:, :, 1:], filler], dim=2), drawn.restore_patches, 2)
        tokens = torch.cat([tokens[:, :, :1], places], dim=2)
        rows = torch.where(
            encoded.attended[:, :, None, None], tokens[:, 1:], self._hidden(tokens, bands - 1)
        )  # bands that an item lacks only fill up its row
        hidden = self._hidden(tokens, drawn.restore_bands.shape[1] - (bands - 1))
        return torch.cat(
            [tokens[:, :1], take(torch.cat([rows, hidden], 1), drawn.restore_bands, 1)], dim=1
        )

    def _hidden(self, like: Tensor, bands: int) -> Tensor:
        """Return mask tokens for hidden bands, (B, bands, 1 + N, D)."""
        items, patches = like.shape[0], like.shape[2] - 1
        first = self.position_mask_token.expand(items, bands, 1, -1)
        others = self.mask_token.expand(items, bands, patches, -1)
        return torch.cat([first, others], dim=2).to(like.dtype)


class HyperMAE(Objective):
    """Pretrain a `LESSBackbone` by reconstructing hidden bands and hidden patches.

    Args:
        modalities: Images on one grid with wavelengths, by name; linked from the DataModule by the
            CLI.
        encoding: Sizes, patch, normalisation and weights of the backbone, sizes of the decoder.
        context_size: Size of the window in pixels, a multiple of the patch.
        mask_ratio: Share of the patches hidden, the same patches in all bands of an item.
        band_mask_ratio: Share of the bands hidden; two stay at least.
        options: Single choices, and whether the released code decides the others.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modalities or sizes cannot be used.
    """

    backbone: LESSBackbone

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: HyperMAEEncoding = HyperMAEEncoding(),
        context_size: int | tuple[int, ...] = 128,
        mask_ratio: float = 0.75,
        band_mask_ratio: float = 0.5,
        options: HyperMAEOptions = HyperMAEOptions(),
        optimization: Optimization = _PUBLISHED,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__(optimization=optimization, execution=execution, context_size=context_size)
        self.options = decide(HyperMAEOptions, options)
        for name, value in (("mask_ratio", mask_ratio), ("band_mask_ratio", band_mask_ratio)):
            if not 0 <= value < 1:
                raise ConfigError(
                    f"model.init_args.{name}: got {value!r}, expected a share in [0, 1)."
                )
        self.mask_ratio, self.band_mask_ratio = mask_ratio, band_mask_ratio
        encoding = as_dataclass(HyperMAEEncoding, encoding)
        sizes = named_sizes(SIZES, encoding.size, encoding.architecture, "HyperMAE")
        self.backbone, state = _make_backbone(as_modalities(modalities), encoding, sizes)
        where = "model.init_args.context_size"
        grid_of(sides_of(context_size, 2, where), self.backbone.patch_size, where)
        self.decoder = HyperMAEDecoder(self.backbone, sizes)
        if state:
            self.load_pretraining_parts(state)

    # -- draws ------------------------------------------------------------------------------

    def draw(self, batch: Batch, generators: Generators) -> HyperMAEDraws:
        """Choose modalities, then hide bands, then patches."""
        names = self.backbone.names(batch)
        every = [names, *((name,) for name in names)] if len(names) > 1 else [names]
        if self.options.inputs == "together":
            every = every[:1]
        elif self.options.inputs == "one_drawn":
            device = batch[names[0]].device
            choice = torch.rand((), generator=generators.shared, device=device)
            every = [every[int(choice * len(every))]]
        return HyperMAEDraws(
            passes={"+".join(some): self._draw_pass(batch, some, generators) for some in every}
        )

    def _draw_pass(
        self, batch: Batch, names: tuple[str, ...], generators: Generators
    ) -> HyperMAEPass:
        attended = self.backbone.attended(batch, names)
        patches = math.prod(self.backbone.grid(batch))
        items, bands = attended.shape

        def uniform(count: int) -> Tensor:
            return torch.rand(items, count, generator=generators.local, device=attended.device)

        kept = max(int(bands * (1 - self.band_mask_ratio)), min(_LEAST_BANDS, bands))
        # bands that an item lacks come last
        by_band = mask_from_noise(uniform(bands) + (~attended).float(), kept)
        by_patch = mask_from_noise(uniform(patches), kept_count(patches, self.mask_ratio))
        return HyperMAEPass(
            keep_bands=by_band.keep,
            restore_bands=by_band.restore,
            hidden_bands=by_band.removed,
            keep_patches=by_patch.keep,
            restore_patches=by_patch.restore,
            hidden_patches=by_patch.removed,
        )

    # -- the step ---------------------------------------------------------------------------

    def forward(self, batch: Batch, draws: HyperMAEDraws, outputs: bool = False) -> Step:
        """Reconstruct all bands of all modalities from what each pass sees."""
        x = self.backbone.normalize(batch)
        wanted = self.backbone.names(x)
        targets = {name: self._target(x, name) for name in wanted}
        losses: dict[str, Tensor] = {}
        pictures: dict[str, dict[str, Tensor]] = {}
        embeddings: dict[str, Tensor] = {}
        for key, drawn in draws.passes.items():
            seen = tuple(key.split("+"))
            encoded = self.backbone.encode_seen(x, seen, drawn.keep_bands, drawn.keep_patches)
            found = self.decoder(encoded, drawn, wanted, self.backbone)
            for name, loss in self._losses(found, targets, encoded, drawn).items():
                losses[name] = losses[name] + loss if name in losses else loss
            if outputs and not pictures:
                pictures = self._pictures(found, targets, encoded, drawn)
                embeddings = dict.fromkeys(seen, encoded.tokens[:, 0, 0].detach())
        if not outputs:
            return Step(losses)
        return Step(losses, {"reconstruction": pictures, "embeddings": embeddings})

    def _target(self, x: Mapping[str, Any], name: str) -> dict[str, Tensor | None]:
        """Return patches (B, C, N, P), their mean and scale, which pixels are valid, and which
        patches count, bool (B, N).
        """
        patches = self.backbone.patches(x[name]).float()
        valid, share = None, self.backbone.fraction_valid(x, name)
        counted = self.backbone.attended(x, (name,))[:, :1].expand_as(share)
        if self.options.pixel_validity:
            mask = valid_mask(x, self.backbone.modalities[name]).unsqueeze(1)
            valid = (patchify(mask.float(), self.backbone.patch_size) > 0).unsqueeze(1)
            counted = share >= _LEAST_VALID
        mean, scale = patches.new_zeros(()), patches.new_ones(())
        if self.options.target_norm == "patch":
            mean, scale = patch_statistics(patches, valid)
        return {
            "patches": patches,
            "valid": valid,
            "counted": counted,
            "mean": mean,
            "scale": scale,
        }

    def _losses(
        self,
        found: Mapping[str, Tensor],
        targets: Mapping[str, dict[str, Any]],
        encoded: SpectralTokens,
        drawn: HyperMAEPass,
    ) -> dict[str, Tensor]:
        """Return `L_pos` and `L_ch`, averaged over the modalities that have terms."""
        hidden = self._hidden_bands(encoded, drawn, found)
        means, counts = [], []
        for name, prediction in found.items():
            t = targets[name]
            error, _ = patch_mse(prediction, (t["patches"] - t["mean"]) / t["scale"], t["valid"])
            patches, bands, count = hidden_bands_and_patches(
                error, hidden[name], drawn.hidden_patches, t["counted"]
            )
            means.append(torch.stack([patches, bands]))
            counts.append(count)
        modalities = all_reduce_any(torch.stack(counts) > 0).sum(0).clamp(min=1)
        patches, bands = torch.stack(means).sum(0) / modalities
        return {"patches": patches, "bands": bands}

    def _hidden_bands(
        self, encoded: SpectralTokens, drawn: HyperMAEPass, found: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return which bands a pass did not see, bool (B, C) per modality."""
        counts = self.backbone.bands(encoded.names)
        hidden = zip(encoded.names, drawn.hidden_bands.split(counts, dim=1), strict=True)
        every = {n: torch.ones_like(t[:, :, 0, 0], dtype=torch.bool) for n, t in found.items()}
        return every | dict(hidden)

    def _pictures(
        self,
        found: Mapping[str, Tensor],
        targets: Mapping[str, dict[str, Any]],
        encoded: SpectralTokens,
        drawn: HyperMAEPass,
    ) -> dict[str, dict[str, Tensor]]:
        """Return input, visible (NaN where hidden) and predicted of every modality."""
        hidden = self._hidden_bands(encoded, drawn, found)
        pictures = {}
        for name, prediction in found.items():
            t = targets[name]
            mask = hidden[name].unsqueeze(2) | drawn.hidden_patches.unsqueeze(1)
            whole = prediction.float() * t["scale"] + t["mean"]
            shown = hidden_and_seen(t["patches"], whole, mask)
            pictures[name] = {
                kind: self._images(values, encoded.grid) for kind, values in shown.items()
            }
        return pictures

    def _images(self, patches: Tensor, grid: tuple[int, ...]) -> Tensor:
        """(B, C, N, P) -> (B, C, H, W)."""
        flat = unpatchify(patches.flatten(0, 1), grid, self.backbone.patch_size)
        return flat.squeeze(1).unflatten(0, patches.shape[:2])

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield a modality's patch embedding and its head in the decoder."""
        yield from super().modality_parameters(name)
        yield from self.decoder.heads[name].parameters()

    # -- reference files --------------------------------------------------------------------

    def load_pretraining_parts(self, state: Mapping[str, Any]) -> LoadReport:
        """Fill the decoder from a state dict of the released MAE.

        Raises:
            WeightsError: A tensor is missing or has another shape.
        """
        flat = tensors_of(state)
        below = {n.removeprefix("decoder."): t for n, t in flat.items() if n.startswith("decoder.")}
        found = blocks_from_reference(below, "decoder_blocks", "decoder_norm")
        found |= {ours: below[theirs] for ours, theirs in self._names() if theirs in below}
        own = self.decoder.state_dict()
        wrong = [n for n in own if n not in found or found[n].shape != own[n].shape]
        if wrong:
            raise WeightsError(
                f"Decoder of the file: {wrong[:5]} are missing or have another shape. Give the "
                "sizes of the run it comes from."
            )
        self.decoder.load_state_dict({n: found[n] for n in own})
        return LoadReport(tuple(own), (), ())

    def to_reference(self) -> dict[str, Tensor]:
        """Return encoder and decoder as the released MAE's state dict has them."""
        own = self.decoder.state_dict()
        below = blocks_to_reference(self.decoder.transformer, "decoder_blocks", "decoder_norm")
        for ours, theirs in self._names():
            below.setdefault(theirs, own[ours])
        written = {f"encoder.{n}": t for n, t in self.backbone.to_reference().items()}
        return written | {f"decoder.{n}": t for n, t in below.items()}

    def _names(self) -> list[tuple[str, str]]:
        """Return (ours, the released code's) names of what is no block of the decoder."""
        names = [
            ("mask_token", "mask_token"),
            ("channel_mask_token", "channel_mask_token"),
            ("position_mask_token", "spatial_mask_token"),
        ]
        for kind in ("weight", "bias"):
            names.append((f"embed.{kind}", f"decoder_embed.{kind}"))
            for name, modality in self.backbone.modalities.items():
                group = "radar" if modality.value_unit == "db" else "optical"
                names.append((f"heads.{name}.{kind}", f"decoder_{group}_pred.{kind}"))
        return names


def _make_backbone(
    known: dict[str, Modality], encoding: HyperMAEEncoding, sizes: HyperMAEArchitecture
) -> tuple[LESSBackbone, dict[str, Any]]:
    """Build or load the backbone; also return a file's tensors if it holds a decoder."""
    names = {f.name for f in dataclasses.fields(LESSArchitecture)}
    own = {n: v for n, v in vars(sizes).items() if n in names and v is not None}
    variant: dict[str, Any] = {
        "architecture": {**own, "radius_m": encoding.radius_m},
        "patch_size": encoding.patch_size,
        "normalization": encoding.normalization,
    }
    if encoding.weights is None:
        return LESSBackbone(known, **variant), {}
    loaded, state = load_initial(
        LESSBackbone, encoding.weights, "less_base",
        modalities=known, arguments=variant, bands=encoding.bands,
    )  # fmt: skip
    has_decoder = any(name.startswith("decoder.") for name in tensors_of(state))
    return loaded, state if has_decoder else {}
