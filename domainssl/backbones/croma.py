"""CROMA's encoders: radar, optical, and a joint encoder in which radar asks optical.

Source: Fuller, Millard, Green, "CROMA: Remote Sensing Representations with Contrastive
Radar-Optical Masked Autoencoders", NeurIPS 2023 (arXiv 2311.00566), section 3, and the released
inference code. Outputs follow the released code for every square image; rectangles, volumes
and other numbers of heads follow from the same formula.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from domainssl.backbones.base import Backbone, Features, LoadReport, common_size, refuse_replace
from domainssl.errors import ConfigError, DataError, WeightsError
from domainssl.modality import Modality, key, present_mask, sides_of, valid_mask
from domainssl.nn.alibi import DistanceBias, alibi_slopes
from domainssl.nn.blocks import FeedForward, Transformer
from domainssl.nn.masking import take_tokens
from domainssl.nn.patching import (
    grid_coordinates,
    grid_of,
    patch_fraction,
    patch_proportions,
    patchify,
)

__all__ = ["PUBLISHED_MODALITIES", "CROMABackbone", "flatten_reference", "reference_name"]

# What the released weights were trained on: SSL4EO-S12 v1.0, S1 GRD in dB and S2 L2A digital
# numbers without offset, with the statistics of that data set.
PUBLISHED_MODALITIES: dict[str, Modality] = {
    "s1": Modality(
        name="s1",
        kind="image",
        channels=("VV", "VH"),
        value_unit="db",
        gsd_m=10.0,
        mean=(-12.54847273, -20.19237134),
        std=(5.25697717, 5.91150917),
    ),
    "s2": Modality(
        name="s2",
        kind="image",
        channels=(
            "B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12",
        ),
        value_unit="dn",
        gsd_m=10.0,
        mean=(
            752.40087073, 884.29673756, 1144.16202635, 1297.47289228, 1624.90992062,
            2194.6423161, 2422.21248945, 2517.76053101, 2581.64687018, 2645.51888987,
            2368.51236873, 1805.06846033,
        ),
        std=(
            1108.02887453, 1155.15170768, 1183.6292542, 1368.11351514, 1370.265037,
            1355.55390699, 1416.51487101, 1474.78900051, 1439.3086061, 1582.28010962,
            1455.52084939, 1343.48379601,
        ),
    ),
}  # fmt: skip


class _Encoder(nn.Module):
    """Linear patch embedding and a transformer."""

    def __init__(self, inputs: int, width: int, depth: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.transformer = Transformer(width, depth, heads, ratio)


class CROMABackbone(Backbone):
    """Encode radar, optical, or both.

    Radar and optical are roles: any two images or volumes on one footprint fill them, such as pet
    and ct. Features are named after the modalities that were given, plus `joint` when both were.
    `pooled` of a sensor is its mean token through a small network (the paper's GAP FFN), that of
    `joint` the plain mean of the joint tokens. Distances that bias attention count in patches;
    where a patch is longer along one axis (thick slices), in the median of its sides in mm.

    Args:
        modalities: Radar and optical, or one of them; images or volumes.
        radar: Name of the modality whose tokens ask (queries of the joint encoder).
        optical: Name of the modality that is asked (keys and values).
        width: Token width.
        depth: Blocks of the optical encoder; radar and joint encoder have half of them.
        heads: Attention heads of all three encoders.
        patch_size: Side of a patch in pixels or voxels, one number or one per axis.
        ffn_ratio: Width of the feed-forward layers over `width`.
        normalization: Form for all modalities, or one per modality.

    Raises:
        ConfigError: No modality is the radar or optical one, or sizes do not fit.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "croma_tiny": {"width": 32, "depth": 2, "heads": 4},
        "croma_base": {"width": 768, "depth": 12, "heads": 16},
        "croma_large": {"width": 1024, "depth": 24, "heads": 16},
    }

    forward_methods: ClassVar[tuple[str, ...]] = ("encode", "encode_sensors", "join")
    slopes: Tensor

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        radar: str = "s1",
        optical: str = "s2",
        width: int = 768,
        depth: int = 12,
        heads: int = 16,
        patch_size: int | tuple[int, ...] = 8,
        ffn_ratio: float = 4,
        normalization: str | dict[str, str] = "mean2std",
    ) -> None:
        super().__init__(modalities, normalization)
        self.radar, self.optical = radar, optical
        self.patch_size = patch_size if isinstance(patch_size, int) else tuple(patch_size)
        unknown = [name for name in self.modalities if name not in (radar, optical)]
        if unknown or radar == optical:
            raise ConfigError(
                f"CROMA takes one radar and one optical modality, here {radar!r} and {optical!r}; "
                f"it cannot use {unknown or [radar]}. Set radar and optical to the names of your "
                "two modalities and leave others out of the DataModule."
            )
        if depth < 2 or depth % 2:
            raise ConfigError(
                f"CROMA: depth {depth} must be even and at least 2: radar and joint encoder have "
                "half of it."
            )
        self.register_buffer("slopes", alibi_slopes(heads), persistent=False)
        for role, name in (("radar", radar), ("optical", optical)):
            if name in self.modalities:
                modality = self.modalities[name]
                if modality.kind not in ("image", "volume"):
                    raise ConfigError(
                        f"CROMA: modality {name!r} is a {modality.kind}; expected images or "
                        "volumes. Choose one date in the DataModule."
                    )
                sides = sides_of(patch_size, modality.spatial_dims, "patch_size")
                inputs = modality.num_channels * math.prod(sides)
                layers = depth // 2 if role == "radar" else depth
                encoder = _Encoder(inputs, width, layers, heads, ffn_ratio)
                self.add_module(f"{role}_encoder", encoder)
                self.add_module(f"{role}_pool", FeedForward(width, ffn_ratio))
                shape = torch.tensor(patch_proportions(sides, modality.steps))
                self.register_buffer(f"{role}_sides", shape, persistent=False)
        self.embed_dim = dict.fromkeys(self.modalities, width)
        if len(self.modalities) == 2:
            self.joint_encoder = Transformer(width, depth // 2, heads, ffn_ratio, cross=True)
            self.embed_dim["joint"] = width

    def _role(self, name: str) -> str:
        return "radar" if name == self.radar else "optical"

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of one sensor's encoder and pooling network."""
        for part in ("encoder", "pool"):
            yield from self.get_submodule(f"{self._role(name)}_{part}").parameters()

    def band_tensors(self, name: str) -> dict[str, str]:
        """Return the patch embedding of a sensor; see `Backbone.band_tensors`."""
        return {f"{self._role(name)}_encoder.embed.weight": "bands first"}

    def tokenize(self, x: Tensor) -> Tensor:
        """Cut a normalised grid into tokens (B, N, C·P), channel-major inside a token."""
        return patchify(x, self.patch_size, channels_first=True)

    def coordinates(self, grid: tuple[int, ...], keep: Tensor | None) -> Tensor:
        """Return token coordinates in patch units, (1, N, D), or (B, K, D) of the kept ones."""
        coords = grid_coordinates(grid, device=self.slopes.device)
        return coords.unsqueeze(0) if keep is None else take_tokens(coords, keep)

    def _proportions(self, name: str) -> Tensor:
        """Return the sides of a modality's patches in units of their median, (D,)."""
        return self.get_buffer(f"{self._role(name)}_sides")

    def encode(
        self,
        x: Mapping[str, Any],
        keep: Mapping[str, Tensor] | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> Features:
        """Run the encoders; see `Backbone.encode`. CROMA has no mask token.

        `joint_self_bias` of the objective is applied by `join`; here the joint encoder's
        self-attention has the bias of its own tokens, which is what the released code computes
        when nothing is masked.
        """
        refuse_replace(replace, type(self).__name__)
        features = self.encode_sensors(x, keep)
        if self.radar in features.tokens and self.optical in features.tokens:
            self._check_footprint(x)
            features = self.join(features)
        return features

    def _check_footprint(self, x: Mapping[str, Any]) -> None:
        """Refuse two sensors that cannot show the same place."""
        names = (self.radar, self.optical)
        sizes = [common_size(x[name], self.modalities[name]) for name in names]
        known = [self.modalities[name] for name in names]
        units = {"mm" if m.spacing_mm else "m" if m.gsd_m else "" for m in known}
        steps = [m.steps for m in known]
        lengths = [
            tuple(n * step for n, step in zip(size, own, strict=True))
            for size, own in zip(sizes, steps, strict=True)
        ]
        differ = any(abs(a - b) > max(s) for a, b, *s in zip(*lengths, *steps, strict=True))
        if differ and len(units) == 1 and "" not in units:
            (unit,) = units
            raise DataError(
                f"{names[0]!r} covers {lengths[0]} {unit} and {names[1]!r} {lengths[1]} {unit} "
                f"(sizes {sizes[0]} and {sizes[1]}); co-registered modalities show the same place. "
                "Cut or resample them to one footprint, or encode each alone."
            )

    def encode_sensors(
        self, x: Mapping[str, Any], keep: Mapping[str, Tensor] | None = None
    ) -> Features:
        """Run the two sensor encoders (eq. 1 of the paper) with 2D-ALiBi."""
        features = Features()
        names = [name for name in (self.radar, self.optical) if name in x]
        for name in names:
            if name not in self.modalities:
                raise DataError(f"CROMA was built without {name!r}; it knows {[*self.modalities]}.")
            kept = keep.get(name) if keep is not None else None
            self._encode_sensor(name, x, kept, features)
        return features

    def _encode_sensor(
        self, name: str, x: Mapping[str, Any], keep: Tensor | None, features: Features
    ) -> None:
        modality, role = self.modalities[name], self._role(name)
        encoder = cast(_Encoder, self.get_submodule(f"{role}_encoder"))
        grid = grid_of(common_size(x[name], modality), self.patch_size, f"batch.{name}")
        tokens = self.tokenize(x[name])
        valid = patch_fraction(valid_mask(x, modality), self.patch_size) > 0
        valid = valid & present_mask(x, name).unsqueeze(1)
        if keep is not None:
            tokens, valid = take_tokens(tokens, keep), valid.gather(1, keep)
        coords = self.coordinates(grid, keep)
        places = coords * self._proportions(name)
        bias = DistanceBias(places, places, self.slopes)
        encoded = encoder.transformer(encoder.embed(tokens), bias)  # (B, K, C·P) -> (B, K, E)
        features.tokens[name] = encoded
        features.pooled[name] = self.get_submodule(f"{role}_pool")(encoded.mean(1))
        features.coords[name] = coords if keep is not None else coords[0]
        features.grid[name] = grid
        features.token_valid[name] = valid
        if key(name, "dates") in x:
            features.dates[name] = x[key(name, "dates")]

    def join(self, features: Features, *, self_bias: str = "2d") -> Features:
        """Return `features` with the joint tokens beside those of the sensors (eq. 2).

        Args:
            features: Features of both sensors.
            self_bias: `2d` biases the joint self-attention by distances among radar tokens, as
                the paper says; `cross` by radar-to-optical distances, as the released
                pretraining code does.
        """
        radar, optical = self.radar, self.optical
        queries = features.coords[radar]
        keys = features.coords[optical]
        queries, keys = (c if c.ndim == 3 else c.unsqueeze(0) for c in (queries, keys))
        if features.grid[radar] != features.grid[optical]:
            keys = _rescale(keys, features.grid[optical], features.grid[radar])
        queries, keys = (c * self._proportions(radar) for c in (queries, keys))
        cross = DistanceBias(queries, keys, self.slopes)
        same = cross if self_bias == "cross" else DistanceBias(queries, queries, self.slopes)
        joint = self.joint_encoder(features.tokens[radar], same, features.tokens[optical], cross)
        return dataclasses.replace(
            features,
            tokens={**features.tokens, "joint": joint},
            pooled={**features.pooled, "joint": joint.mean(1)},
            coords={**features.coords, "joint": features.coords[radar]},
            grid={**features.grid, "joint": features.grid[radar]},
            token_valid={**features.token_valid, "joint": features.token_valid[radar]},
        )

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    ) -> tuple[Self, LoadReport]:
        """Read the released five-group files, torchgeo's flat layout, or pretraining state dicts.

        The statistics are those of the released weights, whatever `modalities` say; bands, order
        and unit of `modalities` are compared with the published ones.
        """
        chosen: Mapping[str, Any] = PUBLISHED_MODALITIES
        arguments = {"normalization": "mean2std", **variant}
        if modalities is not None and "modalities" not in variant:
            chosen = _published(arguments, modalities)
        backbone = cls(**{"modalities": chosen, **arguments})
        if modalities is not None and "modalities" not in variant:
            backbone.check(modalities)
        flat = flatten_reference(state)
        layout = "pretraining" if any(n.startswith("radar_encoder.") for n in flat) else "released"
        renamed: dict[str, Tensor] = {}
        used: set[str] = set()
        for own in backbone.state_dict():
            name = reference_name(own, layout)
            if name in flat:
                renamed[own] = flat[name]
                used.add(name)
        if not renamed:
            raise WeightsError(
                "This is no CROMA weights file: expected the groups s1_encoder, s1_GAP_FFN, "
                "s2_encoder, s2_GAP_FFN, joint_encoder (released and torchgeo layout) or "
                f"radar_encoder, optical_encoder, cross_encoder; found {sorted(flat)[:5]}."
            )
        loaded = backbone.load_tensors(renamed)
        missing = tuple(n for n in loaded.missing if not n.startswith("normalizer."))
        return backbone, LoadReport(
            loaded.matched, missing, tuple(n for n in flat if n not in used)
        )

    @classmethod
    def published_modalities(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality],
    ) -> dict[str, Modality]:
        """Return the bands of SSL4EO-S12 in the roles of the data; see the base class."""
        return _published(variant, modalities)

    def to_reference(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights in the released five-group layout."""
        groups: dict[str, dict[str, Tensor]] = {}
        for own, tensor in self.state_dict().items():
            if not own.startswith("normalizer."):
                group, name = reference_name(own, "released").split(".", 1)
                groups.setdefault(group, {})[name] = tensor
        return groups


def _published(
    variant: Mapping[str, Any], names: Mapping[str, Modality | Mapping[str, Any]]
) -> dict[str, Modality]:
    """Return the published description of the modalities that have a role."""
    roles = {variant.get("radar", "s1"): "s1", variant.get("optical", "s2"): "s2"}
    return {
        name: dataclasses.replace(PUBLISHED_MODALITIES[roles[name]], name=name)
        for name in names
        if name in roles
    }


def _rescale(coords: Tensor, grid: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """Express coordinates of one grid in patch units of another one over the same footprint."""
    ratio = torch.tensor([t / g for t, g in zip(target, grid, strict=True)], device=coords.device)
    return (coords + 0.5) * ratio - 0.5


def flatten_reference(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a reference file under dotted names without wrapper prefixes."""
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": tensor for inner, tensor in value.items()}
        elif isinstance(value, Tensor):
            flat[name] = value
    return {re.sub(r"^(module\.|model\.)+", "", name): tensor for name, tensor in flat.items()}


_GROUPS = {
    "released": {
        "radar_encoder": "s1_encoder",
        "optical_encoder": "s2_encoder",
        "joint_encoder": "joint_encoder",
        "radar_pool": "s1_GAP_FFN",
        "optical_pool": "s2_GAP_FFN",
    },
    "pretraining": {
        "joint_encoder": "cross_encoder",
        "radar_pool": "GAP_FFN_radar",
        "optical_pool": "GAP_FFN_optical",
    },
}


def reference_name(own: str, layout: str) -> str:
    """Translate one of our parameter names.

    Args:
        own: Name in our state dict.
        layout: `released` (also torchgeo's, joined with dots) or `pretraining`.

    Returns:
        The dotted name in the reference's file.
    """
    group, rest = own.split(".", 1)
    published = layout == "released"
    named = _GROUPS[layout].get(group, group)
    if group.endswith("_pool"):
        for ours, theirs in (("norm.", "0."), ("up.", "1."), ("down.", "3.")):
            rest = re.sub(rf"^{re.escape(ours)}", theirs, rest)
        return f"{named}.{rest}"
    ffn = "2" if group == "joint_encoder" else "1"
    rules = (
        (r"^embed\.", "linear_input."),
        (r"^(transformer\.|decoder\.|)norm\.", r"\1norm_out."),
        (r"^(transformer\.|decoder\.|)blocks\.", r"\1layers."),
        (r"\.attention\.qkv\.", ".0.to_qkv." if published else ".0.create_qkv."),
        (r"\.attention\.out\.", ".0.to_out." if published else ".0.out."),
        (r"\.attention\.norm\.", ".0.input_norm."),
        (r"\.cross\.([qkv])\.", r".1.to_\1." if published else r".1.create_\1."),
        (r"\.cross\.out\.", ".1.to_out."),
        (r"\.cross\.norm\.", ".1.input_norm."),
        (r"\.feed_forward\.norm\.", f".{ffn}.input_norm."),
        (r"\.feed_forward\.up\.", f".{ffn}.net.0."),
        (r"\.feed_forward\.down\.", f".{ffn}.net.3." if published else f".{ffn}.net.2."),
    )
    for pattern, replacement in rules:
        rest = re.sub(pattern, replacement, rest)
    return f"{named}.{rest}"
