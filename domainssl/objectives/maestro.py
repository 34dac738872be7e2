"""MAESTRO: masked autoencoders for many sensors, dates and bands.

Source: Labatie et al., WACV 2026 (arXiv 2508.10894), and the released code (IGNF/MAESTRO).

One training step: hide 75 % of the tokens of every sequence, first whole modalities, dates and
places, then single tokens (`draw`); encode the visible ones; decode every sequence on its own; and
compare hidden patches with their pixels, standardised per patch and per group of correlated bands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from domainssl.backbones.base import LoadReport
from domainssl.backbones.maestro.backbone import (
    Encoded,
    Layout,
    MAESTROBackbone,
    Raster,
)
from domainssl.backbones.maestro.files import fit_shape, reference_name, reference_tensors
from domainssl.backbones.maestro.inputs import check_width
from domainssl.backbones.registry import load_initial
from domainssl.distributed import all_reduce_sum
from domainssl.errors import ConfigError, WeightsError
from domainssl.losses.patch_groups import masked_error, patch_group_statistics
from domainssl.modality import Batch, Modality, as_modalities
from domainssl.nn.alibi import KeyMask
from domainssl.nn.patching import patchify, unpatchify
from domainssl.nn.structured import (
    TokenAxes,
    first_usable,
    hide_lowest,
    structure_shapes,
    structured_mask,
)
from domainssl.objectives.base import Generators, Objective, Step
from domainssl.objectives.maestro_parts import (
    SIZES,
    Decoder,
    MAESTROArchitecture,
    MAESTROEncoding,
    MAESTROMasking,
    MaskToken,
    PixelHead,
    check_masking,
)
from domainssl.options import MethodOptions, as_dataclass, decide, named_sizes, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = [
    "MAESTRO",
    "MAESTROArchitecture",
    "MAESTRODraws",
    "MAESTROEncoding",
    "MAESTROMasking",
    "MAESTROOptions",
]

Loss = Literal["l1_norm", "l2_norm", "l1", "l2"]
_PASSES = 8  # structured maskings drawn at once; one that leaves nothing visible is drawn again


# Base rate 3e-5 times sqrt(128 / 3): four devices with 32 items, as in the released code.
_PUBLISHED = Optimization(
    lr=1.96e-4, weight_decay=0.01, betas=(0.9, 0.99), warmup_fraction=0.2, final_lr_fraction=1e-7
)


@dataclass(frozen=True)
class MAESTROOptions(MethodOptions):
    """Where the released code and good sense differ; None follows `reference`."""

    surplus: Literal["random", "ordered"] | None = option(
        ours="random",
        reference="ordered",
        text="Which tokens stay visible where structured masking selects more than the ratio: "
        "random ones, or the last ones of the sequence.",
    )
    pixel_validity: bool | None = option(
        ours=True,
        reference=False,
        text="Leave invalid pixels out of target statistics and loss.",
    )
    modality_weight: Literal["valid", "slots"] | None = option(
        ours="valid",
        reference="slots",
        text="Weight of a modality's loss: its tokens that saw something in the global batch, or "
        "all its dates times patches.",
    )


@dataclass(frozen=True)
class MAESTRODraws:
    """Random choices of one step.

    Attributes:
        hidden: bool (B, N) per modality, True where a token is hidden.
        kept: Number of visible tokens per sequence.
    """

    hidden: dict[str, Tensor]
    kept: dict[str, int]


class MAESTRO(Objective):
    """Pretrain a `MAESTROBackbone` by reconstructing hidden tokens of images or volumes.

    Args:
        modalities: Images and series, or volumes and their series, on one footprint; linked from
            the DataModule by the CLI.
        encoding: Inputs, size, fusion, normalisation and weights of the backbone.
        context_size: Side in pixels of what the DataModule yields, None for any.
        masking: Ratio and structures.
        loss: Absolute or squared error, of standardised (`_norm`) or plain pixels.
        options: Choices between our and the published behaviour.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modalities or sizes cannot be used.
    """

    contrastive: ClassVar[bool] = False
    backbone: MAESTROBackbone

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: MAESTROEncoding = MAESTROEncoding(),
        context_size: int | tuple[int, ...] | None = None,
        masking: MAESTROMasking = MAESTROMasking(),
        loss: Loss = "l1_norm",
        options: MAESTROOptions = MAESTROOptions(),
        optimization: Optimization = _PUBLISHED,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__(optimization=optimization, execution=execution, context_size=context_size)
        encoding = as_dataclass(MAESTROEncoding, encoding)
        sizes = named_sizes(SIZES, encoding.size, encoding.architecture, "MAESTRO")
        self.options = decide(MAESTROOptions, options)
        self.masking = check_masking(as_dataclass(MAESTROMasking, masking))
        if loss not in ("l1_norm", "l2_norm", "l1", "l2"):
            raise ConfigError(f"model.init_args.loss: {loss!r}; expected l1_norm, l2_norm, l1, l2.")
        self.loss_kind = loss
        shared_depth = encoding.shared_depth
        if shared_depth is None:
            shares = encoding.fusion in ("mod", "group")
            shared_depth = min(3, cast(int, sizes.depth) - 1) if shares else 0
        known = as_modalities(modalities)
        variant: dict[str, Any] = {
            "inputs": encoding.inputs,
            "fusion": encoding.fusion,
            "width": sizes.width,
            "depth": sizes.depth,
            "heads": sizes.heads,
            "head_dim": sizes.head_dim,
            "ffn_ratio": sizes.ffn_ratio,
            "shared_depth": shared_depth,
            "position_cells": encoding.position_cells,
            "date_reference": encoding.date_reference,
            "normalization": encoding.normalization,
        }
        state: dict[str, Any] = {}
        if encoding.weights is None:
            self.backbone = MAESTROBackbone(known, **variant)
        else:
            self.backbone, state = _from_weights(encoding, known, variant)
        self._build_decoders(sizes)
        if state:
            self.load_pretraining_parts(state)

    def _build_decoders(self, sizes: MAESTROArchitecture) -> None:
        names, width = list(self.backbone.modalities), sizes.decoder_width
        check_width(width, self.backbone.spatial_dims, "decoder_width")
        self.decoder_width = width
        self.decoders = nn.ModuleDict(
            {n: Decoder(self.backbone.width, sizes) for n in self.backbone.encoder_names(names)}
        )
        self.mask_tokens, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for name in names:
            groups = [len(group) for group in self.backbone.bands[name]]
            self.mask_tokens[name] = MaskToken(len(groups), width)
            embedding = self.backbone.embedding_of(name)
            if embedding not in self.heads:
                self.heads[embedding] = PixelHead(width, groups, self._pixels(name))
        self.target_bands = {n: self._target_bands(n) for n in names}

    def _pixels(self, name: str) -> int:
        return math.prod(self.backbone.patch_of(name))

    def _target_bands(self, name: str) -> list[int]:
        groups = [len(group) for group in self.backbone.bands[name]]
        sizes = self.backbone.inputs[name].target_bands or groups
        if sum(sizes) != sum(groups):
            raise ConfigError(
                f"model.init_args.encoding.inputs.{name}.target_bands: {sizes} sum to "
                f"{sum(sizes)}, but "
                f"{sum(groups)} bands are used. Give the sizes of consecutive groups."
            )
        return list(sizes)

    # -- masks ------------------------------------------------------------------------------

    def rates(self, name: str, axes: TokenAxes, is_alone: bool) -> dict[str, float]:
        """Return the probability of every structure that can be hidden in a modality."""
        if self.backbone.fusion in ("shared", "monotemp"):
            return {}
        m = self.masking
        usable = {
            "modality": m.modality if not is_alone else None,
            "bands": m.bands if axes[1] > 1 else None,
            "dates": m.dates if axes[2] > 1 else None,
            "locations": m.locations,
        }
        return {kind: rate for kind, rate in usable.items() if rate is not None}

    def ratio(self, layers: int) -> float:
        """Return the share hidden in a sequence of so many dates times band groups."""
        if self.backbone.fusion in ("shared", "monotemp"):
            return self.masking.ratio
        return float(1 - (1 - self.masking.ratio) / layers**self.masking.scale)

    def draw(self, batch: Batch, generators: Generators) -> MAESTRODraws:
        """Hide tokens of every sequence: structures first, then single ones."""
        rasters, generator = self.backbone.layouts(batch), generators.local
        valid = {n: r.token_valid for n, r in rasters.items()}
        structure = self._draw_structure(rasters, generator)
        sequences = self.backbone.sequences(list(rasters))
        hidden, kept = {}, {}
        known = self.backbone.join(valid, rasters)
        passes = {
            s: torch.cat([structure[n] for n in names], dim=2) for s, names in sequences.items()
        }
        for sequence, names in sequences.items():
            counted = known[sequence]
            noise = torch.rand(counted.shape, generator=generator, device=counted.device)
            first = torch.zeros_like(counted)
            if passes[sequence].shape[1:] == counted.shape:  # dates in one sequence
                first = first_usable(passes[sequence], counted)
            ratio = self.ratio(sum(rasters[n].band_groups * rasters[n].dates for n in names))
            hidden[sequence] = hide_lowest(
                noise, first, counted, ratio, self.options.surplus or "random"
            )
            length = counted.shape[1]
            kept[sequence] = max(1, length - round(ratio * length))
        return MAESTRODraws(self.backbone.split(hidden, rasters), kept)

    def _draw_structure(
        self, rasters: Mapping[str, Layout], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return several structured maskings per modality, bool (R, B, N)."""
        masks = {}
        for names in self.backbone.sequences(list(rasters)).values():
            for name in names:
                axes = rasters[name].axes
                rates = self.rates(name, axes, len(names) == 1)
                shapes, device = structure_shapes(axes), rasters[name].token_valid.device
                draws = {
                    kind: torch.rand(_PASSES, *shapes[kind], generator=generator, device=device)
                    for kind in rates
                }
                mask = structured_mask(axes, draws, rates).to(device)
                masks[name] = mask if mask.ndim == 3 else mask.expand(_PASSES, -1, -1)
        return masks

    # -- the step ---------------------------------------------------------------------------

    def forward(self, batch: Batch, draws: MAESTRODraws, outputs: bool = False) -> Step:
        """Reconstruct hidden tokens; one loss per modality, weighted by its tokens."""
        rasters = self.backbone.prepare(self.backbone.normalize(batch))
        encoded = self.backbone.encode_visible(rasters, draws.hidden, draws.kept)
        decoded = self.decode(encoded, rasters)
        losses, weights = {}, {}
        pictures = {}
        for name, raster in rasters.items():
            head = cast(PixelHead, self.heads[self.backbone.embedding_of(name)])
            predicted = head(decoded[name], self._pixels(name))  # (B, D * L, P, C)
            patches, valid = self.patches(raster, name)
            mean, scale = self._statistics(patches, valid, name)
            counted = self.counted(draws.hidden[name], raster, name)
            if valid is not None:
                counted = counted & valid
            target = (patches - mean) / scale
            power: Literal[1, 2] = 1 if self.loss_kind.startswith("l1") else 2
            losses[name] = masked_error(predicted, target, counted, power)
            weights[name] = self._weight(raster, counted)
            if outputs:
                whole = predicted.detach().float() * scale + mean
                pictures[name] = self._picture(name, raster, patches, whole, draws.hidden[name])
        total = torch.stack(list(weights.values())).sum().clamp(min=1e-12)
        terms = {f"reconstruction_{n}": loss * (weights[n] / total) for n, loss in losses.items()}
        if not outputs:
            return Step(terms)
        with torch.no_grad():
            embeddings = self._pooled(encoded, rasters)
        return Step(terms, {"reconstruction": pictures, "embeddings": embeddings})

    def decode(self, encoded: Encoded, rasters: Mapping[str, Raster]) -> dict[str, Tensor]:
        """Fill hidden places with mask tokens and run the decoders, (B, N, F) per modality."""
        parts, codes = {}, {}
        for name, raster in rasters.items():
            parts[name] = cast(MaskToken, self.mask_tokens[name])(raster.axes)
            codes[name] = self.backbone.codes(raster, self.decoder_width)
        full, codes = self.backbone.join(parts, rasters), self.backbone.join(codes, rasters)
        valid = self.backbone.join({n: r.token_valid for n, r in rasters.items()}, rasters)
        for sequence, tokens in full.items():
            decoder = cast(Decoder, self.decoders[self.backbone.encoder_of(sequence)])
            visible = decoder.embed(encoded.tokens[sequence])
            order = encoded.order[sequence].unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
            tokens = tokens.to(visible.dtype)
            seen = encoded.is_seen[sequence].unsqueeze(-1)
            # entries that only fill up a shorter sequence put back what stands there
            tokens = tokens.scatter(1, order, torch.where(seen, visible, tokens.gather(1, order)))
            tokens = tokens + codes[sequence].to(tokens.dtype)
            full[sequence] = decoder.transformer(tokens, KeyMask(valid[sequence]))
        return self.backbone.split(full, rasters)

    def patches(self, raster: Raster, name: str) -> tuple[Tensor, Tensor | None]:
        """Return target patches (B, D * L, P, C) and where they count, (B, D * L, P, 1)."""

        def cut(x: Tensor) -> Tensor:  # (B, D, C, *S) -> (B, D * L, P, C)
            tokens = patchify(x.flatten(0, 1), self.backbone.patch_of(name))
            return tokens.unflatten(0, x.shape[:2]).flatten(1, 2).unflatten(2, (-1, x.shape[2]))

        if not self.options.pixel_validity:
            return cut(raster.values), None
        return cut(raster.values), cut(raster.valid.unsqueeze(2))

    def _statistics(
        self, patches: Tensor, valid: Tensor | None, name: str
    ) -> tuple[Tensor, Tensor]:
        if self.loss_kind.endswith("_norm"):
            return patch_group_statistics(patches, self.target_bands[name], valid)
        return patches.new_zeros(()), patches.new_ones(())

    def counted(self, hidden: Tensor, raster: Raster, name: str) -> Tensor:
        """Return which values are hidden, (B, D * L, 1, C): a token hides its own bands."""
        hidden = hidden & raster.token_valid
        groups = hidden.unflatten(1, (raster.band_groups, -1))  # (B, G, D * L)
        sizes = [len(group) for group in self.backbone.bands[name]]
        parts = [
            groups[:, i, :, None, None].expand(-1, -1, 1, size) for i, size in enumerate(sizes)
        ]
        return torch.cat(parts, dim=-1)

    def _weight(self, raster: Raster, counted: Tensor) -> Tensor:
        """Return dates times patches of the global batch, zero where nothing is hidden in it."""
        items, _, dates, places = raster.axes
        slots = raster.token_valid[:, : dates * places].sum()
        if self.options.modality_weight == "slots":
            slots = slots.new_tensor(items * dates * places)
        both = torch.stack([slots.double(), counted.any().double()])
        tokens, some = all_reduce_sum(both).float().unbind()
        return tokens * (some > 0)

    def _pooled(self, encoded: Encoded, rasters: Mapping[str, Raster]) -> dict[str, Tensor]:
        """Return the mean visible token of every sequence, for each of its modalities."""
        pooled: dict[str, Tensor] = {}
        for sequence, names in self.backbone.sequences(list(rasters)).items():
            seen = encoded.is_seen[sequence].unsqueeze(-1)
            tokens = encoded.tokens[sequence].detach()
            items = len(rasters[names[0]].values)
            total = (tokens * seen).unflatten(0, (items, -1)).flatten(1, 2).sum(1)
            count = seen.unflatten(0, (items, -1)).flatten(1, 2).sum(1)
            pooled |= dict.fromkeys(names, total / count.clamp(min=1))
        return pooled

    def _picture(
        self, name: str, raster: Raster, seen: Tensor, predicted: Tensor, hidden: Tensor
    ) -> dict[str, Tensor]:
        """Return input, visible and predicted in the modality's batch layout."""
        modality, where = self.backbone.modalities[name], self.counted(hidden, raster, name)
        patch, dates = self.backbone.patch_of(name), raster.dates
        used = [modality.channels.index(b) for group in self.backbone.bands[name] for b in group]
        shown = {
            "input": seen,
            "visible": seen.masked_fill(where, float("nan")),
            "predicted": torch.where(where, predicted, seen),
        }
        pictures = {}
        for kind, x in shown.items():
            flat = (
                x.detach().flatten(2).unflatten(1, (dates, -1)).flatten(0, 1)
            )  # (B * D, L, P * C)
            x = unpatchify(flat, raster.grid, patch).unflatten(0, (-1, dates))
            whole = x.new_zeros(*x.shape[:2], modality.num_channels, *x.shape[3:])
            whole[:, :, used] = x
            pictures[kind] = whole if modality.kind == "series" else whole[:, 0]
        return pictures

    # -- parameters -------------------------------------------------------------------------

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield what this modality alone uses: embedding, encoder, decoder, head, mask token."""
        yield from super().modality_parameters(name)
        embedding, encoder = self.backbone.own_parts(name)
        if embedding is not None:
            yield from self.heads[embedding].parameters()
        if encoder is not None:
            yield from self.decoders[encoder].parameters()
        yield from self.mask_tokens[name].parameters()

    def load_pretraining_parts(self, state: Mapping[str, Any], use_ema: bool = False) -> LoadReport:
        """Fill decoders, heads and mask tokens from a released checkpoint.

        Raises:
            WeightsError: The file has some of these tensors and lacks others, or shapes differ.
        """
        flat = reference_tensors(state, use_ema)
        own = {n: t for n, t in self.state_dict().items() if not n.startswith("backbone.")}
        found = {n: fit_shape(flat[reference_name(n)], t) for n, t in own.items()
                 if reference_name(n) in flat}  # fmt: skip
        missing = tuple(reference_name(n) for n in own if n not in found)
        wrong = [n for n, t in found.items() if t.shape != own[n].shape]
        if found and (missing or wrong):
            raise WeightsError(
                f"MAESTRO checkpoint: missing {list(missing[:5])}, of another shape {wrong[:5]}. "
                "Give the sizes and inputs of the run it comes from."
            )
        self.load_state_dict(found, strict=False)
        return LoadReport(tuple(found), missing, ())


def _from_weights(
    encoding: MAESTROEncoding, known: dict[str, Modality], variant: dict[str, Any]
) -> tuple[MAESTROBackbone, dict[str, Any]]:
    """Load the backbone, and the file's content if it is a released checkpoint with decoders."""
    loaded, content = load_initial(
        MAESTROBackbone, str(encoding.weights), f"maestro_{encoding.size}",
        modalities=known, arguments=variant, bands=encoding.bands,
    )  # fmt: skip
    has_decoder = any("decoder." in name for name in content.get("state_dict", content))
    return loaded, content if has_decoder else {}
