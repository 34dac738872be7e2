"""Parts of MAE that only pretraining needs: sizes, decoder, its names in released files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from domainssl.backbones.bands import BandPolicy
from domainssl.backbones.registry import load_initial
from domainssl.backbones.vit import ViTBackbone, date_codes, position_codes, transform
from domainssl.backbones.vit_files import read_transformer, tensors_of, write_transformer
from domainssl.errors import WeightsError
from domainssl.modality import Modality
from domainssl.nn.blocks import Transformer
from domainssl.nn.dates import DATE_CHANNELS
from domainssl.nn.masking import restore_tokens

__all__ = [
    "SIZES",
    "MAEArchitecture",
    "MAEDecoder",
    "Size",
    "build_vit",
    "decoder_tensors",
    "decoder_to_reference",
]

Size = Literal["tiny", "small", "base", "large", "huge"]


@dataclass(frozen=True, kw_only=True)
class MAEArchitecture:
    """Sizes and conventions; None takes the value of the named size, or what the layout has.

    Attributes:
        width: Token width of the encoder; a multiple of 4 for images, of 6 for volumes.
        depth: Blocks of the encoder.
        heads: Attention heads of the encoder.
        hidden: Width of its feed-forward layers; None is four times the width.
        layout: `timm` or `monai`, see `ViTArchitecture`; None is `monai` for volumes.
        qkv_bias: Queries, keys and values have a bias; None is what the layout has.
        positions: `sincos` or `learned`; None is `sincos`, or what the weights have.
        decoder_width: Token width of the decoder, with the same divisors.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        decoder_hidden: Width of its feed-forward layers; None is four times its width.
    """

    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    hidden: int | None = None
    layout: Literal["timm", "monai"] | None = None
    qkv_bias: bool | None = None
    positions: Literal["sincos", "learned"] | None = None
    decoder_width: int | None = None
    decoder_depth: int | None = None
    decoder_heads: int | None = None
    decoder_hidden: int | None = None


def _published(width: int, depth: int, heads: int) -> MAEArchitecture:
    return MAEArchitecture(
        width=width, depth=depth, heads=heads, decoder_width=512, decoder_depth=8, decoder_heads=16
    )


SIZES: dict[Size, MAEArchitecture] = {
    "tiny": MAEArchitecture(
        width=48, depth=2, heads=4, decoder_width=48, decoder_depth=1, decoder_heads=4
    ),
    "small": _published(384, 12, 6),
    "base": _published(768, 12, 12),
    "large": _published(1024, 24, 16),
    "huge": _published(1280, 32, 16),
}


class MAEDecoder(nn.Module):
    """A light transformer from visible tokens to the values of every patch."""

    def __init__(self, backbone: ViTBackbone, outputs: int, sizes: MAEArchitecture) -> None:
        super().__init__()
        assert sizes.decoder_width and sizes.decoder_depth and sizes.decoder_heads
        self.width = sizes.decoder_width
        self.embed = nn.Linear(backbone.width, self.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.width).normal_(std=0.02))
        self.dims = backbone.modality.spatial_dims
        position_codes((1,) * self.dims, self.width)  # refuses a width that does not divide
        self.has_dates = backbone.modality.kind == "series"
        if self.has_dates:
            self.date_embed = nn.Linear(DATE_CHANNELS, self.width, bias=False)
        self.transformer = Transformer(
            self.width,
            sizes.decoder_depth,
            sizes.decoder_heads,
            hidden=sizes.decoder_hidden,
            qkv_bias=backbone.qkv_bias,
            epsilon=backbone.epsilon,
        )
        self.head = nn.Linear(self.width, outputs)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(
        self,
        cls: Tensor | None,
        visible: Tensor,
        seen: Tensor,
        restore: Tensor,
        grid: tuple[int, ...],
        x: Mapping[str, Any],
        backbone: ViTBackbone,
    ) -> Tensor:
        """Predict every patch.

        Args:
            cls: Class token of the encoder, (B, D), if it has one.
            visible: Its other tokens, (B, K, D), in shuffled order.
            seen: bool (B, K); False tokens only fill up the row.
            restore: Place of every token in the shuffled order, int64 (B, N).
            grid: Tokens per axis, dates first.
            x: The normalised batch, for the dates of a series.
            backbone: What encoded it.

        Returns:
            (B, N, P).
        """
        tokens = self.embed(visible)
        mask_token = self.mask_token.to(tokens.dtype)
        if self.has_dates:
            tokens = torch.where(seen.unsqueeze(-1), tokens, mask_token)
        tokens = restore_tokens(tokens, restore, mask_token)
        codes = position_codes(grid[-self.dims :], self.width, device=tokens.device)
        if self.has_dates:
            dates = self.date_embed(date_codes(x, backbone.name))
            codes = (dates.unsqueeze(2) + codes).flatten(1, 2)
        tokens = tokens + codes.to(tokens.dtype)
        first = None if cls is None else self.embed(cls).unsqueeze(1)
        _, tokens = transform(self.transformer, first, tokens, backbone.token_frames(x))
        out: Tensor = self.head(tokens)
        return out


def decoder_tensors(state: Mapping[str, Any], backbone: ViTBackbone) -> dict[str, Tensor]:
    """Return the decoder of a released pretraining file under our names; empty without one.

    Raises:
        WeightsError: Its positions are not the sine-cosine table of this grid.
    """
    flat = tensors_of(state)
    layout = backbone.layout
    own = {
        f"transformer.{n}": t
        for n, t in read_transformer(flat, layout, "decoder_blocks", "decoder_norm").items()
    }
    named = {
        "embed.weight": "decoder_embed.weight",
        "embed.bias": "decoder_embed.bias",
        "head.weight": "decoder_pred.weight",
        "head.bias": "decoder_pred.bias",
        "mask_token": "mask_token" if layout == "timm" else "mask_tokens",
    }
    own |= {ours: flat[theirs] for ours, theirs in named.items() if theirs in flat}
    table = flat.get("decoder_pos_embed", flat.get("decoder_pos_embedding"))
    if table is not None and backbone.modality.size:
        prefix = int(layout == "timm" and backbone.class_token is not None)
        grid = backbone.grid_of(backbone.modality.size)
        expected = position_codes(grid, table.shape[-1])
        found = table[0, prefix:].float()
        if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-4):
            raise WeightsError(
                "The positions of the file's decoder are not the sine-cosine table of a grid of "
                f"{grid} patches: they were learned, or are for another size of image."
            )
    return own


def decoder_to_reference(decoder: MAEDecoder, backbone: ViTBackbone) -> dict[str, Tensor]:
    """Return the decoder under the names of MAE's or MONAI's pretraining class."""
    is_timm = backbone.layout == "timm"
    written = write_transformer(
        decoder.transformer.state_dict(),
        backbone.layout,
        "decoder_blocks",
        "decoder_norm" if is_timm else None,
    )
    for ours, theirs in (("embed", "decoder_embed"), ("head", "decoder_pred")):
        part = decoder.get_submodule(ours).state_dict()
        written |= {f"{theirs}.{kind}": tensor for kind, tensor in part.items()}
    written["mask_token" if is_timm else "mask_tokens"] = decoder.mask_token.detach()
    table = position_codes(backbone.grid_of(backbone.modality.size), decoder.width).unsqueeze(0)
    if is_timm and backbone.class_token is not None:
        table = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    written["decoder_pos_embed" if is_timm else "decoder_pos_embedding"] = table
    return written


def build_vit(
    known: dict[str, Modality],
    variant: Mapping[str, Any],
    weights: str | None,
    bands: BandPolicy = "strict",
) -> tuple[ViTBackbone, dict[str, Any]]:
    """Build a ViT, or load it with all that its file holds besides.

    Args:
        known: The modality.
        variant: Arguments of `ViTBackbone`.
        weights: File of others, or an export or checkpoint of ours.
        bands: See `load_backbone`.

    Returns:
        The backbone in training mode, and the tensors of a file of others.

    Raises:
        WeightsError: The file cannot be used.
    """
    if weights is None:
        return ViTBackbone(known, **variant), {}
    loaded, state = load_initial(
        ViTBackbone, weights, "vit_base", modalities=known, arguments=variant, bands=bands
    )
    return loaded, tensors_of(state)
