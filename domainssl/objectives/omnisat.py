"""OmniSat: masked reconstruction and token contrast of any sensors over one footprint.

Source: Astruc, Gonthier, Mallet, Landrieu, ECCV 2024 (arXiv 2404.08351). Section numbers below are
the paper's.

One training step: encode every sensor into one token per patch (section 3.1), contrast the tokens
of different sensors at the same place (3.3), hide 75 % of all tokens (`draw`), fuse the rest into
one token per patch (3.2), and reconstruct every sensor from the fused tokens: images patch by
patch, series on the dates that the temporal encoder attends to most (3.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainssl.backbones.base import Features, LoadReport
from domainssl.backbones.omnisat import (
    OmniSatBackbone,
    Traces,
    flatten_reference,
)
from domainssl.backbones.registry import load_initial
from domainssl.distributed import RowLayout, row_layout
from domainssl.errors import ConfigError, WeightsError
from domainssl.losses.reconstruction import masked_patch_mse, patch_statistics
from domainssl.losses.tokens import token_nce
from domainssl.modality import Batch, Modality, as_modalities, key, present_mask, valid_mask
from domainssl.nn.bypass import PatchDecoder
from domainssl.nn.calendar import date_sinusoids
from domainssl.nn.filtering import filter_dates
from domainssl.nn.masking import Masking, kept_count, mask_from_noise
from domainssl.nn.patching import unpatchify
from domainssl.nn.relative import check_path
from domainssl.objectives.base import Generators, Objective, Step
from domainssl.objectives.omnisat_parts import (
    OmniSatArchitecture,
    OmniSatEncoding,
    SeriesDecoder,
    backbone_sizes,
    check_shares,
    decoder_name,
    patch_grid,
    patch_sizes,
    sizes_of,
)
from domainssl.objectives.terms import term_weights
from domainssl.options import MethodOptions, as_dataclass, decide, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["OmniSat", "OmniSatArchitecture", "OmniSatDraws", "OmniSatEncoding", "OmniSatOptions"]

_PUBLISHED = Optimization(lr=1e-4, weight_decay=0.0, betas=(0.9, 0.999))  # Adam, section 4


@dataclass(frozen=True, kw_only=True)
class OmniSatOptions(MethodOptions):
    """Where the paper, the released code and good sense differ; None follows `reference`."""

    rpe_layout: Literal["aligned", "legacy"] | None = option(
        ours="aligned",
        reference="legacy",
        text="Distances of the fusion's self-attention: between the patches of two tokens "
        "(paper), or on a square over the joined sequence (released code).",
    )
    attend_to_padding: bool | None = option(
        ours=False,
        reference=True,
        text="Let padded and invalid dates enter attention and statistics, as zeros of day 0.",
    )
    date_filter_drops_last_valid: bool | None = option(
        ours=False,
        reference=True,
        text="Never reconstruct the last date of a series.",
    )
    contrast_gather: Literal["grad", "local"] | None = option(
        ours="grad",
        reference="local",
        text="Contrast with the tokens of all ranks, with their gradient, or of this rank only.",
    )
    image_loss_on: Literal["all_patches", "masked_patches"] | None = option(
        ours="all_patches",
        reference="all_patches",
        text="Patches of images that count: all (released code), or the hidden ones (paper).",
    )
    pixel_validity: bool | None = option(
        ours=True,
        reference=False,
        text="Leave invalid pixels out of target statistics and reconstruction loss.",
    )
    pool: Literal["mean", "cls"] | None = option(
        ours="mean",
        reference="cls",
        text="Vector of an item: mean of the fused tokens, or the class token, which no "
        "pretraining loss trains.",
    )


@dataclass(frozen=True)
class OmniSatDraws:
    """Random choices of one step.

    Attributes:
        masking: Masking of the tokens of all modalities, modality by modality, (B, M·P).
        frames: Indices of the dates taken from long series, int64 (B, T') per modality.
    """

    masking: Masking
    frames: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Picture:
    """Target and prediction of one modality as patches (B, P, V), and their statistics."""

    seen: Tensor
    predicted: Tensor
    mean: Tensor
    scale: Tensor


class OmniSat(Objective):
    """Pretrain an `OmniSatBackbone` on images or volumes and their series over one footprint.

    Args:
        modalities: Two or more images and series, or volumes and their series, by name; linked
            from the DataModule by the CLI.
        encoding: Size, patches, calendar, normalisation and weights of the backbone.
        context_size: Side of what the DataModule yields, None for any.
        mask_ratio: Share of all tokens hidden from the fusion.
        kept_dates: Share of the dates of a series that is reconstructed.
        temperature: Of the contrast.
        max_frames: Dates taken at random from longer series.
        options: Choices between our and the published behaviour.
        loss_weights: Weight of the terms `contrastive` and `reconstruction`.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory; attention is `fused` or `math`.

    Raises:
        ConfigError: The modalities or sizes cannot be used.
    """

    contrastive: ClassVar[bool] = True
    backbone: OmniSatBackbone

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: OmniSatEncoding = OmniSatEncoding(),
        context_size: int | tuple[int, ...] | None = None,
        mask_ratio: float = 0.75,
        kept_dates: float = 0.25,
        temperature: float = 0.1,
        max_frames: int = 50,
        options: OmniSatOptions = OmniSatOptions(),
        loss_weights: dict[str, float] | None = None,
        optimization: Optimization = _PUBLISHED,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__(optimization=optimization, execution=execution, context_size=context_size)
        check_path(self.execution.attention, "model.init_args.execution.attention")
        encoding = as_dataclass(OmniSatEncoding, encoding)
        sizes = sizes_of(encoding)
        self.options = decide(OmniSatOptions, options)
        known = as_modalities(modalities)
        self.loss_weights = term_weights(loss_weights, "OmniSat")
        if len(known) < 2 and self.loss_weights["contrastive"]:
            raise ConfigError(
                f"OmniSat contrasts modalities with each other and the data have only {[*known]}. "
                "Add one, or set model.init_args.loss_weights.contrastive: 0."
            )
        check_shares(mask_ratio=mask_ratio, kept_dates=1 - kept_dates)
        self.mask_ratio, self.kept_dates = mask_ratio, kept_dates
        self.temperature, self.max_frames = temperature, max_frames
        given = encoding.patch_size or {}
        sides = {**patch_sizes(known, encoding.patch_m, encoding.patch_mm, given), **given}
        variant: dict[str, Any] = {
            "patch_size": sides,
            "grid": patch_grid(known, sides, encoding.grid),
            **backbone_sizes(sizes, self.options.rpe_layout),
            "calendar": encoding.calendar,
            "attend_to_padding": self.options.attend_to_padding,
            "pool": self.options.pool,
            "normalization": encoding.normalization,
        }
        reference_state: dict[str, Tensor] = {}
        if encoding.weights is None:
            self.backbone = OmniSatBackbone(known, **variant)
        else:
            self.backbone, reference_state = _from_weights(encoding, known, variant)
        width = self.backbone.embed_dim["joint"]
        self.decoder = nn.ModuleDict(
            {f"projector_{n}": self._decoder(n, width, sizes.decoder_widths) for n in known}
        )
        if reference_state:
            self.load_pretraining_parts(reference_state)

    def _decoder(self, name: str, width: int, hidden: tuple[int, ...]) -> nn.Module:
        channels, patch = self.backbone.modalities[name].num_channels, self.backbone.patch_of(name)
        if self.backbone.is_image(name):
            return PatchDecoder(channels, width, patch)
        return SeriesDecoder(width, channels * math.prod(patch), tuple(hidden))

    def draw(self, batch: Batch, generators: Generators) -> OmniSatDraws:
        """Hide tokens of all modalities jointly (section 3.2), and choose dates of long series."""
        names = self._names(batch)
        tokens = len(names) * math.prod(self.backbone.grid)
        x = batch[names[0]]
        noise = torch.rand(len(x), tokens, generator=generators.local, device=x.device)
        frames = {}
        for name in names:
            if self.backbone.modalities[name].kind != "series":
                continue
            length = batch[name].shape[1]
            if length > self.max_frames:
                order = torch.rand(len(x), length, generator=generators.local, device=x.device)
                order = order + 2.0 * ~self.backbone.frame_mask(batch, name)  # padding comes last
                frames[name] = order.argsort(1)[:, : self.max_frames].sort(1).values
        return OmniSatDraws(mask_from_noise(noise, kept_count(tokens, self.mask_ratio)), frames)

    def _names(self, batch: Mapping[str, Any]) -> list[str]:
        return [name for name in self.backbone.modalities if name in batch]

    def forward(self, batch: Batch, draws: OmniSatDraws, outputs: bool = False) -> Step:
        """Compute contrast and reconstruction; an item counts where it has a modality."""
        layout = row_layout(draws.masking.removed)
        x = self.backbone.normalize(_take_frames(batch, draws.frames))
        features, traces = self.backbone.encode_sensors(x)
        names = self._names(x)
        removed = draws.masking.removed.unflatten(1, (len(names), -1)).unbind(1)
        hidden = dict(zip(names, removed, strict=True))
        features = self.backbone.fuse(features, hidden)
        losses = {
            "contrastive": self.loss_weights["contrastive"]
            * self._contrast(features, names, layout)
        }
        pictures: dict[str, _Picture] = {}
        for name in names:
            rebuild = self._rebuild_image
            if self.backbone.modalities[name].kind == "series":
                rebuild = self._rebuild_series
            loss, pictures[name] = rebuild(name, x, features, traces, hidden[name])
            losses[f"reconstruction_{name}"] = self.loss_weights["reconstruction"] * loss
        if not outputs:
            return Step(losses)
        return Step(losses, self._outputs(features, pictures, hidden))

    def _contrast(self, features: Features, names: list[str], layout: RowLayout) -> Tensor:
        """Contrast the tokens before fusion (section 3.3)."""
        return token_nce(
            torch.stack([features.tokens[name] for name in names], dim=1),
            valid=torch.stack([features.token_valid[name] for name in names], dim=1),
            temperature=self.temperature,
            gather_keys="none" if self.options.contrast_gather == "local" else "grad",
            layout=layout,
        )

    def embed(self, features: Features) -> dict[str, Tensor]:
        """Lay the normalised tokens of every sensor side by side, (B, P·E).

        The loss compares patches at the same place, so the similarity of two items is the mean
        cosine over their patches: the cosine of these vectors. Patches without data are zero.
        """
        return {
            name: (F.normalize(features.tokens[name].float(), dim=-1) * valid[..., None]).flatten(1)
            for name, valid in features.token_valid.items()
            if name in self.backbone.modalities
        }

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the sensor's own encoder and decoder."""
        yield from super().modality_parameters(name)
        yield from self.decoder[f"projector_{name}"].parameters()

    def _value_mask(self, name: str, x: Mapping[str, Any]) -> Tensor | None:
        """Which values count, as patches (B, P, V) or (B, T, P, V); None counts all."""
        modality = self.backbone.modalities[name]
        if not self.options.pixel_validity:
            return None
        mask = valid_mask(x, modality).unsqueeze(modality.channel_axis).float()
        return self.backbone.patches(name, mask.expand_as(x[name])) > 0

    def _rebuild_image(
        self, name: str, x: Mapping[str, Any], features: Features, traces: Traces, hidden: Tensor
    ) -> tuple[Tensor, _Picture]:
        """Mean squared error of standardised patches, all of them by default."""
        tokens = features.tokens["joint"]
        target, mask = self.backbone.patches(name, x[name]), self._value_mask(name, x)
        decoder = self.decoder[f"projector_{name}"]
        if self.backbone.is_image(name):
            predicted = decoder(tokens.flatten(0, 1), traces["poolings"][name])
            predicted = predicted.flatten(1).unflatten(0, tokens.shape[:2])  # (B, P, C·p·p)
            mean, scale = patch_statistics(target, mask)
        else:  # one pixel per patch: the whole image is standardised
            predicted = decoder(tokens)
            mean, scale = _whole_statistics(target, mask)
        counted = present_mask(x, name).unsqueeze(1).expand_as(hidden)
        if self.options.image_loss_on == "masked_patches":
            counted = counted & hidden
        loss = masked_patch_mse(predicted, _standardized(target, mean, scale), counted, mask)
        return loss, _Picture(target, predicted, mean, scale)

    def _rebuild_series(
        self, name: str, x: Mapping[str, Any], features: Features, traces: Traces, hidden: Tensor
    ) -> tuple[Tensor, _Picture]:
        """Mean squared error of hidden patches on the dates that are attended to most."""
        tokens = features.tokens["joint"]
        candidates = self.backbone.seen_dates(x, name).any(1)  # (B, T)
        chosen = filter_dates(
            traces["attention"][name],
            candidates,
            self.kept_dates,
            drops_last=bool(self.options.date_filter_drops_last_valid),
        )
        days = self.backbone.calendars[name].days(x[key(name, "dates")]).gather(1, chosen.positions)
        code = date_sinusoids(days, tokens.shape[-1], self.backbone.calendars[name].length)
        dated = tokens.unsqueeze(1) + code.unsqueeze(2).to(tokens.dtype)  # (B, K, P, D)
        predicted = self.decoder[f"projector_{name}"](dated)  # (B, K, P, V)
        target = _take(self.backbone.patches(name, x[name]), chosen.positions)
        mask = self._value_mask(name, x)
        mask = None if mask is None else _take(mask, chosen.positions)
        target, predicted = target.flatten(0, 1), predicted.flatten(0, 1)  # (B·K, P, V)
        mask = None if mask is None else mask.flatten(0, 1)
        mean, scale = _whole_statistics(target, mask)
        counted = chosen.kept & present_mask(x, name).unsqueeze(1)
        counted = (counted.unsqueeze(2) & hidden.unsqueeze(1)).flatten(0, 1)
        loss = masked_patch_mse(predicted, _standardized(target, mean, scale), counted, mask)
        best = slice(None, None, chosen.positions.shape[1])  # the first kept date of every item
        return loss, _Picture(target[best], predicted[best], mean[best], scale[best])

    def _outputs(
        self, features: Features, pictures: Mapping[str, _Picture], hidden: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Pictures in normalised units, hidden patches NaN in `visible`, and contrasted vectors.

        A series is shown on one of its reconstructed dates, (B, 1, C, *S).
        """
        reconstruction = {}
        for name, picture in pictures.items():
            seen = picture.seen.float()
            shown = {
                "input": seen,
                "visible": seen.masked_fill(hidden[name].unsqueeze(-1), float("nan")),
                "predicted": picture.predicted.float() * picture.scale + picture.mean,
            }
            patch = self.backbone.patch_of(name)
            images = {
                kind: unpatchify(t, self.backbone.grid, patch, channels_first=True).detach()
                for kind, t in shown.items()
            }
            is_series = self.backbone.modalities[name].kind == "series"
            reconstruction[name] = {
                kind: t.unsqueeze(1) if is_series else t for kind, t in images.items()
            }
        embeddings = {name: z.detach() for name, z in self.embed(features).items()}
        return {"reconstruction": reconstruction, "embeddings": embeddings}

    def load_pretraining_parts(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Fill the decoders from a pretraining state dict of the published code.

        Args:
            state: Tensors under the published names; encoders are not looked at.

        Raises:
            WeightsError: The file lacks a decoder, or shapes differ.
        """
        own = self.decoder.state_dict()
        names = {n: decoder_name(n, state) for n in own}
        missing = [names[n] for n in own if names[n] not in state]
        wrong = [n for n in own if n not in missing and names[n] in state]
        wrong = [n for n in wrong if state[names[n]].shape != own[n].shape]
        if missing or wrong:
            raise WeightsError(
                f"Pretraining state dict: missing {missing[:5]}, of another shape {wrong[:5]}. "
                "Give the modalities and sizes of the run it comes from."
            )
        self.decoder.load_state_dict({n: state[names[n]] for n in own})
        return LoadReport(tuple(f"decoder.{n}" for n in own), (), ())


def _standardized(target: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return (target.float() - mean) / scale


def _whole_statistics(patches: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and scale of all values of an image, (B, P, V) -> (B, 1, 1) each."""
    flat = patches.flatten(1).unsqueeze(1)
    return patch_statistics(flat, None if mask is None else mask.flatten(1).unsqueeze(1))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Take dates: (B, T, ...) and int64 (B, K) -> (B, K, ...)."""
    wide = index.view(*index.shape, *[1] * (x.ndim - 2))
    return x.gather(1, wide.expand(-1, -1, *x.shape[2:]))


def _take_frames(batch: Batch, frames: Mapping[str, Tensor]) -> Batch:
    """Return the batch with only the chosen dates of long series."""
    out = dict(batch)
    for name, index in frames.items():
        for entry in (name, *(key(name, part) for part in ("valid", "dates", "frames"))):
            if entry in batch:
                out[entry] = _take(batch[entry], index)
    return out


def _from_weights(
    encoding: OmniSatEncoding, known: dict[str, Modality], variant: dict[str, Any]
) -> tuple[OmniSatBackbone, dict[str, Tensor]]:
    """Load the backbone, and the file's tensors if it is a pretraining state dict."""
    loaded, content = load_initial(
        OmniSatBackbone, str(encoding.weights), f"omnisat_{encoding.size}",
        modalities=known, arguments=variant, same=("patch_size",), bands=encoding.bands,
    )  # fmt: skip
    state = flatten_reference(content)
    return loaded, state if any(name.startswith("decoder.") for name in state) else {}
