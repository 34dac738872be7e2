"""Parts of MAESTRO that only pretraining needs: sizes, masking rates, decoders and pixel heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from domainssl.backbones.bands import BandPolicy
from domainssl.backbones.maestro.backbone import Fusion
from domainssl.backbones.maestro.inputs import MAESTROInput
from domainssl.errors import ConfigError
from domainssl.nn.blocks import Transformer
from domainssl.nn.structured import TokenAxes

__all__ = [
    "Decoder",
    "MAESTROArchitecture",
    "MAESTROEncoding",
    "MAESTROMasking",
    "MaskToken",
    "PixelHead",
    "SIZES",
    "Size",
    "check_masking",
]

Size = Literal["tiny", "small", "base", "large"]


@dataclass(frozen=True, kw_only=True)
class MAESTROArchitecture:
    """Sizes; None takes the value of the named size.

    Attributes:
        width: Token width of the encoders, a multiple of 4 and at least 16.
        depth: Blocks that a token passes in the encoders, shared ones included.
        heads: Attention heads of the encoders.
        head_dim: Width of an encoder head.
        ffn_ratio: Width of the encoders' feed-forward layers over `width`.
        decoder_width: Token width of the decoders, a multiple of 4 and at least 16.
        decoder_depth: Blocks of a decoder.
        decoder_heads: Attention heads of a decoder.
        decoder_head_dim: Width of a decoder head.
        decoder_ffn_ratio: Width of the decoders' feed-forward layers over `width`, that of the
            encoders, as the released weights have it.
    """

    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    head_dim: int = 64
    ffn_ratio: float | None = None
    decoder_width: int = 512
    decoder_depth: int | None = None
    decoder_heads: int = 16
    decoder_head_dim: int = 32
    decoder_ffn_ratio: float = 4


SIZES: dict[Size, MAESTROArchitecture] = {
    "tiny": MAESTROArchitecture(width=192, depth=12, heads=3, ffn_ratio=2, decoder_depth=1),
    "small": MAESTROArchitecture(width=384, depth=12, heads=6, ffn_ratio=2, decoder_depth=2),
    "base": MAESTROArchitecture(width=768, depth=12, heads=12, ffn_ratio=4, decoder_depth=3),
    "large": MAESTROArchitecture(width=1024, depth=24, heads=16, ffn_ratio=4, decoder_depth=4),
}


@dataclass(frozen=True, kw_only=True)
class MAESTROMasking:
    """How much is hidden, and in which structures.

    Attributes:
        ratio: Share of the tokens of every sequence.
        scale: Hide more in sequences of many dates: `1 - (1 - ratio) / dates^scale`.
        modality: Probability that a whole modality of a sequence of several is hidden.
        bands: Probability of a band group on all dates.
        dates: Probability of a date.
        locations: Probability of a place on all dates.
    """

    ratio: float = 0.75
    scale: float = 0.0
    modality: float | None = 0.25
    bands: float | None = None
    dates: float | None = 0.25
    locations: float | None = 0.25


@dataclass(frozen=True, kw_only=True)
class MAESTROEncoding:
    """What encodes the modalities.

    Attributes:
        inputs: Patch size, groups and bands of every modality.
        size: Named size, `tiny`, `small`, `base` (the released code calls it medium) or `large`.
        architecture: Explicit sizes over the named one.
        fusion: What is encoded together: `group` (dates and modalities of a group), `mod` (dates),
            `monotemp` or `shared` (nothing; one encoder per modality, or one for all).
        shared_depth: How many of the last encoder blocks see all groups at once; None is 3 with
            `group` and `mod`, 0 otherwise.
        position_cells: Cells of the position grid along the footprint; published ones measure
            0.625 m. None is the least common multiple of all grids. For volumes along the longest
            side; None is one per millimetre.
        date_reference: Modality whose date distances in time are counted from; None is the first
            image or volume.
        normalization: Form for all modalities, or one per modality.
        weights: Start from a released checkpoint, one of ours, or an export.
        bands: Where the bands differ from those of the weights: `strict` refuses, `subset` keeps
            the weights of the bands that are there, `average` gives new ones averaged weights.
    """

    inputs: dict[str, MAESTROInput] = field(default_factory=dict)
    size: Size = "base"
    architecture: MAESTROArchitecture = MAESTROArchitecture()
    fusion: Fusion = "group"
    shared_depth: int | None = None
    position_cells: int | None = None
    date_reference: str | None = None
    normalization: str | dict[str, str] = "identity"
    weights: str | None = None
    bands: BandPolicy = "strict"


class Decoder(nn.Module):
    """A light transformer over one sequence."""

    def __init__(self, width: int, sizes: MAESTROArchitecture) -> None:
        super().__init__()
        inner, depth = sizes.decoder_width, sizes.decoder_depth
        assert depth is not None
        self.embed: nn.Module = nn.Linear(width, inner) if width != inner else nn.Identity()
        self.transformer = Transformer(
            inner,
            depth,
            sizes.decoder_heads,
            head_dim=sizes.decoder_head_dim,
            hidden=int(width * sizes.decoder_ffn_ratio),
        )


class MaskToken(nn.Module):
    """One learned token per band group of a modality."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(groups, width))

    def forward(self, axes: TokenAxes) -> Tensor:
        """Return (B, G * D * L, F)."""
        items, groups, dates, places = axes
        token = self.token.view(1, groups, 1, -1)
        return token.expand(items, -1, dates * places, -1).flatten(1, 2)


class PixelHead(nn.Module):
    """Decoder tokens to the pixels of their patch, one linear layer per band group."""

    def __init__(self, width: int, sizes: list[int], pixels: int) -> None:
        super().__init__()
        self.bands = nn.ModuleList(nn.Linear(width, n * pixels) for n in sizes)

    def forward(self, tokens: Tensor, pixels: int) -> Tensor:
        """(B, G * N, F) -> (B, N, P, C), N dates times patches."""
        parts = tokens.unflatten(1, (len(self.bands), -1)).unbind(1)
        out = [
            head(part).unflatten(-1, (pixels, -1))
            for head, part in zip(self.bands, parts, strict=True)
        ]
        return torch.cat(out, dim=-1)


def check_masking(masking: MAESTROMasking) -> MAESTROMasking:
    """Return the rates, or refuse those outside their range."""
    for name, value in vars(masking).items():
        is_fine = value is None or (value >= 0 if name == "scale" else 0 <= value < 1)
        if not is_fine:
            expected = "zero or more" if name == "scale" else "0 <= value < 1"
            raise ConfigError(
                f"model.init_args.masking.{name}: got {value!r}, expected {expected}."
            )
    return masking
