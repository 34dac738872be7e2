"""Crops, backbone and teacher of DINO, iBOT and SimDINO: what a configuration says about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from domainssl.backbones.bands import BandPolicy
from domainssl.backbones.base import Backbone
from domainssl.backbones.encoders.backbone import EncoderBackbone, EncoderSizes
from domainssl.backbones.registry import load_initial
from domainssl.backbones.vit import Positions, ViTArchitecture, ViTBackbone
from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import Modality, sides_of
from domainssl.nn.positions import PositionResizing
from domainssl.nn.views import Views
from domainssl.options import as_dataclass, named_sizes
from domainssl.training.optimization import Optimization

__all__ = [
    "PUBLISHED",
    "Crops",
    "StudentArchitecture",
    "StudentEncoding",
    "make_student",
    "published_crops",
]

# DINO's and SimDINO's ViTs: 5e-4 per 256 items, 10 of 100 epochs warm up, the last rate is 1e-6.
PUBLISHED = Optimization(
    lr=5e-4, weight_decay=0.04, final_weight_decay=0.4, betas=(0.9, 0.999), warmup_fraction=0.1,
    warmup_start="zero", final_lr_fraction=2e-3, decay_rule="vectors", clip=3.0, clip_by="tensor",
)  # fmt: skip

Size = Literal["tiny", "small", "base", "large", "huge"]
_FIELDS = ("first", "second", "local")
_LARGE, _SMALL = (0.4, 1.0), (0.05, 0.4)


@dataclass(frozen=True, kw_only=True)
class StudentArchitecture:
    """Explicit sizes over the named ones; None keeps the named value.

    Attributes:
        width: Token width.
        depth: Blocks.
        heads: Attention heads.
        hidden: Width of the feed-forward layers; None is four times the width.
        drop_path: Share of items that skip a branch of the student's last block, less in those
            before; None is 0. Of `vit` alone.
    """

    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    hidden: int | None = None
    drop_path: float | None = None


SIZES: dict[str, StudentArchitecture] = {
    "tiny": StudentArchitecture(width=48, depth=2, heads=4),
    "small": StudentArchitecture(width=384, depth=12, heads=6),
    "base": StudentArchitecture(width=768, depth=12, heads=12),
    "large": StudentArchitecture(width=1024, depth=24, heads=16),
    "huge": StudentArchitecture(width=1280, depth=32, heads=16),
}


@dataclass(frozen=True, kw_only=True)
class StudentEncoding:
    """What the backbone is built from.

    Attributes:
        encoder: `vit`, or an encoder of `EncoderBackbone` such as `transformer` or `resnet50`,
            which has no mask token and so no masked patches.
        size: Named size of `vit` and `transformer`.
        architecture: Explicit sizes over the named one.
        patch_size: Side of a patch in pixels or voxels, one number or one per axis.
        positions: `learned`, a table for the size of the large crops, or `sincos`. Of `vit` alone.
        resizing: How a learned table is fitted to small crops; see `nn.positions`.
        normalization: Form of the modality.
        weights: Start student and teacher from this export, checkpoint or published file.
        bands: Where the bands differ from those of the weights: `strict` refuses, `subset` keeps
            the weights of the bands that are there, `average` gives new ones averaged weights.
    """

    encoder: str = "vit"
    size: Size = "small"
    architecture: StudentArchitecture = field(default_factory=StudentArchitecture)
    patch_size: int | tuple[int, ...] = 16
    positions: Positions = "learned"
    resizing: PositionResizing = "offset"
    normalization: str | dict[str, str] = "mean2std"
    weights: str | None = None
    bands: BandPolicy = "strict"


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Two large crops, which the teacher sees, and small ones.

    Attributes:
        global_size: Size of the large crops, one number or one per axis; None is that of the
            window.
        local_size: Size of the small ones; None is half of the large, in whole patches.
        local_count: Number of the small ones.
        first: How the first large crop is drawn; None takes `published_crops`.
        second: How the second one is drawn.
        local: How the small ones are drawn.

    Raises:
        ConfigError: There are less than no small crops.
    """

    global_size: int | tuple[int, ...] | None = None
    local_size: int | tuple[int, ...] | None = None
    local_count: int = 8
    first: Views | None = None
    second: Views | None = None
    local: Views | None = None

    def __post_init__(self) -> None:
        if self.local_count < 0:
            raise ConfigError(
                f"model.init_args.crops.local_count: got {self.local_count}, expected 0 or more."
            )
        for name in _FIELDS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_dataclass(Views, getattr(self, name)))

    def fitted(
        self, modality: Modality, context_size: int | tuple[int, ...], encoding: StudentEncoding
    ) -> Crops:
        """Return the crops with a size per axis and every kind of change filled in.

        Raises:
            ConfigError: The modality has no crops, or sizes are not made of whole patches.
        """
        axes, where = modality.spatial_dims, "model.init_args.crops"
        if axes == 0:
            raise ConfigError(
                f"modality {modality.name!r} is of kind {modality.kind!r}; crops are cut from "
                "images, series and volumes."
            )
        given = context_size if self.global_size is None else self.global_size
        large = sides_of(given, axes, f"{where}.global_size")
        patch = (1,) * axes
        if encoding.encoder in ("vit", "transformer"):
            patch = sides_of(encoding.patch_size, axes, "model.init_args.encoding.patch_size")
        small = tuple(max(p, side // 2 // p * p) for side, p in zip(large, patch, strict=True))
        if self.local_size is not None:
            small = sides_of(self.local_size, axes, f"{where}.local_size")
        for name, size in (("global_size", large), ("local_size", small)):
            if any(side % p for side, p in zip(size, patch, strict=True)):
                raise ConfigError(
                    f"{where}.{name}: got {size}, no multiple of the patches of {patch}."
                )
        usual = dict(zip(_FIELDS, published_crops(modality), strict=True))
        chosen: dict[str, Any] = {name: getattr(self, name) or usual[name] for name in _FIELDS}
        for views in chosen.values():
            views.flips(axes)
        return dataclasses.replace(self, global_size=large, local_size=small, **chosen)

    @property
    def large(self) -> tuple[int, ...]:
        """Size of a large crop."""
        assert isinstance(self.global_size, tuple)
        return self.global_size

    @property
    def small(self) -> tuple[int, ...]:
        """Size of a small crop."""
        assert isinstance(self.local_size, tuple)
        return self.local_size

    def views(self, which: str) -> Views:
        """Return how crops are drawn: `first`, `second` or `local`."""
        found = getattr(self, which)
        assert isinstance(found, Views)
        return found

    def plan(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return kind and size of every crop, the large ones first."""
        return [
            ("first", self.large),
            ("second", self.large),
            *[("local", self.small)] * self.local_count,
        ]


def published_crops(modality: Modality) -> tuple[Views, Views, Views]:
    """Return how SSL4EO's DINO draws the three kinds of crops of such a modality.

    Volumes have no published counterpart; their values change by gamma, blur, brightness and
    contrast, and never by colour.
    """
    color: dict[str, Any]
    if modality.value_unit in ("dn", "reflectance", "rgb8"):
        color = {"color_probability": 0.8, "grey_probability": 0.2}
    elif modality.value_unit in ("db", "linear"):
        color = {"grey_probability": 0.2}
    elif modality.spatial_dims == 3:
        color = {"color_probability": 0.5, "brightness": 0.1, "contrast": 0.1}
        color |= {"gamma_probability": 0.8}
    else:
        return Views(crop_area=_LARGE), Views(crop_area=_LARGE), Views(crop_area=_SMALL)
    if modality.spatial_dims == 2 and modality.value_unit in ("dn", "reflectance", "db", "linear"):
        color["flip"] = (0.0, 0.5)  # left and right alone
    inverts = 0.2 if modality.value_unit in ("dn", "reflectance", "rgb8") else 0.0
    return (
        Views(crop_area=_LARGE, blur_probability=1.0, **color),
        Views(crop_area=_LARGE, blur_probability=0.1, solarize_probability=inverts, **color),
        Views(crop_area=_SMALL, blur_probability=0.5, **color),
    )


def make_student(
    known: Mapping[str, Modality], encoding: StudentEncoding, crops: Crops, *, has_masks: bool
) -> Backbone:
    """Build the student's backbone, or load it.

    Args:
        known: The one modality.
        encoding: What to build.
        crops: Their sizes, filled in.
        has_masks: Patches are hidden from the student, so that it needs a mask token.

    Raises:
        ConfigError: The encoder cannot hide patches, or sizes do not fit.
        WeightsError: The weights do not fit.
    """
    sizes = named_sizes(SIZES, encoding.size, encoding.architecture, "encoding")
    if encoding.encoder != "vit":
        if has_masks:
            raise ConfigError(
                f"model.init_args.encoding.encoder: {encoding.encoder!r} cannot hide patches from "
                "the student. Use encoder: vit, or give patches no weight (loss_weights.patch: 0)."
            )
        return _convolutional(known, encoding, sizes, crops)
    own = {**vars(sizes), "drop_path": sizes.drop_path or 0.0}
    arguments: dict[str, Any] = {
        "architecture": ViTArchitecture(
            **own, positions=encoding.positions, resizing=encoding.resizing,
            mask_token=has_masks, pooling="class",
        ),
        "patch_size": encoding.patch_size,
        "image_size": crops.large,
        "normalization": encoding.normalization,
    }  # fmt: skip
    if encoding.weights is None:
        return ViTBackbone(known, **arguments)
    loaded, _ = load_initial(
        ViTBackbone, encoding.weights, f"vit_{encoding.size}",
        modalities=known, arguments=arguments, same=("modalities",), bands=encoding.bands,
    )  # fmt: skip
    if has_masks and loaded.mask_token is None:
        raise WeightsError(
            f"model.init_args.encoding.weights: {encoding.weights!r} holds a ViTBackbone without "
            "a mask token, but patches are hidden from the student. Give patches no weight "
            "(loss_weights.patch: 0), or start from weights with a mask token."
        )
    return loaded


def _one_number(patch_size: int | tuple[int, ...]) -> int:
    if isinstance(patch_size, int):
        return patch_size
    raise ConfigError(
        f"model.init_args.encoding.patch_size: got {patch_size!r}; sides per axis need "
        "encoder: vit."
    )


def _convolutional(
    known: Mapping[str, Modality],
    encoding: StudentEncoding,
    sizes: StudentArchitecture,
    crops: Crops,
) -> EncoderBackbone:
    """Build timm's encoders and the small transformer."""
    if sizes.drop_path:
        raise ConfigError(
            f"model.init_args.encoding.architecture.drop_path: got {sizes.drop_path!r}, but "
            f"{encoding.encoder!r} has no branches that are dropped. Set it to null, or use "
            "encoder: vit."
        )
    unused = ("hidden", "drop_path")
    wanted: dict[str, Any] = {n: v for n, v in vars(sizes).items() if n not in unused}
    arguments: dict[str, Any] = {
        "encoder": encoding.encoder,
        "sizes": EncoderSizes(**wanted, patch_size=_one_number(encoding.patch_size)),
        "image_size": max(crops.large),
    }
    if encoding.weights is None:
        return EncoderBackbone(known, **arguments, normalization=encoding.normalization)
    names = [n for n, v in EncoderBackbone.variants.items() if v["encoder"] == encoding.encoder]
    loaded, _ = load_initial(
        EncoderBackbone, encoding.weights, names[-1] if names else None,
        modalities=known, arguments=arguments, bands=encoding.bands,
    )  # fmt: skip
    return loaded
