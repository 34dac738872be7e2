"""MONAI's SwinTransformer as an encoder, with both orders of patch merging.

Up to MONAI 1.4 the merging of a 2×2×2 block read two octants twice and two never; from 1.5 on it
reads each once (MONAI pull request 8285). Shapes are equal, so older weights load into the newer
code and give other features without any warning. `merging: legacy` is the old order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainssl.backbones.encoders.base import MapEncoder, refuse_attention
from domainssl.errors import ConfigError, require
from domainssl.modality import Modality

__all__ = ["LegacyMerging", "Merging", "SwinArchitecture", "SwinEncoder"]

Merging = Literal["standard", "legacy"]
_STAGES = 4
_LEGACY = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))


@dataclass(frozen=True, kw_only=True)
class SwinArchitecture:
    """Sizes of a SwinTransformer.

    Attributes:
        feature_size: Channels at half resolution; they double with every stage, up to 16 times.
        depths: Blocks of the four stages.
        heads: Attention heads of the four stages.
        window: Side of the attention windows in tokens; smaller maps shrink it.
        mlp_ratio: Width of feed-forward layers over the token width.
        residual_convolution: A residual convolution before every stage (SwinUNETR version 2).
        merging: `standard` (MONAI 1.5 and later) or `legacy` (earlier weights); None takes what
            the weights file states, without weights `standard`.
    """

    feature_size: int = 48
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: float = 4.0
    residual_convolution: bool = False
    merging: Merging | None = None

    def __post_init__(self) -> None:
        for name in ("depths", "heads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != _STAGES:
                raise ConfigError(
                    f"swin.{name}: got {list(getattr(self, name))}, expected {_STAGES} numbers, "
                    "one per stage."
                )
        for stage, heads in enumerate(self.heads):
            width = self.feature_size * 2**stage
            if heads < 1 or width % heads:
                raise ConfigError(
                    f"swin.heads: {heads} in stage {stage + 1} do not divide its width {width} "
                    f"(feature_size {self.feature_size} · 2^{stage}); published: 3, 6, 12, 24 for "
                    "a feature_size that is a multiple of 12."
                )
        if self.merging not in (None, "standard", "legacy"):
            raise ConfigError(f"swin.merging: got {self.merging!r}, expected standard or legacy.")

    @property
    def width(self) -> int:
        """Channels of the deepest map."""
        return self.feature_size * 2**_STAGES


class LegacyMerging(nn.Module):
    """Patch merging of MONAI before 1.5: octants 101 in place of 110, and 010, 001 twice.

    Source: `PatchMerging` of MONAI 1.4.0; names are those of MONAI's class.
    """

    def __init__(
        self, dim: int, norm_layer: type[nn.LayerNorm] = nn.LayerNorm, spatial_dims: int = 3
    ) -> None:
        super().__init__()
        assert spatial_dims == 3
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(8 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, X, Y, Z, E) -> (B, X/2, Y/2, Z/2, 2E); odd sides are padded with zeros."""
        odd = [side % 2 for side in x.shape[1:4]]
        if any(odd):
            x = F.pad(x, (0, 0, 0, odd[2], 0, odd[1], 0, odd[0]))
        parts = [x[:, i::2, j::2, k::2] for i, j, k in _LEGACY]
        out: Tensor = self.reduction(self.norm(torch.cat(parts, -1)))
        return out


class SwinEncoder(MapEncoder):
    """MONAI's SwinTransformer over one volume; the same weights give the same maps.

    Dropout and stochastic depth are zero, as in every published pretraining. The integer tables
    `relative_position_index` are left out of the state dict: they follow from the window.

    Args:
        modality: A volume.
        sizes: Sizes and order of merging.

    Raises:
        ConfigError: The modality is no volume.
    """

    band_tensors: Mapping[str, str] = {"net.patch_embed.proj.weight": "convolution"}

    def __init__(self, modality: Modality, sizes: SwinArchitecture) -> None:
        super().__init__()
        if modality.spatial_dims != 3:
            raise ConfigError(
                f"encoder 'monai:swin' takes volumes; modality {modality.name!r} is of kind "
                f"{modality.kind!r}. Use a timm encoder or 'transformer' for it."
            )
        swin = cast(Any, require("monai.networks.nets.swin_unetr", "medical"))
        net: nn.Module = swin.SwinTransformer(
            in_chans=modality.num_channels,
            embed_dim=sizes.feature_size,
            window_size=(sizes.window,) * 3,
            patch_size=(2, 2, 2),
            depths=sizes.depths,
            num_heads=sizes.heads,
            mlp_ratio=sizes.mlp_ratio,
            qkv_bias=True,
            spatial_dims=3,
            downsample=LegacyMerging if sizes.merging == "legacy" else "merging",
            use_v2=sizes.residual_convolution,
        )
        for part in net.modules():
            if isinstance(part, swin.WindowAttention):
                index = part.get_buffer("relative_position_index")
                part.register_buffer("relative_position_index", index, persistent=False)
            if isinstance(part, swin.SwinTransformerBlock):
                part.is_block = True  # type: ignore[assignment]
        self.net = net
        self.width = sizes.width
        self.levels = tuple((sizes.feature_size * 2**i, 2 ** (i + 1)) for i in range(_STAGES + 1))
        self._checkpointing = False

    @property
    def gradient_checkpointing(self) -> bool:
        """Recompute blocks in the backward pass; MONAI's blocks read `use_checkpoint`."""
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self._checkpointing = enabled
        for part in self.net.modules():
            if hasattr(part, "use_checkpoint"):
                part.use_checkpoint = enabled  # type: ignore[assignment]

    def stages(
        self, x: Tensor, valid: Tensor, attention: nn.ModuleDict | None = None
    ) -> list[Tensor]:
        """Return five maps, (B, F·2^i, *S / 2^(i+1)), each normalised without affine."""
        refuse_attention(attention, "monai:swin")
        maps: list[Tensor] = self.net(x)
        return maps
