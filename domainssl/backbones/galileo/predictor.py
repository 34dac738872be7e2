"""The network that predicts hidden tokens of Galileo from visible ones, used in pretraining alone.

Source: Tseng et al. 2025 (arXiv 2502.09356) and the released code, whose names of parameters are
kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from domainssl.backbones.galileo.encoder import GalileoBlock, GalileoTokens
from domainssl.backbones.galileo.encodings import UNIT_M, GroupEncodings
from domainssl.backbones.galileo.groups import ARRAYS, Array, GalileoGroup
from domainssl.errors import ConfigError
from domainssl.nn.masking import marked_first, take_tokens

__all__ = ["GalileoPredictor", "Predicted", "PredictorSizes"]


@dataclass(frozen=True, kw_only=True)
class PredictorSizes:
    """Sizes of a predictor.

    Attributes:
        width: Token width, a multiple of 16; None is that of the encoder.
        depth: Blocks.
        heads: Attention heads.
        ffn_ratio: Width of the feed-forward layers over that of tokens.
        learned_groups: Train the codes of groups, which are zero at first.
    """

    width: int | None = None
    depth: int = 2
    heads: int = 8
    ffn_ratio: float = 4.0
    learned_groups: bool = True


@dataclass(frozen=True)
class Predicted:
    """What a predictor says about hidden tokens.

    Attributes:
        tokens: (B, K, E), of the width of the encoder.
        order: Which token of the row it is (`GalileoTokens.flat`), int64 (B, K).
        counted: bool (B, K); False fills up where an item has fewer hidden tokens.
    """

    tokens: Tensor
    order: Tensor
    counted: Tensor


class GalileoPredictor(GroupEncodings):
    """Predict hidden tokens: queries look at the visible ones, never at each other.

    Args:
        groups: Groups of the encoder, in order.
        inputs: Token width of the encoder.
        sizes: Sizes.
        max_steps: Longest series.

    Raises:
        ConfigError: Sizes do not fit.
    """

    def __init__(
        self, groups: Sequence[GalileoGroup], inputs: int, sizes: PredictorSizes, max_steps: int
    ) -> None:
        width = sizes.width or inputs
        super().__init__(groups, width, max_steps, is_learned=sizes.learned_groups)
        if width % sizes.heads:
            raise ConfigError(
                f"predictor.width: got {width}, expected a multiple of the {sizes.heads} heads."
            )
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.input_norm = nn.LayerNorm(inputs)
        self.encoder_to_decoder_embed = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            GalileoBlock(width, sizes.heads, sizes.ffn_ratio, 0.0) for _ in range(sizes.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.to_output_embed = nn.Linear(width, inputs)
        self.reset_linear()

    def forward(
        self,
        seen: GalileoTokens,
        hidden: Mapping[Array, Tensor],
        months: Mapping[Array, Tensor],
        *,
        patch_size: int,
        gsd_m: float = UNIT_M,
    ) -> Predicted:
        """Predict what is hidden.

        Args:
            seen: What the encoder said.
            hidden: True where to predict, bool by array, of the shapes of `seen.visible`.
            months: int (B, T), 0 to 11, of `space_time` and `time`.
            patch_size: Side of a patch in pixels.
            gsd_m: Side of a pixel in metres.

        Raises:
            DataError: Series are too long.
        """
        row, visible = seen.flat()
        wanted = torch.cat([hidden[a].flatten(1) for a in ARRAYS if a in seen.tokens], 1)
        shapes = {array: mask.shape[1:] for array, mask in seen.visible.items()}
        codes = self.encodings(shapes, months, patch_size * gsd_m / UNIT_M)
        codes = codes.expand(len(row), -1, -1)
        order, _, keys = marked_first(visible)
        context = self.encoder_to_decoder_embed(self.input_norm(take_tokens(row, order)))
        context = context + take_tokens(codes, order)
        order, counted, _ = marked_first(wanted)
        x = self.mask_token + take_tokens(codes, order)
        for block in self.blocks:
            x = block(x, keys, context)
        return Predicted(self.to_output_embed(self.norm(x)), order, counted)
