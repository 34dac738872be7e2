"""One encoder per modality: timm ResNets and ViTs, or a small transformer of our own.

Methods that compare one vector per item (DeCUR, SimCLR, CLIP, Barlow Twins, VICReg) train these.
Nothing is shared between modalities, except deformable attention where it is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from domainssl.backbones.base import Backbone, Features, LoadReport, common_size, refuse_replace
from domainssl.backbones.encoders.files import (
    EncoderFile,
    plain_names,
    published_modality,
    read_encoder_file,
)
from domainssl.backbones.encoders.nets import Encoder, deformable_blocks, make_encoder
from domainssl.backbones.encoders.residual import RESENC_L
from domainssl.backbones.encoders.swin import SwinArchitecture
from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import Modality, key, present_mask, valid_mask
from domainssl.nn.masking import mean_of_valid
from domainssl.nn.norm import counted_rows
from domainssl.nn.normalization import Form
from domainssl.nn.patching import grid_coordinates
from domainssl.options import as_dataclass

__all__ = ["DeformableAttentionUse", "EncoderBackbone", "EncoderSizes"]

logger = logging.getLogger(__name__)

DeformableAttentionUse = Literal["none", "shared", "per_modality"]


@dataclass(frozen=True, kw_only=True)
class EncoderSizes:
    """Sizes of encoders whose name does not settle them; timm's bring their own.

    Attributes:
        width: `transformer`: token width.
        depth: `transformer`: blocks.
        heads: `transformer`: attention heads.
        patch_size: `transformer`: side of a patch in pixels or voxels, one number or one per axis.
        features: `resenc`: channels of every stage; each stage but the first halves the grid.
        blocks: `resenc`: residual blocks of every stage. Both defaults are nnssl's ResEnc-L.
        widen: `monai:resnet…`: factor on the channels of every stage.
        swin: `monai:swin`: its sizes, see `SwinArchitecture`.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch_size: int | tuple[int, ...] = 16
    features: tuple[int, ...] = RESENC_L.features
    blocks: tuple[int, ...] = RESENC_L.blocks
    widen: float = 1.0
    swin: SwinArchitecture = field(default_factory=SwinArchitecture)

    def __post_init__(self) -> None:
        for name in ("features", "blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "swin", as_dataclass(SwinArchitecture, self.swin))


class EncoderBackbone(Backbone):
    """Encode every modality by itself; `pooled` is one vector per item.

    ================  ==============================  =======================  ================
    encoder           tokens                          pooled                   kinds
    ================  ==============================  =======================  ================
    timm ResNet       last map                        its mean                 images, series
    timm ViT          patch tokens after the norm     class token              images, series
    transformer       patch tokens after the norm     mean of valid tokens     all three
    resenc            last map                        its mean                 all three
    monai:resnet18    last map (10 to 200 layers)     its mean                 all three
    monai:swin        last map, normalised            its mean                 volumes
    ================  ==============================  =======================  ================

    Series are encoded date by date: tokens of all dates, pooled the mean over real dates.

    Args:
        modalities: Images, series or volumes.
        encoder: One of the names above, or a timm name such as `resnet50` or
            `vit_small_patch16_224`; one for all modalities or one per modality.
        sizes: Sizes of encoders whose name does not settle them.
        image_size: Side that position tables are made for (ViTs, deformable attention).
        deformable_attention: Residual deformable attention behind the last two stages of
            ResNets; `shared` is one pair of blocks for all modalities.
        normalization: Form for all modalities, or one per modality.

    Raises:
        ConfigError: A modality or a combination cannot be used.
    """

    forward_methods: ClassVar[tuple[str, ...]] = ("encode", "encode_pyramid")
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "decur_resnet50": {"encoder": "resnet50"},
        "decur_resnet50_rda": {
            "encoder": "resnet50",
            "deformable_attention": "shared",
            "normalization": "mean2std8",
        },
        "decur_vit_small": {"encoder": "vit_small_patch16_224", "normalization": "mean2std8"},
        "csip_resnet18": {"encoder": "resnet18"},
        "ssl4eo_resnet18": {"encoder": "resnet18"},
        "ssl4eo_resnet50": {"encoder": "resnet50"},
        "ssl4eo_vit_small": {"encoder": "vit_small_patch16_224"},
        "ssl4eo_vit_base": {"encoder": "vit_base_patch16_224"},
        "ssl4eo_vit_large": {"encoder": "vit_large_patch16_224"},
        "ssl4eo_vit_huge": {"encoder": "vit_huge_patch14_224"},
        "monai_resnet10": {"encoder": "monai:resnet10"},
        "monai_resnet18": {"encoder": "monai:resnet18"},
        "monai_resnet34": {"encoder": "monai:resnet34"},
        "monai_resnet50": {"encoder": "monai:resnet50"},
        "resenc_l": {"encoder": "resenc"},
    }

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        encoder: str | dict[str, str] = "resnet50",
        sizes: EncoderSizes = EncoderSizes(),
        image_size: int = 224,
        deformable_attention: DeformableAttentionUse = "none",
        normalization: str | dict[str, str] = "mean2std",
    ) -> None:
        super().__init__(modalities, normalization)
        sizes = as_dataclass(EncoderSizes, sizes)
        if isinstance(encoder, dict) and set(encoder) != set(self.modalities):
            raise ConfigError(
                f"encoder: got {sorted(encoder)}, expected one name for all modalities or one for "
                f"each of {sorted(self.modalities)}."
            )
        self.encoders = nn.ModuleDict()
        for name, modality in self.modalities.items():
            chosen = encoder[name] if isinstance(encoder, dict) else encoder
            self.encoders[name] = make_encoder(chosen, modality, vars(sizes), image_size)
        self.embed_dim = {name: self._encoder(name).width for name in self.modalities}
        self.attention = nn.ModuleDict()
        if deformable_attention == "none":
            return
        owners = list(self.modalities) if deformable_attention == "per_modality" else ["shared"]
        for owner in owners:
            nets = [self._encoder(n) for n in self.modalities if owner in (n, "shared")]
            self.attention[owner] = deformable_blocks(nets, image_size)

    def _encoder(self, name: str) -> Encoder:
        encoder = self.encoders[name]
        assert isinstance(encoder, Encoder)
        return encoder

    def _attention(self, name: str) -> nn.ModuleDict | None:
        owner = "shared" if "shared" in self.attention else name
        found = dict(self.attention.items()).get(owner)
        assert found is None or isinstance(found, nn.ModuleDict)
        return found

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of a modality's encoder, and of its own deformable attention."""
        yield from self.encoders[name].parameters()
        if name in self.attention:
            yield from self.attention[name].parameters()

    def band_tensors(self, name: str) -> dict[str, str]:
        """Return the first layer of a modality's encoder; see `Backbone.band_tensors`."""
        own = self._encoder(name).band_tensors
        return {f"encoders.{name}.{tensor}": layout for tensor, layout in own.items()}

    def encode(
        self,
        x: Mapping[str, Any],
        keep: Mapping[str, Tensor] | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> Features:
        """Encode the modalities that are there; see `Backbone.encode`.

        Raises:
            ConfigError: `keep` or `replace` is given: encoders here see whole images.
        """
        refuse_replace(replace, type(self).__name__)
        if keep is not None:
            raise ConfigError(
                f"{type(self).__name__} encodes whole images and cannot leave tokens out (keep)."
            )
        features = Features()
        for name in self.modalities:
            if name in x:
                self._encode_one(name, x, features)
        return features

    def _encode_one(self, name: str, x: Mapping[str, Any], features: Features) -> None:
        modality = self.modalities[name]
        values, valid = x[name], valid_mask(x, modality)
        rows, frames = present_mask(x, name), None
        is_masked = key(name, "present") in x
        if modality.kind == "series":
            frames = x.get(key(name, "frames"))
            if frames is None:
                frames = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
            is_masked = is_masked or key(name, "frames") in x
            rows = (rows.unsqueeze(1) & frames).flatten()
            values, valid = values.flatten(0, 1), valid.flatten(0, 1)
        with counted_rows(rows if is_masked else None):
            out = self._encoder(name)(values, valid, self._attention(name))
        seen = out.token_valid & rows.unsqueeze(1)
        tokens, pooled, cls, grid = out.tokens, out.pooled, out.cls, out.grid
        if frames is not None:
            grid = (frames.shape[1], *grid)
            tokens, seen = (t.unflatten(0, frames.shape).flatten(1, 2) for t in (tokens, seen))
            pooled = mean_of_valid(pooled.unflatten(0, frames.shape), frames)
            cls = None if cls is None else mean_of_valid(cls.unflatten(0, frames.shape), frames)
        features.tokens[name], features.pooled[name] = tokens, pooled
        features.token_valid[name], features.grid[name] = seen, grid
        features.coords[name] = grid_coordinates(grid, device=tokens.device)
        if cls is not None:
            features.cls[name] = cls
        if key(name, "dates") in x:
            features.dates[name] = x[key(name, "dates")]

    def stages(self, batch: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Return the maps of all stages for dense heads, (B, E_i, *S_i), coarser each time.

        ResNets have four stages, transformers one.

        Raises:
            ConfigError: A modality is a series; choose one date.
        """
        return {
            name: self._encoder(name).stages(values, valid, self._attention(name))
            for name, values, valid in self._single(self.watched(batch))
        }

    def feature_pyramid(self, batch: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Return the maps that decoders take, finest first, (B, E_i, *S_i) per name.

        =============  ==================================================================
        ResNets        the stem at half resolution, then the four stages
        `resenc`       every stage, the first at full resolution
        `monai:swin`   five maps at 1/2 to 1/32, normalised, as MONAI's SwinUNETR has them
        `transformer`  four hidden states on one grid, as MONAI's UNETR takes them
        others         one map
        =============  ==================================================================

        Raises:
            ConfigError: A modality is a series; choose one date.
        """
        return self.encode_pyramid(self.watched(batch))

    def encode_pyramid(self, x: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Return `feature_pyramid` of a normalised batch; absent items leave no statistics."""
        found = {}
        for name, values, valid in self._single(x):
            rows = present_mask(x, name) if key(name, "present") in x else None
            with counted_rows(rows):
                found[name] = self._encoder(name).pyramid(values, valid)
        return found

    def levels(self, name: str) -> tuple[tuple[int, int], ...]:
        """Return channels and stride of every map of a modality's pyramid, finest first.

        Empty for encoders whose maps all have one size.
        """
        return self._encoder(name).levels

    def _single(self, x: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, normalised values and validity of the modalities that are there."""
        for name, modality in self.modalities.items():
            if name not in x:
                continue
            if modality.kind == "series":
                raise ConfigError(f"Maps of stages: {name!r} is a series; choose one date of it.")
            common_size(x[name], modality)
            yield name, x[name], valid_mask(x, modality)

    # -- reference files --------------------------------------------------------------------

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    ) -> tuple[Self, LoadReport]:
        """Read DeCUR's files, SSL4EO's MoCo, DINO and MAE layouts, 3D ResNets and nnssl's ResEnc.

        Bands, units and statistics are the published ones; `modalities` choose what to take from
        a joint file, and are compared. Files of other data (3 bands, volumes) take `modalities`
        as given.
        """
        file = read_encoder_file(state)
        chosen = _choose(file, modalities)
        wanted = variant.get("normalization")
        forms = {name: _published_form(m, wanted) for name, (m, _) in chosen.items()}
        arguments = {
            "modalities": {name: m for name, (m, _) in chosen.items()},
            **variant,
            "normalization": {name: form for name, form in forms.items() if form is not None},
        }
        backbone = cls(**arguments)
        if modalities is not None:
            backbone.check({n: m for n, m in modalities.items() if n in backbone.modalities})
        renamed: dict[str, Tensor] = {}
        for name, (_, part) in chosen.items():
            renamed |= {f"encoders.{name}.net.{n}": t for n, t in file.encoders[part].items()}
        renamed |= _attention_tensors(file, backbone, {n: p for n, (_, p) in chosen.items()})
        report = backbone.load_tensors(renamed)
        missing = tuple(n for n in report.missing if not n.startswith("normalizer."))
        if report.unexpected:
            raise WeightsError(
                f"This file does not fit {variant.get('encoder', 'the encoder')!r}: "
                f"{len(report.unexpected)} tensors have no place, such as "
                f"{list(report.unexpected[:3])}. Choose the variant of its architecture, one of "
                f"{', '.join(cls.variants)}."
            )
        return backbone, LoadReport(report.matched, missing, ())

    @classmethod
    def published_modalities(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality],
    ) -> dict[str, Modality]:
        """Return SSL4EO's bands that a file has encoders for; see the base class."""
        if "modalities" in variant:
            return super().published_modalities(state, variant, modalities)
        found = _choose(read_encoder_file(state), None)
        return {name: known for name, (known, _) in found.items() if name in modalities}

    def to_reference(self, name: str | None = None) -> dict[str, Tensor]:
        """Return the weights in DeCUR's layout.

        Args:
            name: Modality of a backbone-only file (plain torchvision or timm keys; with
                deformable attention `backbone.*` and `da1_*` or `da2_*`); None gives the
                backbones of a joint file under `module.`.
        """
        order = list(self.modalities)
        written: dict[str, Tensor] = {}
        for index, own in enumerate(order, 1):
            if name not in (None, own):
                continue
            net = plain_names(self.encoders[own].state_dict())
            attention = self._attention(own)
            blocks = {} if attention is None else attention.state_dict()
            da = {f"da{index}_{n}": t for n, t in blocks.items()}
            if name is None:
                written |= {f"module.backbone_{index}.{n}": t for n, t in net.items()}
                written |= {f"module.{n}": t for n, t in da.items()}
            else:
                written |= {f"backbone.{n}": t for n, t in net.items()} | da if da else net
        return written


def _choose(
    file: EncoderFile, modalities: Mapping[str, Modality | Mapping[str, Any]] | None
) -> dict[str, tuple[Modality, int]]:
    """Return the modality and the part of the file for every name that is to be loaded."""
    bands = file.bands()
    if modalities is None:
        chosen = {}
        for part, count in bands.items():
            known = published_modality(count)
            if known is None:
                raise WeightsError(
                    f"The file is for {count} bands and does not say which; pass modalities=… "
                    "with their names, unit and statistics."
                )
            chosen[known.name] = (known, part)
        return chosen
    chosen = {}
    for name, given in modalities.items():
        own = given if isinstance(given, Modality) else Modality.of({"name": name, **given})
        parts = [p for p, count in bands.items() if count == own.num_channels]
        parts = [p for p in parts if p not in {q for _, q in chosen.values()}] or parts
        if not parts:
            raise WeightsError(
                f"{name}: the file has encoders for {sorted(bands.values())} bands, the data have "
                f"{own.num_channels}. Choose the bands that the weights were trained on."
            )
        known = None if own.kind == "volume" else published_modality(own.num_channels)
        if known is None:
            chosen[name] = (own, parts[0])
        else:
            chosen[name] = (Modality.of({**known.to_dict(), "name": name}), parts[0])
    return chosen


def _published_form(modality: Modality, wanted: object) -> str | None:
    """Return the scaling that the released weights saw (8 bit throughout)."""
    if modality.value_unit == "rgb8":
        return "scale(255)"
    if isinstance(wanted, Mapping):
        return str(wanted[modality.name]) if modality.name in wanted else None
    if modality.kind == "volume":
        if wanted is None:
            raise WeightsError(
                f"{modality.name}: the file does not say how its volumes were scaled; pass "
                "arguments={'normalization': …}, such as 'window(-1000,1000)', 'zscore' or 'item'."
            )
        return str(wanted)
    is_known = modality.mean is not None
    if wanted is not None and (is_known or not Form.parse(str(wanted)).needs_statistics):
        return str(wanted)
    if modality.mean is None:
        return "identity"
    return "window(0,10000)" if modality.value_unit == "dn" else "mean2std8"


def _attention_tensors(
    file: EncoderFile, backbone: EncoderBackbone, parts: Mapping[str, int]
) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for owner in backbone.attention:
        source = 1 if owner == "shared" else max(1, parts[owner])
        if source not in file.attention:
            source = next(iter(file.attention), 0)
        if source == 2:
            logger.warning(
                "The blocks da2_* of DeCUR's deformable attention were never trained: pretraining "
                "used da1_* for both modalities. Load the joint file with "
                "deformable_attention='shared' for the trained ones."
            )
        blocks = file.attention.get(source, {})
        renamed |= {f"attention.{owner}.{n}": t for n, t in blocks.items()}
    return renamed
