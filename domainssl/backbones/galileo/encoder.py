"""The transformer of Galileo: tokens of groups in four arrays, flexible patches, exit depths.

Source: Tseng et al. 2025 (arXiv 2502.09356) and the released code, whose names of parameters are
kept; patches of other sizes after Beyer et al. 2023 (FlexiViT).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from domainssl.backbones.galileo.encodings import UNIT_M, GroupEncodings
from domainssl.backbones.galileo.groups import ARRAYS, Array, GalileoGroup
from domainssl.errors import ConfigError, DataError
from domainssl.nn.blocks import drop_path
from domainssl.nn.masking import marked_first, mean_of_valid, take_tokens

__all__ = [
    "GalileoArchitecture",
    "GalileoBlock",
    "GalileoEncoder",
    "GalileoTokens",
    "resized_kernel",
]


@dataclass(frozen=True, kw_only=True)
class GalileoArchitecture:
    """Sizes of the encoder; defaults are those of the released nano model.

    Attributes:
        width: Token width, a multiple of 16.
        depth: Blocks.
        heads: Attention heads.
        ffn_ratio: Width of the feed-forward layers over that of tokens.
        max_patch_size: Side of the stored kernels in pixels, the largest patch.
        max_steps: Longest series.
        drop_path: Share of items that skip a branch while training.
    """

    width: int = 128
    depth: int = 4
    heads: int = 8
    ffn_ratio: float = 4.0
    max_patch_size: int = 8
    max_steps: int = 24
    drop_path: float = 0.1


@dataclass(frozen=True)
class GalileoTokens:
    """Tokens by array, and which of them the encoder saw.

    Attributes:
        tokens: `space_time` (B, h, w, T, G, E), `space` (B, h, w, G, E), `time` (B, T, G, E),
            `static` (B, G, E); arrays without a group in the batch are left out.
        visible: bool, the same shapes without E.
    """

    tokens: dict[Array, Tensor]
    visible: dict[Array, Tensor]

    def flat(self, names: Sequence[Array] = ARRAYS) -> tuple[Tensor, Tensor]:
        """Return the tokens of some arrays in one row (B, N, E), and which are visible (B, N)."""
        found = [name for name in names if name in self.tokens]
        tokens = [self.tokens[name].flatten(1, -2) for name in found]
        return torch.cat(tokens, 1), torch.cat([self.visible[n].flatten(1) for n in found], 1)

    def mean(self) -> Tensor:
        """Return the mean of the visible tokens, (B, E); zero where there is none."""
        return mean_of_valid(*self.flat())

    def per_patch(self) -> tuple[Tensor, Tensor]:
        """Return the mean at every patch, (B, h·w, E), and where anything was visible (B, h·w).

        Tokens of time and static groups count at every patch. Without an array in space there is
        one place.
        """
        totals: list[Tensor] = []
        counts: list[Tensor] = []
        for name, tokens in self.tokens.items():
            in_space = name in ("space_time", "space")
            weight = self.visible[name].to(tokens.dtype).unsqueeze(-1)
            tokens, weight = (
                (x.flatten(1, 2).flatten(2, -2) if in_space else x.flatten(1, -2).unsqueeze(1))
                for x in (tokens * weight, weight)
            )
            totals.append(tokens.sum(2))
            counts.append(weight.sum(2))
        total, count = (sum(parts[1:], parts[0]) for parts in (totals, counts))
        return total / count.clamp(min=1), count.squeeze(-1) > 0


@cache
def _shrinking(stored: int, side: int) -> Tensor:
    """Return the pseudo-inverse of bicubic downsampling of a kernel, (side², stored²)."""
    with torch.inference_mode(False), torch.no_grad():
        units = torch.eye(stored**2).unflatten(1, (1, stored, stored))
        small = F.interpolate(
            units, size=(side, side), mode="bicubic", antialias=True, align_corners=False
        )
        return torch.linalg.pinv(small.flatten(1).double()).float()


def resized_kernel(kernel: Tensor, side: int) -> Tensor:
    """Return a patch kernel for smaller patches: what gives the same tokens of shrunk patches.

    Args:
        kernel: (E, C, P, P).
        side: The side wanted, at most P.

    Returns:
        float32 (E, C, side, side); the kernel itself where the side is P.

    Source: Beyer et al. 2023 (FlexiViT), section 3.4.
    """
    stored = kernel.shape[-1]
    if side == stored:
        return kernel
    with torch.autocast(kernel.device.type, enabled=False):
        flat = kernel.float().flatten(2)
        return (flat @ _shrinking(stored, side).to(flat.device).T).unflatten(2, (side, side))


class _Patches(nn.Module):
    def __init__(self, bands: int, width: int, side: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(bands, width, side, stride=side)

    def forward(self, x: Tensor, side: int) -> Tensor:
        """(N, C, H, W) -> (N, h, w, E)."""
        kernel = resized_kernel(self.proj.weight, side)
        return F.conv2d(x, kernel, self.proj.bias, stride=side).permute(0, 2, 3, 1)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, keys: Tensor | None) -> Tensor:
        """(B, Q, E), (B, K, E), bool (B, K) -> (B, Q, E)."""
        q, k, v = (
            layer(of).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, of in ((self.q, x), (self.k, context), (self.v, context))
        )
        mask = None if keys is None else keys[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class _FeedForward(nn.Module):
    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class GalileoBlock(nn.Module):
    """Attention and a feed-forward network, with residuals.

    Tokens look at each other, normalised, or at a context that is taken as it is.
    """

    is_block = True  # see `nn.blocks.blocks_of`

    def __init__(self, width: int, heads: int, ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.mlp = _FeedForward(width, ratio)
        self.drop_path = drop_path

    def _dropped(self, branch: Tensor) -> Tensor:
        return drop_path(branch, self.drop_path, self.training)

    def forward(self, x: Tensor, keys: Tensor | None, context: Tensor | None = None) -> Tensor:
        """(B, N, E), what may be looked at, bool (B, K), and (B, K, E) -> (B, N, E)."""
        normed = self.norm1(x)
        x = x + self._dropped(self.attn(normed, normed if context is None else context, keys))
        return x + self._dropped(self.mlp(self.norm2(x)))


class GalileoEncoder(GroupEncodings):
    """Encode groups of bands, any of them missing.

    Args:
        groups: Groups with their arrays, in order.
        architecture: Sizes.

    Raises:
        ConfigError: Sizes do not fit.
    """

    def __init__(self, groups: Sequence[GalileoGroup], architecture: GalileoArchitecture) -> None:
        super().__init__(groups, architecture.width, architecture.max_steps)
        a = self.sizes = architecture
        if a.width % a.heads:
            raise ConfigError(
                f"architecture.width: got {a.width}, expected a multiple of the {a.heads} heads."
            )
        for array, found in self.groups.items():
            parts: dict[str, nn.Module] = {}
            for group in found:
                parts[group.name] = (
                    _Patches(group.width, a.width, a.max_patch_size)
                    if array in ("space_time", "space")
                    else nn.Linear(group.width, a.width)
                )
            self.add_module(f"{array}_embed", nn.ModuleDict(parts))
        self.blocks = nn.ModuleList(
            GalileoBlock(a.width, a.heads, a.ffn_ratio, a.drop_path) for _ in range(a.depth)
        )
        self.norm = nn.LayerNorm(a.width)
        self.gradient_checkpointing = False
        self.reset_linear()

    @torch.no_grad()
    def scale_projections(self, gain: float, middles: Mapping[str, float]) -> None:
        """Multiply the weights of the projections of pixels and numbers.

        Args:
            gain: The factor.
            middles: What the values of a group lie around: input that the projection keeps at its
                bias as it was.
        """
        for array, groups in self.groups.items():
            parts = cast(nn.ModuleDict, getattr(self, f"{array}_embed"))
            for group in groups:
                part = parts[group.name]
                inner = cast(nn.Linear, part.proj if isinstance(part, _Patches) else part)
                inner.weight.mul_(gain)
                cast(Tensor, inner.bias).sub_(middles[group.name] * inner.weight.flatten(1).sum(1))

    def forward(
        self,
        x: Mapping[str, Tensor],
        months: Mapping[Array, Tensor],
        visible: Mapping[str, Tensor],
        *,
        patch_size: int,
        gsd_m: float = UNIT_M,
        depths: int | Mapping[str, int] | None = None,
        last_norm: bool = True,
    ) -> GalileoTokens:
        """Encode what is visible.

        Args:
            x: Normalised values by group: (B, T, C, H, W) in `space_time`, (B, C, H, W) in
                `space`, (B, T, C) in `time`, (B, C) in `static`. Groups may be missing.
            months: int (B, T), 0 to 11, of `space_time` and `time`.
            visible: bool by group: (B, h, w, T), (B, h, w), (B, T), (B,); those left out are
                visible everywhere.
            patch_size: Side of a patch in pixels.
            gsd_m: Side of a pixel in metres.
            depths: After how many blocks tokens are taken, one number or one by group; at 0 they
                are the bare projections. None is the last block.
            last_norm: Apply the last LayerNorm.

        Returns:
            Tokens of all groups in the arrays that `x` has any of; those not visible are zero, or
            the bias of the last LayerNorm.

        Raises:
            DataError: Series are too long, or shapes of an array differ.
            ConfigError: The patch is larger than the stored kernels, or a depth than the encoder.
        """
        if not 1 <= patch_size <= self.sizes.max_patch_size:
            raise ConfigError(
                f"patch_size: got {patch_size}, expected 1 to {self.sizes.max_patch_size} pixels."
            )
        bare = self._projected(x, visible, patch_size)
        row, seen = bare.flat()
        row = torch.where(seen.unsqueeze(-1), row, 0.0)
        depth = self._depths(bare, depths)
        if max(depth) > 0:
            shapes = {array: found.shape[1:] for array, found in bare.visible.items()}
            encodings = self.encodings(shapes, months, patch_size * gsd_m / UNIT_M)
            row = self._attended(row, encodings, seen, torch.tensor(depth, device=row.device))
        if last_norm:
            row = self.norm(row)
        parts = row.split([bare.visible[n][0].numel() for n in bare.tokens], dim=1)
        shaped = {
            name: part.unflatten(1, bare.visible[name].shape[1:])
            for name, part in zip(bare.tokens, parts, strict=True)
        }
        return GalileoTokens(cast(dict[Array, Tensor], shaped), bare.visible)

    def _projected(
        self, x: Mapping[str, Tensor], visible: Mapping[str, Tensor], side: int
    ) -> GalileoTokens:
        tokens: dict[Array, Tensor] = {}
        masks: dict[Array, Tensor] = {}
        for array, groups in self.groups.items():
            found = {g.name: self._project(array, g.name, x[g.name], side)
                     for g in groups if g.name in x}  # fmt: skip
            shapes = {tuple(part.shape) for part in found.values()}
            if len(shapes) > 1:
                raise DataError(
                    f"Groups of the array {array!r} have tokens of the shapes {sorted(shapes)} for "
                    f"{', '.join(found)}; they need the same dates and the same grid of patches. "
                    "Make composites of the same periods, cut to one footprint."
                )
            if not found:
                continue
            like = next(iter(found.values()))
            empty = torch.zeros_like(like[..., 0], dtype=torch.bool)
            tokens[array] = torch.stack(
                [found.get(g.name, torch.zeros_like(like)) for g in groups], dim=-2
            )
            masks[array] = torch.stack(
                [visible.get(g.name, ~empty) if g.name in found else empty for g in groups], -1
            )
        if not tokens:
            raise DataError("Galileo got none of its groups; give at least one of its modalities.")
        return GalileoTokens(tokens, masks)

    def _project(self, array: Array, name: str, x: Tensor, side: int) -> Tensor:
        """Return (B, h, w, T, E), (B, h, w, E), (B, T, E) or (B, E)."""
        layer = cast(nn.ModuleDict, self.get_submodule(f"{array}_embed"))[name]
        if array == "space_time":
            parts: Tensor = layer(x.flatten(0, 1), side).unflatten(0, x.shape[:2])
            return parts.permute(0, 2, 3, 1, 4)
        return cast(Tensor, layer(x, side) if array == "space" else layer(x))

    def _depths(self, bare: GalileoTokens, depths: int | Mapping[str, int] | None) -> list[int]:
        """Return the exit depth of every token of a row."""
        last = self.sizes.depth
        found: list[int] = []
        for array in bare.tokens:
            own = [
                last if depths is None else depths if isinstance(depths, int)
                else depths.get(group.name, last)
                for group in self.groups[array]
            ]  # fmt: skip
            found += own * (bare.visible[array][0].numel() // len(own))
        if not 0 <= min(found) <= max(found) <= last:
            raise ConfigError(f"depths: got {depths!r}, expected 0 to {last}, the encoder's depth.")
        return found

    def _attended(self, bare: Tensor, encodings: Tensor, seen: Tensor, depth: Tensor) -> Tensor:
        """Run the blocks on the visible tokens, moved to the front; (B, N, E) -> (B, N, E)."""
        order, real, keys = marked_first(seen)
        result = take_tokens(bare, order)
        x = take_tokens(bare + encodings, order)
        exits = depth.expand_as(seen).gather(1, order).unsqueeze(-1)
        for number, block in enumerate(self.blocks[: int(depth.max())], 1):
            if self.gradient_checkpointing and self.training and x.requires_grad:
                x = checkpoint(block, x, keys, use_reentrant=False)
            else:
                x = block(x, keys)
            result = torch.where(exits == number, x, result)
        index = order.unsqueeze(-1).expand_as(result)
        return torch.zeros_like(bare, dtype=result.dtype).scatter(
            1, index, torch.where(real.unsqueeze(-1), result, 0.0)
        )
