"""A transformer over the tokens of all contrasts of an exam that are there.

Source: BM-MAE (Robinet, Berger, Houmani, MICCAI 2025) and its released code: a patch embedding per
contrast, fixed positions, no code of the contrast, one class token, MONAI's blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from domainssl.backbones.base import (
    Backbone,
    Features,
    LoadReport,
    present_names,
    refuse_replace,
    shared_grid,
)
from domainssl.backbones.vit_files import (
    patch_weight,
    read_transformer,
    tensors_of,
    write_transformer,
)
from domainssl.backbones.vit_tokens import position_codes, transform
from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import Modality, key, present_mask, sides_of, valid_mask
from domainssl.nn.blocks import Transformer
from domainssl.nn.masking import mean_of_valid, take_tokens
from domainssl.nn.patching import grid_coordinates, grid_of, patch_fraction, patchify
from domainssl.options import as_dataclass

__all__ = ["ContrastArchitecture", "ContrastTokens", "MultiContrastBackbone", "contrast_of_file"]

_ALIASES = {"t1c": ("t1c", "t1ce", "t1gd")}  # how files call a contrast


@dataclass(frozen=True, kw_only=True)
class ContrastArchitecture:
    """Sizes of the encoder.

    Attributes:
        width: Token width; a multiple of 6 for volumes, of 4 for images.
        depth: Blocks.
        heads: Attention heads.
        hidden: Width of the feed-forward layers.
        qkv_bias: Queries, keys and values have a bias.
        pooling: `pooled` is the mean of the valid tokens, or the `class` token.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 1536
    qkv_bias: bool = True
    pooling: Literal["mean", "class"] = "mean"


@dataclass(frozen=True, kw_only=True)
class ContrastTokens:
    """Encoded tokens of several contrasts, one contrast after the other.

    Attributes:
        names: The contrasts.
        grid: Tokens per axis, the same for all.
        cls: Class token, (B, E).
        tokens: (B, K, E).
        present: Which contrasts an item has, bool (B, M).
    """

    names: tuple[str, ...]
    grid: tuple[int, ...]
    cls: Tensor
    tokens: Tensor
    present: Tensor


class MultiContrastBackbone(Backbone):
    """Encode any subset of the contrasts of an exam together.

    Nothing attends to the tokens of a contrast that an item lacks. `tokens[m]` are those of one
    contrast, having seen the others; `joint` is their mean over the contrasts at the same place.

    Args:
        modalities: Volumes or images on one grid, by contrast.
        architecture: Sizes.
        patch_size: Side of a patch, one number or one per axis.
        normalization: Form for all contrasts, or one per contrast.

    Raises:
        ConfigError: The contrasts differ in kind or size, or sizes do not fit.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {"bmmae_base": {}}
    forward_methods: ClassVar[tuple[str, ...]] = ("encode", "encode_seen")

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        architecture: ContrastArchitecture = ContrastArchitecture(),
        patch_size: int | tuple[int, ...] = 16,
        normalization: str | dict[str, str] = "item",
    ) -> None:
        super().__init__(modalities, normalization)
        a = as_dataclass(ContrastArchitecture, architecture)
        self.dims = _common_axes(self.modalities)
        self.patch_size = sides_of(patch_size, self.dims, "patch_size")
        self.width, self.qkv_bias, self.pooling = a.width, a.qkv_bias, a.pooling
        position_codes((1,) * self.dims, a.width)  # refuses a width that does not divide
        voxels = math.prod(self.patch_size)
        self.embed = nn.ModuleDict(
            {n: nn.Linear(m.num_channels * voxels, a.width) for n, m in self.modalities.items()}
        )
        self.class_token = nn.Parameter(torch.empty(1, 1, a.width).normal_(std=0.02))
        self.transformer = Transformer(
            a.width, a.depth, a.heads, hidden=a.hidden, qkv_bias=a.qkv_bias
        )
        self.embed_dim = dict.fromkeys(self.modalities, a.width)
        if len(self.modalities) > 1:
            self.embed_dim["joint"] = a.width

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the patch embedding of a contrast."""
        yield from self.embed[name].parameters()

    # -- tokens -----------------------------------------------------------------------------

    def names(self, x: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the contrasts of a batch, in the order of the model.

        Raises:
            DataError: There is none.
        """
        return present_names(x, self.modalities, "contrasts")

    def grid(self, x: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the tokens per axis.

        Raises:
            DataError: The contrasts of the batch have different sizes.
        """
        return shared_grid(x, self.names(x), self.patch_size, "The contrasts of an exam")

    def present(self, x: Mapping[str, Any]) -> Tensor:
        """Return which contrasts of the batch every item has, bool (B, M)."""
        return torch.stack([present_mask(x, name) for name in self.names(x)], dim=1)

    def fraction_valid(self, x: Mapping[str, Any], name: str) -> Tensor:
        """Return the share of valid voxels per patch of a contrast, (B, N); zero where absent."""
        share = patch_fraction(valid_mask(x, self.modalities[name]), self.patch_size)
        return share * present_mask(x, name).unsqueeze(1)

    def encode_seen(
        self, x: Mapping[str, Any], keep: Tensor | None = None, seen: Tensor | None = None
    ) -> ContrastTokens:
        """Encode some tokens of all contrasts, in one sequence behind the class token.

        Args:
            x: What `normalize` returned.
            keep: Indices into the tokens of all contrasts, int64 (B, K); None is all.
            seen: bool (B, K); nothing attends to False tokens.
        """
        names, grid, present = self.names(x), self.grid(x), self.present(x)
        codes = position_codes(grid, self.width, device=present.device)
        parts = []
        for name in names:
            patches = patchify(x[name], self.patch_size, channels_first=True)
            embedded = self.embed[name](patches)  # (B, N, C·P) -> (B, N, E)
            parts.append(embedded + codes.to(embedded.dtype))
        tokens = torch.cat(parts, dim=1)
        attended = None
        if seen is not None or any(key(name, "present") in x for name in names):
            attended = present.repeat_interleave(len(codes), dim=1)
        if keep is not None:
            tokens = take_tokens(tokens, keep)
            attended = None if attended is None else attended.gather(1, keep)
        if attended is not None and seen is not None:
            attended = attended & seen
        cls, tokens = transform(self.transformer, self.class_token, tokens, attended)
        assert cls is not None
        return ContrastTokens(names=names, grid=grid, cls=cls, tokens=tokens, present=present)

    def encode(
        self,
        x: Mapping[str, Any],
        keep: Mapping[str, Tensor] | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> Features:
        """Run the network; see `Backbone.encode`. No mask token, no `joint` with `keep`."""
        refuse_replace(replace, type(self).__name__)
        names, grid = self.names(x), self.grid(x)
        count = math.prod(grid)
        items, device = x[names[0]].shape[0], x[names[0]].device
        every = torch.arange(count, device=device).expand(items, -1)
        kept = dict.fromkeys(names, every) | dict(keep or {})
        index = torch.cat([kept[n] + i * count for i, n in enumerate(names)], dim=1)
        encoded = self.encode_seen(x, None if keep is None else index)
        coords = grid_coordinates(grid, device=device)
        features = Features()
        lengths = [kept[name].shape[1] for name in names]
        for name, tokens in zip(names, encoded.tokens.split(lengths, dim=1), strict=True):
            valid = (self.fraction_valid(x, name) > 0).gather(1, kept[name])
            features.tokens[name], features.token_valid[name] = tokens, valid
            features.coords[name] = coords if keep is None else take_tokens(coords, kept[name])
            features.grid[name], features.cls[name] = grid, encoded.cls
            features.pooled[name] = self._pool(encoded.cls, tokens, valid)
            if key(name, "dates") in x:
                features.dates[name] = x[key(name, "dates")]
        if len(names) > 1 and keep is None:
            self._join(features, names, encoded)
        return features

    def _pool(self, cls: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        return cls if self.pooling == "class" else mean_of_valid(tokens, valid)

    def _join(self, features: Features, names: tuple[str, ...], encoded: ContrastTokens) -> None:
        """Add the mean of the contrasts that an item has, place by place."""
        tokens = torch.stack([features.tokens[name] for name in names], dim=1)  # (B, M, N, E)
        valid = torch.stack([features.token_valid[name] for name in names], dim=1)
        features.tokens["joint"] = mean_of_valid(tokens, encoded.present.unsqueeze(2))
        features.token_valid["joint"] = valid.any(1)
        features.coords["joint"] = features.coords[names[0]]
        features.grid["joint"], features.cls["joint"] = encoded.grid, encoded.cls
        features.pooled["joint"] = self._pool(
            encoded.cls, tokens.flatten(1, 2), valid.flatten(1, 2)
        )

    def band_tensors(self, name: str) -> dict[str, str]:
        """Return the embedding of a contrast; see `Backbone.band_tensors`."""
        return {f"embed.{name}.weight": "bands first"}

    # -- reference files --------------------------------------------------------------------

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    ) -> tuple[Self, LoadReport]:
        """Read a state dict of BM-MAE; its decoder is left out.

        Raises:
            WeightsError: It is none, lacks a contrast, or is of other sizes.
        """
        given = variant.get("modalities", modalities)
        if given is None:
            raise WeightsError(
                "BM-MAE files say nothing about intensities; pass modalities=… with channels and "
                "unit of every contrast."
            )
        flat = tensors_of(state)
        if not any(name.startswith("tokenizers.") for name in flat):
            raise WeightsError(
                "This is no state dict of BM-MAE: expected 'tokenizers.<contrast>.…'; found "
                f"{sorted(flat)[:5]}."
            )
        a = as_dataclass(ContrastArchitecture, variant.get("architecture", {}))
        bias = any(name.endswith(".qkv.bias") for name in flat)
        backbone = cls(
            **{**variant, "modalities": given, "architecture": {**vars(a), "qkv_bias": bias}}
        )
        blocks = read_transformer(
            {n: t for n, t in flat.items() if not n.startswith(("tokenizers.", "decoder."))},
            "monai", "blocks", "norm",
        )  # fmt: skip
        tensors = {f"transformer.{n}": t for n, t in blocks.items()}
        if "cls_token" in flat:
            tensors["class_token"] = flat["cls_token"]
        used = set()
        for name in backbone.modalities:
            tensors |= backbone._read_tokenizer(flat, name)
            used.add(contrast_of_file(flat, name, "tokenizers"))
        report = backbone.load_tensors(tensors)
        missing = tuple(n for n in report.missing if not n.startswith("normalizer."))
        others = {n.split(".")[1] for n in flat if n.startswith("tokenizers.")} - used
        return backbone, LoadReport(report.matched, missing, tuple(sorted(others)))

    def _read_tokenizer(self, flat: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        prefix = f"tokenizers.{contrast_of_file(flat, name, 'tokenizers')}.patch_embedding"
        modality = self.modalities[name]
        table = flat.get(f"{prefix}.position_embeddings")
        if table is not None and modality.size:
            grid = grid_of(modality.size, self.patch_size, f"{name}: size")
            codes = position_codes(grid, self.width)
            if table.shape[1:] != codes.shape or not torch.allclose(table[0], codes, atol=1e-4):
                raise WeightsError(
                    f"{name}: the file's positions are not the sine-cosine table of a grid of "
                    f"{grid} patches: they are for another size of volume."
                )
        weight, bias = (flat.get(f"{prefix}.patch_embeddings.{k}") for k in ("weight", "bias"))
        if weight is None or bias is None:
            return {}  # told as missing by the report
        return {
            f"embed.{name}.weight": patch_weight(weight, modality.num_channels, self.patch_size),
            f"embed.{name}.bias": bias,
        }

    def to_reference(self) -> dict[str, Tensor]:
        """Return the weights as BM-MAE's state dict has them, for the size of the modalities."""
        written = write_transformer(self.transformer.state_dict(), "monai", "blocks", "norm")
        written["cls_token"] = self.class_token.detach()
        for name, modality in self.modalities.items():
            prefix = f"tokenizers.{name}.patch_embedding"
            part = self.embed[name].state_dict()
            shape = (modality.num_channels, *self.patch_size)
            written[f"{prefix}.patch_embeddings.weight"] = part["weight"].unflatten(1, shape)
            written[f"{prefix}.patch_embeddings.bias"] = part["bias"]
            grid = grid_of(modality.size, self.patch_size, f"{name}: size")
            written[f"{prefix}.position_embeddings"] = position_codes(grid, self.width)[None]
        return written


def contrast_of_file(flat: Mapping[str, Tensor], name: str, group: str) -> str:
    """Return what a file calls a contrast.

    Raises:
        WeightsError: It does not have it.
    """
    known = sorted({n.removeprefix(f"{group}.").split(".")[0] for n in flat if n.startswith(group)})
    for alias in _ALIASES.get(name, (name,)):
        if alias in known:
            return alias
    raise WeightsError(f"The file has no contrast {name!r}; it has {known}.")


def _common_axes(modalities: Mapping[str, Modality]) -> int:
    kinds = {m.kind for m in modalities.values()}
    if len(kinds) > 1 or not kinds <= {"volume", "image"}:
        raise ConfigError(
            "Contrasts are volumes, or images, on one grid; got "
            f"{ {n: m.kind for n, m in modalities.items()} }."
        )
    sizes = {m.size for m in modalities.values() if m.size}
    if len(sizes) > 1:
        raise ConfigError(
            "The contrasts of an exam share a grid; got the sizes "
            f"{ {n: m.size for n, m in modalities.items()} }. Resample them to one of them."
        )
    return next(iter(modalities.values())).spatial_dims
