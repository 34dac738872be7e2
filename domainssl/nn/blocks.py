"""Pre-norm transformer blocks over tokens of any origin."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from domainssl.errors import ConfigError
from domainssl.nn.alibi import DistanceBias
from domainssl.nn.attention import AttentionPath, attention

__all__ = [
    "CrossAttention",
    "FeedForward",
    "SelfAttention",
    "Transformer",
    "TransformerBlock",
    "blocks_of",
    "compile_blocks",
    "drop_path",
    "set_attention_path",
]


def _check_heads(width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ConfigError(f"Attention width {width} is not a multiple of the {heads} heads.")


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Drop a residual branch of whole items, (B, ...), and scale what stays.

    Source: Huang et al., ECCV 2016 (stochastic depth, arXiv 1603.09382).
    """
    if rate == 0 or not training:
        return x
    keep = x.new_empty((len(x), *[1] * (x.ndim - 1))).bernoulli_(1 - rate)
    return x * keep / (1 - rate)


def _split(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def _merge(x: Tensor) -> Tensor:
    return rearrange(x, "b h n d -> b n (h d)")


class SelfAttention(nn.Module):
    """`Out(softmax(q k^T / sqrt(d) + bias) v)` of the normalised tokens."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        epsilon: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if head_dim is None:
            _check_heads(width, heads)
        inner = width if head_dim is None else heads * head_dim
        self.heads = heads
        self.path: AttentionPath = "fused"
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.qkv = nn.Linear(width, 3 * inner, bias=qkv_bias)
        self.out = nn.Linear(inner, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: DistanceBias | None = None) -> Tensor:
        """(B, N, E) -> (B, N, E), without the residual."""
        q, k, v = (_split(part, self.heads) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        share = self.drop.p if self.training else 0.0
        mixed = _merge(attention(q, k, v, bias, path=self.path, dropout=share))
        out: Tensor = self.drop(self.out(mixed))
        return out


class CrossAttention(nn.Module):
    """Queries from one set of tokens, keys and values from another; one norm serves both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        _check_heads(width, heads)
        self.heads = heads
        self.path: AttentionPath = "fused"
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, bias: DistanceBias | None = None) -> Tensor:
        """(B, Q, E) and (B, K, E) -> (B, Q, E), without the residual."""
        x, context = self.norm(x), self.norm(context)
        q, k, v = (
            _split(part, self.heads) for part in (self.q(x), self.k(context), self.v(context))
        )
        out: Tensor = self.out(_merge(attention(q, k, v, bias, path=self.path)))
        return out


class FeedForward(nn.Module):
    """`Lin(GELU(Lin(LN(x))))`, without the residual."""

    def __init__(
        self,
        width: int,
        ratio: float = 4,
        hidden: int | None = None,
        *,
        epsilon: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = int(width * ratio) if hidden is None else hidden
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.up = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.down = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        out: Tensor = self.drop(self.down(self.drop(self.act(self.up(self.norm(x))))))
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention where wanted, and a feed-forward network, with residuals."""

    is_block = True  # see `blocks_of`
    drop_path: float = 0.0  # share of items that skip a branch while training

    def __init__(
        self,
        width: int,
        heads: int,
        ratio: float = 4,
        *,
        cross: bool = False,
        head_dim: int | None = None,
        hidden: int | None = None,
        qkv_bias: bool = False,
        epsilon: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(
            width, heads, head_dim, qkv_bias=qkv_bias, epsilon=epsilon, dropout=dropout
        )
        self.cross = CrossAttention(width, heads) if cross else None
        self.feed_forward = FeedForward(width, ratio, hidden, epsilon=epsilon, dropout=dropout)

    def forward(
        self,
        x: Tensor,
        bias: DistanceBias | None = None,
        context: Tensor | None = None,
        cross_bias: DistanceBias | None = None,
    ) -> Tensor:
        """(B, N, E) -> (B, N, E)."""
        x = x + self._dropped(self.attention(x, bias))
        if self.cross is not None:
            assert context is not None
            x = x + self._dropped(self.cross(x, context, cross_bias))
        return x + self._dropped(self.feed_forward(x))

    def _dropped(self, branch: Tensor) -> Tensor:
        return drop_path(branch, self.drop_path, self.training)


class Transformer(nn.Module):
    """A stack of blocks and a final LayerNorm.

    Args:
        width: Token width E.
        depth: Number of blocks.
        heads: Attention heads.
        ratio: Width of the feed-forward layer over E.
        cross: Blocks attend to a context as well.
        head_dim: Width of a head in self-attention; None is `width / heads`.
        hidden: Width of the feed-forward layer; None is `ratio * width`.
        qkv_bias: Give queries, keys and values of self-attention a bias.
        epsilon: Added to the variance in the norms of self-attention and feed-forward.
        dropout: Share dropped in self-attention (weights and result) and feed-forward (both
            layers) while training, from the global generator.
        drop_path: Share of items that skip a branch of the last block while training, less in
            those before, from the global generator.

    Set `gradient_checkpointing` to recompute blocks in the backward pass.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        ratio: float = 4,
        *,
        cross: bool = False,
        head_dim: int | None = None,
        hidden: int | None = None,
        qkv_bias: bool = False,
        epsilon: float = 1e-5,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        blocks = [
            TransformerBlock(
                width,
                heads,
                ratio,
                cross=cross,
                head_dim=head_dim,
                hidden=hidden,
                qkv_bias=qkv_bias,
                epsilon=epsilon,
                dropout=dropout,
            )
            for _ in range(depth)
        ]
        for number, block in enumerate(blocks):
            block.drop_path = drop_path * number / max(1, depth - 1)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=epsilon)

    def forward(
        self,
        x: Tensor,
        bias: DistanceBias | None = None,
        context: Tensor | None = None,
        cross_bias: DistanceBias | None = None,
    ) -> Tensor:
        """(B, N, E) -> (B, N, E)."""
        for block in self.blocks:
            if self.gradient_checkpointing and self.training and x.requires_grad:
                x = checkpoint(block, x, bias, context, cross_bias, use_reentrant=False)
            else:
                x = block(x, bias, context, cross_bias)
        out: Tensor = self.norm(x)
        return out

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """Return tokens at four depths, as MONAI's UNETR takes them from a ViT; (B, N, E) each.

        They are what the blocks L/4, L/2 and 3L/4 (from 0, of L) return, and the normalised tokens
        of the last one.
        """
        states = []
        for block in self.blocks:
            if self.gradient_checkpointing and self.training and x.requires_grad:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            states.append(x)
        chosen = [states[len(states) * part // 4] for part in (1, 2, 3)]
        return [*chosen, self.norm(x)]


def set_attention_path(module: nn.Module, path: AttentionPath) -> None:
    """Choose how every attention layer below `module` computes (see `nn.attention`)."""
    for part in module.modules():
        if isinstance(part, SelfAttention | CrossAttention):
            part.path = path


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the parts of a network that are compiled, and sharded, one by one.

    They carry `is_block = True`: transformer blocks, and residual blocks of convolutions.
    """
    return [part for part in module.modules() if getattr(part, "is_block", False)]


def compile_blocks(module: nn.Module) -> int:
    """Compile every block below `module` in place; return how many there are."""
    blocks = blocks_of(module)
    for block in blocks:
        block.compile()
    return len(blocks)
