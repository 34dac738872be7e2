"""The networks behind `EncoderBackbone`: what turns one image into tokens and a vector."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from domainssl.errors import ConfigError, nearest, require
from domainssl.modality import Modality
from domainssl.nn.blocks import Transformer
from domainssl.nn.deformable import DeformableAttention
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


@dataclass(frozen=True)
class Encoded:
    """One modality, encoded.

    Attributes:
        tokens: (B, N, E).
        pooled: (B, E).
        grid: Tokens per axis.
        token_valid: bool (B, N); True where a token saw a valid pixel.
        cls: Class token (B, E) where there is one.
    """

    tokens: Tensor
    pooled: Tensor
    grid: tuple[int, ...]
    token_valid: Tensor
    cls: Tensor | None = None


class Encoder(nn.Module):
    """A network for one modality.

    Attributes:
        width: Feature width E.
        is_own: True for our blocks, which `execution.compile` and `.attention` reach.
        gradient_checkpointing: Recompute activations in the backward pass.
    """

    width: int
    is_own = False

    def forward(self, x: Tensor, valid: Tensor, attention: nn.ModuleDict | None = None) -> Encoded:
        """Encode normalised values (B, C, *S) with their bool validity (B, *S)."""
        raise NotImplementedError

    def stages(
        self, x: Tensor, valid: Tensor, attention: nn.ModuleDict | None = None
    ) -> list[Tensor]:
        """Return the maps of the stages, (B, E_i, *S_i), coarser each time."""
        out = self(x, valid, attention)
        return [out.tokens.transpose(1, 2).unflatten(2, out.grid)]


def _refuse_attention(attention: nn.ModuleDict | None, encoder: str) -> None:
    if attention is not None:
        raise ConfigError(
            f"deformable_attention goes behind the stages of a ResNet; {encoder} has none. "
            "Set deformable_attention: none."
        )


def _contexts() -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    rows = current_rows()
    return lambda: (counted_rows(rows), recomputing(rows))


class ResNetEncoder(Encoder):
    """A timm ResNet whose batch statistics are global; deformable attention where it is given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net
        self.width = int(net.num_features)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        convert_batch_norm(net)

    def _stage(self, layer: nn.Module, x: Tensor) -> Tensor:
        for block in cast(nn.ModuleList, layer):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False, context_fn=_contexts())
            else:
                x = block(x)
        return x

    def stages(
        self, x: Tensor, valid: Tensor, attention: nn.ModuleDict | None = None
    ) -> list[Tensor]:
        """Return the four maps, (B, E_i, H / 4·2^i, W / 4·2^i)."""
        x = self.net.maxpool(self.net.act1(self.net.bn1(self.net.conv1(x))))
        maps = []
        for index in range(1, 5):
            x = self._stage(getattr(self.net, f"layer{index}"), x)
            if attention is not None and f"l{index}" in attention:
                x = x + attention[f"l{index}"](x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor, valid: Tensor, attention: nn.ModuleDict | None = None) -> Encoded:
        """Encode; tokens are the cells of the last map, pooled is its mean."""
        last = self.stages(x, valid, attention)[-1]
        grid = (last.shape[2], last.shape[3])
        seen = F.adaptive_max_pool2d(valid.unsqueeze(1).float(), grid).flatten(1) > 0
        return Encoded(last.flatten(2).transpose(1, 2), last.mean((2, 3)), grid, seen)


class ViTEncoder(Encoder):
    """A timm ViT; other sizes than its own resample the position table."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net
        self.width = int(net.num_features)  # type: ignore[arg-type]
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, valid: Tensor, attention: nn.ModuleDict | None = None) -> Encoded:
        """Encode; pooled is what timm pools, the class token in the published models."""
        _refuse_attention(attention, "a ViT")
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

    def __init__(self, modality: Modality, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.width, self.patch_size = sizes["width"], sizes["patch_size"]
        dims = modality.spatial_dims
        if self.width % (2 * dims):
            raise ConfigError(
                f"sizes.width {self.width} is no multiple of {2 * dims}: sine and cosine per axis."
            )
        self.embed = nn.Linear(modality.num_channels * self.patch_size**dims, self.width)
        self.transformer = Transformer(self.width, sizes["depth"], sizes["heads"])

    def forward(self, x: Tensor, valid: Tensor, attention: nn.ModuleDict | None = None) -> Encoded:
        """Encode; pooled is the mean of the tokens that saw a valid pixel."""
        _refuse_attention(attention, "the transformer")
        grid = grid_of(x.shape[2:], self.patch_size, "input of the transformer")
        coords = grid_coordinates(grid, device=x.device)
        tokens = self.embed(patchify(x, self.patch_size))
        tokens = tokens + sincos_positions(coords, self.width).to(tokens.dtype)
        tokens = self.transformer(tokens)  # (B, N, E)
        seen = patch_fraction(valid, self.patch_size) > 0
        weight = seen.to(tokens.dtype).unsqueeze(-1)
        pooled = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
        return Encoded(tokens, pooled, grid, seen)


def _timm_net(name: str, channels: int, image_size: int) -> nn.Module:
    timm = cast(Any, require("timm", "all"))
    if not timm.is_model(name):
        known = timm.list_models()
        raise ConfigError(
            f"encoder: {name!r} is neither 'transformer' nor a model of timm."
            f"{nearest(name, [*known, 'transformer'])}"
        )
    builder = timm.model_entrypoint(name)
    family = inspect.getmodule(builder)
    options: dict[str, Any] = {"pretrained": False, "in_chans": channels, "num_classes": 0}
    if family is not None and family.__name__.endswith("vision_transformer"):
        options |= {"img_size": image_size, "dynamic_img_size": True}
    return cast(nn.Module, timm.create_model(name, **options))


def make_encoder(
    name: str, modality: Modality, sizes: Mapping[str, int], image_size: int
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
    if modality.spatial_dims != 2:
        raise ConfigError(
            f"encoder {name!r} is two-dimensional and modality {modality.name!r} is a "
            f"{modality.kind}; use encoder: transformer."
        )
    net = _timm_net(name, modality.num_channels, image_size)
    kind = type(net).__name__
    if kind == "ResNet":
        return ResNetEncoder(net)
    if kind == "VisionTransformer":
        return ViTEncoder(net)
    raise ConfigError(
        f"encoder: {name!r} is a {kind}; expected one of timm's ResNet or VisionTransformer "
        "models, or 'transformer'."
    )


def deformable_blocks(encoders: Sequence[Encoder], image_size: int) -> nn.ModuleDict:
    """Build the attention blocks behind stages 3 and 4 that all `encoders` use.

    Raises:
        ConfigError: An encoder is no ResNet, or they differ in width.
    """
    widths = set()
    for encoder in encoders:
        if not isinstance(encoder, ResNetEncoder):
            _refuse_attention(nn.ModuleDict(), type(encoder).__name__)
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
