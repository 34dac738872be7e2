"""BEiT: a vision transformer with learned relative positions and scaled branches, for images.

Source: Bao et al. 2022 (BEiT), in the variant of data2vec (Baevski et al. 2022): one relative bias
for all blocks, no absolute positions. Names and features are those of the published files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from domainssl.backbones.base import Backbone, Features, LoadReport
from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import Modality, key, present_mask, sides_of, valid_mask
from domainssl.nn.blocks import drop_path
from domainssl.nn.patching import grid_coordinates, grid_of, patch_fraction
from domainssl.options import as_dataclass

__all__ = ["BEiTArchitecture", "BEiTBackbone"]

_EPSILON = 1e-6
_CLASS_ROWS = 3  # class to patch, patch to class, class to class
_WRAPPERS = ("model", "module", "state_dict")
_UNUSED = ("lm_head.", "head.", "fc_norm.")


@dataclass(frozen=True, kw_only=True)
class BEiTArchitecture:
    """Sizes of the transformer; defaults are those of SSL4EO-S12's data2vec.

    Attributes:
        width: Token width.
        depth: Blocks.
        heads: Attention heads.
        mlp_ratio: Width of the feed-forward layers over that of tokens.
        qkv_bias: Queries and values have a bias; keys have none.
        init_values: What the branches are scaled by at first.
        drop_path: Largest share of items that skip a branch while training; it rises with depth.
        attention_dropout: Share of attention weights dropped while training.
        shared_bias: One relative bias for all blocks, or each block its own.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    init_values: float = 1e-4
    drop_path: float = 0.0
    attention_dropout: float = 0.0
    shared_bias: bool = True


def relative_index(grid: tuple[int, int]) -> Tensor:
    """Return the row of the bias table for every pair of class token and patches, (1+N, 1+N)."""
    coords = grid_coordinates(grid).long()
    offset = coords.unsqueeze(1) - coords.unsqueeze(0)
    height, width = grid
    rows = (offset[..., 0] + height - 1) * (2 * width - 1) + offset[..., 1] + width - 1
    last = (2 * height - 1) * (2 * width - 1) + _CLASS_ROWS
    index = F.pad(rows, (1, 0, 1, 0))
    index[0, :], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
    return index


class RelativeBias(nn.Module):
    """A learned bias per head and offset between patches; other grids resample the table."""

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.grid = grid
        rows = math.prod(2 * n - 1 for n in grid) + _CLASS_ROWS
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Return the bias of a class token and the patches of a grid, (1, heads, 1+N, 1+N)."""
        table: Tensor = self.relative_position_bias_table
        if grid != self.grid:
            source = tuple(2 * n - 1 for n in self.grid)
            places = table[:-_CLASS_ROWS].float().T.unflatten(1, source).unsqueeze(0)
            size = [2 * n - 1 for n in grid]
            places = F.interpolate(places, size=size, mode="bicubic")[0].flatten(1).T
            table = torch.cat([places.to(table.dtype), table[-_CLASS_ROWS:]])
        index = relative_index(grid).to(table.device)
        return table[index].permute(2, 0, 1).unsqueeze(0)


class _Attention(nn.Module):
    def __init__(self, a: BEiTArchitecture, grid: tuple[int, int]) -> None:
        super().__init__()
        self.heads, self.dropout = a.heads, a.attention_dropout
        self.qkv = nn.Linear(a.width, 3 * a.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(a.width)) if a.qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(a.width)) if a.qkv_bias else None
        self.proj = nn.Linear(a.width, a.width)
        self.relative = None if a.shared_bias else RelativeBias(grid, a.heads)

    def forward(self, x: Tensor, bias: Tensor | None, grid: tuple[int, int]) -> Tensor:
        qkv_bias = None
        if self.q_bias is not None and self.v_bias is not None:
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        parts = F.linear(x, self.qkv.weight, qkv_bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        if self.relative is not None:
            bias = self.relative(grid)
        share = self.dropout if self.training else 0.0
        mask = None if bias is None else bias.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=share)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class _FeedForward(nn.Module):
    def __init__(self, a: BEiTArchitecture) -> None:
        super().__init__()
        self.fc1 = nn.Linear(a.width, int(a.width * a.mlp_ratio))
        self.fc2 = nn.Linear(int(a.width * a.mlp_ratio), a.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class BEiTBlock(nn.Module):
    """Attention and feed-forward network, each scaled per channel before its residual."""

    is_block = True  # see `nn.blocks.blocks_of`

    def __init__(self, a: BEiTArchitecture, grid: tuple[int, int], drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(a.width, eps=_EPSILON)
        self.attn = _Attention(a, grid)
        self.norm2 = nn.LayerNorm(a.width, eps=_EPSILON)
        self.mlp = _FeedForward(a)
        self.gamma_1 = nn.Parameter(torch.full((a.width,), a.init_values))
        self.gamma_2 = nn.Parameter(torch.full((a.width,), a.init_values))
        self.drop_path = drop_path

    def _dropped(self, branch: Tensor) -> Tensor:
        return drop_path(branch, self.drop_path, self.training)

    def forward(
        self, x: Tensor, bias: Tensor | None, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """(B, N, E) -> the tokens, and what the feed-forward branch added to them."""
        x = x + self._dropped(self.gamma_1 * self.attn(self.norm1(x), bias, grid))
        branch = self._dropped(self.gamma_2 * self.mlp(self.norm2(x)))
        return x + branch, branch


class BEiTBackbone(Backbone):
    """Encode one image; `pooled` is the mean of the tokens that saw a valid pixel.

    Args:
        modalities: One image.
        architecture: Sizes.
        patch_size: Side of a patch in pixels, one number or one per axis.
        image_size: Size that the table of relative positions is made for.
        normalization: Form of the modality.

    Raises:
        ConfigError: There are several modalities, or one that is no image.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "beit_small": {"architecture": {"width": 384, "depth": 12, "heads": 6}},
        "beit_base": {"architecture": {"width": 768, "depth": 12, "heads": 12}},
    }
    forward_methods: ClassVar[tuple[str, ...]] = ("encode", "encode_layers")

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        architecture: BEiTArchitecture = BEiTArchitecture(),
        patch_size: int | tuple[int, ...] = 16,
        image_size: int | tuple[int, ...] = 224,
        normalization: str | dict[str, str] = "zscore",
    ) -> None:
        super().__init__(modalities, normalization)
        found = {name: m.kind for name, m in self.modalities.items()}
        if list(found.values()) != ["image"]:
            raise ConfigError(
                f"BEiT encodes one image; the data have {found}. Choose one in the DataModule "
                "(`other: null` takes one out of a recipe), and of a series one date "
                "(dates: {mode: one})."
            )
        (self.name,) = found
        a = as_dataclass(BEiTArchitecture, architecture)
        if a.width % a.heads:
            raise ConfigError(f"Attention width {a.width} is not a multiple of {a.heads} heads.")
        self.patch_size = sides_of(patch_size, 2, "patch_size")
        grid = self._grid(sides_of(image_size, 2, "image_size"))
        channels = self.modalities[self.name].num_channels
        self.gradient_checkpointing = False
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(channels, a.width, self.patch_size, stride=self.patch_size)}  # type: ignore[arg-type]
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, a.width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, a.width))
        self.rel_pos_bias = RelativeBias(grid, a.heads) if a.shared_bias else None
        shares = torch.linspace(0, a.drop_path, a.depth).tolist()
        self.blocks = nn.ModuleList(BEiTBlock(a, grid, share) for share in shares)
        self.norm = nn.LayerNorm(a.width, eps=_EPSILON)
        self.embed_dim = {self.name: a.width}
        self._initialise()

    def _initialise(self) -> None:
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for token in (self.cls_token, self.mask_token):
            nn.init.trunc_normal_(token, std=0.02)
        for depth, block in enumerate(self.blocks, 1):
            assert isinstance(block, BEiTBlock)
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.data.div_(math.sqrt(2 * depth))

    def _grid(self, size: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = grid_of(size, self.patch_size, "image_size")
        return rows, columns

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield all parameters: there is one modality."""
        yield from self.parameters()

    def band_tensors(self, name: str) -> dict[str, str]:
        """Return the patch embedding, which takes bands one by one."""
        return {"patch_embed.proj.weight": "convolution"}

    def encode(
        self,
        x: Mapping[str, Any],
        keep: Mapping[str, Tensor] | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> Features:
        """Run the network; see `Backbone.encode`.

        Raises:
            ConfigError: `keep` is given: relative positions here are those of whole images.
        """
        if keep is not None:
            raise ConfigError(f"{type(self).__name__} encodes whole images (keep).")
        return self.encode_layers(x, None if replace is None else replace.get(self.name))[0]

    def encode_layers(
        self, x: Mapping[str, Any], replaced: Tensor | None = None
    ) -> tuple[Features, list[Tensor], list[Tensor]]:
        """Encode, and return what every block says about the patches.

        Args:
            x: What `normalize` returned.
            replaced: Put the mask token in place of these patches, bool (B, N).

        Returns:
            The features; tokens after every block, (B, N, E) each, before the last norm; and what
            the feed-forward branch of every block added, (B, N, E) each.
        """
        name, values = self.name, x[self.name]
        grid = self._grid(tuple(values.shape[-2:]))
        tokens = self.patch_embed["proj"](values).flatten(2).transpose(1, 2)
        if replaced is not None:
            tokens = torch.where(replaced.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        first = self.cls_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([first, tokens], dim=1)
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias(grid)
        ends, branches = [], []
        for block in self.blocks:
            if self.gradient_checkpointing and self.training and tokens.requires_grad:
                tokens, branch = checkpoint(block, tokens, bias, grid, use_reentrant=False)
            else:
                tokens, branch = block(tokens, bias, grid)
            ends.append(tokens[:, 1:])
            branches.append(branch[:, 1:])
        tokens = self.norm(tokens)
        valid = patch_fraction(valid_mask(x, self.modalities[name]), self.patch_size) > 0
        valid = valid & present_mask(x, name).unsqueeze(1)
        weight = valid.unsqueeze(-1).to(tokens.dtype)
        pooled = (tokens[:, 1:] * weight).sum(1) / weight.sum(1).clamp(min=1)
        features = Features(
            tokens={name: tokens[:, 1:]}, pooled={name: pooled}, cls={name: tokens[:, 0]},
            coords={name: grid_coordinates(grid, device=tokens.device)}, grid={name: grid},
            token_valid={name: valid},
        )  # fmt: skip
        if key(name, "dates") in x:
            features.dates[name] = x[key(name, "dates")]
        return features, ends, branches

    def feature_pyramid(self, batch: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Return patches at four depths on their grid, as `ViTBackbone` does.

        They are what the blocks L/4, L/2 and 3L/4 (from 0, of L) return, and the normalised patches
        of the last one.
        """
        features, ends, _ = self.encode_layers(self.watched(batch))
        chosen = [ends[len(ends) * part // 4] for part in (1, 2, 3)]
        grid = features.grid[self.name]
        states = [*chosen, features.tokens[self.name]]
        return {self.name: [s.transpose(1, 2).unflatten(2, grid) for s in states]}

    # -- reference files --------------------------------------------------------------------

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    ) -> tuple[Self, LoadReport]:
        """Read files of BEiT and data2vec; the head is left out.

        Raises:
            WeightsError: It is none of these files, or of other sizes.
        """
        given = variant.get("modalities", modalities)
        if given is None:
            raise WeightsError(
                "BEiT files say nothing about the data they were trained on; pass modalities=… "
                "with channels, unit and statistics."
            )
        for wrapper in _WRAPPERS:
            if isinstance(state.get(wrapper), Mapping):
                state = state[wrapper]
        flat = {n.removeprefix("module."): t for n, t in state.items() if isinstance(t, Tensor)}
        a = vars(as_dataclass(BEiTArchitecture, variant.get("architecture", {})))
        facts = {
            "shared_bias": "rel_pos_bias.relative_position_bias_table" in flat,
            "qkv_bias": "blocks.0.attn.q_bias" in flat,
        }
        arguments = {**variant, "modalities": given, "architecture": {**a, **facts}}
        backbone = cls(**arguments)
        tensors = {
            n.replace(
                ".attn.relative_position_bias_table", ".attn.relative.relative_position_bias_table"
            ): t
            for n, t in flat.items()
            if not n.startswith(_UNUSED) and not n.endswith("relative_position_index")
        }
        report = backbone.load_tensors(tensors)
        missing = tuple(
            n for n in report.missing if n != "mask_token" and not n.startswith("normalizer.")
        )
        if missing or report.unexpected:
            raise WeightsError(
                f"This file does not fit BEiT of these sizes: missing {list(missing[:3])}, without "
                f"a place {list(report.unexpected[:3])}. Give the sizes of the weights."
            )
        return backbone, report

    def to_reference(self) -> dict[str, Tensor]:
        """Return the weights under the published names, without a head."""
        return {
            n.replace(".attn.relative.relative", ".attn.relative"): t.detach()
            for n, t in self.state_dict().items()
            if not n.startswith("normalizer.")
        }
