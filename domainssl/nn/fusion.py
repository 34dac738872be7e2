"""Fuse the tokens of several modalities on one patch grid into one token per patch.

Source: OmniSat (arXiv 2404.08351), section 3.2. Parameter names are those of the published code.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from domainssl.errors import ConfigError
from domainssl.nn.attention import AttentionPath
from domainssl.nn.blocks import CrossAttention, SelfAttention, TransformerBlock, drop_path
from domainssl.nn.relative import (
    RelativeTable,
    aligned_buckets,
    bucket_table,
    legacy_buckets,
    relative_attention,
)

__all__ = ["Combiner", "FusionBlock", "ReadoutBlock", "RelativeLayout"]

RelativeLayout = Literal["aligned", "legacy"]


def _heads(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def _terms(table: RelativeTable, q: Tensor, first_head: bool) -> Tensor:
    """Return the terms per bucket, (B, Hd, Q, d) -> (B, Hd, Q, 8)."""
    terms: Tensor = table(q[:, :1] if first_head else q)
    return terms.expand(-1, q.shape[1], -1, -1)


class _MLP(nn.Module):
    def __init__(self, width: int, ratio: float, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.fc2 = nn.Linear(int(width * ratio), width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))
        return out


class _SelfAttention(SelfAttention):
    first_head = False  # see FusionBlock

    def __init__(self, width: int, heads: int, dropout: float, attention_dropout: float) -> None:
        nn.Module.__init__(self)
        self.heads, self.dropout, self.attention_dropout = heads, dropout, attention_dropout
        self.path: AttentionPath = "fused"
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rpe_k = RelativeTable(width // heads)

    def forward(self, x: Tensor, buckets: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        """(B, N, E), int64 (N, N) and bool (B, N) -> (B, N, E)."""
        q, k, v = (_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        terms = _terms(self.rpe_k, q * q.shape[-1] ** -0.5, self.first_head)
        dropout = self.attention_dropout if self.training else 0.0
        y = relative_attention(q, k, v, terms, buckets, valid, dropout=dropout, path=self.path)
        y = self.proj(rearrange(y, "b h n d -> b n (h d)"))
        return F.dropout(y, self.dropout, self.training)


class _ReadoutAttention(CrossAttention):
    """One query per output position, the same for all items: learned, or one with fixed codes."""

    pos_embed: nn.Parameter | None
    first_head = False  # see FusionBlock

    def __init__(
        self, width: int, heads: int, positions: int | None, dropout: float,
        attention_dropout: float,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.heads, self.dropout, self.attention_dropout = heads, dropout, attention_dropout
        self.path: AttentionPath = "fused"
        self.q_learned = nn.Parameter(torch.zeros(1, 1, width))
        if positions is None:
            self.pos_embed = None
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, positions, width))
        self.wk = nn.Linear(width, width)
        self.wv = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.rpe_k = RelativeTable(width // heads)

    def forward(  # type: ignore[override]
        self, x: Tensor, buckets: Tensor, valid: Tensor, codes: Tensor | None = None
    ) -> Tensor:
        """(B, N, E), int64 (1 + P, N), bool (B, N), codes (1 + P, E) -> (B, 1 + P, E)."""
        # A key bias adds the same number to all keys of a query, which the softmax takes away.
        bias = self.wk.bias.detach() + 0 * self.wk.bias
        k, v = F.linear(x, self.wk.weight, bias), self.wv(x)
        places = self.pos_embed if codes is None else codes
        assert places is not None
        q = (self.q_learned + places).to(k.dtype).expand(x.shape[0], -1, -1)
        q, k, v = (_heads(part, self.heads) for part in (q, k, v))
        terms = _terms(self.rpe_k, q, self.first_head)  # unscaled, as published
        dropout = self.attention_dropout if self.training else 0.0
        y = relative_attention(q, k, v, terms, buckets, valid, dropout=dropout, path=self.path)
        y = self.proj(rearrange(y, "b h n d -> b n (h d)"))
        return F.dropout(y, self.dropout, self.training)


class FusionBlock(TransformerBlock):
    """Pre-norm self-attention with relative terms, and a feed-forward network, with residuals.

    With `first_head` the queries of the first head give the relative terms of all heads, as the
    released code of AnySat has it; else every head its own.
    """

    def __init__(
        self, width: int, heads: int, ratio: float, dropout: float, attention_dropout: float,
        drop_path: float, epsilon: float = 1e-6, first_head: bool = False,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=epsilon)
        self.attn = _SelfAttention(width, heads, dropout, attention_dropout)
        self.attn.first_head = first_head
        self.norm2 = nn.LayerNorm(width, eps=epsilon)
        self.mlp = _MLP(width, ratio, dropout)

    def forward(self, x: Tensor, buckets: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        """(B, N, E) -> (B, N, E)."""
        x = x + drop_path(self.attn(self.norm1(x), buckets, valid), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)


class ReadoutBlock(TransformerBlock):
    """Cross-attention of learned queries without residual, and a feed-forward network with one.

    With `positions` None the codes of the queries come with every call; `first_head` as in
    `FusionBlock`.
    """

    def __init__(
        self, width: int, heads: int, positions: int | None, ratio: float, dropout: float,
        attention_dropout: float, drop_path: float, first_head: bool = False,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _ReadoutAttention(width, heads, positions, dropout, attention_dropout)
        self.attn.first_head = first_head
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _MLP(width, ratio, dropout)

    def forward(  # type: ignore[override]
        self, x: Tensor, buckets: Tensor, valid: Tensor, codes: Tensor | None = None
    ) -> Tensor:
        """(B, N, E) -> (B, 1 + P, E)."""
        y: Tensor = self.attn(self.norm1(x), buckets, valid, codes)
        return y + drop_path(self.mlp(self.norm2(y)), self.drop_path, self.training)


class Combiner(nn.Module):
    """Self-attention over the tokens of all modalities and a readout of one token per patch.

    Args:
        width: Token width E.
        depth: Self-attention blocks.
        heads: Attention heads.
        grid: Patches along each axis.
        ratio: Width of the feed-forward layers over E.
        dropout: After attention and inside the feed-forward layers.
        attention_dropout: On the attention weights.
        drop_path: Rate of dropped branches of the last block; it grows linearly from zero.
        layout: Which pairs of tokens count as near, see `nn.relative`.
        proportions: Lengths of a patch's sides, in the unit of distances; None counts patches.

    Raises:
        ConfigError: The width is no multiple of the heads, or the layout `legacy`, a square, is
            asked for a volume.
    """

    buckets: Tensor

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        grid: tuple[int, ...],
        ratio: float,
        dropout: float,
        attention_dropout: float,
        drop_path: float,
        layout: RelativeLayout,
        proportions: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"Attention width {width} is not a multiple of the {heads} heads.")
        if layout == "legacy" and len(grid) != 2:
            raise ConfigError(
                "rpe_layout: 'legacy' lays tokens on a square, which volumes have not; set it to "
                "'aligned'."
            )
        self.layout, self.gradient_checkpointing = layout, False
        positions = 1 + math.prod(grid)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, positions, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.register_buffer(
            "buckets", bucket_table(grid, proportions=proportions), persistent=False
        )
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            FusionBlock(width, heads, ratio, dropout, attention_dropout, rate) for rate in rates
        )
        last = ReadoutBlock(width, heads, positions, ratio, dropout, attention_dropout, drop_path)
        self.blocks.append(last)

    def sequence(self, tokens: list[Tensor], hidden: Tensor | None) -> Tensor:
        """Lay tokens of all modalities, with positions, behind the class token.

        Args:
            tokens: (B, P, E) per modality.
            hidden: bool (B, M·P); True tokens, their position included, become the mask token.

        Returns:
            (B, 1 + M·P, E).
        """
        position = self.pos_embed[:, 1:]
        z = torch.cat([t + position.to(t.dtype) for t in tokens], dim=1)
        if hidden is not None:
            z = torch.where(hidden.unsqueeze(-1), self.mask_token.to(z.dtype), z)
        first = (self.cls_token + self.pos_embed[:, :1]).to(z.dtype)
        return torch.cat([first.expand(z.shape[0], -1, -1), z], dim=1)

    def tables(self, modalities: int) -> tuple[Tensor, Tensor]:
        """Return the buckets of self-attention (1 + M·P)² and of the readout, (1 + P, 1 + M·P)."""
        aligned = aligned_buckets(self.buckets, modalities)
        own = aligned
        if self.layout == "legacy":
            own = legacy_buckets(self.buckets, modalities)
        return own, aligned[: len(self.buckets)]

    def forward(
        self, tokens: list[Tensor], valid: list[Tensor], hidden: Tensor | None = None
    ) -> Tensor:
        """Fuse.

        Args:
            tokens: (B, P, E) per modality.
            valid: bool (B, P) per modality; False tokens are not attended to.
            hidden: bool (B, M·P), see `sequence`.

        Returns:
            (B, 1 + P, E), the class token first.
        """
        x = self.sequence(tokens, hidden)
        attended = F.pad(torch.cat(valid, dim=1), (1, 0), value=True)
        own, readout = self.tables(len(tokens))
        for i, block in enumerate(self.blocks):
            table = readout if i == len(self.blocks) - 1 else own
            if self.gradient_checkpointing and self.training and x.requires_grad:
                x = checkpoint(block, x, table, attended, use_reentrant=False)
            else:
                x = block(x, table, attended)
        return x
