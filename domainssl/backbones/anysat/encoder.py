"""AnySat's network: projectors per sensor, a transformer within patches, one over all patches.

Source: Astruc et al. 2025 (arXiv 2412.14123), section 3.1, and the released code. Names of
parameters follow the released weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from domainssl.backbones.anysat.sensors import CELL_M, AnySatSensor
from domainssl.nn.alibi import KeyMask
from domainssl.nn.blocks import TransformerBlock
from domainssl.nn.fusion import FusionBlock, ReadoutBlock
from domainssl.nn.ltae import LTAE
from domainssl.nn.patching import grid_coordinates
from domainssl.nn.positions import sincos_positions
from domainssl.nn.relative import aligned_buckets, bucket_table

__all__ = [
    "AnySatArchitecture",
    "AnySatCombiner",
    "ImageProjector",
    "PartTransformer",
    "SeriesProjector",
    "parts_of_patches",
    "parts_on_grid",
]

# Values that the layers of a series hold at once without gradients.
_MAX_SERIES_ELEMENTS = 2**26


@dataclass(frozen=True, kw_only=True)
class AnySatArchitecture:
    """Sizes of the network; the defaults are those of the released weights.

    Attributes:
        width: Token width E.
        depth: Blocks within patches, and as many over all patches; a readout block follows.
        heads: Attention heads of both.
        ffn_ratio: Width of the feed-forward layers over E.
        series_heads: Heads of the temporal encoders, and groups of their normalisations.
        key_width: Width of their keys.
        series_widths: Widths of their layers before attention over E; the last one is 1.
        series_dropout: Of these layers, in training.
    """

    width: int = 768
    depth: int = 6
    heads: int = 12
    ffn_ratio: float = 4.0
    series_heads: int = 16
    key_width: int = 8
    series_widths: tuple[float, ...] = (0.125, 0.5, 1.0, 2.0, 1.0)
    series_dropout: float = 0.2


class ImageProjector(nn.Module):
    """Embed every part of an image, (B, C, H, W) -> (B, E, h, w)."""

    def __init__(self, channels: int, part_px: int, sizes: AnySatArchitecture) -> None:
        super().__init__()
        width = sizes.width
        self.patch_embed = nn.Conv2d(channels, width, part_px, part_px, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.ReLU(),
            nn.Linear(2 * width, width), nn.LayerNorm(width), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, E, h, w)."""
        parts = self.patch_embed(x).movedim(1, -1)
        out: Tensor = self.mlp(parts).movedim(-1, 1)
        return out


class SeriesProjector(nn.Module):
    """Embed the series of every pixel, (B, T, C, H, W) -> (B, E, H, W).

    Args:
        channels: Bands C.
        sensor: Calendar and normalisation.
        sizes: Widths.
    """

    def __init__(self, channels: int, sensor: AnySatSensor, sizes: AnySatArchitecture) -> None:
        super().__init__()
        # stands for values that were not measured; not trained further, as published
        self.pad_parameter = nn.Parameter(torch.tensor(0.0), requires_grad=False)
        widths = [round(sizes.width * share) for share in sizes.series_widths]
        self.widest = max(channels, *widths)
        self.patch_embed = LTAE(
            channels,
            sizes.width,
            heads=sizes.series_heads,
            key_width=sizes.key_width,
            widths_in=widths,
            widths_out=[sizes.width],
            dropout=sizes.series_dropout,
            calendar_length=sensor.calendar_length,
            input_norm=sensor.input_norm,
            norm="group",
        )

    def forward(self, x: Tensor, days: Tensor, frames: Tensor, valid: Tensor | None) -> Tensor:
        """Embed.

        Args:
            x: (B, T, C, H, W).
            days: Days of the calendar, (B, T).
            frames: bool (B, T); False dates are not seen.
            valid: bool (B, T, H, W); False values are replaced by a number of the weights. None
                replaces nothing.

        Returns:
            (B, E, H, W).
        """
        if valid is not None:
            x = torch.where(valid.unsqueeze(2), x, self.pad_parameter)
        rows, columns = x.shape[-2:]
        pixels = rearrange(x, "b t c h w -> b (h w) t c")
        pixels = torch.where(frames[:, None, :, None], pixels, 0.0)
        step = pixels.shape[1]
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            step = max(1, _MAX_SERIES_ELEMENTS // (len(x) * x.shape[1] * self.widest))
        found = []
        for part in pixels.split(step, dim=1):  # pixels do not see each other
            seen = frames.unsqueeze(1).expand(-1, part.shape[1], -1)
            found.append(self.patch_embed(part, days, seen, seen.any(-1))[0])
        return torch.cat(found, 1).transpose(1, 2).unflatten(2, (rows, columns))


class PartTransformer(nn.Module):
    """Make one token of the parts of every patch, as its class token."""

    def __init__(self, sizes: AnySatArchitecture) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.predictor_blocks = nn.ModuleList(
            FusionBlock(
                sizes.width, sizes.heads, sizes.ffn_ratio, 0.0, 0.0, 0.0,
                epsilon=1e-5, first_head=True,
            )
            for _ in range(sizes.depth)
        )  # fmt: skip
        self.predictor_norm = nn.LayerNorm(sizes.width)

    def forward(self, parts: Tensor, part_m: float) -> tuple[Tensor, Tensor]:
        """Encode the parts of patches.

        Args:
            parts: (B, N, S, E), S a square; places are those of a raster, as published.
            part_m: Side of a part in metres.

        Returns:
            Tokens (B, N, E) and parts (B, N, S, E).
        """
        batch, patches, count, width = parts.shape
        side = math.isqrt(count)
        codes = sincos_positions(
            grid_coordinates((side, side), device=parts.device) * part_m, width
        )
        x = parts.flatten(0, 1) + codes.to(parts.dtype)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], 1)
        buckets = bucket_table((side, side), device=x.device)
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for block in self.predictor_blocks:
            if self.gradient_checkpointing and self.training and x.requires_grad:
                x = checkpoint(block, x, buckets, valid, use_reentrant=False)
            else:
                x = block(x, buckets, valid)
        x = self.predictor_norm(x).unflatten(0, (batch, patches))
        return x[:, :, 0], x[:, :, 1:]


class AnySatCombiner(nn.Module):
    """Self-attention over the patches of all sensors, and a readout of one token per patch."""

    def __init__(self, sizes: AnySatArchitecture) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.cls_token = nn.Parameter(torch.empty(1, 1, sizes.width))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(sizes.width, sizes.heads, sizes.ffn_ratio, qkv_bias=True, epsilon=1e-6)
            for _ in range(sizes.depth)
        )
        self.readout = ReadoutBlock(
            sizes.width, sizes.heads, None, sizes.ffn_ratio, 0.0, 0.0, 0.0, first_head=True
        )

    def forward(
        self,
        tokens: Sequence[Tensor],
        valid: Sequence[Tensor],
        grid: tuple[int, int],
        patch_m: float,
        whole: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> Tensor:
        """Fuse.

        Args:
            tokens: (B, P, E) per sensor, in row-major order of the grid.
            valid: bool (B, P) per sensor; False tokens are not attended to.
            grid: Patches along each axis.
            patch_m: Side of a patch in metres.
            whole: Tokens (B, E) without a place, and bool (B,) which of them are there.

        Returns:
            (B, 1 + P, E), the class token first.
        """
        first = tokens[0]
        places = grid_coordinates(grid, device=first.device) * (patch_m / CELL_M)
        codes = sincos_positions(places, first.shape[-1]).to(first.dtype)
        lead = [self.cls_token.to(first.dtype).expand(len(first), -1, -1)]
        lead += [token.unsqueeze(1) for token, _ in whole]
        x = torch.cat([*lead, *(t + codes for t in tokens)], 1)
        seen = [valid[0].new_ones(len(first), 1), *(there.unsqueeze(1) for _, there in whole)]
        attended = torch.cat([*seen, *valid], 1)
        mask = KeyMask(attended)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training and x.requires_grad:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        table = bucket_table(grid, device=first.device)
        buckets = aligned_buckets(table, len(tokens))[: len(table)]
        # tokens without a place are as far from all patches as the class token
        buckets = torch.cat([*[buckets[:, :1]] * (1 + len(whole)), buckets[:, 1:]], 1)
        queries = torch.cat([torch.zeros_like(codes[:1]), codes])
        out: Tensor = self.readout(x, buckets, attended, queries)
        return out


def parts_of_patches(x: Tensor, cells: int, per_cell: int) -> Tensor:
    """Sort parts by patch, cell by cell of 10 m within it, as the published code does.

    Args:
        x: (B, E, h, w).
        cells: Cells along a side of a patch.
        per_cell: Parts along a side of a cell.

    Returns:
        (B, N, S, E).
    """
    pattern = "b e (y r1 r2) (x c1 c2) -> b (y x) (r1 c1 r2 c2) e"
    sizes = {"r1": cells, "c1": cells, "r2": per_cell, "c2": per_cell}
    return rearrange(x, pattern, **sizes)


def parts_on_grid(parts: Tensor, grid: tuple[int, int], cells: int, per_cell: int) -> Tensor:
    """Lay the parts of patches where they lie on the ground, (B, N, S, E) -> (B, h, w, E)."""
    pattern = "b (y x) (r1 c1 r2 c2) e -> b (y r1 r2) (x c1 c2) e"
    sizes = {"y": grid[0], "x": grid[1], "r1": cells, "c1": cells, "r2": per_cell, "c2": per_cell}
    return rearrange(parts, pattern, **sizes)
