"""Backbones as models of timm, for every library that asks timm for its encoders.

The model takes raw physical values of one sensor and normalises them itself, in its `forward`: do
not normalise before it. `pretrained_cfg` says mean 0 and deviation 1 for those who ask timm.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from domainssl.backbones.base import Backbone
from domainssl.backbones.card import export_backbone
from domainssl.backbones.graph import plausible_values
from domainssl.backbones.registry import load_backbone
from domainssl.errors import ConfigError, DataError, WeightsError, nearest, require
from domainssl.modality import Modality

__all__ = ["TimmModel", "TimmPyramid", "export_timm", "register_timm"]

ARCHITECTURE = "domainssl"
CONFIG_NAME = "config.json"
_TRIED = (64, 224)  # sides of the image that strides are measured on, if the modality has no size
_REGISTERED: dict[str, tuple[Backbone, str]] = {}  # backbone and sensor by name


def register_timm(
    backbone: Backbone | str | Path | None = None,
    name: str = ARCHITECTURE,
    *,
    modality: str | None = None,
) -> str:
    """Make a backbone known to `timm.create_model`.

        name = register_timm("runs/first", "my_s2", modality="s2")
        model = timm.create_model(name, pretrained=True, num_classes=10)

    Without a backbone, exports of `export_timm` are: `local-dir:FOLDER`, `hf-hub:owner/repository`.

    Args:
        backbone: What `load_backbone` reads, or a backbone; it is loaded now.
        name: Name for timm; one that timm has is refused.
        modality: The sensor, where the backbone has several.

    Returns:
        The name.

    Raises:
        ConfigError: The name is taken, or the modality is unknown or cannot be used.
        WeightsError: See `load_backbone`.
    """
    timm = cast(Any, require("timm", "all"))
    if not name.isidentifier():
        raise ConfigError(f"name: {name!r}; timm takes letters, digits and underscores.")
    if (backbone is None) != (name == ARCHITECTURE):
        raise ConfigError(
            f"register_timm: the name {ARCHITECTURE!r} is for exports that are named when the "
            "model is created; give a backbone and another name, or neither."
        )
    if timm.is_model(name) and timm.models.model_entrypoint(name).__module__ != __name__:
        raise ConfigError(f"name: timm has a model {name!r} of its own. Choose another name.")
    if backbone is not None:
        loaded = backbone if isinstance(backbone, Backbone) else load_backbone(backbone)
        _REGISTERED[name] = (loaded, _sensor(loaded, modality).name)
    if not timm.is_model(name):
        entry = _entry(name) if backbone is not None else _generic
        before = list(__all__)
        entry.__name__ = name
        timm.models.register_model(entry)
        __all__[:] = before  # timm adds the name
    return name


def _entry(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        return _create(*_REGISTERED[name], pretrained, **options)

    return create


def _generic(
    pretrained: bool = False,
    *,
    backbone: Backbone | str | Path | None = None,
    modality: str | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Create a model of what `backbone`, `local-dir:` or `hf-hub:` names."""
    found = dict(pretrained_cfg or {})
    if backbone is None and found.get("hf_hub_id"):
        backbone = f"hf://{found['hf_hub_id']}"
    elif backbone is None and found.get("file"):
        backbone = found["file"]
    if backbone is None:
        raise ConfigError(
            "timm.create_model('domainssl'): name the weights: backbone='FOLDER', or create "
            "'local-dir:FOLDER' or 'hf-hub:owner/repository'."
        )
    loaded = backbone if isinstance(backbone, Backbone) else load_backbone(backbone)
    return _create(loaded, _sensor(loaded, modality).name, pretrained, **options)


def _create(
    backbone: Backbone,
    sensor: str,
    pretrained: bool,
    *,
    num_classes: int = 0,
    in_chans: int | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model of timm's form out of a backbone, which stays as it is.

    Raises:
        ConfigError: The channels are others, or an option has no meaning here.
    """
    ignored = ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir")
    wrong = [n for n, v in options.items() if n not in ignored and v not in (None, False, 0.0)]
    if wrong:
        raise ConfigError(
            f"timm.create_model: {', '.join(wrong)} cannot be set for an exported backbone; its "
            "card says how it is built. Leave them out."
        )
    modality = backbone.modalities[sensor]
    if in_chans is not None and in_chans != modality.num_channels:
        raise ConfigError(
            f"in_chans: got {in_chans}, the encoder takes {modality.num_channels}: "
            f"{' '.join(modality.channels)} ({modality.value_unit}). Choose these bands, or fit "
            "the backbone to yours first: load_backbone(…, modalities=…, bands='subset')."
        )
    copied = copy.deepcopy(backbone) if pretrained else _untrained(backbone)
    if features_only:
        return TimmPyramid(copied, sensor, out_indices).train()
    return TimmModel(copied, sensor, num_classes).train()


def _untrained(backbone: Backbone) -> Backbone:
    """Return the same architecture with new weights and the same statistics."""
    with torch.device("cpu"):  # some ask for a model on the meta device, to look at its maps
        fresh = type(backbone)(**backbone.arguments)
    fresh.normalizer.load_state_dict(backbone.normalizer.state_dict())
    return fresh


def _sensor(backbone: Backbone, name: str | None) -> Modality:
    """Return the one modality that goes in.

    Raises:
        ConfigError: It is unknown or not chosen, or its batch is more than one tensor.
    """
    known = backbone.modalities
    if name is None and len(known) > 1:
        raise ConfigError(
            f"modality: the backbone has {', '.join(known)}; models of timm take one tensor. Name "
            "one of them."
        )
    name = next(iter(known)) if name is None else name
    if name not in known:
        raise ConfigError(
            f"modality: this backbone has no {name!r}.{nearest(name, known)} It knows "
            f"{', '.join(known)}."
        )
    modality = known[name]
    form = backbone.normalizer.forms[name].name
    if modality.kind not in ("image", "volume") or form == "item":
        what = f"is of kind {modality.kind!r}" if form != "item" else "is scaled per item"
        raise ConfigError(
            f"modality: {name!r} {what}, which takes more than one tensor; models of timm take "
            "one. Use the backbone itself."
        )
    return modality


class _Sensor(nn.Module):
    """What both forms share: the backbone of one sensor and its configuration for timm."""

    def __init__(self, backbone: Backbone, sensor: str) -> None:
        super().__init__()
        modality = backbone.modalities[sensor]
        self.backbone, self.sensor = backbone, sensor
        self.pretrained_cfg = self.default_cfg = _configuration(modality)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass."""
        self.backbone.set_gradient_checkpointing(enable)


class TimmModel(_Sensor):
    """A backbone in the form of timm's classifiers.

    Args:
        backbone: It normalises raw values itself.
        sensor: Modality that goes in.
        num_classes: Width of the linear head; 0 is none, and `forward` returns pooled features.
    """

    num_prefix_tokens = 1

    def __init__(self, backbone: Backbone, sensor: str, num_classes: int = 0) -> None:
        super().__init__(backbone, sensor)
        self.num_features = self.head_hidden_size = self.embed_dim = backbone.embed_dim[sensor]
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new linear head on the pooled feature; its pooling is the backbone's."""
        self.num_classes = num_classes
        self.head: nn.Module = (
            nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        )

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the pooled feature and the tokens behind it, (B, 1 + N, E), of raw values.

        Where tokens have another width there is the pooled feature alone, (B, 1, E).
        """
        features = self.backbone({self.sensor: x})
        pooled, tokens = features.pooled[self.sensor], features.tokens[self.sensor]
        if tokens.shape[-1] != pooled.shape[-1]:
            return pooled.unsqueeze(1)
        return torch.cat([pooled.unsqueeze(1), tokens], 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, K), or the pooled feature (B, E)."""
        pooled = x[:, 0]
        return pooled if pre_logits else cast(Tensor, self.head(pooled))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K), or pooled features (B, E) without a head, of raw values."""
        return self.forward_head(self.forward_features(x))


class TimmPyramid(_Sensor):
    """A backbone in the form of timm's `features_only` models: maps for decoders, finest first.

    Args:
        backbone: It normalises raw values itself.
        sensor: Modality that goes in.
        out_indices: Maps to return; None is all.

    Raises:
        ConfigError: The method has no maps, or fewer.
    """

    def __init__(
        self, backbone: Backbone, sensor: str, out_indices: Sequence[int] | None = None
    ) -> None:
        super().__init__(backbone, sensor)
        models = cast(Any, require("timm.models", "all"))
        levels = _levels(backbone, sensor)
        indices = list(range(len(levels))) if out_indices is None else list(out_indices)
        if any(not -len(levels) <= index < len(levels) for index in indices):
            raise ConfigError(
                f"out_indices: got {indices}, but {type(backbone).__name__} has {len(levels)} maps "
                f"at strides {[stride for _, stride in levels]}. Ask for fewer (depth, "
                "encoder_depth)."
            )
        self.out_indices = [index % len(levels) for index in indices]
        self.feature_info = models.FeatureInfo(
            [
                {"num_chs": width, "reduction": stride, "module": f"map{index}"}
                for index, (width, stride) in enumerate(levels)
            ],
            self.out_indices,
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps of raw values, (B, E_i, *S_i)."""
        maps = self.backbone.feature_pyramid({self.sensor: x})[self.sensor]
        return [maps[index] for index in self.out_indices]


def _configuration(modality: Modality) -> dict[str, Any]:
    """Return what timm's data functions ask for: nothing is left to normalise."""
    channels = modality.num_channels
    return {
        "architecture": ARCHITECTURE,
        "input_size": (channels, *(modality.size or (224,) * modality.spatial_dims)),
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "fixed_input_size": False,
        "num_classes": 0,
        "first_conv": None,
        "classifier": "head",
    }


def _levels(backbone: Backbone, sensor: str) -> list[tuple[int, int]]:
    """Return width and stride of every map, measured on one image.

    Raises:
        ConfigError: The method has no maps, or no image of a usual size goes through.
    """
    modality = backbone.modalities[sensor]
    sizes = [modality.size or (side,) * modality.spatial_dims for side in _TRIED]
    was_training, problem = backbone.training, ""
    device = next(backbone.parameters()).device
    backbone.eval()
    for size in dict.fromkeys(sizes):
        (values,) = plausible_values(backbone, {sensor: modality}, {sensor: size}, 1)
        try:
            with torch.no_grad():
                maps = backbone.feature_pyramid({sensor: values.to(device)})[sensor]
        except (ConfigError, DataError) as error:
            problem = str(error)
            continue
        backbone.train(was_training).watch_units()
        return [(m.shape[1], size[0] // m.shape[2]) for m in maps]
    raise ConfigError(
        f"features_only: {type(backbone).__name__} gives no maps of {sensor!r}: {problem}"
    )


def export_timm(
    backbone: Backbone, folder: str | Path, *, modality: str | None = None, **options: Any
) -> Path:
    """Write an export that timm finds: `timm.create_model("local-dir:FOLDER")`.

    Besides the export there is a `config.json`, which says that the architecture is registered by
    `register_timm()`. Push the folder to the hub as it is for `hf-hub:owner/repository`.

    Args:
        backbone: What to write.
        folder: Created where it does not exist.
        modality: The sensor, where the backbone has several.
        options: See `export_backbone`.

    Returns:
        Path of `config.json`.

    Raises:
        ConfigError: The modality is unknown or cannot be used.
        WeightsError: The folder holds an export or another `config.json`.
    """
    chosen = _sensor(backbone, modality)
    target = Path(folder) / CONFIG_NAME
    if target.exists() and not options.get("overwrite"):
        raise WeightsError(f"{target} exists already; pass overwrite=True (--overwrite).")
    export_backbone(backbone, folder, **options)
    content = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": backbone.embed_dim[chosen.name],
        "pretrained_cfg": _configuration(chosen),
        "model_args": {"modality": chosen.name},
    }
    target.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return target
