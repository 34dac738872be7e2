"""The networks behind `EncoderBackbone`: what turns one image into tokens and a vector."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from domainssl.backbones.encoders.base import Encoded, Encoder, MapEncoder, refuse_attention
from domainssl.backbones.encoders.monai_nets import monai_resnet, resnet_levels
from domainssl.backbones.encoders.residual import ResidualEncoder
from domainssl.backbones.encoders.swin import SwinEncoder
from domainssl.errors import ConfigError, nearest, require
from domainssl.modality import Modality, sides_of
from domainssl.nn.blocks import Transformer
from domainssl.nn.deformable import DeformableAttention
from domainssl.nn.masking import mean_of_valid
from domainssl.nn.norm import convert_batch_norm, counted_rows, current_rows, recomputing
from domainssl.nn.patching import grid_coordinates, grid_of, patch_fraction, patchify
from domainssl.nn.positions import sincos_positions

__all__ = [
    "Encoded",
    "Encoder",
    "ResNetEncoder",
    "TransformerEncoder",
    "ViTEncoder",
    "deformable_blocks",
    "make_encoder",
]

OWN_NAMES = ("transformer", "resenc", "monai:swin", "monai:resnet10 … monai:resnet200")


def _contexts() -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    rows = current_rows()
    return lambda: (counted_rows(rows), recomputing(rows))


class ResNetEncoder(MapEncoder):
    """A ResNet of timm or MONAI whose batch statistics are global, in 2D or 3D.

    Deformable attention goes behind the stages of 2D ones where it is given.
    """

    band_tensors: Mapping[str, str] = {"net.conv1.weight": "convolution"}

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net
        self.levels = resnet_levels(net)
        self.width = self.levels[-1][0]
        self.gradient_checkpointing = False
        convert_batch_norm(net)

    def _stem(self, x: Tensor) -> Tensor:
        net = self.net
        out: Tensor = (net.act1 if hasattr(net, "act1") else net.act)(net.bn1(net.conv1(x)))
        return out

    def _stage(self, layer: nn.Module, x: Tensor) -> Tensor:
        for block in cast(nn.ModuleList, layer):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False, context_fn=_contexts())
            else:
                x = block(x)
        return x

    def _stages(self, x: Tensor, attention: nn.ModuleDict | None) -> list[Tensor]:
        x = self.net.maxpool(x)
        maps = []
        for index in range(1, 5):
            x = self._stage(getattr(self.net, f"layer{index}"), x)
            if attention is not None and f"l{index}" in attention:
                x = x + attention[f"l{index}"](x)
            maps.append(x)
        return maps

    def stages(
        self, x: Tensor, valid: Tensor, attention: nn.ModuleDict | None = None
    ) -> list[Tensor]:
        """Return the four maps, (B, E_i, *S / (4·2^i))."""
        return self._stages(self._stem(x), attention)

    def pyramid(self, x: Tensor, valid: Tensor) -> list[Tensor]:
        """Return the map of the stem, at half resolution, and those of the four stages."""
        stem = self._stem(x)
        return [stem, *self._stages(stem, None)]


class ViTEncoder(Encoder):
    """A timm ViT; other sizes than its own resample the position table."""

    band_tensors: Mapping[str, str] = {"net.patch_embed.proj.weight": "convolution"}

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net
        self.width = int(net.num_features)  # type: ignore[arg-type]
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, valid: Tensor, attention: nn.ModuleDict | None = None) -> Encoded:
        """Encode; pooled is what timm pools, the class token in the published models."""
        refuse_attention(attention, "a ViT")
        patch = int(self.net.patch_embed.patch_size[0])
        grid = grid_of(x.shape[2:], patch, "input of the ViT")
        self.net.set_grad_checkpointing(self.gradient_checkpointing and self.training)
        out = self.net.forward_features(x)
        prefix = int(self.net.num_prefix_tokens)
        return Encoded(
            tokens=out[:, prefix:],
            pooled=self.net.forward_head(out, pre_logits=True),
            grid=grid,
            token_valid=patch_fraction(valid, patch) > 0,
            cls=out[:, 0] if self.net.cls_token is not None else None,
        )


class TransformerEncoder(Encoder):
    """Linear patch embedding, sine-cosine positions, our own blocks; images and volumes."""

    is_own = True
    band_tensors: Mapping[str, str] = {"embed.weight": "bands last"}

    def __init__(self, modality: Modality, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        self.width = sizes["width"]
        dims = modality.spatial_dims
        if self.width % (2 * dims):
            raise ConfigError(
                f"sizes.width {self.width} is no multiple of {2 * dims}: sine and cosine per axis."
            )
        self.patch_size = sides_of(sizes["patch_size"], dims, "sizes.patch_size")
        self.embed = nn.Linear(modality.num_channels * math.prod(self.patch_size), self.width)
        self.transformer = Transformer(self.width, sizes["depth"], sizes["heads"])

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        grid = grid_of(x.shape[2:], self.patch_size, "input of the transformer")
        coords = grid_coordinates(grid, device=x.device)
        tokens = self.embed(patchify(x, self.patch_size))
        return tokens + sincos_positions(coords, self.width).to(tokens.dtype), grid

    def pyramid(self, x: Tensor, valid: Tensor) -> list[Tensor]:
        """Return four maps of one size, as UNETR takes them from a ViT (`hidden_states`)."""
        tokens, grid = self._embed(x)
        states = self.transformer.hidden_states(tokens)
        return [state.transpose(1, 2).unflatten(2, grid) for state in states]

    def forward(self, x: Tensor, valid: Tensor, attention: nn.ModuleDict | None = None) -> Encoded:
        """Encode; pooled is the mean of the tokens that saw a valid pixel."""
        refuse_attention(attention, "the transformer")
        tokens, grid = self._embed(x)
        tokens = self.transformer(tokens)  # (B, N, E)
        seen = patch_fraction(valid, self.patch_size) > 0
        return Encoded(
            tokens=tokens, pooled=mean_of_valid(tokens, seen), grid=grid, token_valid=seen
        )


def _timm_net(name: str, channels: int, image_size: int) -> nn.Module:
    timm = cast(Any, require("timm", "all"))
    if not timm.is_model(name):
        known = timm.list_models()
        raise ConfigError(
            f"encoder: {name!r} is neither one of {', '.join(OWN_NAMES)} nor a model of timm."
            f"{nearest(name, [*known, *OWN_NAMES])}"
        )
    builder = timm.model_entrypoint(name)
    family = inspect.getmodule(builder)
    options: dict[str, Any] = {"pretrained": False, "in_chans": channels, "num_classes": 0}
    if family is not None and family.__name__.endswith("vision_transformer"):
        options |= {"img_size": image_size, "dynamic_img_size": True}
    return cast(nn.Module, timm.create_model(name, **options))


def make_encoder(
    name: str, modality: Modality, sizes: Mapping[str, Any], image_size: int
) -> Encoder:
    """Build the encoder of one modality.

    Raises:
        ConfigError: The name is unknown or does not fit the modality.
    """
    if modality.spatial_dims == 0:
        raise ConfigError(
            f"modality {modality.name!r} is of kind {modality.kind!r}; encoders take images, "
            "series and volumes."
        )
    if name == "transformer":
        return TransformerEncoder(modality, sizes)
    if name == "resenc":
        return ResidualEncoder(modality, sizes["features"], sizes["blocks"])
    if name == "monai:swin":
        return SwinEncoder(modality, sizes["swin"])
    if name.startswith("monai:"):
        return ResNetEncoder(monai_resnet(name.removeprefix("monai:"), modality, sizes["widen"]))
    if modality.spatial_dims != 2:
        raise ConfigError(
            f"encoder {name!r} is two-dimensional and modality {modality.name!r} is a "
            f"{modality.kind}; use encoder: transformer, resenc, monai:swin or monai:resnet18 "
            "(10 to 200)."
        )
    net = _timm_net(name, modality.num_channels, image_size)
    kind = type(net).__name__
    if kind == "ResNet":
        return ResNetEncoder(net)
    if kind == "VisionTransformer":
        return ViTEncoder(net)
    raise ConfigError(
        f"encoder: {name!r} is a {kind}; expected one of timm's ResNet or VisionTransformer "
        f"models, or one of {', '.join(OWN_NAMES)}."
    )


def deformable_blocks(encoders: Sequence[Encoder], image_size: int) -> nn.ModuleDict:
    """Build the attention blocks behind stages 3 and 4 that all `encoders` use.

    Raises:
        ConfigError: An encoder is no ResNet, or they differ in width.
    """
    widths = set()
    for encoder in encoders:
        is_flat = isinstance(encoder, ResNetEncoder) and encoder.net.conv1.weight.ndim == 4
        if not is_flat:
            refuse_attention(nn.ModuleDict(), type(encoder).__name__)
        widths.add(encoder.width)
    if len(widths) > 1:
        raise ConfigError(
            f"deformable_attention: shared needs encoders of one width, got {sorted(widths)}; "
            "use per_modality."
        )
    (width,) = widths
    return nn.ModuleDict(
        {
            "l3": DeformableAttention(width // 2, image_size // 16, kernel=5, stride=2),
            "l4": DeformableAttention(width, image_size // 32, kernel=3, stride=1),
        }
    )
