"""TITAN's slide encoder: a transformer over the features of tiles, biased by their distance.

Source: Ding et al. 2024 (TITAN, arXiv 2411.19666), the vision encoder of the first stage; names of
tensors are those of its released file. The poolers and the text side of later stages are not here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from domainssl.backbones.base import Backbone, Features, LoadReport, refuse_replace
from domainssl.backbones.vit_files import read_transformer, tensors_of, write_transformer
from domainssl.errors import ConfigError, DataError, WeightsError
from domainssl.modality import Modality, key, present_mask, valid_mask
from domainssl.nn.alibi import DistanceBias, alibi_slopes
from domainssl.nn.blocks import Transformer
from domainssl.nn.masking import mean_of_valid, take_tokens
from domainssl.nn.patching import grid_coordinates

__all__ = ["PUBLISHED_MODALITIES", "TITANBackbone"]

_WIDTH = 768  # of CONCH v1.5
# What the released weights take: features of CONCH v1.5, as they are, of tiles at 20x.
PUBLISHED_MODALITIES: dict[str, Modality] = {
    "tile_features": Modality(
        name="tile_features",
        kind="features",
        channels=tuple(f"f{i}" for i in range(_WIDTH)),
        value_unit="arbitrary",
        mpp_um=0.5,
    )
}


class TITANBackbone(Backbone):
    """Encode the features of the tiles of a slide, or of a region of it.

    Tokens are tiles; attention falls with their distance in tiles (2D ALiBi), and nothing attends
    to background. `<m>.coords` of a batch holds row and column of every tile, (B, N, 2), in tiles;
    without it tiles are those of a grid of the modality's size, row by row.

    Args:
        modalities: One set of features.
        width: Token width.
        depth: Blocks.
        heads: Attention heads.
        hidden: Width of the feed-forward layers; None is four times the width.
        mask_token: Have a learned token for `encode(replace=...)`.
        pooling: `pooled` is the `class` token, or the `mean` of the valid ones.
        normalization: Form of the features.

    Raises:
        ConfigError: The modality is none of features, or there are several.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "titan": {"width": 768, "depth": 6, "heads": 12, "normalization": "identity"},
        "titan_tiny": {"width": 48, "depth": 2, "heads": 4},
    }
    slopes: Tensor

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        width: int = 768,
        depth: int = 6,
        heads: int = 12,
        hidden: int | None = None,
        mask_token: bool = False,
        pooling: Literal["class", "mean"] = "class",
        normalization: str | dict[str, str] = "zscore",
    ) -> None:
        super().__init__(modalities, normalization)
        if len(self.modalities) != 1:
            raise ConfigError(
                f"A slide encoder takes one set of features; the data have {[*self.modalities]}. "
                "Choose one encoder of tiles in the DataModule."
            )
        ((self.name, modality),) = self.modalities.items()
        if modality.kind != "features":
            raise ConfigError(
                f"modality {self.name!r} is of kind {modality.kind!r}; a slide encoder takes the "
                "features of tiles, as SlideFeatureDataModule has them."
            )
        if pooling not in ("class", "mean"):
            raise ConfigError(f"pooling: got {pooling!r}, expected class or mean.")
        self.width, self.pooling = width, pooling
        self.embed = nn.Linear(modality.num_channels, width)
        self.act = nn.GELU()
        self.class_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=1e-6))
        self.mask_token: nn.Parameter | None = None
        if mask_token:
            self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.transformer = Transformer(
            width, depth, heads, hidden=hidden, qkv_bias=True, epsilon=1e-6
        )
        self.register_buffer("slopes", alibi_slopes(heads), persistent=False)
        self.embed_dim = {self.name: width}
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    @property
    def modality(self) -> Modality:
        """The one modality."""
        return self.modalities[self.name]

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield all parameters: there is one modality."""
        yield from self.parameters()

    def places(self, x: Mapping[str, Any]) -> Tensor:
        """Return row and column of every tile, in tiles, (B, N, 2) or, shared by items, (1, N, 2).

        Raises:
            DataError: The batch does not say, and the number of tiles is not that of the grid.
        """
        values: Tensor = x[self.name]
        given = x.get(key(self.name, "coords"))
        if given is not None:
            if tuple(given.shape) != (*values.shape[:2], 2):
                raise DataError(
                    f"batch.{self.name}.coords: got shape {tuple(given.shape)}, expected "
                    f"{(*values.shape[:2], 2)}: row and column of every tile."
                )
            return given.float()  # type: ignore[no-any-return]
        size = self.modality.size
        if len(size) != 2 or math.prod(size) != values.shape[1]:
            raise DataError(
                f"batch.{self.name}: {values.shape[1]} tiles without {self.name}.coords, and no "
                f"grid of {size or 'a known size'}. Attention needs row and column of every tile."
            )
        return grid_coordinates(size, device=values.device).unsqueeze(0)

    def encode(
        self,
        x: Mapping[str, Any],
        keep: Mapping[str, Tensor] | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> Features:
        """Run the network; see `Backbone.encode`."""
        if self.mask_token is None:
            refuse_replace(replace, f"{type(self).__name__} with mask_token: false")
        name = self.name
        values: Tensor = x[name]
        places = self.places(x)
        valid = valid_mask(x, self.modality) & present_mask(x, name).unsqueeze(1)
        tokens = self.act(self.embed(values))
        replaced = None if replace is None else replace.get(name)
        if replaced is not None and self.mask_token is not None:
            filled = self.mask_token.to(tokens.dtype)
            tokens = torch.where(replaced.unsqueeze(-1), filled, tokens)
        grid = self._grid(values.shape[1])
        kept = None if keep is None else keep.get(name)
        if kept is not None:
            tokens, valid = take_tokens(tokens, kept), valid.gather(1, kept)
            places = take_tokens(places.expand(len(kept), -1, -1), kept)
        first = self.class_token.to(tokens.dtype).expand(len(tokens), -1, -1)
        out = self.transformer(torch.cat([first, tokens], 1), self.bias(places, valid))
        cls, tokens = out[:, 0], out[:, 1:]
        pooled = cls if self.pooling == "class" else mean_of_valid(tokens, valid)
        return Features(
            tokens={name: tokens}, pooled={name: pooled}, cls={name: cls}, grid={name: grid},
            token_valid={name: valid},
            coords={name: places if len(places) > 1 else places[0]},
        )  # fmt: skip

    def bias(self, places: Tensor, valid: Tensor) -> DistanceBias:
        """Return the attention bias of a class token and the tiles; background is no key.

        Args:
            places: (B, N, 2) or (1, N, 2), in tiles.
            valid: bool (B, N).
        """
        placed = torch.cat([torch.zeros_like(places[:, :1]), places], 1)
        seen = torch.cat([torch.ones_like(valid[:, :1]), valid], 1)
        return DistanceBias(placed, placed, self.slopes, seen, unplaced=1)

    def _grid(self, tiles: int) -> tuple[int, ...]:
        size = self.modality.size
        return tuple(size) if len(size) == 2 and math.prod(size) == tiles else (tiles,)

    def band_tensors(self, name: str) -> dict[str, str]:
        """Refuse: components of features are no bands."""
        raise self.no_bands(name, "components of the features of one tile encoder are no bands")

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    ) -> tuple[Self, LoadReport]:
        """Read TITAN's released file; what belongs to later stages is reported as unexpected.

        Raises:
            WeightsError: It is no such file, or of other sizes.
        """
        given = variant.get("modalities", modalities) or PUBLISHED_MODALITIES
        flat = tensors_of(state)
        named = {_inner(name): tensor for name, tensor in flat.items()}
        if "patch_embed.0.weight" not in named:
            raise WeightsError(
                "This is no file of TITAN's slide encoder: expected "
                f"'vision_encoder.patch_embed.0.weight'; found {sorted(flat)[:5]}."
            )
        used = [n for n in named if re.match(r"(blocks|norm|patch_embed\.0)\.", n)]
        used += [n for n in ("cls_token", "masked_embed") if n in named]
        arguments = {**variant, "modalities": given}
        arguments["mask_token"] = variant.get("mask_token", False) or "masked_embed" in named
        backbone = cls(**arguments)
        parts = {n: named[n] for n in used}
        tensors = {
            f"transformer.{n}": t
            for n, t in read_transformer(parts, "timm", "blocks", "norm").items()
        }
        for kind in ("weight", "bias"):
            tensors[f"embed.{kind}"] = named[f"patch_embed.0.{kind}"]
        for theirs, ours in (("cls_token", "class_token"), ("masked_embed", "mask_token")):
            if theirs in named:
                tensors[ours] = named[theirs].reshape(1, 1, -1)
        report = backbone.load_tensors(tensors)
        missing = tuple(
            n for n in report.missing if not n.startswith("normalizer.") and n != "mask_token"
        )
        unused = tuple(own for own in flat if _inner(own) not in used)
        return backbone, LoadReport(report.matched, missing, (*report.unexpected, *unused))

    def to_reference(self) -> dict[str, Tensor]:
        """Return the weights under the names of TITAN's released file."""
        written = {
            "cls_token": self.class_token.detach(),
            "patch_embed.0.weight": self.embed.weight.detach(),
            "patch_embed.0.bias": self.embed.bias.detach(),
            **write_transformer(
                self.transformer.state_dict(), "timm", "blocks.modules_list", "norm"
            ),
        }
        if self.mask_token is not None:
            written["masked_embed"] = self.mask_token.detach()
        return {f"vision_encoder.{name}": tensor for name, tensor in written.items()}


def _inner(name: str) -> str:
    """Return the name of a tensor inside the vision encoder, as timm would call it."""
    return re.sub(r"^blocks\.modules_list\.", "blocks.", name.removeprefix("vision_encoder."))
