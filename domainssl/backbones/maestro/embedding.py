"""Patches of images and volumes to tokens, one embedding per group of bands."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from domainssl.errors import ConfigError

__all__ = ["PatchEmbedding", "check_shared"]


class _BandEmbedding(nn.Module):
    """Patches of some bands to tokens; the norm runs over all channels and places of a date."""

    def __init__(self, bands: int, width: int, patch: tuple[int, ...]) -> None:
        super().__init__()
        convolution = nn.Conv3d if len(patch) == 3 else nn.Conv2d
        self.conv = convolution(bands, width, patch, patch)  # type: ignore[arg-type]
        self.norm = nn.GroupNorm(1, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, L, E)."""
        out: Tensor = self.norm(self.conv(x))
        return out.flatten(2).transpose(1, 2)


class PatchEmbedding(nn.Module):
    """One embedding per band group."""

    def __init__(self, sizes: list[int], width: int, patch: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes, self.patch = sizes, patch
        self.bands = nn.ModuleList(_BandEmbedding(n, width, patch) for n in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, C, *S) -> (B, G * D * L, E)."""
        items = x.shape[0]
        parts = x.flatten(0, 1).split(self.sizes, dim=1)
        tokens = [
            embed(part).unflatten(0, (items, -1))
            for embed, part in zip(self.bands, parts, strict=True)
        ]
        return torch.stack(tokens, dim=1).flatten(1, 3)


def check_shared(
    name: str, embedding: str, found: nn.Module, sizes: list[int], patch: tuple[int, ...]
) -> None:
    """Refuse two modalities of different bands or patches under one embedding.

    Raises:
        ConfigError: They differ.
    """
    shared = cast(PatchEmbedding, found)
    if shared.sizes != sizes or shared.patch != patch:
        raise ConfigError(
            f"model.init_args.encoding.inputs.{name}.embedding: {embedding!r} has band groups of "
            f"{shared.sizes} and patches of {_shown(shared.patch)} pixels, but {name!r} has "
            f"{sizes} and {_shown(patch)}. Modalities that share an embedding need equal bands and "
            "patches."
        )


def _shown(patch: tuple[int, ...]) -> int | tuple[int, ...]:
    return patch[0] if len(set(patch)) == 1 else patch
