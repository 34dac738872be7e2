"""MAESTRO's encoders: images and series of several sensors, fused in time and between sensors.

Source: Labatie et al., "MAESTRO: Masked AutoEncoders for Multimodal, Multitemporal, and
Multispectral Earth Observation Data", WACV 2026 (arXiv 2508.10894), and its released code. Outputs
follow the released code; series of any length, missing dates, nodata and absent sensors, which it
does not know, are left out of attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainssl.backbones.base import Backbone, Features, LoadReport, common_size, refuse_replace
from domainssl.backbones.maestro.embedding import PatchEmbedding, check_shared
from domainssl.backbones.maestro.files import read_reference
from domainssl.backbones.maestro.inputs import (
    MAESTROInput,
    band_order,
    check_depth,
    check_inputs,
    check_width,
    date_reference_of,
    nominal_grid,
)
from domainssl.modality import (
    Modality,
    as_modalities,
    key,
    present_mask,
    sides_of,
    valid_mask,
)
from domainssl.nn.alibi import KeyMask
from domainssl.nn.blocks import Transformer
from domainssl.nn.dates import DATE_CHANNELS, date_encoding, decimal_year
from domainssl.nn.masking import mean_of_valid, take_tokens
from domainssl.nn.metric_positions import metric_positions
from domainssl.nn.patching import grid_coordinates, grid_of, patch_fraction

__all__ = ["Encoded", "Fusion", "Layout", "MAESTROBackbone", "MAESTROInput", "Raster"]

Fusion = Literal["shared", "monotemp", "mod", "group"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The tokens of one modality of a batch, without their values.

    Attributes:
        grid: Patches (h, w) or (x, y, z).
        dates: Number of dates, D.
        band_groups: Number of tokens per patch and date, G.
        token_valid: bool (B, G * D * L), band group slowest; False where nothing was measured.
    """

    grid: tuple[int, ...]
    dates: int
    band_groups: int
    token_valid: Tensor

    @property
    def axes(self) -> tuple[int, int, int, int]:
        """(B, G, D, L), L patches per date."""
        return self.token_valid.shape[0], self.band_groups, self.dates, math.prod(self.grid)


@dataclass(frozen=True, kw_only=True)
class Raster(Layout):
    """One modality of a batch, ready to be cut into tokens.

    Attributes:
        values: Resized and reordered, float32 (B, D, C, *S); zero where not valid.
        valid: bool (B, D, *S).
        cells: Cells of the fine position grid over the same footprint.
        date_code: float32 (B, D, 8), zero without dates.
    """

    values: Tensor
    valid: Tensor
    cells: tuple[int, ...]
    date_code: Tensor


@dataclass(frozen=True)
class Encoded:
    """Visible tokens after the encoders, per sequence.

    Attributes:
        tokens: (S, K, E); S is B, or B times dates and band groups where dates are not fused.
        order: Place of every visible token in the full sequence, int64 (S, K).
        is_seen: bool (S, K); False on entries that only fill up shorter sequences.
    """

    tokens: dict[str, Tensor]
    order: dict[str, Tensor]
    is_seen: dict[str, Tensor]


class MAESTROBackbone(Backbone):
    """Encode images, volumes and series of them, of any sensors or contrasts on one footprint.

    `tokens[m]` are ordered band group, date, patch; `grid[m]` is (h, w) or (x, y, z) for an image
    or volume with one band group, with G * D before it otherwise. `pooled[m]` is the mean over
    tokens that saw something, and `pooled["joint"]` the mean of these over the modalities that an
    item has.

    Args:
        modalities: Images and series, or volumes and their series, by name.
        inputs: How each becomes tokens.
        fusion: `shared` one encoder for every single date of every modality, `monotemp` one per
            modality for every single date, `mod` one per modality for all dates, `group` one per
            group for all its dates and modalities.
        width: Token width E, a multiple of 4 and at least 16, for volumes 20.
        depth: Blocks that a token passes, shared ones included.
        heads: Attention heads.
        head_dim: Width of a head.
        ffn_ratio: Width of the feed-forward layers over `width`.
        shared_depth: How many of the last blocks see all sequences at once (`mod` and `group`).
        position_cells: Cells of the fine position grid along the footprint; None is the least
            common multiple of all grids. Equal cells on the ground make weights comparable. For
            volumes the number along the longest side, and None is one per millimetre.
        date_reference: Modality whose date distances in time are counted from; None is the first
            image or volume. Without it in a batch they are counted from the mean of all dates of
            the item.
        normalization: Form for all modalities, or one per modality.

    Raises:
        ConfigError: Modalities, inputs and sizes do not fit each other.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "maestro_tiny": {"width": 192, "depth": 12, "heads": 3, "ffn_ratio": 2},
        "maestro_small": {"width": 384, "depth": 12, "heads": 6, "ffn_ratio": 2},
        "maestro_base": {"width": 768, "depth": 12, "heads": 12, "ffn_ratio": 4},
        "maestro_large": {"width": 1024, "depth": 24, "heads": 16, "ffn_ratio": 4},
    }
    forward_methods: ClassVar[tuple[str, ...]] = ("encode", "encode_visible")
    reference_holds_classes: ClassVar[bool] = True

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        inputs: Mapping[str, MAESTROInput | Mapping[str, Any]],
        fusion: Fusion = "group",
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        head_dim: int = 64,
        ffn_ratio: float = 4,
        shared_depth: int = 3,
        position_cells: int | None = None,
        date_reference: str | None = None,
        normalization: str | dict[str, str] = "identity",
    ) -> None:
        known = as_modalities(modalities)
        super().__init__(known, normalization)
        self.inputs = check_inputs(known, inputs)
        check_depth(fusion, depth, shared_depth)
        self.spatial_dims = next(iter(known.values())).spatial_dims
        check_width(width, self.spatial_dims)
        self.fusion, self.width = fusion, width
        self.bands = {n: band_order(known[n], self.inputs[n]) for n in known}
        self.date_reference = date_reference_of(known, date_reference)
        self.position_cells = position_cells
        self.nominal = {n: nominal_grid(known[n], self.inputs[n]) for n in known}
        self.patch_embed = nn.ModuleDict()
        for name in known:
            sizes = [len(group) for group in self.bands[name]]
            embedding = self.embedding_of(name)
            patch = self.patch_of(name)
            if embedding not in self.patch_embed:
                self.patch_embed[embedding] = PatchEmbedding(sizes, width, patch)
            check_shared(name, embedding, self.patch_embed[embedding], sizes, patch)

        def stack(blocks: int) -> Transformer:
            return Transformer(width, blocks, heads, ffn_ratio, head_dim=head_dim)

        self.encoders = nn.ModuleDict(
            {n: stack(depth - shared_depth) for n in self.encoder_names(list(known))}
        )
        self.shared_encoder = stack(shared_depth) if shared_depth else None
        self.embed_dim = dict.fromkeys([*known, *(["joint"] if len(known) > 1 else [])], width)

    # -- names ------------------------------------------------------------------------------

    def embedding_of(self, name: str) -> str:
        """Return the name under which a modality's patch embedding is stored."""
        return self.inputs[name].embedding or name

    def patch_of(self, name: str) -> tuple[int, ...]:
        """Return the sides of a modality's patches in pixels or voxels, one per axis."""
        return sides_of(self.inputs[name].patch_size, self.spatial_dims)

    def sequences(self, names: list[str]) -> dict[str, list[str]]:
        """Return which modalities form which sequence, in order of appearance."""
        found: dict[str, list[str]] = {}
        for name in names:
            group = self.inputs[name].group or name
            found.setdefault(group if self.fusion == "group" else name, []).append(name)
        return found

    def encoder_of(self, sequence: str) -> str:
        """Return the name of the encoder that a sequence passes."""
        return "shared" if self.fusion == "shared" else sequence

    def encoder_names(self, names: list[str]) -> list[str]:
        """Return the encoders that some modalities need, without repetitions."""
        return list(dict.fromkeys(self.encoder_of(s) for s in self.sequences(names)))

    def own_parts(self, name: str) -> tuple[str | None, str | None]:
        """Return patch embedding and encoder that serve this modality alone, None where shared."""
        others = [n for n in self.modalities if n != name]
        embedding: str | None = self.embedding_of(name)
        if embedding in [self.embedding_of(n) for n in others]:
            embedding = None
        encoder: str | None = self.encoder_names([name])[0]
        if encoder in self.encoder_names(others):
            encoder = None
        return embedding, encoder

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield patch embedding and encoder where no other modality uses them."""
        embedding, encoder = self.own_parts(name)
        if embedding is not None:
            yield from self.patch_embed[embedding].parameters()
        if encoder is not None:
            yield from self.encoders[encoder].parameters()

    # -- before the network -----------------------------------------------------------------

    def layouts(self, x: Mapping[str, Any]) -> dict[str, Layout]:
        """Return the tokens that every modality of a batch gives, without preparing values."""
        return {n: self._layout(n, self._valid(x, n)) for n in self.modalities if n in x}

    def prepare(self, x: Mapping[str, Any]) -> dict[str, Raster]:
        """Resize, reorder and date every modality of a normalised batch."""
        names = [name for name in self.modalities if name in x]
        reference = self._reference_date(x, names)
        return {name: self._raster(x, name, reference) for name in names}

    def _raster(self, x: Mapping[str, Any], name: str, reference: Tensor | None) -> Raster:
        given, modality, valid = self.inputs[name], self.modalities[name], self._valid(x, name)
        values: Tensor = x[name].float()
        size = common_size(values, modality)
        if modality.kind != "series":
            values = values.unsqueeze(1)
        channels = modality.channels
        order = [channels.index(band) for group in self.bands[name] for band in group]
        if order != list(range(len(channels))):
            values = values[:, :, order]
        values = self._resize(values, name)
        if given.is_elevation:
            below = 30 * (values[:, :, :1] - values[:, :, 1:])
            values = torch.cat([values[:, :, :1], below], dim=2)
        layout = self._layout(name, valid)
        return Raster(
            **vars(layout),
            values=torch.where(valid.unsqueeze(2), values, 0.0),
            valid=valid,
            cells=self._cells(name, layout.grid, size),
            date_code=self._date_code(x, name, valid.shape[0], layout.dates, reference),
        )

    def _layout(self, name: str, valid: Tensor) -> Layout:
        """Cut where values count, bool (B, D, *S), into tokens."""
        (items, dates), patch = valid.shape[:2], self.patch_of(name)
        grid = grid_of(valid.shape[2:], patch, f"batch.{name}")
        seen = (patch_fraction(valid.flatten(0, 1), patch) > 0).unflatten(0, (items, 1, dates))
        groups = len(self.bands[name])
        return Layout(
            grid=grid,
            dates=dates,
            band_groups=groups,
            token_valid=seen.expand(-1, groups, -1, -1).flatten(1),
        )

    def _valid(self, x: Mapping[str, Any], name: str) -> Tensor:
        """Where resized values count, bool (B, D, *S): all pixels they are made of do."""
        valid = valid_mask(x, self.modalities[name])
        if self.modalities[name].kind != "series":
            valid = valid.unsqueeze(1)
        places = [1] * self.spatial_dims
        valid = valid & present_mask(x, name).view(-1, 1, *places)
        frames = x.get(key(name, "frames"))
        if frames is not None:
            valid = valid & frames.view(*frames.shape, *places)
        resized = self._resize(valid.unsqueeze(2), name)
        return resized[:, :, 0] if resized.dtype == torch.bool else resized[:, :, 0] > 1 - 1e-4

    def _resize(self, values: Tensor, name: str) -> Tensor:
        """Resize (B, D, C, *S) to `image_size`; what has that size already is returned as it is."""
        given = self.inputs[name]
        if given.image_size is None:
            return values
        size = sides_of(given.image_size, self.spatial_dims)
        if tuple(values.shape[3:]) == size:
            return values
        mode: str = given.interpolation
        if mode == "bilinear" and self.spatial_dims == 3:
            mode = "trilinear"
        flat = F.interpolate(values.flatten(0, 1).float(), size, mode=mode)
        return flat.unflatten(0, values.shape[:2])

    def _cells(self, name: str, grid: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the fine grid: fixed over the nominal footprint, in proportion over others."""
        if self.spatial_dims == 3:
            return self._cells_mm(self.modalities[name], size)
        nominal = self.nominal[name]
        cells = self.position_cells
        if cells is None:
            cells = math.lcm(*(side for pair in self.nominal.values() for side in pair or ()))
        if nominal is None:
            return (cells,) * len(grid)
        return tuple(max(1, round(cells * g / n)) for g, n in zip(grid, nominal, strict=True))

    def _cells_mm(self, modality: Modality, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return cells of equal sides in mm, so that thick slices are as thick as they are."""
        cell = 1.0
        if self.position_cells is not None:
            longest = max(n * s for n, s in zip(modality.size or size, modality.steps, strict=True))
            cell = longest / self.position_cells
        return tuple(max(1, round(n * s / cell)) for n, s in zip(size, modality.steps, strict=True))

    def _dates(self, x: Mapping[str, Any], name: str, companion: str) -> Tensor | None:
        dates = x.get(key(name, companion))
        if dates is None:
            return None
        found: Tensor = dates.unsqueeze(1) if dates.ndim == 1 else dates
        return found

    def _reference_date(self, x: Mapping[str, Any], names: list[str]) -> Tensor | None:
        """Return the date that distances are counted from, as a decimal year, (B, 1)."""
        total: Tensor | None = None
        count: Tensor | None = None
        for name in names:
            dates = self._dates(x, name, "dates")
            if dates is None:
                continue
            weight = self._dated(x, name, dates).double()
            days, number = (dates * weight).sum(1), weight.sum(1)
            total = days if total is None else total + days
            count = number if count is None else count + number
        if total is None or count is None:
            return None
        days = (total / count.clamp(min=1)).round().long().unsqueeze(1)
        name = self.date_reference or ""
        dates = self._dates(x, name, "dates") if name in names else None
        if dates is not None:
            days = torch.where(present_mask(x, name).unsqueeze(1), dates[:, :1].long(), days)
        return decimal_year(days)

    def _dated(self, x: Mapping[str, Any], name: str, dates: Tensor) -> Tensor:
        """Where dates belong to real frames, bool (B, D)."""
        real = present_mask(x, name).unsqueeze(1).expand(-1, dates.shape[1])
        frames = x.get(key(name, "frames"))
        return real if frames is None else real & frames

    def _date_code(
        self,
        x: Mapping[str, Any],
        name: str,
        items: int,
        dates: int,
        reference: Tensor | None,
    ) -> Tensor:
        days = self._dates(x, name, "dates")
        if days is None or reference is None:
            return torch.zeros(items, dates, DATE_CHANNELS, device=x[name].device)
        code = date_encoding(days, self._dates(x, name, "hours"), reference)
        return torch.where(self._dated(x, name, days).unsqueeze(-1), code, 0.0)

    def codes(self, raster: Raster, width: int) -> Tensor:
        """Return position plus date codes of all tokens, float32 (B, G * D * L, width)."""
        device = raster.values.device
        place = metric_positions(
            raster.grid, raster.cells, width, reserved=DATE_CHANNELS, device=device
        )
        date = F.pad(raster.date_code, (width - DATE_CHANNELS, 0))
        both = date.unsqueeze(2) + place  # (B, D, L, width)
        return both.unsqueeze(1).expand(-1, raster.band_groups, -1, -1, -1).flatten(1, 3)

    # -- sequences --------------------------------------------------------------------------

    def join(self, parts: Mapping[str, Tensor], rasters: Mapping[str, Layout]) -> dict[str, Tensor]:
        """Lay (B, N, ...) of every modality into its sequence; dates apart where not fused."""
        joined = {}
        for sequence, names in self.sequences(list(rasters)).items():
            x = torch.cat([parts[name] for name in names], dim=1)
            if self.fusion in ("shared", "monotemp"):
                x = x.unflatten(1, (-1, math.prod(rasters[names[0]].grid))).flatten(0, 1)
            joined[sequence] = x
        return joined

    def split(
        self, sequences: Mapping[str, Tensor], rasters: Mapping[str, Layout]
    ) -> dict[str, Tensor]:
        """Undo `join`."""
        parts: dict[str, Tensor] = {}
        for sequence, names in self.sequences(list(rasters)).items():
            x = sequences[sequence]
            if self.fusion in ("shared", "monotemp"):
                x = x.unflatten(0, (rasters[names[0]].token_valid.shape[0], -1)).flatten(1, 2)
            lengths = [math.prod(rasters[name].axes[1:]) for name in names]
            parts |= zip(names, x.split(lengths, dim=1), strict=True)
        return {name: parts[name] for name in rasters}

    def embed_patches(self, rasters: Mapping[str, Raster]) -> dict[str, Tensor]:
        """Return tokens without encodings, (B, N, E) per modality."""
        return {n: self.patch_embed[self.embedding_of(n)](r.values) for n, r in rasters.items()}

    def encode_visible(
        self,
        rasters: Mapping[str, Raster],
        hidden: Mapping[str, Tensor] | None = None,
        kept: Mapping[str, int] | None = None,
    ) -> Encoded:
        """Run the encoders on tokens that are valid and not hidden.

        Args:
            rasters: What `prepare` returned.
            hidden: bool (B, N) per modality; None hides nothing.
            kept: Length that each sequence is cut to, at least the number of its visible tokens;
                None keeps hidden tokens in place, unseen.
        """
        tokens, visible = {}, {}
        for name, raw in self.embed_patches(rasters).items():
            tokens[name] = raw + self.codes(rasters[name], self.width).to(raw.dtype)
            seen = rasters[name].token_valid
            visible[name] = seen if hidden is None else seen & ~hidden[name]
        sequences, masks = self.join(tokens, rasters), self.join(visible, rasters)
        order = {}
        for name, x in sequences.items():
            length = x.shape[1]
            if kept is None:
                order[name] = torch.arange(length, device=x.device).expand(x.shape[0], -1)
                continue
            places = (~masks[name]).to(torch.uint8).argsort(dim=1, stable=True)
            order[name] = places[:, : min(length, kept[name])]
            sequences[name] = take_tokens(x, order[name])
            masks[name] = masks[name].gather(1, order[name])
        for name, x in sequences.items():
            encoder = self.encoders[self.encoder_of(name)]
            sequences[name] = encoder(x, KeyMask(masks[name]))
        if self.shared_encoder is not None:
            lengths = [x.shape[1] for x in sequences.values()]
            both = KeyMask(torch.cat(list(masks.values()), dim=1))
            fused = self.shared_encoder(torch.cat(list(sequences.values()), dim=1), both)
            sequences = dict(zip(sequences, fused.split(lengths, dim=1), strict=True))
        return Encoded(sequences, order, masks)

    def encode(
        self,
        x: Mapping[str, Any],
        keep: Mapping[str, Tensor] | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> Features:
        """Run the encoders; see `Backbone.encode`. Tokens have their mask token in the decoder."""
        refuse_replace(replace, type(self).__name__)
        rasters = self.prepare(x)
        hidden = None
        if keep is not None:
            hidden = {}
            for name, raster in rasters.items():
                hidden[name] = torch.zeros_like(raster.token_valid)
                if name in keep:
                    hidden[name] = torch.ones_like(hidden[name]).scatter(1, keep[name], False)
        tokens = self.split(self.encode_visible(rasters, hidden).tokens, rasters)
        features = Features()
        for name, raster in rasters.items():
            layers = raster.band_groups * raster.dates
            is_flat = self.modalities[name].kind != "series" and layers == 1
            grid = raster.grid if is_flat else (layers, *raster.grid)
            coords, valid = grid_coordinates(grid, tokens[name].device), raster.token_valid
            features.tokens[name] = tokens[name]
            if keep is not None and name in keep:
                places = keep[name]
                features.tokens[name] = take_tokens(tokens[name], places)
                coords, valid = take_tokens(coords, places), valid.gather(1, places)
            features.coords[name], features.token_valid[name] = coords, valid
            features.grid[name] = grid
            features.pooled[name] = mean_of_valid(features.tokens[name], valid)
            if key(name, "dates") in x:
                features.dates[name] = x[key(name, "dates")]
        if len(rasters) > 1:
            each = torch.stack([features.pooled[n] for n in rasters], dim=1)
            some = torch.stack([features.token_valid[n].any(1) for n in rasters], dim=1)
            features.pooled["joint"] = mean_of_valid(each, some)
        return features

    def feature_maps(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return tokens on their grid, (B, E, *grid), averaged over dates and band groups."""
        features = self(batch)
        maps = {}
        for name, tokens in features.tokens.items():
            grid = features.grid[name][-self.spatial_dims :]
            places = math.prod(grid)
            x = tokens.unflatten(1, (-1, places)).transpose(1, 2).flatten(0, 1)
            seen = features.token_valid[name].unflatten(1, (-1, places)).transpose(1, 2)
            mean = mean_of_valid(x, seen.flatten(0, 1)).unflatten(0, (tokens.shape[0], *grid))
            maps[name] = mean.movedim(-1, 1)
        return maps

    def band_tensors(self, name: str) -> dict[str, str]:
        """Return the patch embedding of a modality; see `Backbone.band_tensors`."""
        given = self.inputs[name]
        if given.token_bands is not None or given.is_elevation:
            raise self.no_bands(name, "its tokens are made of groups of bands (token_bands)")
        if self.own_parts(name)[0] is None:
            raise self.no_bands(name, "it shares its patch embedding with another modality")
        return {f"patch_embed.{self.embedding_of(name)}.bands.0.conv.weight": "convolution"}

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    ) -> tuple[Self, LoadReport]:
        """Read a checkpoint of the released code, or its state dict; see `files.py`.

        `variant` may hold `use_ema: true` for the averaged weights of the file.
        """
        arguments, tensors, unexpected = read_reference(cls, state, variant, modalities)
        backbone = cls(**arguments)
        loaded = backbone.load_tensors(tensors)
        missing = tuple(n for n in loaded.missing if not n.startswith("normalizer."))
        return backbone, LoadReport(loaded.matched, missing, unexpected + loaded.unexpected)
