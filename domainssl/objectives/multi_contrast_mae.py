"""Multi-contrast MAE: reconstruct the contrasts of an exam from some patches of some of them.

Source: BM-MAE (Robinet, Berger, Houmani, MICCAI 2025) and its released code, which pretrains on
complete exams; exams that lack contrasts are ours.

One training step: deal a budget of visible patches to the contrasts (`draw`), encode them in one
sequence, put mask tokens in the other places, and reconstruct the hidden patches of every contrast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from domainssl.backbones.bands import BandPolicy
from domainssl.backbones.base import LoadReport
from domainssl.backbones.multi_contrast import (
    ContrastArchitecture,
    ContrastTokens,
    MultiContrastBackbone,
    contrast_of_file,
)
from domainssl.backbones.registry import load_initial
from domainssl.backbones.vit_files import read_transformer, tensors_of, write_transformer
from domainssl.backbones.vit_tokens import position_codes, transform
from domainssl.distributed import global_mean
from domainssl.errors import ConfigError, WeightsError, nearest
from domainssl.losses.reconstruction import masked_patch_mse, patch_mse, patch_statistics
from domainssl.modality import (
    Batch,
    Modality,
    as_modalities,
    key,
    present_mask,
    sides_of,
    valid_mask,
)
from domainssl.nn.blocks import Transformer
from domainssl.nn.contrast_masking import contrast_masking, drop_contrasts, random_shares
from domainssl.nn.masking import restore_tokens
from domainssl.nn.patching import grid_of, hidden_and_seen, patchify, unpatchify
from domainssl.objectives.base import Generators, Objective, Step
from domainssl.options import MethodOptions, as_dataclass, decide, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = [
    "MultiContrastArchitecture",
    "MultiContrastDraws",
    "MultiContrastEncoding",
    "MultiContrastMAE",
    "MultiContrastOptions",
]

_PUBLISHED = Optimization(lr=1e-4, weight_decay=0.05, warmup_fraction=0.05)
_LEAST_VALID = 0.5  # of a patch's values, for the patch to be reconstructed


@dataclass(frozen=True, kw_only=True)
class MultiContrastArchitecture(ContrastArchitecture):
    """Sizes of encoder and decoder.

    Attributes:
        decoder_width: Token width of the decoder, with the same divisors.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        decoder_hidden: Width of its feed-forward layers.
    """

    decoder_width: int = 384
    decoder_depth: int = 3
    decoder_heads: int = 12
    decoder_hidden: int = 1536


@dataclass(frozen=True, kw_only=True)
class MultiContrastEncoding:
    """What the backbone is built from.

    Attributes:
        architecture: Sizes.
        patch_size: Side of a patch, one number or one per axis.
        normalization: Form for all contrasts, or one per contrast.
        weights: Start from a state dict of BM-MAE, or from exported weights.
        bands: Where the bands differ from those of the weights: `strict` refuses, `subset` keeps
            the weights of the bands that are there, `average` gives new ones averaged weights.
    """

    architecture: MultiContrastArchitecture = field(default_factory=MultiContrastArchitecture)
    patch_size: int | tuple[int, ...] = 16
    normalization: str | dict[str, str] = "item"
    weights: str | None = None
    bands: BandPolicy = "strict"


@dataclass(frozen=True, kw_only=True)
class MultiContrastOptions(MethodOptions):
    """Where the released code and good sense differ; None follows `reference`."""

    target_norm: Literal["patch", "none"] | None = option(
        ours="patch",
        reference="none",
        text="Standardise every target patch, or not.",
    )
    weighting: Literal["exams", "contrasts"] | None = option(
        ours="exams",
        reference="contrasts",
        text="Average the contrasts of every exam, then exams; or add the means of the contrasts, "
        "so that exams with more contrasts weigh more.",
    )
    contrast_dropout: float | None = option(
        ours=0.2,
        reference=0.0,
        text="Probability of hiding a whole contrast, which is then reconstructed from the others; "
        "one always stays.",
    )
    decoder_dropout: float | None = option(
        ours=0.0,
        reference=0.1,
        text="Dropout in the decoder's blocks.",
    )
    pixel_validity: bool | None = option(
        ours=True,
        reference=False,
        text="Leave invalid voxels out of target statistics and loss, and patches of which less "
        "than half is valid.",
    )


@dataclass(frozen=True, kw_only=True)
class MultiContrastDraws:
    """Random choices of one step, over the tokens of all contrasts.

    Attributes:
        keep: Indices of the encoded tokens, int64 (B, K).
        restore: Place of every token in the shuffled order, int64 (B, M·N).
        seen: bool (B, K); False tokens only fill up the row of an exam with fewer contrasts.
        removed: True where a token is hidden, bool (B, M·N).
    """

    keep: Tensor
    restore: Tensor
    seen: Tensor
    removed: Tensor


class ContrastDecoder(nn.Module):
    """A light transformer from visible tokens to the values of all patches of all contrasts."""

    def __init__(
        self,
        backbone: MultiContrastBackbone,
        outputs: int,
        sizes: MultiContrastArchitecture,
        dropout: float,
    ) -> None:
        super().__init__()
        self.width = sizes.decoder_width
        position_codes((1,) * backbone.dims, self.width)  # refuses a width that does not divide
        self.embed = nn.Linear(backbone.width, self.width)
        self.mask_token = _token(self.width)
        self.contrasts = nn.ParameterDict({n: _token(self.width) for n in backbone.modalities})
        self.transformer = Transformer(
            self.width,
            sizes.decoder_depth,
            sizes.decoder_heads,
            hidden=sizes.decoder_hidden,
            qkv_bias=backbone.qkv_bias,
            dropout=dropout,
        )
        self.head = nn.Linear(self.width, outputs)

    def forward(
        self, encoded: ContrastTokens, draws: MultiContrastDraws, is_masked: bool
    ) -> dict[str, Tensor]:
        """Predict every patch of every contrast, (B, N, P) each.

        Args:
            encoded: Visible tokens.
            draws: Where they stand.
            is_masked: Leave contrasts that an exam lacks out of attention.
        """
        visible = self.embed(encoded.tokens)
        mask_token = self.mask_token.to(visible.dtype)
        visible = torch.where(draws.seen.unsqueeze(-1), visible, mask_token)
        tokens = restore_tokens(visible, draws.restore, mask_token)
        codes = position_codes(encoded.grid, self.width, device=tokens.device)
        added = [codes + self.contrasts[name][0] for name in encoded.names]
        tokens = tokens + torch.cat(added).to(tokens.dtype)
        attended = encoded.present.repeat_interleave(len(codes), dim=1) if is_masked else None
        first = self.embed(encoded.cls).unsqueeze(1)
        _, tokens = transform(self.transformer, first, tokens, attended)
        values = self.head(tokens).split(len(codes), dim=1)
        return dict(zip(encoded.names, values, strict=True))


class MultiContrastMAE(Objective):
    """Pretrain a `MultiContrastBackbone` on exams of which some lack contrasts.

    Args:
        modalities: Volumes or images on one grid, by contrast; linked from the DataModule by the
            CLI.
        encoding: Sizes, patch, normalisation and weights of the backbone, sizes of the decoder.
        context_size: Size of the window in voxels, one number or one per axis, multiples of the
            patch.
        mask_ratio: Share of the patches of the contrasts that are there that is hidden.
        options: Single choices, and whether the released code decides the others.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The contrasts or sizes cannot be used.
    """

    backbone: MultiContrastBackbone

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: MultiContrastEncoding = MultiContrastEncoding(),
        context_size: int | tuple[int, ...] = 128,
        mask_ratio: float = 0.75,
        options: MultiContrastOptions = MultiContrastOptions(),
        optimization: Optimization = _PUBLISHED,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__(optimization=optimization, execution=execution, context_size=context_size)
        self.options = decide(MultiContrastOptions, options)
        self.mask_ratio = mask_ratio
        self.contrast_dropout = float(self.options.contrast_dropout or 0.0)
        dropout = float(self.options.decoder_dropout or 0.0)
        for name, value in (
            ("mask_ratio", mask_ratio),
            ("options.contrast_dropout", self.contrast_dropout),
            ("options.decoder_dropout", dropout),
        ):
            if not 0 <= value < 1:
                raise ConfigError(
                    f"model.init_args.{name}: got {value!r}, expected a share in [0, 1)."
                )
        encoding = as_dataclass(MultiContrastEncoding, encoding)
        sizes = as_dataclass(MultiContrastArchitecture, encoding.architecture)
        known = as_modalities(modalities)
        self.backbone, state = _make_backbone(known, encoding, sizes)
        where = "model.init_args.context_size"
        grid_of(sides_of(context_size, self.backbone.dims, where), self.backbone.patch_size, where)
        counts = {m.num_channels for m in self.backbone.modalities.values()}
        if len(counts) > 1:
            raise ConfigError(
                "MultiContrastMAE predicts all contrasts with one layer, so they need the same "
                f"number of channels; got "
                f"{ {n: m.num_channels for n, m in self.backbone.modalities.items()} }."
            )
        values = counts.pop() * math.prod(self.backbone.patch_size)
        self.decoder = ContrastDecoder(self.backbone, values, sizes, dropout)
        if state:
            self.load_pretraining_parts(state)

    # -- draws ------------------------------------------------------------------------------

    def draw(self, batch: Batch, generators: Generators) -> MultiContrastDraws:
        """Deal the budget of visible patches to the contrasts of every exam."""
        present, tokens = self.backbone.present(batch), math.prod(self.backbone.grid(batch))
        items, contrasts = present.shape

        def uniform(*shape: int) -> Tensor:
            return torch.rand(items, *shape, generator=generators.local, device=present.device)

        usable = drop_contrasts(uniform(contrasts), present, self.contrast_dropout)
        visible = 1 - self.mask_ratio
        budget = (visible * tokens * present.sum(1)).long().clamp(min=1)
        budget = budget.minimum((usable.sum(1) * tokens).clamp(min=1))
        kept = max(1, int(visible * tokens * contrasts))
        masking = contrast_masking(
            random_shares(uniform(contrasts), usable),
            uniform(contrasts, tokens),
            uniform(contrasts * tokens),
            budget,
            usable,
            kept,
        )
        seen = torch.arange(kept, device=present.device) < budget.unsqueeze(1)
        return MultiContrastDraws(
            keep=masking.keep, restore=masking.restore, seen=seen, removed=masking.removed
        )

    # -- the step ---------------------------------------------------------------------------

    def forward(self, batch: Batch, draws: MultiContrastDraws, outputs: bool = False) -> Step:
        """Reconstruct the hidden patches of the contrasts that every exam has."""
        x = self.backbone.normalize(batch)
        encoded = self.backbone.encode_seen(x, draws.keep, draws.seen)
        predictions = self.predict(x, encoded, draws)
        tokens = math.prod(encoded.grid)
        removed = dict(zip(encoded.names, draws.removed.split(tokens, dim=1), strict=True))
        errors, counted, pictures = {}, {}, {}
        for name, prediction in predictions.items():
            patches, valid = self._targets(x, name)
            mean, scale = self._statistics(patches, valid)
            target = (patches.float() - mean) / scale
            if valid is not None:
                target = torch.where(valid, target, 0.0)
            counted[name] = removed[name] & self._counted(x, encoded, name)
            errors[name] = (prediction, target, valid)
            if outputs:
                whole = prediction.float() * scale + mean
                pictures[name] = self._picture(patches, whole, removed[name], encoded)
        losses = self._losses(errors, counted)
        if not outputs:
            return Step(losses)
        embeddings = dict.fromkeys(encoded.names, encoded.cls.detach())
        return Step(losses, {"reconstruction": pictures, "embeddings": embeddings})

    def predict(
        self, x: Mapping[str, Any], encoded: ContrastTokens, draws: MultiContrastDraws
    ) -> dict[str, Tensor]:
        """Return the decoder's values of every patch, (B, N, P) per contrast of the batch."""
        is_masked = any(key(name, "present") in x for name in encoded.names)
        found: dict[str, Tensor] = self.decoder(encoded, draws, is_masked)
        return found

    @torch.no_grad()
    def synthesise(self, batch: Batch, names: Sequence[str] = ()) -> dict[str, Tensor]:
        """Predict contrasts from the others, as the authors do for one that an exam lacks.

        Args:
            batch: Raw values; a contrast may lack its key, or be absent from some of the exams.
            names: Contrasts to predict, hidden where exams have them; empty predicts those that any
                exam lacks.

        Returns:
            (B, C, X, Y, Z) per contrast, in the units of `backbone.normalize`: the scale of a
            contrast that was never measured is not known.

        Raises:
            ConfigError: The model was trained on standardised patches, whose level it does not
                predict; or a name is not one of its contrasts.
        """
        if self.options.target_norm == "patch":
            raise ConfigError(
                "synthesise needs a model trained with options.target_norm: none; this one "
                "predicts standardised patches, whose mean and deviation stay hidden."
            )
        for name in names:
            if name not in self.backbone.modalities:
                raise ConfigError(
                    f"synthesise: no contrast {name!r}.{nearest(name, self.backbone.modalities)} "
                    f"The model has {', '.join(self.backbone.modalities)}."
                )
        x = dict(self.backbone.normalize(batch))
        given = self.backbone.names(x)
        some, whole = x[given[0]], torch.ones_like(self.backbone.present(x)[:, 0])
        hidden = {}
        for name, modality in self.backbone.modalities.items():
            if name in given:
                hidden[name] = ~present_mask(x, name) | (name in names)
            else:
                hidden[name] = whole
                x[name] = some.new_zeros(len(some), modality.num_channels, *some.shape[2:])
            x[key(name, "present")] = whole  # every contrast has its place in the decoder
        tokens = math.prod(self.backbone.grid(x))
        order = self.backbone.names(x)
        seen = torch.stack([~hidden[n] for n in order], 1).repeat_interleave(tokens, dim=1)
        every = torch.arange(seen.shape[1], device=seen.device).expand_as(seen)
        draws = MultiContrastDraws(keep=every, restore=every, seen=seen, removed=~seen)
        encoded = self.backbone.encode_seen(x, draws.keep, draws.seen)
        found = self.predict(x, encoded, draws)
        wanted = names or [name for name, mask in hidden.items() if bool(mask.any())]
        patch = self.backbone.patch_size
        return {name: unpatchify(found[name], encoded.grid, patch) for name in wanted}

    def _targets(self, x: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor | None]:
        """Return normalised patches (B, N, P), channels last, and which values are valid."""
        modality, patch = self.backbone.modalities[name], self.backbone.patch_size
        patches = patchify(x[name], patch)
        if not self.options.pixel_validity:
            return patches, None
        mask = patchify(valid_mask(x, modality).unsqueeze(1).float(), patch) > 0
        return patches, mask.repeat_interleave(modality.num_channels, dim=-1)

    def _statistics(self, patches: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.options.target_norm == "patch":
            return patch_statistics(patches, valid)
        return patches.new_zeros(()), patches.new_ones(())

    def _counted(self, x: Mapping[str, Any], encoded: ContrastTokens, name: str) -> Tensor:
        """Return the patches of a contrast that may be reconstructed, bool (B, N) or (B, 1)."""
        if self.options.pixel_validity:
            return self.backbone.fraction_valid(x, name) >= _LEAST_VALID
        place = encoded.names.index(name)
        return encoded.present[:, place : place + 1]

    def _losses(
        self,
        errors: Mapping[str, tuple[Tensor, Tensor, Tensor | None]],
        counted: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return one term per contrast; their sum is the loss."""
        if self.options.weighting == "contrasts":
            return {
                f"reconstruction_{n}": masked_patch_mse(p, t, counted[n], v)
                for n, (p, t, v) in errors.items()
            }
        means, has_some = [], []
        for name, (prediction, target, valid) in errors.items():
            error, has_values = patch_mse(prediction, target, valid)
            weight = (counted[name] & has_values).float()
            means.append((error * weight).sum(1) / weight.sum(1).clamp(min=1))
            has_some.append(weight.sum(1) > 0)
        every = torch.stack(has_some, dim=1)  # (B, M)
        contrasts = every.sum(1).clamp(min=1)
        exams = every.any(1).float().sum()
        return {
            f"reconstruction_{name}": global_mean((mean / contrasts).sum(), exams)
            for name, mean in zip(errors, means, strict=True)
        }

    def _picture(
        self, seen: Tensor, predicted: Tensor, removed: Tensor, encoded: ContrastTokens
    ) -> dict[str, Tensor]:
        """Return input, visible (NaN where hidden) and predicted of a contrast."""
        shown = hidden_and_seen(seen, predicted, removed)
        patch = self.backbone.patch_size
        return {kind: unpatchify(t, encoded.grid, patch) for kind, t in shown.items()}

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield a contrast's patch embedding and its code in the decoder."""
        yield from super().modality_parameters(name)
        yield self.decoder.contrasts[name]

    # -- reference files --------------------------------------------------------------------

    def load_pretraining_parts(self, state: Mapping[str, Any]) -> LoadReport:
        """Fill the decoder from a state dict of BM-MAE.

        Raises:
            WeightsError: A tensor is missing or has another shape.
        """
        flat = tensors_of(state)
        below = {n.removeprefix("decoder."): t for n, t in flat.items() if n.startswith("decoder.")}
        blocks = read_transformer(below, "monai", "decoder_blocks", "decoder_norm")
        found = {f"transformer.{n}": t for n, t in blocks.items()}
        found |= {
            ours: below[theirs] for ours, theirs in _decoder_names(self.decoder) if theirs in below
        }
        for name in self.backbone.modalities:
            alias = contrast_of_file(below, name, "modality_embeddings")
            found[f"contrasts.{name}"] = below[f"modality_embeddings.{alias}"]
        own = self.decoder.state_dict()
        wrong = [n for n in own if n not in found or found[n].shape != own[n].shape]
        if wrong:
            raise WeightsError(
                f"Decoder of the BM-MAE file: {wrong[:5]} are missing or have another shape. Give "
                "the sizes of the run it comes from."
            )
        self.decoder.load_state_dict({n: found[n] for n in own})
        return LoadReport(tuple(own), (), ())

    def to_reference(self) -> dict[str, Tensor]:
        """Return the weights as BM-MAE's state dict has them."""
        decoder, own = self.decoder, self.decoder.state_dict()
        below = write_transformer(
            decoder.transformer.state_dict(), "monai", "decoder_blocks", "decoder_norm"
        )
        below |= {theirs: own[ours] for ours, theirs in _decoder_names(decoder)}
        below |= {f"modality_embeddings.{n}": t.detach() for n, t in decoder.contrasts.items()}
        written = self.backbone.to_reference()
        first = next(iter(self.backbone.modalities.values()))
        grid = grid_of(first.size, self.backbone.patch_size, f"{first.name}: size")
        below["position_embeddings"] = position_codes(grid, decoder.width)[None]
        return written | {f"decoder.{n}": t for n, t in below.items()}


def _token(width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))


def _decoder_names(decoder: ContrastDecoder) -> list[tuple[str, str]]:
    """Return (ours, BM-MAE's) names of what is neither a block nor a contrast's code."""
    names = [("mask_token", "mask_tokens")]
    for ours, theirs in (("embed", "decoder_embed"), ("head", "decoder_pred")):
        names += [
            (f"{ours}.{k}", f"{theirs}.{k}") for k in decoder.get_submodule(ours).state_dict()
        ]
    return names


def _make_backbone(
    known: dict[str, Modality], encoding: MultiContrastEncoding, sizes: MultiContrastArchitecture
) -> tuple[MultiContrastBackbone, dict[str, Any]]:
    """Build or load the backbone; also return a file's tensors if it holds a decoder."""
    own = {f.name: getattr(sizes, f.name) for f in fields(ContrastArchitecture)}
    variant: dict[str, Any] = {
        "architecture": own,
        "patch_size": encoding.patch_size,
        "normalization": encoding.normalization,
    }
    if encoding.weights is None:
        return MultiContrastBackbone(known, **variant), {}
    loaded, state = load_initial(
        MultiContrastBackbone, encoding.weights, "bmmae_base",
        modalities=known, arguments=variant, bands=encoding.bands,
    )  # fmt: skip
    has_decoder = any(name.startswith("decoder.") for name in tensors_of(state))
    return loaded, state if has_decoder else {}
