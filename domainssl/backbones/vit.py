"""A plain vision transformer over the patches of an image, a series or a volume.

Source: Dosovitskiy et al. 2021; He et al. 2022 (MAE), whose 2D model is timm's; MONAI's 3D models.
With the weights of those libraries the features are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from domainssl.backbones.base import Backbone, Features, LoadReport, refuse_replace
from domainssl.backbones.vit_files import (
    Layout,
    ViTFile,
    patch_weight,
    read_vit_file,
    write_transformer,
)
from domainssl.backbones.vit_tokens import (
    date_codes,
    grid_of_table,
    moco_codes,
    per_date,
    position_codes,
    transform,
)
from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import (
    Modality,
    as_modalities,
    key,
    present_mask,
    sides_of,
    valid_mask,
)
from domainssl.nn.blocks import Transformer
from domainssl.nn.dates import DATE_CHANNELS
from domainssl.nn.masking import mean_of_valid, take_tokens
from domainssl.nn.patching import grid_coordinates, grid_of, patch_fraction, patchify
from domainssl.nn.positions import PositionResizing, resized_positions
from domainssl.options import as_dataclass

__all__ = [
    "Positions",
    "ViTArchitecture",
    "ViTBackbone",
    "date_codes",
    "per_date",
    "position_codes",
    "transform",
]

Positions = Literal["sincos", "learned"]

_LEAST_SHARE = 0.95  # of a backbone's tensors that a weights file must hold
_EPSILON: dict[Layout, float] = {"timm": 1e-6, "monai": 1e-5}


@dataclass(frozen=True, kw_only=True)
class ViTArchitecture:
    """Sizes and conventions of a transformer.

    Attributes:
        width: Token width; a multiple of 4 for images, of 6 for volumes, with `sincos` positions.
        depth: Blocks.
        heads: Attention heads.
        hidden: Width of the feed-forward layers; None is four times the width.
        layout: Whose conventions hold where the libraries differ: `timm` (epsilon 1e-6, queries,
            keys and values with a bias) or `monai` (1e-5, without); None is `monai` for volumes.
        qkv_bias: Queries, keys and values have a bias; None is what the layout has.
        positions: `sincos`, computed for the grid at hand, or a `learned` table, resampled for
            other grids than its own.
        resizing: How a learned table is resampled; see `nn.positions.resized_positions`.
        class_token: Put a learned token before those of the patches.
        mask_token: Have a learned token for `encode(replace=...)`.
        pooling: `pooled` is the mean of the valid tokens, or the `class` token.
        drop_path: Share of items that skip a branch of the last block while training, less in
            those before.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int | None = None
    layout: Layout | None = None
    qkv_bias: bool | None = None
    positions: Positions = "sincos"
    resizing: PositionResizing = "antialias"
    class_token: bool = True
    mask_token: bool = False
    pooling: Literal["mean", "class"] = "mean"
    drop_path: float = 0.0


class ViTBackbone(Backbone):
    """Encode one image, series or volume.

    The tokens of a series are those of all its dates, in one sequence: a code of the date is added
    to that of the place, and padded dates are never attended to.

    Args:
        modalities: One modality.
        architecture: Sizes and conventions.
        patch_size: Side of a patch in pixels or voxels, one number or one per axis.
        image_size: Size that a `learned` table of positions is made for.
        normalization: Form of the modality.

    Raises:
        ConfigError: There are several modalities, one cannot be cut, or sizes do not fit.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "vit_tiny": {"architecture": {"width": 48, "depth": 2, "heads": 4}},
        "vit_small": {"architecture": {"width": 384, "depth": 12, "heads": 6}},
        "vit_base": {"architecture": {"width": 768, "depth": 12, "heads": 12}},
        "vit_large": {"architecture": {"width": 1024, "depth": 24, "heads": 16}},
        "vit_huge": {"architecture": {"width": 1280, "depth": 32, "heads": 16}},
    }
    forward_methods: ClassVar[tuple[str, ...]] = ("encode", "encode_seen")

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        architecture: ViTArchitecture = ViTArchitecture(),
        patch_size: int | tuple[int, ...] = 16,
        image_size: int | tuple[int, ...] | None = None,
        normalization: str | dict[str, str] = "zscore",
    ) -> None:
        super().__init__(modalities, normalization)
        a = as_dataclass(ViTArchitecture, architecture)
        self.name, modality = _only(self.modalities)
        dims = modality.spatial_dims
        self.patch_size = sides_of(patch_size, dims, "patch_size")
        self.width, self.positions, self.resizing = a.width, a.positions, a.resizing
        self.layout: Layout = a.layout or ("monai" if dims == 3 else "timm")
        self.epsilon = _EPSILON[self.layout]
        self.qkv_bias = self.layout == "timm" if a.qkv_bias is None else a.qkv_bias
        if a.pooling == "class" and not a.class_token:
            raise ConfigError("pooling: 'class' needs class_token: true.")
        self.pooling = a.pooling
        self.embed = nn.Linear(modality.num_channels * math.prod(self.patch_size), a.width)
        self.class_token = _token(a.width) if a.class_token else None
        self.mask_token = _token(a.width) if a.mask_token else None
        # timm's tables have a row for the class token as well
        has_row = self.positions == "learned" and self.layout == "timm" and a.class_token
        self.table_prefix = int(has_row)
        self.position_table = self._table(image_size, dims)
        if modality.kind == "series":
            self.date_embed = nn.Linear(DATE_CHANNELS, a.width, bias=False)
        self.transformer = Transformer(
            a.width,
            a.depth,
            a.heads,
            hidden=a.hidden,
            qkv_bias=self.qkv_bias,
            epsilon=self.epsilon,
            drop_path=a.drop_path,
        )
        self.embed_dim = {self.name: a.width}
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def _table(self, image_size: int | tuple[int, ...] | None, dims: int) -> nn.Parameter | None:
        """Return the learned table, (1, prefix + N, E); its grid is kept beside it."""
        self.table_grid: tuple[int, ...] = ()
        if self.positions == "sincos":
            position_codes((1,) * dims, self.width)
            return None
        if image_size is None:
            raise ConfigError(
                "positions: 'learned' needs image_size, the size that the table is made for."
            )
        self.table_grid = grid_of(
            sides_of(image_size, dims, "image_size"), self.patch_size, "image_size"
        )
        rows = self.table_prefix + math.prod(self.table_grid)
        table = torch.empty(1, rows, self.width)
        return nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    @property
    def modality(self) -> Modality:
        """The one modality."""
        return self.modalities[self.name]

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield all parameters: there is one modality."""
        yield from self.parameters()

    def band_tensors(self, name: str) -> dict[str, str]:
        """Return the patch embedding; see `Backbone.band_tensors`."""
        return {"embed.weight": "bands first"}

    # -- tokens -----------------------------------------------------------------------------

    def grid(self, x: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the tokens per axis, (h, w), (x, y, z), or either behind the number of dates."""
        values = x[self.name]
        size = values.shape[-self.modality.spatial_dims :]
        frames = values.shape[1:2] if self.modality.kind == "series" else ()
        return (*frames, *self.grid_of(size, f"batch.{self.name}"))

    def grid_of(self, size: tuple[int, ...], name: str = "size") -> tuple[int, ...]:
        """Return the patches per axis of an image or volume of some size."""
        return grid_of(size, self.patch_size, name)

    def patches(self, values: Tensor, *, channels_first: bool = False) -> Tensor:
        """Cut values in the modality's layout into patches, (B, N, P·C); see `patchify`."""
        return per_date(
            self.modality,
            values,
            lambda v: patchify(v, self.patch_size, channels_first=channels_first),
        )

    def fraction_valid(self, x: Mapping[str, Any]) -> Tensor:
        """Return the share of valid pixels of every token, (B, N); zero in absent items."""
        valid = valid_mask(x, self.modality)
        found = per_date(self.modality, valid, lambda v: patch_fraction(v, self.patch_size))
        return found * present_mask(x, self.name).unsqueeze(1)

    def token_frames(self, x: Mapping[str, Any]) -> Tensor | None:
        """Return which tokens belong to real dates of a series, bool (B, N); None else."""
        if self.modality.kind != "series":
            return None
        frames = x.get(key(self.name, "frames"))
        places = math.prod(self.grid(x)[1:])
        if frames is None:
            values = x[self.name]
            frames = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        found: Tensor = frames.repeat_interleave(places, dim=1)
        return found

    def _codes(self, x: Mapping[str, Any]) -> Tensor:
        """Return position plus date codes, (N, E), or (B, N, E) of a series."""
        grid = self.grid(x)
        places = grid[-self.modality.spatial_dims :]
        if self.position_table is None:
            codes = position_codes(places, self.width, device=x[self.name].device)
        else:
            codes = resized_positions(
                self.position_table, self.table_grid, places, prefix=self.table_prefix,
                how=self.resizing,
            )[0, self.table_prefix :]  # fmt: skip
        if self.modality.kind != "series":
            return codes
        dates = self.date_embed(date_codes(x, self.name))  # (B, T, E)
        return (dates.unsqueeze(2) + codes).flatten(1, 2)

    # -- encoding ---------------------------------------------------------------------------

    def encode(
        self,
        x: Mapping[str, Any],
        keep: Mapping[str, Tensor] | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> Features:
        """Run the network; see `Backbone.encode`."""
        if self.mask_token is None:
            refuse_replace(replace, f"{type(self).__name__} with mask_token: false")
        kept = None if keep is None else keep.get(self.name)
        replaced = None if replace is None else replace.get(self.name)
        return self.encode_seen(x, kept, replaced=replaced)

    def encode_seen(
        self,
        x: Mapping[str, Any],
        keep: Tensor | None = None,
        seen: Tensor | None = None,
        replaced: Tensor | None = None,
    ) -> Features:
        """Encode some tokens.

        Args:
            x: What `normalize` returned.
            keep: Encode only these, int64 (B, K); None is all.
            seen: bool (B, K); False tokens of a series only fill up the row: nothing attends to
                them.
            replaced: Put the mask token in place of these patches, bool (B, N).
        """
        name, grid = self.name, self.grid(x)
        patches = self.patches(x[name], channels_first=True)
        codes, valid = self._codes(x), self.fraction_valid(x) > 0
        coords = grid_coordinates(grid, device=patches.device)
        frames = self.token_frames(x)
        if frames is not None:
            valid = valid & frames
        if keep is not None:
            patches, codes, valid = (
                take_tokens(patches, keep),
                take_tokens(codes, keep),
                valid.gather(1, keep),
            )
            coords = take_tokens(coords, keep)
            frames = None if frames is None else frames.gather(1, keep)
            replaced = None if replaced is None else replaced.gather(1, keep)
        tokens = self.embed(patches)  # (B, K, P·C) -> (B, K, E)
        if replaced is not None and self.mask_token is not None:
            tokens = torch.where(replaced.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        tokens = tokens + codes.to(tokens.dtype)
        if frames is not None and seen is not None:
            frames, valid = frames & seen, valid & seen
        cls, tokens = transform(self.transformer, self._first(), tokens, frames)
        features = Features(
            tokens={name: tokens}, coords={name: coords}, grid={name: grid},
            token_valid={name: valid}, cls={} if cls is None else {name: cls},
        )  # fmt: skip
        if cls is not None and self.pooling == "class":
            features.pooled[name] = cls
        else:
            features.pooled[name] = mean_of_valid(tokens, valid)
        if key(name, "dates") in x:
            features.dates[name] = x[key(name, "dates")]
        return features

    def _first(self) -> Tensor | None:
        """Return what stands before the patches, (1, 1, E): the class token with its position."""
        if self.class_token is None or not self.table_prefix or self.position_table is None:
            return self.class_token
        return self.class_token + self.position_table[:, :1]

    def feature_maps(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return tokens on their grid, (B, E, h, w) or (B, E, x, y, z); of a series, their mean."""
        features = self(batch)
        name = self.name
        grid, tokens = features.grid[name], features.tokens[name]
        if self.modality.kind == "series":
            valid = features.token_valid[name].unflatten(1, (grid[0], -1)).transpose(1, 2)
            tokens = tokens.unflatten(1, (grid[0], -1)).transpose(1, 2)  # (B, L, T, E)
            tokens, grid = mean_of_valid(tokens, valid, axis=2), grid[1:]
        return {name: tokens.transpose(1, 2).unflatten(2, grid)}

    def feature_pyramid(self, batch: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Return hidden states at four depths on their grid, as MONAI's UNETR takes them.

        Raises:
            ConfigError: The modality is a series; choose one date.
        """
        name, modality = self.name, self.modality
        if modality.kind == "series":
            raise ConfigError(f"feature_pyramid: {name!r} is a series; choose one date of it.")
        x = self.watched(batch)
        tokens = self.embed(self.patches(x[name], channels_first=True))
        tokens = tokens + self._codes(x).to(tokens.dtype)
        first = self._first()
        if first is not None:
            tokens = torch.cat([first.expand(tokens.shape[0], -1, -1), tokens], 1)
        places = math.prod(self.grid(x))
        states = self.transformer.hidden_states(tokens)
        maps = [s[:, -places:].transpose(1, 2).unflatten(2, self.grid(x)) for s in states]
        return {name: maps}

    # -- reference files --------------------------------------------------------------------

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    ) -> tuple[Self, LoadReport]:
        """Read timm and MAE files, and MONAI's ViT, UNETR, ViTAutoEnc and MaskedAutoEncoderViT.

        Layout, bias, class token and kind of positions are the file's; decoders and heads are
        left out. Files say nothing about units and statistics: `modalities` do.

        Raises:
            WeightsError: It is none of these files, or of other sizes.
        """
        given = variant.get("modalities", modalities)
        if given is None:
            raise WeightsError(
                "ViT weights files say nothing about the data they were trained on; pass "
                "modalities=… with channels, unit and statistics."
            )
        file = read_vit_file(state)
        arguments = {**variant, "modalities": given}
        asked = arguments.get("architecture", {})
        a = as_dataclass(ViTArchitecture, asked)
        facts: dict[str, Any] = {
            "layout": file.layout,
            "qkv_bias": file.has("transformer.blocks.0.attention.qkv.bias"),
            "class_token": file.has("class_token"),
        }
        arguments["architecture"] = {**vars(a), **facts}
        is_asked = not isinstance(asked, Mapping) or "positions" in asked
        backbone = cls(**_with_positions(file, arguments, is_asked))
        return backbone, _fill(backbone, file)

    def to_reference(
        self, layout: Layout | None = None, final_norm: str | None = "norm"
    ) -> dict[str, Tensor]:
        """Return the weights under the names of timm or MONAI.

        Args:
            layout: `timm` or `monai`; None is the backbone's own.
            final_norm: Name of the last norm; None is one more block, as in MONAI's
                MaskedAutoEncoderViT.

        Raises:
            WeightsError: The other library computes something else with these weights.
        """
        layout = layout or self.layout
        if layout != self.layout:
            raise WeightsError(
                f"These weights follow {self.layout}'s conventions (epsilon of the norms, bias); "
                f"{layout} would compute other features. Export them as {self.layout}."
            )
        stem = {"timm": "patch_embed.proj", "monai": "patch_embedding.patch_embeddings"}[layout]
        shape = (self.modality.num_channels, *self.patch_size)
        written = {
            f"{stem}.weight": self.embed.weight.detach().unflatten(1, shape),
            f"{stem}.bias": self.embed.bias.detach(),
            **write_transformer(self.transformer.state_dict(), layout, "blocks", final_norm),
        }
        if self.class_token is not None:
            written["cls_token"] = self.class_token.detach()
        return written | self._reference_positions(layout)

    def _reference_positions(self, layout: Layout) -> dict[str, Tensor]:
        """Return the table of positions as files have it, for the size of the modality."""
        table: Tensor | None = self.position_table
        if table is None:
            if not self.modality.size:
                raise WeightsError(
                    f"The files hold a table of positions for one size; modality {self.name!r} "
                    "has no size. Give it the size that the table is for."
                )
            grid = self.grid_of(self.modality.size, f"{self.name}: size")
            table = position_codes(grid, self.width).unsqueeze(0).to(self.embed.weight.device)
        if layout == "monai":
            return {"patch_embedding.position_embeddings": table.detach()}
        if self.class_token is not None and not self.table_prefix:
            table = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
        return {"pos_embed": table.detach()}


def _only(modalities: Mapping[str, Modality]) -> tuple[str, Modality]:
    if len(modalities) != 1:
        raise ConfigError(
            f"A ViT encodes one modality; the data have {list(modalities)}. Choose one in the "
            "DataModule (`other: null` takes one out of a recipe), or a method for several: CROMA, "
            "OmniSat, MAESTRO, MultiContrastMAE."
        )
    ((name, modality),) = modalities.items()
    if modality.spatial_dims == 0:
        raise ConfigError(
            f"modality {name!r} is of kind {modality.kind!r}; a ViT takes images, series and "
            "volumes."
        )
    return name, modality


def _token(width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))


def _with_positions(file: ViTFile, arguments: dict[str, Any], is_asked: bool) -> dict[str, Any]:
    """Return the arguments with the kind of positions that the file's table is.

    Raises:
        WeightsError: It is for no grid that is known, or sine-cosine positions were asked for and
            it holds others.
    """
    if file.table is None:
        return arguments
    _, modality = _only(as_modalities(arguments["modalities"]))
    patch = sides_of(arguments.get("patch_size", 16), modality.spatial_dims, "patch_size")
    grid = grid_of_table(file.table.shape[1], modality, patch, arguments.get("image_size"))
    architecture = arguments["architecture"]
    asked = architecture["positions"] if is_asked else None
    is_sincos = file.table.shape[2] % (2 * len(grid)) == 0 and torch.allclose(
        file.table[0].float(), position_codes(grid, file.table.shape[2]), atol=1e-4
    )
    if is_sincos and asked != "learned":
        architecture = {**architecture, "positions": "sincos"}
        return {**arguments, "architecture": architecture, "image_size": None}
    if asked == "sincos":
        width = file.table.shape[2]
        if len(grid) == 2 and torch.allclose(
            file.table[0].float(), moco_codes((grid[0], grid[1]), width), atol=1e-4
        ):
            raise WeightsError(
                "The file's table of positions is that of MoCo v3, sine and cosine with the rows "
                "first. Give positions: learned, which takes it as it is."
            )
        raise WeightsError(
            f"The file's table of positions is not the sine-cosine table of a grid of {grid} "
            "patches: it was learned, or is for another grid with as many tokens. Give the "
            "image_size of the weights, or positions: learned."
        )
    size = tuple(n * p for n, p in zip(grid, patch, strict=True))
    return {
        **arguments,
        "architecture": {**architecture, "positions": "learned"},
        "image_size": size,
    }


def _fill(backbone: ViTBackbone, file: ViTFile) -> LoadReport:
    """Copy the file's tensors into a backbone.

    Raises:
        WeightsError: Fewer than 95 % of the backbone's tensors are in the file, or shapes differ.
    """
    tensors = dict(file.tensors)
    channels = backbone.modality.num_channels
    tensors["embed.weight"] = patch_weight(tensors["embed.weight"], channels, backbone.patch_size)
    row = file.class_position
    if row is not None and not backbone.table_prefix and "class_token" in tensors:
        tensors["class_token"] = tensors["class_token"] + row  # the sum is what goes in
    if backbone.position_table is not None and file.table is not None:
        rows = [row] if backbone.table_prefix and row is not None else []
        tensors["position_table"] = torch.cat([*rows, file.table], dim=1)
    if backbone.mask_token is not None and file.mask_token is not None:
        tensors["mask_token"] = file.mask_token.view_as(backbone.mask_token)
    report = backbone.load_tensors(tensors)
    missing = tuple(n for n in report.missing if not n.startswith("normalizer."))
    if len(report.matched) < _LEAST_SHARE * (len(report.matched) + len(missing)):
        raise WeightsError(
            f"Only {len(report.matched)} of {len(report.matched) + len(missing)} tensors of the "
            f"backbone are in the file; missing {list(missing[:5])}, without a place "
            f"{list(report.unexpected[:5])}. Give the sizes of the weights."
        )
    unexpected = (*report.unexpected, *file.unknown)
    return LoadReport(report.matched, missing, unexpected)
