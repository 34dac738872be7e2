"""OmniSat encoders: one token per patch from every sensor, fused into one token per patch.

Source: Astruc, Gonthier, Mallet, Landrieu, ECCV 2024 (arXiv 2404.08351). The published weights
layout is read and written; names of parameters follow it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from domainssl.backbones.base import Backbone, Features, LoadReport, common_size
from domainssl.errors import ConfigError, DataError, WeightsError, nearest
from domainssl.modality import Modality, key, present_mask, sides_of, valid_mask
from domainssl.nn.bypass import PatchEncoder, Pooled
from domainssl.nn.calendar import Calendar, calendars_of
from domainssl.nn.fusion import Combiner, RelativeLayout
from domainssl.nn.ltae import LTAE
from domainssl.nn.masking import mean_of_valid
from domainssl.nn.patching import (
    grid_coordinates,
    grid_of,
    patch_fraction,
    patch_proportions,
    patchify,
)
from domainssl.options import as_dataclass

__all__ = [
    "FusionArchitecture",
    "OmniSatBackbone",
    "SeriesArchitecture",
    "Traces",
    "flatten_reference",
    "published_name",
]

Pool = Literal["mean", "cls"]
Traces = dict[str, Any]  # "poolings": {image: [Pooled]}, "attention": {series: (B, T)}


@dataclass(frozen=True, kw_only=True)
class SeriesArchitecture:
    """Sizes of the temporal encoders.

    Attributes:
        heads: Attention heads, and groups of the normalisations.
        key_width: Width of a key.
        widths_in: Widths of the layers before attention; the last one is the token width.
        widths_out: Widths of the layers after attention; the last one is the token width.
        dropout: Of the layers.
        attention_dropout: Of the attention weights.
        input_norm: Modalities whose dates are normalised in groups of channels before attention;
            None takes those whose name begins with `s2`, as published.
        constant_date: Day that images of one pixel per patch are taken for, as published.
    """

    heads: int = 16
    key_width: int = 8
    widths_in: tuple[int, ...] = (32, 128, 256)
    widths_out: tuple[int, ...] = (256, 512, 256)
    dropout: float = 0.2
    attention_dropout: float = 0.1
    input_norm: tuple[str, ...] | None = None
    constant_date: int = 120


@dataclass(frozen=True, kw_only=True)
class FusionArchitecture:
    """Sizes of the fusion.

    Attributes:
        depth: Self-attention blocks; a readout block follows.
        heads: Attention heads.
        ffn_ratio: Width of the feed-forward layers over the token width.
        dropout: Of tokens and layers.
        attention_dropout: Of the attention weights.
        drop_path: Rate of dropped branches of the last block.
        rpe_layout: `aligned` compares the patches of two tokens whatever their modality; `legacy`
            lays the whole sequence on one square, as the published code does.
    """

    depth: int = 6
    heads: int = 16
    ffn_ratio: float = 4
    dropout: float = 0.2
    attention_dropout: float = 0.2
    drop_path: float = 0.2
    rpe_layout: RelativeLayout = "aligned"


class OmniSatBackbone(Backbone):
    """Encode any of its modalities, all on one patch grid over the same footprint.

    Images and volumes with patches of 3 pixels or more go through convolutions and poolings, series
    through a temporal attention encoder per patch; an image or volume with one pixel per patch is a
    series of one date.
    Features are named after the modalities, before fusion, plus `joint` for the fused tokens.
    `pooled` of a modality is the mean of its valid tokens, that of `joint` follows `pool`; `cls`
    holds the class token of `joint`.

    Args:
        modalities: Images and series, or volumes and their series.
        patch_size: Side of a patch in pixels or voxels per modality, one number or one per axis.
        grid: Patches along each axis, the same for all modalities.
        width: Token width.
        groups: Groups of the normalisations of the image encoder.
        fusion: Sizes of the fusion.
        series: Sizes of the temporal encoders.
        calendar: How days are counted, one for all or one per series.
        attend_to_padding: Let padded and invalid dates enter attention and statistics, as zeros
            of day 0, as the published code does.
        pool: `pooled["joint"]` is the mean of the valid fused tokens, or the class token.
        normalization: Form for all modalities, or one per modality.

    Raises:
        ConfigError: A modality is of another kind, or sizes do not fit.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "omnisat_tiny": {
            "width": 32,
            "fusion": {"depth": 2, "heads": 4},
            "series": {"heads": 4, "widths_in": [16, 32], "widths_out": [32, 32]},
        },
        "omnisat_base": {"width": 256, "fusion": {"depth": 6, "heads": 16}},
    }
    forward_methods: ClassVar[tuple[str, ...]] = ("encode", "encode_sensors", "fuse")

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        patch_size: Mapping[str, int | tuple[int, ...]],
        grid: tuple[int, ...],
        width: int = 256,
        groups: int = 4,
        fusion: FusionArchitecture | Mapping[str, Any] = FusionArchitecture(),
        series: SeriesArchitecture | Mapping[str, Any] = SeriesArchitecture(),
        calendar: Calendar | Mapping[str, Any] = Calendar(),
        attend_to_padding: bool = False,
        pool: Pool = "mean",
        normalization: str | dict[str, str] = "zscore",
    ) -> None:
        super().__init__(modalities, normalization)
        self.patch_size = {n: _plain(side) for n, side in patch_size.items()}
        self.spatial_dims = _common_axes(self.modalities)
        self.grid = sides_of(grid, self.spatial_dims, "grid")
        self.attend_to_padding, self.pool = attend_to_padding, pool
        self.series = as_dataclass(SeriesArchitecture, series)
        self.calendars = calendars_of(calendar, self.modalities)
        for name, modality in self.modalities.items():
            patch = _patch_sides(name, modality, self.patch_size)
            encoder: nn.Module
            if self.is_image(name):
                encoder = PatchEncoder(modality.num_channels, width, patch, groups)
            else:
                encoder = self._series_encoder(
                    name, modality.num_channels * math.prod(patch), width
                )
            self.add_module(f"projector_{name}", encoder)
        sizes = as_dataclass(FusionArchitecture, fusion)
        self.combiner = Combiner(
            width, sizes.depth, sizes.heads, self.grid, sizes.ffn_ratio, sizes.dropout,
            sizes.attention_dropout, sizes.drop_path, sizes.rpe_layout, self._proportions(),
        )  # fmt: skip
        self.embed_dim = dict.fromkeys([*self.modalities, "joint"], width)

    def _series_encoder(self, name: str, inputs: int, width: int) -> LTAE:
        sizes, named = self.series, self.series.input_norm
        return LTAE(
            inputs,
            width,
            heads=sizes.heads,
            key_width=sizes.key_width,
            widths_in=tuple(sizes.widths_in),
            widths_out=tuple(sizes.widths_out),
            dropout=sizes.dropout,
            attention_dropout=sizes.attention_dropout,
            calendar_length=self.calendars[name].length,
            input_norm=name.startswith("s2") if named is None else name in named,
        )

    def patch_of(self, name: str) -> tuple[int, ...]:
        """Return the sides of a modality's patches in pixels or voxels, one per axis."""
        return sides_of(self.patch_size[name], self.spatial_dims)

    def _proportions(self) -> tuple[float, ...]:
        """Return the sides of a patch in units of their median, the same for all modalities."""
        sides = {
            n: patch_proportions(self.patch_of(n), m.steps) for n, m in self.modalities.items()
        }
        known = {n: side for n, side in sides.items() if self.modalities[n].spacing_mm is not None}
        first = next(iter((known or sides).values()))
        for name, side in known.items():
            if any(abs(a - b) > 0.02 * b for a, b in zip(side, first, strict=True)):
                raise ConfigError(
                    f"patch_size: patches of {name!r} have sides in the proportions {side}, those "
                    f"of {next(iter(known))!r} {first}; all modalities share one grid over one "
                    "footprint. Choose patch_size per axis by the spacing of each."
                )
        return first

    def is_image(self, name: str) -> bool:
        """True where a modality goes through the encoder of images and volumes."""
        return self.modalities[name].kind != "series" and max(self.patch_of(name)) > 1

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of one modality's encoder."""
        yield from self.get_submodule(f"projector_{name}").parameters()

    def encode(
        self,
        x: Mapping[str, Any],
        keep: Mapping[str, Tensor] | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> Features:
        """Run encoders and fusion; see `Backbone.encode`.

        The sequence keeps its length here, so `keep` is refused; `replace` hides tokens from the
        fusion, not from the features of their own modality.
        """
        if keep is not None:
            raise ConfigError(
                "OmniSatBackbone keeps hidden tokens in the sequence; pass `replace`, bool (B, N) "
                "per modality, instead of `keep`."
            )
        features, _ = self.encode_sensors(x)
        return self.fuse(features, replace)

    def encode_sensors(self, x: Mapping[str, Any]) -> tuple[Features, Traces]:
        """Encode every modality on its own.

        Returns:
            Features before fusion, and what the decoders need besides: `poolings` of images,
            `attention` over the dates of series.
        """
        features = Features()
        traces: Traces = {"poolings": {}, "attention": {}}
        coords = grid_coordinates(self.grid, device=self.combiner.buckets.device)
        for name in self.modalities:
            if name not in x:
                continue
            self._check_grid(name, x[name])
            if self.is_image(name):
                tokens, valid, poolings = self._encode_image(name, x)
                traces["poolings"][name] = poolings
            else:
                tokens, valid, attention = self._encode_series(name, x)
                traces["attention"][name] = attention
            features.tokens[name], features.token_valid[name] = tokens, valid
            features.pooled[name] = mean_of_valid(tokens, valid)
            features.coords[name], features.grid[name] = coords, self.grid
            if key(name, "dates") in x:
                features.dates[name] = x[key(name, "dates")]
        return features, traces

    def _check_grid(self, name: str, x: Tensor) -> None:
        size = common_size(x, self.modalities[name])
        found = grid_of(size, self.patch_size[name], f"batch.{name}")
        if found != self.grid:
            raise DataError(
                f"batch.{name}: {size} pixels are {found} patches of "
                f"{self.patch_size[name]} pixels, but the position embeddings are for {self.grid}. "
                "All modalities must cover the same footprint: crop them to it, or build the "
                "backbone with another grid."
            )

    def _encode_image(self, name: str, x: Mapping[str, Any]) -> tuple[Tensor, Tensor, list[Pooled]]:
        modality, patch = self.modalities[name], self.patch_of(name)
        valid = patch_fraction(valid_mask(x, modality), patch) > 0
        valid = valid & present_mask(x, name).unsqueeze(1)
        patches = self.patches(name, x[name])  # (B, C, *S) -> (B, P, C·p·p)
        pixels = patches.flatten(0, 1).unflatten(1, (modality.num_channels, *patch))
        encoder = cast(PatchEncoder, self.get_submodule(f"projector_{name}"))
        tokens, poolings = encoder(pixels, valid.flatten())
        return tokens.unflatten(0, valid.shape), valid, poolings

    def patches(self, name: str, x: Tensor) -> Tensor:
        """Cut (B, C, *S) or a series (B, T, C, *S) into (B, P, V) or (B, T, P, V).

        Values of a patch are ordered by channel, then by axis.
        """
        patch = self.patch_of(name)
        if self.modalities[name].kind != "series":
            return patchify(x, patch, channels_first=True)
        flat = patchify(x.flatten(0, 1), patch, channels_first=True)
        return flat.unflatten(0, x.shape[:2])

    def frame_mask(self, x: Mapping[str, Any], name: str) -> Tensor:
        """Return `<m>.frames`, bool (B, T); all True where the batch does not carry it."""
        found = x.get(key(name, "frames"))
        if found is not None:
            return cast(Tensor, found)
        return torch.ones(x[name].shape[:2], dtype=torch.bool, device=x[name].device)

    def seen_dates(self, x: Mapping[str, Any], name: str) -> Tensor:
        """Return which dates of which patches hold a measurement, bool (B, P, T)."""
        modality = self.modalities[name]
        valid = valid_mask(x, modality)  # (B, T, *S)
        share = patch_fraction(valid.flatten(0, 1), self.patch_size[name])
        measured = (share > 0).unflatten(0, valid.shape[:2])  # (B, T, P)
        return (measured & self.frame_mask(x, name).unsqueeze(2)).transpose(1, 2)

    def _encode_series(self, name: str, x: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        modality = self.modalities[name]
        if modality.kind != "series":  # one pixel per patch: a series of one constant date
            valid = patch_fraction(valid_mask(x, modality), 1) > 0
            seen = valid.unsqueeze(-1)
            days = torch.full((seen.shape[0], 1), self.series.constant_date, device=seen.device)
            values = self.patches(name, x[name]).unsqueeze(2)
        else:
            seen = self.seen_dates(x, name)
            days = self._days(name, x)
            frames = self.frame_mask(x, name)
            values = self.patches(name, x[name]).transpose(1, 2)  # (B, T, P, V) -> (B, P, T, V)
            values = torch.where(frames[:, None, :, None], values, 0.0)
        valid = seen.any(-1) & present_mask(x, name).unsqueeze(1)
        attends = torch.ones_like(seen) if self.attend_to_padding else seen
        encoder = self.get_submodule(f"projector_{name}")
        tokens, attention = encoder(values, days, attends, valid)
        return tokens, valid, attention

    def _days(self, name: str, x: Mapping[str, Any]) -> Tensor:
        """Days of the calendar, (B, T); 0 where there is no frame."""
        dates = x.get(key(name, "dates"))
        if dates is None:
            raise DataError(
                f"batch.{name}.dates is missing: series need int32 (B, T) days since 1970-01-01. "
                "Rasters have them from their files, or from a day in their names, such as "
                "x_20200501.tif."
            )
        return torch.where(self.frame_mask(x, name), self.calendars[name].days(dates), 0)

    def fuse(self, features: Features, replace: Mapping[str, Tensor] | None = None) -> Features:
        """Return `features` with the fused tokens as `joint`.

        Args:
            features: What `encode_sensors` returned, of one modality or several.
            replace: Tokens to hide, bool (B, P) per modality.
        """
        names = [name for name in self.modalities if name in features.tokens]
        hidden = None
        if replace is not None:
            masks = [replace.get(n, torch.zeros_like(features.token_valid[n])) for n in names]
            hidden = torch.cat(masks, dim=1)
        valid = [features.token_valid[name] for name in names]
        fused = self.combiner([features.tokens[name] for name in names], valid, hidden)
        tokens, anywhere = fused[:, 1:], torch.stack(valid).any(0)
        pooled = fused[:, 0] if self.pool == "cls" else mean_of_valid(tokens, anywhere)
        first = names[0]
        return dataclasses.replace(
            features,
            tokens={**features.tokens, "joint": tokens},
            pooled={**features.pooled, "joint": pooled},
            cls={**features.cls, "joint": fused[:, 0]},
            coords={**features.coords, "joint": features.coords[first]},
            grid={**features.grid, "joint": self.grid},
            token_valid={**features.token_valid, "joint": anywhere},
        )

    @classmethod
    def current_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Move the sizes of the fusion into their group, where older cards have them flat."""
        flat = {field.name for field in dataclasses.fields(FusionArchitecture)} & set(arguments)
        kept = {name: value for name, value in arguments.items() if name not in flat}
        return {**kept, "fusion": {n: arguments[n] for n in flat}} if flat else kept

    def band_tensors(self, name: str) -> dict[str, str]:
        """Return the first layer of a sensor; see `Backbone.band_tensors`."""
        if self.is_image(name):
            return {f"projector_{name}.proj.0.weight": "convolution"}
        return {f"projector_{name}.inconv.0.weight": "bands first"}

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    ) -> tuple[Self, LoadReport]:
        """Read checkpoints of the published code: pretraining, fine-tuning or from scratch.

        There are no published weights, so the file says neither bands nor statistics: `modalities`
        must be given, or stand in `variant`. Sensors of the file that are not asked for are left
        out and reported as unexpected.
        """
        if modalities is None and "modalities" not in variant:
            raise WeightsError(
                "OmniSat files of the published code do not say what goes in: pass modalities=… "
                "with the bands, units and statistics the weights were trained with."
            )
        backbone = cls(**{"modalities": modalities, **variant})
        flat = flatten_reference(state)
        renamed, used = {}, set()
        for own in backbone.state_dict():
            name = published_name(own, backbone.modalities, flat)
            if name in flat:
                renamed[own] = flat[name]
                used.add(name)
        if not any(own.startswith("combiner.") for own in renamed):
            raise WeightsError(
                "This is no OmniSat file: expected names such as encoder.pos_embed and "
                f"encoder.blocks.0.attn.qkv.weight; found {sorted(flat)[:5]}."
            )
        loaded = backbone.load_tensors(renamed)
        # the mask token serves pretraining only; fine-tuning files have none
        optional = ("normalizer.", "combiner.mask_token")
        missing = tuple(n for n in loaded.missing if not n.startswith(optional))
        rest = tuple(n for n in flat if n not in used and not n.startswith("decoder."))
        return backbone, LoadReport(loaded.matched, missing, rest)

    def to_reference(self) -> dict[str, Tensor]:
        """Return the weights in the layout of the published pretraining network."""
        return {
            published_name(own, self.modalities): tensor
            for own, tensor in self.state_dict().items()
            if not own.startswith("normalizer.")
        }


def flatten_reference(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a published checkpoint under `encoder.…`, `decoder.…`."""
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    found = {n: t for n, t in state.items() if isinstance(t, Tensor)}
    if any(n.startswith("model.model.") for n in found):  # fine-tuning wraps the encoder
        return {re.sub(r"^model\.model\.(encoder\.)?", "encoder.", n): t for n, t in found.items()}
    return {n.removeprefix("model."): t for n, t in found.items()}


def published_name(
    own: str, modalities: Mapping[str, Modality], file: Mapping[str, Tensor] | None = None
) -> str:
    """Translate one of our names to the published pretraining network.

    Args:
        own: Name in our state dict.
        modalities: Ours, by name; the published ones have a dash where ours have an underscore.
        file: Names of a file, to accept the underscore too.
    """
    if own == "combiner.mask_token":
        return "masked_token"
    if own.startswith("combiner."):
        return own.replace("combiner.", "encoder.", 1)
    for name in modalities:
        prefix = f"projector_{name}."
        if own.startswith(prefix):
            rest = own.removeprefix(prefix)
            same = f"encoder.{prefix}{rest}"
            if file is not None and same in file:
                return same
            return f"encoder.projector_{name.replace('_', '-')}.{rest}"
    return own


def _common_axes(modalities: Mapping[str, Modality]) -> int:
    """Return the number of spatial axes that all modalities have."""
    axes = {name: m.spatial_dims for name, m in modalities.items()}
    for name, modality in modalities.items():
        if not axes[name]:
            raise ConfigError(
                f"OmniSat: modality {name!r} is a {modality.kind}; expected images, volumes or "
                "series of them over one footprint."
            )
    if len(set(axes.values())) > 1:
        raise ConfigError(
            f"OmniSat: images and volumes share no footprint; the modalities have {axes} axes. "
            "Choose the ones of one kind in the DataModule."
        )
    return next(iter(axes.values()))


def _plain(side: int | tuple[int, ...]) -> int | tuple[int, ...]:
    return side if isinstance(side, int) else tuple(side)


def _patch_sides(
    name: str, modality: Modality, sides: Mapping[str, int | tuple[int, ...]]
) -> tuple[int, ...]:
    if name not in sides:
        raise ConfigError(
            f"patch_size: no entry for modality {name!r}.{nearest(name, sides)} Got {dict(sides)}."
        )
    patch = sides_of(sides[name], modality.spatial_dims, f"patch_size.{name}")
    if min(patch) < 1 or (modality.kind != "series" and max(patch) == 2):
        raise ConfigError(
            f"patch_size.{name}: got {sides[name]}; expected 1 or more pixels, and for an image or "
            "volume 3 or more along one axis (or 1, a series of one date)."
        )
    return patch
