"""DINOv3 of satellite images (SAT-493M), as timm builds it, from a local file.

Source: Simeoni et al. 2025 (DINOv3, arXiv 2508.10104); timm's entries `.sat493m`. The licence is
DINOv3's own: weights are given to those who accept it, and are not part of this library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from domainssl.backbones.tile_encoders import TileEncoderBackbone, TileEncoderSpec
from domainssl.errors import WeightsError
from domainssl.modality import Modality

__all__ = ["SATELLITE_ENCODERS", "DINOv3Backbone"]

_DROPPED = ("mask_token", "rope_embed.periods", "local_cls_norm.")
_RENAMED = {
    "storage_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2",
    "mlp.w1.": "mlp.fc1_g.", "mlp.w2.": "mlp.fc1_x.", "mlp.w3.": "mlp.fc2.",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _SatelliteSpec(TileEncoderSpec):
    """How timm builds an encoder of images of the ground.

    Attributes:
        gsd_m: Metres per pixel of the images it was trained on.
    """

    gsd_m: float

    def modality(self, name: str) -> Modality:
        """Return what the encoder takes, under a key."""
        return replace(super().modality(name), mpp_um=None, gsd_m=self.gsd_m)


def _sat(model: str, dim: int) -> _SatelliteSpec:
    return _SatelliteSpec(
        model=model, arguments={"num_classes": 0, "global_pool": "token"}, dim=dim, size=256,
        mean=(0.430, 0.411, 0.296), std=(0.213, 0.156, 0.143), gsd_m=0.6,
    )  # fmt: skip


SATELLITE_ENCODERS: dict[str, TileEncoderSpec] = {
    "dinov3_sat_large": _sat("vit_large_patch16_dinov3", 1024),
    "dinov3_sat_large_qkvb": _sat("vit_large_patch16_dinov3_qkvb", 1024),
    "dinov3_sat_7b": _sat("vit_7b_patch16_dinov3", 4096),
}


class DINOv3Backbone(TileEncoderBackbone):
    """Encode red, green and blue of the ground with DINOv3; `pooled` is the class token.

    Args:
        modalities: One image of 8-bit colours; mean and deviation are the encoder's own.
        encoder: Name in `SATELLITE_ENCODERS`.
        changes: Arguments of timm's constructor that differ from the record's, such as
            `{"depth": 2}`.

    Raises:
        ConfigError: There is no such encoder, or the modality is no image of colours.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {n: {"encoder": n} for n in SATELLITE_ENCODERS}
    not_loadable: ClassVar[Mapping[str, str]] = {}
    records: ClassVar[Mapping[str, TileEncoderSpec]] = SATELLITE_ENCODERS
    usual: ClassVar[str] = "aerial"

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        encoder: str = "dinov3_sat_large",
        changes: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(modalities, encoder, changes)

    def timm_names(self, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a file under timm's names; official files have others.

        Raises:
            WeightsError: Queries or values have a bias, and the encoder has none.
        """
        if "storage_tokens" not in flat:
            return dict(flat)
        found: dict[str, Tensor] = {}
        own = dict(self.model.named_parameters())
        for name, tensor in flat.items():
            if name.startswith(_DROPPED) or name.endswith(".bias_mask"):
                continue
            if name.endswith("attn.qkv.bias"):  # that of keys is masked to zero
                stem = name.removesuffix("qkv.bias")
                queries, _, values = tensor.chunk(3)
                if f"{stem}q_bias" in own:
                    found |= {f"{stem}q_bias": queries, f"{stem}v_bias": values}
                elif queries.any() or values.any():
                    raise WeightsError(
                        f"{name}: the file has a bias of queries and values, {self.encoder!r} has "
                        "none. Load it as dinov3_sat_large_qkvb."
                    )
                continue
            for theirs, ours in _RENAMED.items():
                name = name.replace(theirs, ours)
            found[name] = tensor
        return found
