"""Deformable attention on feature maps: every query attends to a few learned positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from domainssl.errors import ConfigError

__all__ = ["DeformableAttention"]

_HEAD_WIDTH, _GROUP_WIDTH = 128, 256


class _ChannelNorm(nn.Module):
    """LayerNorm over the channels of a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        out: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return out.permute(0, 3, 1, 2)


class DeformableAttention(nn.Module):
    """Attention of a map to features sampled at offsets predicted from the map itself.

    Args:
        width: Channels, a multiple of 256: one group of offsets per 256, one head per 128.
        side: Side of the map that the table of relative position biases is made for; other
            sizes stretch the table.
        kernel: Side of the depth-wise kernel that predicts offsets.
        stride: Stride of that kernel: the map is sampled at (side / stride)^2 positions.

    Source: Wang et al., DeCUR, ECCV 2024, section 3.3, and Xia et al. 2022. As in the released
    code, references are divided by R - 1, which shifts them by half a cell and puts the last one
    outside the map (positions are clamped), and offsets are not bounded.
    """

    def __init__(self, width: int, side: int, kernel: int, stride: int) -> None:
        super().__init__()
        if width % _GROUP_WIDTH:
            raise ConfigError(
                f"Deformable attention takes channels in multiples of {_GROUP_WIDTH}, got {width}; "
                "choose a wider encoder or deformable_attention: none."
            )
        self.heads, self.groups = width // _HEAD_WIDTH, width // _GROUP_WIDTH
        group = _GROUP_WIDTH
        self.conv_offset = nn.Sequential(
            nn.Conv2d(group, group, kernel, stride, kernel // 2, groups=group),
            _ChannelNorm(group),
            nn.GELU(),
            nn.Conv2d(group, 2, 1, bias=False),
        )
        self.proj_q, self.proj_k, self.proj_v, self.proj_out = (
            nn.Conv2d(width, width, 1) for _ in range(4)
        )
        self.rpe_table = nn.Parameter(torch.empty(self.heads, 2 * side - 1, 2 * side - 1))
        nn.init.trunc_normal_(self.rpe_table, std=0.01)

    def positions(self, q: Tensor) -> Tensor:
        """(B, C, H, W) queries -> (B·G, R, S, 2) where to sample, (y, x) in [-1, 1]."""
        offset: Tensor = self.conv_offset(rearrange(q, "b (g c) h w -> (b g) c h w", g=self.groups))
        reference = _grid(offset.shape[-2:], 0.5, offset.device)
        return (rearrange(offset, "b p h w -> b h w p").float() + reference).clamp(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), without the residual."""
        h, w = x.shape[-2:]
        q = self.proj_q(x)
        where = self.positions(q)
        grouped = rearrange(x, "b (g c) h w -> (b g) c h w", g=self.groups)
        sampled = _sample(grouped, where)
        sampled = rearrange(sampled, "(b g) c r s -> b (g c) r s", g=self.groups)
        queries, keys, values = (
            rearrange(t, "b (d c) h w -> b d (h w) c", d=self.heads)
            for t in (q, self.proj_k(sampled), self.proj_v(sampled))
        )
        bias = self._bias(where, (h, w)).to(queries.dtype)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        mapped: Tensor = self.proj_out(rearrange(out, "b d (h w) c -> b (d c) h w", h=h, w=w))
        return mapped

    def _bias(self, where: Tensor, size: tuple[int, int]) -> Tensor:
        """Sample the table at half the distance from query to position, (B, Hd, H·W, R·S)."""
        queries = rearrange(_grid(size, 0.0, where.device), "h w p -> 1 (h w) 1 p")
        distance = (queries - rearrange(where, "b r s p -> b 1 (r s) p")) / 2
        batch = len(where) // self.groups
        table = rearrange(self.rpe_table.float(), "(g d) h w -> g d h w", g=self.groups)
        table = table.repeat(batch, 1, 1, 1)
        return rearrange(_sample(table, distance), "(b g) d q k -> b (g d) q k", g=self.groups)


def _grid(size: tuple[int, ...] | torch.Size, shift: float, device: torch.device) -> Tensor:
    """Return `(i + shift) / (n - 1) * 2 - 1` along both axes, (H, W, 2)."""
    axes = [
        (torch.arange(n, dtype=torch.float32, device=device) + shift) / max(1, n - 1) * 2 - 1
        for n in size
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def _sample(x: Tensor, where: Tensor) -> Tensor:
    """Read a map at (y, x) positions in float32, bilinear, zero outside."""
    with torch.autocast(x.device.type, enabled=False):
        out = F.grid_sample(x.float(), where.float().flip(-1), align_corners=True)
    return out.to(x.dtype)
