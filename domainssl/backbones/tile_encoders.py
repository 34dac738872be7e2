"""Published encoders of pathology tiles, as timm builds them, by name and from a local file.

A record says how timm builds the model and what it takes: constructor arguments, pooling, mean and
deviation, and microns per pixel. Loading is strict. No weights are part of this library; most of
them are gated and not for commercial use.

Source: the model cards of the encoders; the table of docs/data/tile_encoders.md.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from domainssl.backbones.base import Backbone, Features, LoadReport, refuse_replace
from domainssl.backbones.vit_files import tensors_of
from domainssl.errors import ConfigError, DataError, WeightsError, nearest
from domainssl.modality import Modality, as_modalities, present_mask, valid_mask
from domainssl.nn.patching import grid_coordinates, patch_fraction

__all__ = ["NOT_LOADABLE", "TILE_ENCODERS", "TileEncoderBackbone", "TileEncoderSpec"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
_MPP_TOLERANCE = 0.1
_SWIGLU = {"mlp_layer": "swiglu_packed", "act_layer": "silu"}


@dataclass(frozen=True, kw_only=True)
class TileEncoderSpec:
    """How timm builds an encoder, and what it takes.

    Attributes:
        model: Name of the architecture in timm.
        arguments: Arguments of `timm.create_model`; layers by the names of this file.
        dim: Width of the pooled feature.
        pooling: Class token, or class token and mean patch token side by side, or the mean of a
            map.
        size: Side of the input in pixels.
        mpp_um: Microns per pixel of the tiles it was trained on.
        mean: Per colour, of values in [0, 1].
        std: Likewise.
        ignored: Beginnings of names in published files that are not part of the encoder.
    """

    model: str
    arguments: Mapping[str, Any]
    dim: int
    pooling: Literal["class", "class_mean", "map"] = "class"
    size: int = 224
    mpp_um: float = 0.5
    mean: tuple[float, ...] = _IMAGENET[0]
    std: tuple[float, ...] = _IMAGENET[1]
    ignored: tuple[str, ...] = field(default=())

    def modality(self, name: str) -> Modality:
        """Return what the encoder takes, under a key."""
        return Modality(
            name=name,
            kind="image",
            channels=("red", "green", "blue"),
            value_unit="rgb8",
            size=(self.size, self.size),
            mpp_um=self.mpp_um,
            mean=tuple(255 * value for value in self.mean),
            std=tuple(255 * value for value in self.std),
            valid_range=(0.0, 255.0),
        )


def _vit(model: str, dim: int, **more: Any) -> TileEncoderSpec:
    fields = ("pooling", "mean", "std")
    own = {name: more.pop(name) for name in fields if name in more}
    return TileEncoderSpec(model=model, arguments={"num_classes": 0, **more}, dim=dim, **own)


TILE_ENCODERS: dict[str, TileEncoderSpec] = {
    "uni": _vit("vit_large_patch16_224", 1024, init_values=1e-5, dynamic_img_size=True),
    "uni2_h": _vit(
        "vit_giant_patch14_224", 1536, img_size=224, patch_size=14, depth=24, num_heads=24,
        embed_dim=1536, mlp_ratio=5.33334, init_values=1e-5, reg_tokens=8, no_embed_class=True,
        dynamic_img_size=True, **_SWIGLU,
    ),
    "virchow": _vit(
        "vit_huge_patch14_224", 2560, pooling="class_mean", img_size=224, mlp_ratio=5.3375,
        init_values=1e-5, dynamic_img_size=True, **_SWIGLU,
    ),
    "virchow2": _vit(
        "vit_huge_patch14_224", 2560, pooling="class_mean", img_size=224, mlp_ratio=5.3375,
        init_values=1e-5, reg_tokens=4, dynamic_img_size=True, **_SWIGLU,
    ),
    "phikon": _vit("vit_base_patch16_224", 768),
    "phikon_v2": _vit("vit_large_patch16_224", 1024, init_values=1.0),
    "prov_gigapath": _vit(
        "vit_giant_patch14_dinov2", 1536, img_size=224, patch_size=16, embed_dim=1536, depth=40,
        num_heads=24, mlp_ratio=5.33334, init_values=1e-5,
    ),
    "h_optimus_0": _vit(
        "vit_giant_patch14_reg4_dinov2", 1536, img_size=224, init_values=1e-5,
        mean=_OPTIMUS[0], std=_OPTIMUS[1],
    ),
    "h_optimus_1": _vit(
        "vit_giant_patch14_reg4_dinov2", 1536, img_size=224, init_values=1e-5,
        mean=_OPTIMUS[0], std=_OPTIMUS[1],
    ),
    "resnet50_truncated": TileEncoderSpec(
        model="resnet50", arguments={"features_only": True, "out_indices": (3,)}, dim=1024,
        pooling="map", size=256, ignored=("layer4.", "fc."),
    ),
}  # fmt: skip
# Encoders that timm cannot build; their features are read as bags.
NOT_LOADABLE: dict[str, str] = {
    "conch": "its vision-language model is built by code of its own",
    "conch_v15": "its vision-language model is built by code of its own",
    "ctranspath": "its Swin-T has a convolutional stem that timm's does not have",
    "h0_mini": "its construction in timm is not public",
    "hibou_l": "it is published in the layout of transformers with code of its own",
}


class TileEncoderBackbone(Backbone):
    """Encode tiles of stained tissue with a published encoder.

    Args:
        modalities: One image of 8-bit colours; mean and deviation are the encoder's own.
        encoder: Name in `TILE_ENCODERS`.
        changes: Arguments of timm's constructor that differ from the record's, such as
            `{"depth": 2}`.
        any_mpp: Accept tiles of another resolution than the encoder was trained on.

    Raises:
        ConfigError: There is no such encoder, or the modality is no image of colours.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {n: {"encoder": n} for n in TILE_ENCODERS}
    not_loadable: ClassVar[Mapping[str, str]] = NOT_LOADABLE
    records: ClassVar[Mapping[str, TileEncoderSpec]] = TILE_ENCODERS
    usual: ClassVar[str] = "he"  # name of the modality where the data have not said theirs

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        encoder: str = "uni",
        changes: dict[str, Any] | None = None,
        any_mpp: bool = False,
    ) -> None:
        if encoder not in self.records:
            reason = self.not_loadable.get(encoder)
            hint = nearest(encoder, self.records)
            raise ConfigError(
                f"encoder {encoder!r} is not one of {', '.join(self.records)}."
                f"{hint if reason is None else f' It cannot be loaded: {reason}.'}"
            )
        spec = self.records[encoder]
        known = as_modalities(modalities)
        if len(known) != 1 or next(iter(known.values())).num_channels != 3:
            raise ConfigError(
                f"{encoder}: the data have {[*known]}; expected one image of three colours, such "
                f"as {self.usual}."
            )
        (name,) = known
        super().__init__({name: spec.modality(name)}, "zscore")
        self.spec, self.encoder = spec, encoder
        self.name, self.any_mpp = name, any_mpp
        built: Any = _build(spec, changes or {})
        self.model: Any = built
        width = spec.dim if spec.pooling == "map" else int(built.num_features)
        self.embed_dim = {name: 2 * width if spec.pooling == "class_mean" else width}

    @property
    def modality(self) -> Modality:
        """What goes in."""
        return self.modalities[self.name]

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield all parameters: there is one modality."""
        yield from self.parameters()

    def encode(
        self,
        x: Mapping[str, Any],
        keep: Mapping[str, Tensor] | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> Features:
        """Run the network on whole tiles; see `Backbone.encode`."""
        refuse_replace(replace, type(self).__name__)
        if keep is not None:
            raise ConfigError(f"{type(self).__name__} encodes whole tiles; leave out keep.")
        name, values = self.name, x[self.name]
        size = tuple(values.shape[-2:])
        if self.spec.pooling == "map":
            maps: Tensor = self.model(values)[0]
            grid = tuple(maps.shape[-2:])
            tokens, cls = maps.flatten(2).transpose(1, 2), None
            pooled = maps.mean((2, 3))
        else:
            patch = tuple(self.model.patch_embed.patch_size)
            if any(side % p for side, p in zip(size, patch, strict=True)):
                raise DataError(
                    f"batch.{name}: tiles of {size} are not made of patches of {patch}; cut or "
                    f"resize them to {self.spec.size} pixels."
                )
            grid = tuple(side // p for side, p in zip(size, patch, strict=True))
            out: Tensor = self.model.forward_features(values)
            tokens, cls = out[:, -math.prod(grid) :], out[:, 0]
            pooled = cls
            if self.spec.pooling == "class_mean":
                pooled = torch.cat([cls, tokens.mean(1)], dim=-1)
        sides = tuple(side // n for side, n in zip(size, grid, strict=True))
        valid = patch_fraction(valid_mask(x, self.modality), sides) > 0
        return Features(
            tokens={name: tokens},
            pooled={name: pooled},
            coords={name: grid_coordinates(grid, device=values.device)},
            grid={name: grid},
            token_valid={name: valid & present_mask(x, name).unsqueeze(1)},
            cls={} if cls is None else {name: cls},
        )

    def check(self, modalities: Mapping[str, Modality | Mapping[str, Any]]) -> None:
        """Compare the data with what the encoder takes, the resolution too.

        Raises:
            WeightsError: Channels, unit or kind differ, or microns per pixel by more than a tenth.
        """
        super().check(modalities)
        found = as_modalities(modalities)[self.name].mpp_um
        wanted = self.spec.mpp_um
        if found is not None and not self.any_mpp and abs(found / wanted - 1) > _MPP_TOLERANCE:
            raise WeightsError(
                f"{self.name}: tiles of {found:g} um per pixel, the encoder was trained on "
                f"{wanted:g}. Cut tiles at {wanted:g}, or accept it with "
                "arguments={'any_mpp': True}."
            )

    def band_tensors(self, name: str) -> dict[str, str]:
        """Refuse: the encoders take red, green and blue."""
        raise self.no_bands(name, f"{self.encoder} takes red, green and blue")

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    ) -> tuple[Self, LoadReport]:
        """Read a file with timm's names, strictly: every tensor of both sides has to match.

        Raises:
            WeightsError: Tensors are missing or left over, or the data do not fit.
        """
        spec = cls.records[str(variant["encoder"])]
        given = variant.get("modalities", modalities) or {cls.usual: spec.modality(cls.usual)}
        backbone = cls(**{**variant, "modalities": given})
        backbone.check(given)
        flat = {n: t for n, t in tensors_of(state).items() if not n.startswith(spec.ignored)}
        flat = backbone.timm_names(flat)
        report = backbone.load_tensors({f"model.{name}": tensor for name, tensor in flat.items()})
        missing = tuple(n for n in report.missing if not n.startswith("normalizer."))
        if report.unexpected or missing:
            raise WeightsError(
                f"This is no file of {variant['encoder']!r} with timm's names: "
                f"{LoadReport(report.matched, missing, report.unexpected)}."
            )
        return backbone, LoadReport(report.matched, missing, report.unexpected)

    def timm_names(self, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a file under timm's names; the base reads no others."""
        return dict(flat)


def _build(spec: TileEncoderSpec, changes: Mapping[str, Any]) -> nn.Module:
    """Build the model as timm does, without weights."""
    timm: Any = importlib.import_module("timm")
    layers = {"swiglu_packed": timm.layers.SwiGLUPacked, "silu": nn.SiLU}
    given = {
        name: layers.get(value, value) if isinstance(value, str) else value
        for name, value in {**spec.arguments, **changes}.items()
    }
    model: nn.Module = timm.create_model(spec.model, pretrained=False, **given)
    return model
