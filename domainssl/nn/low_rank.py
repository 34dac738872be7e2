"""Attention over channels times attention over positions: the blocks of LESS ViT.

Source: Si et al., "Towards Scalable Foundation Model for Multi-modal and Hyperspectral Geospatial
Data" (arXiv 2503.12843), section 3, and its released code; options of the second version are
those of arXiv 2605.18541.

Tokens lie on a grid of channels and positions, (B, C, N, E). Row 0 of the channels and column 0 of
the positions hold class tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from domainssl.errors import ConfigError
from domainssl.nn.blocks import FeedForward, drop_path

__all__ = ["LowRankAttention", "LowRankBlocks", "LowRankSizes", "perception_mask"]

_EPSILON = 1e-6  # of every LayerNorm


@dataclass(frozen=True, kw_only=True)
class LowRankSizes:
    """How one attention over channels and positions is made of two.

    Attributes:
        channel_width: Values per head of the attention over channels; the attention over
            positions has `width / heads / channel_width`.
        ranks: Pairs of attention maps per head whose products are added.
        rank_values: The ranks share their values (first version), or each has its own (second).
        rank_reduction: The ranks are added (first version) or averaged (second).
        qkv_bias: Queries, keys and values have a bias.
        layer_scale: Initial factor of every residual branch and channel; None for no factors.
        dropout: Share dropped in attention and feed-forward layers while training.
        drop_path: Share of items whose branch is dropped in the last block; less in those before.
    """

    channel_width: int = 4
    ranks: int = 1
    rank_values: Literal["shared", "per_rank"] = "shared"
    rank_reduction: Literal["sum", "mean"] = "sum"
    qkv_bias: bool = True
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0


def perception_mask(coords: Tensor, step_m: float, radius_m: float) -> Tensor:
    """Return which positions may attend to each other.

    Args:
        coords: Positions in patches, (N, 2) or (B, N, 2).
        step_m: Side of a patch in metres.
        radius_m: Largest distance.

    Returns:
        bool (1 or B, 1, 1 + N, 1 + N); the class position in front sees and is seen by all.
    """
    if coords.ndim == 2:
        coords = coords.unsqueeze(0)
    apart = (coords.unsqueeze(2) - coords.unsqueeze(1)).double().square().sum(-1)
    near = apart * step_m**2 <= radius_m**2 * (1 + 1e-9)
    return F.pad(near, (1, 0, 1, 0), value=True).unsqueeze(1)


class _Pool(nn.Module):
    """One attention step in which entry 0 of a sequence asks all of them."""

    def __init__(self, width: int, heads: int, sizes: LowRankSizes) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=_EPSILON)
        self.q = nn.Linear(width, width, bias=sizes.qkv_bias)
        self.kv = nn.Linear(width, 2 * width, bias=sizes.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(sizes.dropout)

    def forward(self, x: Tensor, attended: Tensor | None = None) -> Tensor:
        """Add to entry 0 what it finds.

        Args:
            x: (B, M, L, W); the sequence is L long.
            attended: bool (B, L); nothing is taken from False entries.

        Returns:
            (B, M, W).
        """
        normed = self.norm(x)
        q = rearrange(self.q(normed[:, :, :1]), "b m l (h d) -> (b m) h l d", h=self.heads)
        k, v = rearrange(self.kv(normed), "b m l (two h d) -> two (b m) h l d", two=2, h=self.heads)
        mask = None
        if attended is not None:
            mask = attended[:, None, None, None].expand(-1, x.shape[1], -1, -1, -1).flatten(0, 1)
        share = self.drop.p if self.training else 0.0
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=share)
        found = rearrange(found, "(b m) h 1 d -> b m (h d)", b=x.shape[0])
        out: Tensor = x[:, :, 0] + self.drop(self.proj(found))
        return out


class _Branch(nn.Module):
    """Self-attention along one axis with several attention maps per head."""

    def __init__(self, width: int, heads: int, sizes: LowRankSizes) -> None:
        super().__init__()
        self.heads, self.ranks = heads, sizes.ranks
        self.norm = nn.LayerNorm(width, eps=_EPSILON)
        self.qk = nn.Linear(width, 2 * width * sizes.ranks, bias=sizes.qkv_bias)
        copies = sizes.ranks if sizes.rank_values == "per_rank" else 1
        self.v = nn.Linear(width, width * copies, bias=sizes.qkv_bias)
        self.dropout = sizes.dropout

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend.

        Args:
            x: (B, L, W).
            mask: bool, broadcastable to (B, 1, L, L); True where a query may see a key.

        Returns:
            (B, ranks, heads, L, W / heads).
        """
        x = self.norm(x)
        q, k = rearrange(
            self.qk(x), "b l (two h r d) -> two b (r h) l d", two=2, h=self.heads, r=self.ranks
        )
        v = rearrange(self.v(x), "b l (h r d) -> b r h l d", h=self.heads, d=q.shape[-1])
        v = v.expand(-1, self.ranks, -1, -1, -1).flatten(1, 2)
        share = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=share)
        return found.unflatten(1, (self.ranks, self.heads))


class LowRankAttention(nn.Module):
    """`sum_r A_c^r ⊗ A_s^r`: attention over channels and over positions, combined per head.

    Args:
        width: Token width E.
        heads: Attention heads.
        sizes: How a head is split.

    Raises:
        ConfigError: The widths do not divide.
    """

    def __init__(self, width: int, heads: int, sizes: LowRankSizes) -> None:
        super().__init__()
        if heads < 1 or sizes.channel_width < 1 or width % (heads * sizes.channel_width):
            raise ConfigError(
                f"LESS: width {width} is not a multiple of {heads} heads times channel_width "
                f"{sizes.channel_width}; choose one that is."
            )
        channel, spatial = heads * sizes.channel_width, width // sizes.channel_width
        self.mean_over_ranks = sizes.rank_reduction == "mean"
        self.norm = nn.LayerNorm(width, eps=_EPSILON)
        self.to_channels, self.to_positions = nn.Linear(width, channel), nn.Linear(width, spatial)
        self.channel_pool = _Pool(channel, heads, sizes)
        self.position_pool = _Pool(spatial, heads, sizes)
        self.channels = _Branch(channel, heads, sizes)
        self.positions = _Branch(spatial, heads, sizes)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(sizes.dropout)

    def forward(
        self, x: Tensor, near: Tensor | None = None, attended: Tensor | None = None
    ) -> Tensor:
        """Compute the branch without the residual.

        Args:
            x: (B, C, N, E) with class tokens in row and column 0.
            near: Positions that may see each other, bool (1 or B, 1, N, N).
            attended: Channels that count, bool (B, C); others change no other channel.

        Returns:
            (B, C, N, E).
        """
        x = self.norm(x)
        by_channel = self.channel_pool(self.to_channels(x))
        by_position = self.position_pool(self.to_positions(x).transpose(1, 2), attended)
        keys = None if attended is None else attended[:, None, None]
        over_channels = self.channels(by_channel, keys)
        over_positions = self.positions(by_position, near)
        return self.combine(over_channels, over_positions)

    def combine(self, over_channels: Tensor, over_positions: Tensor) -> Tensor:
        """Return the Kronecker products of both, summed over ranks, (B, C, N, E).

        Args:
            over_channels: (B, R, H, C, a).
            over_positions: (B, R, H, N, s), with H·a·s = E.
        """
        joint = torch.einsum("brhca,brhns->bcnhas", over_channels, over_positions).flatten(3)
        if self.mean_over_ranks:
            joint = joint / over_channels.shape[1]
        out: Tensor = self.drop(self.out(joint))
        return out


class _Block(nn.Module):
    """Low-rank attention and a feed-forward network, with residuals."""

    is_block = True  # see `nn.blocks.blocks_of`

    def __init__(self, width: int, heads: int, ratio: float, sizes: LowRankSizes) -> None:
        super().__init__()
        self.attention = LowRankAttention(width, heads, sizes)
        self.feed_forward = FeedForward(width, ratio, epsilon=_EPSILON, dropout=sizes.dropout)
        self.drop_path = sizes.drop_path
        scale = sizes.layer_scale
        self.scales = nn.ParameterList(
            [] if scale is None else [nn.Parameter(torch.full((width,), scale)) for _ in range(2)]
        )

    def forward(self, x: Tensor, near: Tensor | None, attended: Tensor | None) -> Tensor:
        """(B, C, N, E) -> (B, C, N, E)."""
        x = x + self._branch(0, self.attention(x, near, attended))
        return x + self._branch(1, self.feed_forward(x))

    def _branch(self, index: int, x: Tensor) -> Tensor:
        scaled = x * self.scales[index] if len(self.scales) else x
        return drop_path(scaled, self.drop_path, self.training)


class LowRankBlocks(nn.Module):
    """A stack of blocks and a final LayerNorm.

    Set `gradient_checkpointing` to recompute blocks in the backward pass.

    Args:
        width: Token width E.
        depth: Number of blocks.
        heads: Attention heads.
        ratio: Width of the feed-forward layer over E.
        sizes: How a head is split, and dropout.

    Raises:
        ConfigError: The widths do not divide.
    """

    def __init__(
        self, width: int, depth: int, heads: int, ratio: float, sizes: LowRankSizes
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        rates = torch.linspace(0, sizes.drop_path, depth).tolist()
        self.blocks = nn.ModuleList(
            _Block(width, heads, ratio, LowRankSizes(**{**vars(sizes), "drop_path": rate}))
            for rate in rates
        )
        self.norm = nn.LayerNorm(width, eps=_EPSILON)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(
        self, x: Tensor, near: Tensor | None = None, attended: Tensor | None = None
    ) -> Tensor:
        """(B, C, N, E) -> (B, C, N, E); see `LowRankAttention.forward`."""
        for block in self.blocks:
            if self.gradient_checkpointing and self.training and x.requires_grad:
                x = checkpoint(block, x, near, attended, use_reentrant=False)
            else:
                x = block(x, near, attended)
        out: Tensor = self.norm(x)
        return out
