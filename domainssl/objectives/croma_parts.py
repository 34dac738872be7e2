"""Parts of CROMA that only pretraining needs: sizes, decoder, names of released files, checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from domainssl.backbones.bands import BandPolicy
from domainssl.backbones.croma import reference_name
from domainssl.errors import ConfigError, nearest
from domainssl.modality import Modality
from domainssl.nn.blocks import Transformer
from domainssl.nn.masking import restore_tokens
from domainssl.nn.patching import grid_coordinates
from domainssl.nn.positions import sincos_positions

__all__ = [
    "CROMAArchitecture",
    "CROMAEncoding",
    "Decoder",
    "SIZES",
    "Size",
    "check_pair",
    "per_modality",
    "pretraining_name",
]

Size = Literal["tiny", "base", "large"]


@dataclass(frozen=True, kw_only=True)
class CROMAArchitecture:
    """Sizes; None takes the value of the named size.

    Attributes:
        width: Token width of the encoders.
        depth: Blocks of the optical encoder; radar and joint encoder have half of them.
        heads: Attention heads of the encoders.
        ffn_ratio: Width of feed-forward layers over the token width.
        decoder_width: Token width of the decoder; a multiple of its heads, and of 4 (of 6 for
            volumes) for the position codes.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder; 8 in every published size.
    """

    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    ffn_ratio: float = 4
    decoder_width: int | None = None
    decoder_depth: int = 1
    decoder_heads: int = 8


SIZES: dict[Size, CROMAArchitecture] = {
    "tiny": CROMAArchitecture(width=32, depth=2, heads=4, decoder_width=32),
    "base": CROMAArchitecture(width=768, depth=12, heads=16, decoder_width=512),
    "large": CROMAArchitecture(width=1024, depth=24, heads=16, decoder_width=512),
}


@dataclass(frozen=True, kw_only=True)
class CROMAEncoding:
    """What encodes the two modalities.

    Attributes:
        size: Named size, `tiny` (tests), `base` or `large`.
        architecture: Explicit sizes over the named one.
        patch_size: Side of a patch in pixels or voxels, one number or one per axis.
        radar: Name of the modality whose tokens are the queries of the joint encoder: the radar, or
            one of any two images or volumes.
        optical: Name of the modality that they ask.
        normalization: Form for both modalities, or one per modality.
        weights: Start from these released, torchgeo, pretraining or exported weights, with the
            statistics they were trained with.
        bands: Where the bands differ from those of the weights: `strict` refuses, `subset` keeps
            the weights of the bands that are there, `average` gives new ones averaged weights.
    """

    size: Size = "base"
    architecture: CROMAArchitecture = CROMAArchitecture()
    patch_size: int | tuple[int, ...] = 8
    radar: str = "s1"
    optical: str = "s2"
    normalization: str | dict[str, str] = "mean2std"
    weights: str | None = None
    bands: BandPolicy = "strict"


class Decoder(nn.Module):
    """A light transformer from joint tokens to the pixels of both sensors."""

    def __init__(self, inputs: int, outputs: int, sizes: CROMAArchitecture) -> None:
        super().__init__()
        assert sizes.decoder_width is not None
        self.width = sizes.decoder_width
        self.embed = nn.Linear(inputs, self.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.width).normal_(std=0.02))
        self.transformer = Transformer(
            self.width, sizes.decoder_depth, sizes.decoder_heads, sizes.ffn_ratio
        )
        self.head = nn.Linear(self.width, outputs)

    def forward(self, visible: Tensor, restore: Tensor, grid: tuple[int, ...]) -> Tensor:
        """(B, K, E) joint tokens -> (B, N, P) values of every patch."""
        tokens = restore_tokens(self.embed(visible), restore, self.mask_token)
        coords = grid_coordinates(grid, device=tokens.device)
        tokens = tokens + sincos_positions(coords, self.width).to(tokens.dtype)
        out: Tensor = self.head(self.transformer(tokens))
        return out


def pretraining_name(own: str) -> str:
    """Translate a parameter name of the objective to the published pretraining class."""
    if own.startswith("decoder.transformer."):
        return reference_name(own.replace("transformer.", "decoder.", 1), "pretraining")
    for ours, theirs in (
        ("decoder.embed.", "decoder.encoder_to_decoder."),
        ("decoder.head.", "decoder.linear_output."),
        ("radar_projection.", "global_contrast_loss.radar_proj."),
        ("optical_projection.", "global_contrast_loss.optical_proj."),
        ("logit_scale", "global_contrast_loss.logit_scale"),
    ):
        own = own.replace(ours, theirs)
    return own


def check_pair(known: Mapping[str, Modality], radar: str, optical: str) -> None:
    """Refuse what is not two images or two volumes on one grid."""
    for role, name in (("radar", radar), ("optical", optical)):
        if name not in known:
            raise ConfigError(
                f"CROMA needs a {role} modality named {name!r}; the data have {list(known)}."
                f"{nearest(name, known)} Any two images or volumes will do, such as pet and ct: "
                "set model.init_args.encoding.radar to the one that asks (its tokens are the "
                "queries of "
                "the joint encoder) and model.init_args.encoding.optical to the one that is asked."
            )
    a, b = known[radar], known[optical]
    if a.kind != b.kind or a.kind not in ("image", "volume"):
        raise ConfigError(
            f"CROMA: {radar!r} is of kind {a.kind!r} and {optical!r} of kind {b.kind!r}; expected "
            "two images or two volumes on one grid."
        )
    if a.size and b.size and a.size != b.size:
        raise ConfigError(
            f"CROMA reconstructs both modalities on one grid, but {radar!r} has the size {a.size} "
            f"and {optical!r} {b.size}. Resample them to one spacing in the DataModule."
        )


def per_modality(value: float | dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """Return the mask ratio of every modality."""
    ratios = dict.fromkeys(names, value) if not isinstance(value, dict) else value
    if set(ratios) != set(names):
        raise ConfigError(
            f"model.init_args.mask_ratio: got {sorted(ratios)}, expected a number or one per "
            f"modality {sorted(names)}."
        )
    for name, ratio in ratios.items():
        if not 0 <= ratio < 1:
            raise ConfigError(
                f"model.init_args.mask_ratio: {ratio!r} for {name!r}; expected 0 <= ratio < 1."
            )
    return {name: float(ratio) for name, ratio in ratios.items()}
