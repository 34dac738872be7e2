"""What every encoder of one modality is, whatever library it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from domainssl.errors import ConfigError

__all__ = ["Encoded", "Encoder", "MapEncoder", "refuse_attention", "seen_cells"]


@dataclass(frozen=True, kw_only=True)
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
        levels: Channels and stride of every map of `pyramid`; empty where all have one size.
    """

    width: int
    levels: tuple[tuple[int, int], ...] = ()
    is_own = False
    band_tensors: Mapping[str, str] = {}  # see `Backbone.band_tensors`

    def forward(self, x: Tensor, valid: Tensor, attention: nn.ModuleDict | None = None) -> Encoded:
        """Encode normalised values (B, C, *S) with their bool validity (B, *S)."""
        raise NotImplementedError

    def stages(
        self, x: Tensor, valid: Tensor, attention: nn.ModuleDict | None = None
    ) -> list[Tensor]:
        """Return the maps of the stages, (B, E_i, *S_i), coarser each time."""
        out = self(x, valid, attention)
        return [out.tokens.transpose(1, 2).unflatten(2, out.grid)]

    def pyramid(self, x: Tensor, valid: Tensor) -> list[Tensor]:
        """Return the maps that decoders of dense tasks take, finest first, (B, E_i, *S_i)."""
        return self.stages(x, valid)


class MapEncoder(Encoder):
    """A network whose last map is the tokens, as convolutional ones and Swin have it."""

    def forward(self, x: Tensor, valid: Tensor, attention: nn.ModuleDict | None = None) -> Encoded:
        """Encode; tokens are the cells of the last map, pooled is its mean."""
        last = self.stages(x, valid, attention)[-1]
        grid = tuple(last.shape[2:])
        tokens = last.flatten(2).transpose(1, 2)
        return Encoded(
            tokens=tokens,
            pooled=last.flatten(2).mean(2),
            grid=grid,
            token_valid=seen_cells(valid, grid),
        )


def refuse_attention(attention: nn.ModuleDict | None, encoder: str) -> None:
    """Refuse deformable attention for an encoder without stages of two axes.

    Raises:
        ConfigError: There is some.
    """
    if attention is not None:
        raise ConfigError(
            f"deformable_attention goes behind the stages of a 2D ResNet; {encoder} has none. "
            "Set deformable_attention: none."
        )


def seen_cells(valid: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return which cells of a map saw a valid pixel.

    Args:
        valid: bool (B, *S).
        grid: Cells per axis.

    Returns:
        bool (B, N), cells in row-major order.
    """
    pool = F.adaptive_max_pool3d if len(grid) == 3 else F.adaptive_max_pool2d
    shares = pool(valid.unsqueeze(1).float(), cast(tuple[int, int, int], grid))
    return shares.flatten(1) > 0
