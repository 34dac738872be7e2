"""Weights files for `EncoderBackbone`: DeCUR's own, SSL4EO's MoCo, DINO and MAE layouts, nnssl's.

Prefixes are stripped exactly and in a fixed order; what is left over is an error of the caller.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from domainssl.backbones.croma import PUBLISHED_MODALITIES
from domainssl.errors import WeightsError
from domainssl.modality import Modality

__all__ = ["EncoderFile", "plain_names", "published_modality", "read_encoder_file"]

_S1 = PUBLISHED_MODALITIES["s1"]
# S2 L1C digital numbers of SSL4EO-S12 v1.0, with that data set's statistics.
_S2_L1C = Modality(
    name="s2",
    kind="image",
    channels=(
        "B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12",
    ),
    value_unit="dn",
    gsd_m=10.0,
    mean=(
        1605.57504906, 1390.78157673, 1314.8729939, 1363.52445545, 1549.44374991, 2091.74883118,
        2371.7172463, 2299.90463006, 2560.29504086, 830.06605044, 22.10351321, 2177.07172323,
        1524.06546312,
    ),
    std=(
        786.78685367, 850.34818441, 875.06484736, 1138.84957046, 1122.17775652, 1161.59187054,
        1274.39184232, 1248.42891965, 1345.52684884, 577.31607053, 51.15431158, 1336.09932639,
        1136.53823676,
    ),
)  # fmt: skip


def published_modality(bands: int) -> Modality | None:
    """Return the SSL4EO modality with this number of bands: 2 S1, 12 S2 L2A, 13 S2 L1C."""
    return {2: _S1, 12: PUBLISHED_MODALITIES["s2"], 13: _S2_L1C}.get(bands)


_STEMS = ("conv1.weight", "patch_embed.proj.weight", "stem.convs.0.conv.weight")


@dataclass(frozen=True)
class EncoderFile:
    """Tensors of a weights file, sorted.

    Attributes:
        encoders: Tensors under torchvision, timm or nnssl's names: 1 and 2 of a joint file, 0
            alone.
        attention: Deformable attention `l3.*`, `l4.*`: 1 for `da1_*`, 2 for `da2_*`.
        head: Projectors and final norm of a joint file, under their published names.
    """

    encoders: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    attention: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)

    def bands(self) -> dict[int, int]:
        """Return the number of input bands of every encoder."""
        found = {}
        for part, tensors in self.encoders.items():
            stem = next((tensors[name] for name in _STEMS if name in tensors), None)
            if stem is None:
                raise WeightsError(
                    "This is no ResNet or ViT weights file: it has neither 'conv1.weight' nor "
                    f"'patch_embed.proj.weight'; found {sorted(tensors)[:5]}."
                )
            found[part] = int(stem.shape[1])
        return found


def _flatten(state: Mapping[str, Any]) -> dict[str, Tensor]:
    for wrapper in ("teacher", "state_dict", "model", "network_weights"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _below(flat: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in flat.items() if n.startswith(prefix)}


def _without(flat: Mapping[str, Tensor], pattern: str) -> dict[str, Tensor]:
    return {n: t for n, t in flat.items() if not re.match(pattern, n)}


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an encoder under torchvision or timm names."""
    return _below(state, "net.")


def read_encoder_file(state: Mapping[str, Any]) -> EncoderFile:
    """Sort the content of a weights file.

    Args:
        state: What the file holds: DeCUR joint (with or without `model`, with or without
            `module.`), DeCUR backbone-only (with or without deformable attention), MoCo v2, MoCo
            v3, DINO, MAE, CSIP, nnssl's residual encoder U-Net (`network_weights`, `encoder.*`,
            `decoder.*`), or plain torchvision, timm and torchgeo names.

    Raises:
        WeightsError: It holds no tensors.
    """
    flat = _flatten(state)
    if not flat:
        raise WeightsError(f"The file holds no tensors; its top-level keys are {list(state)[:5]}.")
    for prefix, unused in (("module.encoder_q.", r"fc\."), ("module.base_encoder.", r"head\.")):
        if any(n.startswith(prefix) for n in flat):  # MoCo v2 and v3: keep the trained encoder
            return EncoderFile({0: _without(_below(flat, prefix), unused)})
    flat = {n.removeprefix("module."): t for n, t in flat.items()}
    if any(n.startswith("encoder.stages.") for n in flat):  # every layer stands there twice
        return EncoderFile({0: _without(_below(flat, "encoder."), r".*\.all_modules\.")})
    if any(n.startswith("encoder_a.") for n in flat):  # CSIP: an encoder and a layer each
        encoders = {part: _below(flat, f"encoder_{n}.0.") for part, n in enumerate("ab", 1)}
        return EncoderFile({p: _without(t, r"fc\.") for p, t in encoders.items() if t})
    attention = {part: blocks for part in (1, 2) if (blocks := _below(flat, f"da{part}_"))}
    flat = _without(flat, r"da[12]_")
    if any(n.startswith("backbone_1.") for n in flat):
        head = _without(flat, r"backbone_[12]\.")
        encoders = {part: _below(flat, f"backbone_{part}.") for part in (1, 2)}
        return EncoderFile({p: t for p, t in encoders.items() if t}, attention, head)
    if any(n.startswith("backbone.") for n in flat):  # DINO, or one backbone with attention
        flat = {n.removeprefix("backbone."): t for n, t in _without(flat, r"head\.").items()}
    # heads of classifiers, and MAE's decoder
    return EncoderFile({0: _without(flat, r"(fc\.|head\.|decoder_|mask_token$)")}, attention)
