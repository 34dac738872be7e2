"""LESS ViT: one token per band and patch, any bands by their wavelengths, low-rank attention.

Source: Si et al., "Towards Scalable Foundation Model for Multi-modal and Hyperspectral Geospatial
Data" (arXiv 2503.12843) and its released code. No weights have been published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from domainssl.backbones.base import (
    Backbone,
    Features,
    LoadReport,
    present_names,
    refuse_replace,
    shared_grid,
)
from domainssl.backbones.vit_files import tensors_of
from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import Modality, key, present_mask, sides_of, valid_mask
from domainssl.nn.low_rank import LowRankBlocks, LowRankSizes, perception_mask
from domainssl.nn.masking import mean_of_valid, take_tokens
from domainssl.nn.patching import grid_coordinates, patch_fraction, patchify
from domainssl.nn.positions import sincos_positions
from domainssl.options import as_dataclass
from domainssl.sensors import wavelengths_nm

__all__ = [
    "LESSArchitecture",
    "LESSBackbone",
    "SpectralTokens",
    "blocks_from_reference",
    "blocks_to_reference",
    "spectral_codes",
]

_RADAR_NM = {"VV": 5500.0, "VH": 5700.0}  # no wavelengths, but places beside those of light
# Parts of a block: ours and the released code's.
_BLOCK = (
    ("attention.norm", "norm1"),
    ("attention.to_channels", "low_dim_pool.channel_linear"),
    ("attention.to_positions", "low_dim_pool.spatial_linear"),
    ("attention.channel_pool.norm", "low_dim_pool.channel_norm"),
    ("attention.position_pool.norm", "low_dim_pool.spatial_norm"),
    ("attention.channel_pool", "low_dim_pool.channel_pool"),
    ("attention.position_pool", "low_dim_pool.spatial_pool"),
    ("attention.channels.norm", "channel_norm"),
    ("attention.positions.norm", "spatial_norm"),
    ("attention.channels", "attn.channel_branch"),
    ("attention.positions", "attn.spatial_branch"),
    ("attention.out", "attn.proj"),
    ("feed_forward.norm", "norm2"),
    ("feed_forward.up", "mlp.fc1"),
    ("feed_forward.down", "mlp.fc2"),
    ("scales.0", "ls1.gamma"),
    ("scales.1", "ls2.gamma"),
)
_TOKENS = {
    "class_token": "cls_token",
    "channel_token": "channel_cls_token",
    "position_token": "spatial_cls_token",
}


@dataclass(frozen=True, kw_only=True)
class LESSArchitecture(LowRankSizes):
    """Sizes of the encoder.

    Attributes:
        width: Token width; a multiple of 4 and of `heads · channel_width`.
        depth: Blocks.
        heads: Attention heads.
        ratio: Width of the feed-forward layers over `width`.
        radius_m: Patches attend to patches within this distance in metres; None lets all see each
            other.
        pooling: `pooled` is the mean of the valid tokens, or the `class` token.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    ratio: float = 4.0
    radius_m: float | None = 640.0
    pooling: Literal["mean", "class"] = "mean"

    @property
    def low_rank(self) -> LowRankSizes:
        """How attention is split."""
        names = [f.name for f in dataclasses.fields(LowRankSizes)]
        return LowRankSizes(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class SpectralTokens:
    """Encoded tokens of the bands of some modalities, one modality after the other.

    Attributes:
        names: The modalities.
        grid: Patches per axis.
        tokens: (B, 1 + C, 1 + N, E) with class tokens in row and column 0.
        attended: Bands that the item has, bool (B, C).
    """

    names: tuple[str, ...]
    grid: tuple[int, ...]
    tokens: Tensor
    attended: Tensor


class _PatchEmbedding(nn.Module):
    """Embed the pixels of a patch of one band; all bands of a modality share the weights."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(pixels, 2 * width), nn.Linear(2 * width, width)
        for part in (self.up, self.down):
            nn.init.xavier_uniform_(part.weight)

    def forward(self, patches: Tensor) -> Tensor:
        """(..., P) -> (..., E)."""
        out: Tensor = self.down(self.up(patches).relu())
        return out


class LESSBackbone(Backbone):
    """Encode images of any bands together; new bands need their wavelengths and no new weights.

    `tokens[m]` are the patches of a modality, averaged over its bands, having seen all that is
    there; `joint` averages over the bands of all modalities that an item has. `cls` is the class
    token of bands and patches.

    Args:
        modalities: Images on one grid, with `gsd_m` and `wavelengths_nm`; those of Sentinel-1 and
            Sentinel-2 are known.
        architecture: Sizes.
        patch_size: Side of a patch in pixels.
        normalization: Form, one for all or one per modality.

    Raises:
        ConfigError: A modality is no image, lacks resolution or wavelengths, or sizes do not fit.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "less_small": {"architecture": {"width": 384, "heads": 6}},
        "less_base": {},
    }
    forward_methods: ClassVar[tuple[str, ...]] = ("encode", "encode_seen")
    takes_wavelengths: ClassVar[bool] = True

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        architecture: LESSArchitecture = LESSArchitecture(),
        patch_size: int | tuple[int, ...] = 16,
        normalization: str | dict[str, str] = "mean2std",
    ) -> None:
        super().__init__(modalities, normalization)
        self.modalities = {n: _with_wavelengths(m) for n, m in self.modalities.items()}
        self.architecture = a = as_dataclass(LESSArchitecture, architecture)
        self.gsd_m = _common_pixel(self.modalities)
        self.patch_size = sides_of(patch_size, 2, "patch_size")
        self.width = a.width
        sincos_positions(torch.zeros(1, 2), a.width)  # refuses a width that does not divide
        pixels = self.patch_size[0] * self.patch_size[1]
        self.embed = nn.ModuleDict({n: _PatchEmbedding(pixels, a.width) for n in self.modalities})
        for name in _TOKENS:
            token = nn.Parameter(torch.empty(1, 1, a.width).normal_(std=0.02))
            self.register_parameter(name, token)
        self.transformer = LowRankBlocks(a.width, a.depth, a.heads, a.ratio, a.low_rank)
        self.embed_dim = dict.fromkeys(self.modalities, a.width)
        if len(self.modalities) > 1:
            self.embed_dim["joint"] = a.width

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the patch embedding of a modality."""
        yield from self.embed[name].parameters()

    def band_tensors(self, name: str) -> dict[str, str]:
        """Return nothing: no weight belongs to a band; see `Backbone.band_tensors`."""
        return {}

    # -- tokens -----------------------------------------------------------------------------

    def names(self, x: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the modalities of a batch, in the order of the model.

        Raises:
            DataError: There is none.
        """
        return present_names(x, self.modalities, "modalities")

    def grid(self, x: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the patches per axis.

        Raises:
            DataError: The images of the batch have different sizes.
        """
        return shared_grid(x, self.names(x), self.patch_size, "The bands of all modalities")

    def bands(self, names: tuple[str, ...]) -> list[int]:
        """Return the number of bands of some modalities."""
        return [self.modalities[name].num_channels for name in names]

    def attended(self, x: Mapping[str, Any], names: tuple[str, ...]) -> Tensor:
        """Return which bands every item has, bool (B, C)."""
        counts = zip(names, self.bands(names), strict=True)
        return torch.cat([present_mask(x, n).unsqueeze(1).expand(-1, c) for n, c in counts], dim=1)

    def patches(self, values: Tensor) -> Tensor:
        """Cut every band into patches: (B, C, H, W) -> (B, C, N, P)."""
        flat = patchify(values.flatten(0, 1).unsqueeze(1), self.patch_size)
        return flat.unflatten(0, values.shape[:2])

    def fraction_valid(self, x: Mapping[str, Any], name: str) -> Tensor:
        """Return the share of valid pixels per patch, (B, N); zero where an item lacks it."""
        share = patch_fraction(valid_mask(x, self.modalities[name]), self.patch_size)
        return share * present_mask(x, name).unsqueeze(1)

    def codes(
        self, names: tuple[str, ...], grid: tuple[int, ...], width: int, device: torch.device
    ) -> Tensor:
        """Return `E(c, n)` of all bands and patches, float32 (1 + C, 1 + N, width)."""
        waves = [w for name in names for w in self.modalities[name].wavelengths_nm or ()]
        metres = grid_coordinates(grid, device=device) * self.gsd_m
        return spectral_codes(torch.tensor(waves, device=device), metres, width)

    def near(self, coords: Tensor) -> Tensor | None:
        """Return which of some positions, (N, 2) or (B, N, 2), may see each other."""
        radius = self.architecture.radius_m
        if radius is None:
            return None
        return perception_mask(coords, self.patch_size[0] * self.gsd_m, radius)

    def encode_seen(
        self,
        x: Mapping[str, Any],
        names: tuple[str, ...] | None = None,
        keep_bands: Tensor | None = None,
        keep_patches: Tensor | None = None,
    ) -> SpectralTokens:
        """Encode some bands at some positions.

        Args:
            x: What `normalize` returned.
            names: Modalities that are seen; None is all of the batch.
            keep_bands: Indices into their bands, int64 (B, K); None is all.
            keep_patches: Indices into the patches, the same for all bands, int64 (B, L).
        """
        names, grid = names or self.names(x), self.grid(x)
        patches = {n: self.patches(x[n]) for n in names}
        if keep_patches is not None:
            patches = {n: take(values, keep_patches, 2) for n, values in patches.items()}
        tokens = torch.cat([self.embed[n](patches[n]) for n in names], dim=1)
        items, attended = len(tokens), self.attended(x, names)
        codes = self.codes(names, grid, self.width, tokens.device).to(tokens.dtype)
        codes = codes.expand(items, -1, -1, -1)
        coords = grid_coordinates(grid, device=tokens.device)
        if keep_bands is not None:
            tokens, attended = take(tokens, keep_bands, 1), attended.gather(1, keep_bands)
            codes = torch.cat([codes[:, :1], take(codes[:, 1:], keep_bands, 1)], dim=1)
        if keep_patches is not None:
            coords = take_tokens(coords, keep_patches)
            codes = torch.cat([codes[:, :, :1], take(codes[:, :, 1:], keep_patches, 2)], dim=2)
        tokens = self._with_class_tokens(tokens) + codes
        has_gaps = any(key(name, "present") in x for name in names)
        keys = torch.cat([torch.ones_like(attended[:, :1]), attended], 1) if has_gaps else None
        tokens = self.transformer(tokens, self.near(coords), keys)
        return SpectralTokens(names=names, grid=grid, tokens=tokens, attended=attended)

    def _with_class_tokens(self, tokens: Tensor) -> Tensor:
        """(B, C, N, E) -> (B, 1 + C, 1 + N, E)."""
        items, bands, patches = tokens.shape[:3]

        def token(name: str, *shape: int) -> Tensor:
            return getattr(self, name).to(tokens.dtype).expand(items, *shape, -1)

        tokens = torch.cat([token("channel_token", 1, patches), tokens], dim=1)
        first = torch.cat([token("class_token", 1, 1), token("position_token", bands, 1)], dim=1)
        return torch.cat([first, tokens], dim=2)

    def encode(
        self,
        x: Mapping[str, Any],
        keep: Mapping[str, Tensor] | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> Features:
        """Run the network; see `Backbone.encode`. No mask token; all modalities keep the same."""
        refuse_replace(replace, type(self).__name__)
        names, kept = self.names(x), None
        if keep is not None:
            kept = keep[names[0]]
            if any(n not in keep or not torch.equal(keep[n], kept) for n in names):
                raise ConfigError(
                    f"{type(self).__name__} sees the same positions in all bands: pass the same "
                    f"indices for {', '.join(names)}."
                )
        encoded = self.encode_seen(x, names, keep_patches=kept)
        coords = grid_coordinates(encoded.grid, device=encoded.tokens.device)
        features = Features()
        counts = self.bands(names)
        parts = encoded.tokens[:, 1:, 1:].split(counts, dim=1)
        shown = encoded.attended.split(counts, dim=1)
        places = coords if kept is None else take_tokens(coords, kept)
        for name, tokens in zip(names, parts, strict=True):
            valid = self.fraction_valid(x, name) > 0
            valid = valid if kept is None else valid.gather(1, kept)
            self._put(features, name, tokens.mean(1), valid, encoded, places)
            if key(name, "dates") in x:
                features.dates[name] = x[key(name, "dates")]
        if len(names) > 1:
            valid = torch.stack([features.token_valid[name] for name in names]).any(0)
            every = torch.cat(parts, dim=1)
            mean = mean_of_valid(every, torch.cat(shown, dim=1).unsqueeze(2))
            self._put(features, "joint", mean, valid, encoded, places)
        return features

    def _put(
        self,
        features: Features,
        name: str,
        tokens: Tensor,
        valid: Tensor,
        encoded: SpectralTokens,
        places: Tensor,
    ) -> None:
        features.tokens[name], features.token_valid[name] = tokens, valid
        features.coords[name], features.grid[name] = places, encoded.grid
        features.cls[name] = encoded.tokens[:, 0, 0]
        is_class = self.architecture.pooling == "class"
        features.pooled[name] = features.cls[name] if is_class else mean_of_valid(tokens, valid)

    # -- reference files --------------------------------------------------------------------

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    ) -> tuple[Self, LoadReport]:
        """Read a state dict of the released code, of its encoder or of its MAE.

        Raises:
            WeightsError: It is none, or of other sizes.
        """
        given = variant.get("modalities", modalities)
        if given is None:
            raise WeightsError(
                "Files of LESS ViT say nothing about bands; pass modalities=… with channels, unit, "
                "statistics and wavelengths_nm."
            )
        flat = {n.removeprefix("encoder."): t for n, t in tensors_of(state).items()}
        if "spatial_cls_token" not in flat:
            raise WeightsError(
                "This is no state dict of LESS ViT: expected 'spatial_cls_token'; found "
                f"{sorted(flat)[:5]}."
            )
        backbone = cls(**{**variant, "modalities": given})
        tensors = blocks_from_reference(flat, "blocks", "norm")
        tensors |= {ours: flat[theirs] for ours, theirs in _TOKENS.items() if theirs in flat}
        used = set()
        for name, modality in backbone.modalities.items():
            group = _group(modality)
            used.add(group)
            for ours, theirs in (("up", "0"), ("down", "2")):
                for kind in ("weight", "bias"):
                    found = flat.get(f"{group}.proj.{theirs}.{kind}")
                    if found is not None:
                        flat_values = found.flatten(1) if found.ndim > 1 else found
                        tensors[f"embed.{name}.{ours}.{kind}"] = flat_values
        report = backbone.load_tensors(tensors)
        missing = tuple(n for n in report.missing if not n.startswith("normalizer."))
        groups = {n.split(".")[0] for n in flat if "patch_embed" in n}
        return backbone, LoadReport(report.matched, missing, tuple(sorted(groups - used)))

    def to_reference(self) -> dict[str, Tensor]:
        """Return the weights as the released encoder's state dict has them."""
        own = self.state_dict()
        written = blocks_to_reference(self.transformer, "blocks", "norm")
        written |= {theirs: own[ours] for ours, theirs in _TOKENS.items()}
        for name, modality in self.modalities.items():
            part = self.embed[name].state_dict()
            up = part["up.weight"].unflatten(1, (1, 1, *self.patch_size))
            down = part["down.weight"].unflatten(1, (-1, 1, 1, 1))
            shaped = {**part, "up.weight": up, "down.weight": down}
            for ours, theirs in (("up", "0"), ("down", "2")):
                for kind in ("weight", "bias"):
                    place = f"{_group(modality)}.proj.{theirs}.{kind}"
                    written.setdefault(place, shaped[f"{ours}.{kind}"])
        return written


def spectral_codes(waves: Tensor, metres: Tensor, width: int) -> Tensor:
    """Return `E(c, n) = (S_ch(wavelength) + S_pos(place)) / 2`, zero parts for class tokens.

    Args:
        waves: Wavelengths in nm, (C,).
        metres: Index of every patch times the side of a pixel in metres, (N, 2), as published.
        width: Length of a code.

    Returns:
        float32 (1 + C, 1 + N, width).
    """
    by_band = sincos_positions(waves.unsqueeze(1), width)
    by_place = sincos_positions(metres, width)
    zero = by_band.new_zeros(1, width)
    bands, places = torch.cat([zero, by_band]), torch.cat([zero, by_place])
    return (bands.unsqueeze(1) + places.unsqueeze(0)) / 2


def take(tokens: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Gather along the bands (1) or the patches (2) of (B, C, N, E) by index, int64 (B, K)."""
    index = indices.unsqueeze(-1).unsqueeze(3 - axis)
    shape = list(tokens.shape)
    shape[axis] = indices.shape[1]
    return tokens.gather(axis, index.expand(shape))


def blocks_from_reference(flat: Mapping[str, Tensor], blocks: str, norm: str) -> dict[str, Tensor]:
    """Return the tensors of a stack of blocks under our names, below `transformer`."""
    found = {}
    for name, tensor in flat.items():
        if name.startswith(f"{norm}."):
            found[f"transformer.{name.replace(norm, 'norm', 1)}"] = tensor
        if not name.startswith(f"{blocks}."):
            continue
        index, rest = name.removeprefix(f"{blocks}.").split(".", 1)
        for ours, theirs in _BLOCK:
            if rest == theirs or rest.startswith(f"{theirs}."):
                place = f"{ours}{rest.removeprefix(theirs)}"
                found[f"transformer.blocks.{index}.{place}"] = tensor
    return found


def blocks_to_reference(transformer: LowRankBlocks, blocks: str, norm: str) -> dict[str, Tensor]:
    """Return the tensors of a stack of blocks under the released code's names."""
    longest = sorted(_BLOCK, key=lambda pair: -len(pair[0]))
    written = {}
    for name, tensor in transformer.state_dict().items():
        if name.startswith("norm."):
            written[name.replace("norm", norm, 1)] = tensor
            continue
        index, rest = name.removeprefix("blocks.").split(".", 1)
        ours, theirs = next(pair for pair in longest if rest.startswith(pair[0]))
        written[f"{blocks}.{index}.{theirs}{rest.removeprefix(ours)}"] = tensor
    return written


def _group(modality: Modality) -> str:
    """Return the patch embedding that the released code uses for a modality."""
    return "radar_patch_embed" if modality.value_unit == "db" else "optical_patch_embed"


def _with_wavelengths(modality: Modality) -> Modality:
    """Return an image with the wavelength of every band.

    Raises:
        ConfigError: It is no image, or a wavelength is not known.
    """
    where = f"LESS: modality {modality.name!r}"
    if modality.kind != "image":
        raise ConfigError(f"{where} is of kind {modality.kind!r}; expected images on one grid.")
    if modality.wavelengths_nm is not None:
        return modality
    found = wavelengths_nm(modality.channels)
    if found is None and set(modality.channels) <= set(_RADAR_NM):
        found = tuple(_RADAR_NM[band] for band in modality.channels)
    if found is None:
        raise ConfigError(
            f"{where} has no wavelengths_nm, and {', '.join(modality.channels[:8])} are no bands "
            "of Sentinel-1 or Sentinel-2. Give the centre of every band in nanometres in the "
            "DataModule (data.init_args.modalities.<name>.wavelengths_nm), or in modalities=…"
        )
    return dataclasses.replace(modality, wavelengths_nm=found)


def _common_pixel(modalities: Mapping[str, Modality]) -> float:
    """Return the side of a pixel in metres.

    Raises:
        ConfigError: It is not known, or differs.
    """
    sizes = {name: m.gsd_m for name, m in modalities.items()}
    found = {*sizes.values()}
    side = found.pop()
    if found or side is None:
        raise ConfigError(
            f"LESS places patches by metres and needs one gsd_m for all modalities; got {sizes}. "
            "Read them with pixels of one size (gsd_m of the modality)."
        )
    return side
