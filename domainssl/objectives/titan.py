"""TITAN, first stage: iBOT on the features of tiles, laid out as the tiles lie on the slide.

Source: Ding et al. 2024 (TITAN, arXiv 2411.19666); Zhou et al., ICLR 2022 (iBOT, arXiv 2111.07832).
The code of its pretraining is not public: loss, head and teacher are iBOT's.

One training step: cut two large views and several small ones out of a region, whole cells, mirrored
and turned (`draw`); hide blocks of tiles of the large ones from the student; let every view match
the teacher's distribution for the other large view, and every hidden tile the teacher's for it.
Background is seen by nobody, hidden never, and never a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from domainssl.backbones.base import Backbone
from domainssl.backbones.registry import load_initial
from domainssl.backbones.slide import TITANBackbone
from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import (
    Batch,
    Modality,
    check_batch,
    key,
    present_mask,
    sides_of,
    valid_mask,
)
from domainssl.nn.block_masks import BlockMasks, draw_block_masks
from domainssl.nn.grid_views import (
    GridView,
    GridViews,
    change_features,
    draw_grid_view,
    view_cells,
)
from domainssl.nn.patching import grid_coordinates
from domainssl.objectives.base import Generators
from domainssl.objectives.dino import DINO, DINOHead, DINOOptions, DINOTeacher
from domainssl.objectives.student_parts import PUBLISHED
from domainssl.objectives.student_teacher import GLOBALS, CropDraws, CropTokens
from domainssl.objectives.terms import term_weights
from domainssl.objectives.view_steps import unit_values
from domainssl.options import as_dataclass, named_sizes
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["TITAN", "GridCrops", "SlideArchitecture", "SlideEncoding"]

_TERMS = {"cls": 1.0, "patch": 1.0, "koleo": 0.0}
_PROTOTYPES = DINOHead(prototypes=8192)


@dataclass(frozen=True, kw_only=True)
class SlideArchitecture:
    """Explicit sizes over the named ones; None keeps the named value.

    Attributes:
        width: Token width.
        depth: Blocks.
        heads: Attention heads.
        hidden: Width of the feed-forward layers; None is four times the width.
    """

    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    hidden: int | None = None


_SIZES = {
    "tiny": SlideArchitecture(width=48, depth=2, heads=4),
    "base": SlideArchitecture(width=768, depth=6, heads=12),
}


@dataclass(frozen=True, kw_only=True)
class SlideEncoding:
    """What the backbone is built from.

    Attributes:
        size: `base`, as published, or `tiny`.
        architecture: Explicit sizes over the named one.
        normalization: Form of the features: `zscore`, or `identity`, as published.
        weights: Start student and teacher from this export, checkpoint, or TITAN's file.
    """

    size: str = "base"
    architecture: SlideArchitecture = field(default_factory=SlideArchitecture)
    normalization: str | dict[str, str] = "zscore"
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class GridCrops:
    """Two large views of a region, which the teacher sees, and small ones, in cells.

    Attributes:
        global_size: Rows and columns of the large views, one number or two.
        local_size: Of the small ones.
        local_count: Number of the small ones.
        views: How all of them are drawn and changed.

    Raises:
        ConfigError: There are less than no small views.
    """

    global_size: int | tuple[int, int] = 14
    local_size: int | tuple[int, int] = 6
    local_count: int = 10
    views: GridViews = field(default_factory=GridViews)

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", as_dataclass(GridViews, self.views))
        if self.local_count < 0:
            raise ConfigError(
                f"model.init_args.crops.local_count: got {self.local_count}, expected 0 or more."
            )

    def fitted(self, context_size: int | tuple[int, ...]) -> GridCrops:
        """Return the views with two sides each.

        Raises:
            ConfigError: A view is larger than the region.
        """
        region = sides_of(context_size, 2, "model.init_args.context_size")
        sizes: dict[str, Any] = {}
        for name in ("global_size", "local_size"):
            where = f"model.init_args.crops.{name}"
            sizes[name] = sides_of(getattr(self, name), 2, where)
            if any(not 1 <= a <= b for a, b in zip(sizes[name], region, strict=True)):
                raise ConfigError(
                    f"{where}: got {sizes[name]} cells of a region of {region}; expected at least "
                    "1 and no more than the region has. Make the view smaller, or "
                    "data.init_args.window.size larger."
                )
        return replace(self, **sizes)

    @property
    def large(self) -> tuple[int, int]:
        """Rows and columns of a large view."""
        assert isinstance(self.global_size, tuple)
        return self.global_size

    def plan(self) -> list[tuple[int, int]]:
        """Return the size of every view, the large ones first."""
        assert isinstance(self.local_size, tuple)
        return [self.large] * GLOBALS + [self.local_size] * self.local_count


class TITAN(DINO):
    """Pretrain a `TITANBackbone` on regions of feature grids by self-distillation.

    Args:
        modalities: One set of features on a grid, by name; linked from the DataModule by the CLI.
        encoding: What the backbone is built from.
        crops: Sizes, number and changes of the views.
        head: Sizes of the head.
        masks: Which tiles of the large views are hidden, where `loss_weights.patch` is above 0.
        teacher: Momentum, temperatures and centring.
        loss_weights: Of the terms `cls` (1), `patch` (1) and `koleo` (0).
        context_size: Rows and columns of the region that the DataModule yields.
        options: Single choices, and whether iBOT's released code decides the others.
        optimization: Optimiser and schedule; clipping is `optimization.clip`.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modality or sizes cannot be used.
    """

    backbone: TITANBackbone

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: SlideEncoding = SlideEncoding(),
        crops: GridCrops = GridCrops(),
        head: DINOHead = _PROTOTYPES,
        masks: BlockMasks = BlockMasks(),
        teacher: DINOTeacher = DINOTeacher(),
        loss_weights: dict[str, float] | None = None,
        context_size: int | tuple[int, ...] = 16,
        options: DINOOptions = DINOOptions(),
        optimization: Optimization = PUBLISHED,
        execution: Execution = Execution(),
    ) -> None:
        own: dict[str, Any] = {"encoding": encoding, "crops": crops}  # of other classes than DINO's
        super().__init__(
            modalities,
            head=head,
            masks=masks,
            teacher=teacher,
            loss_weights=term_weights(loss_weights, "TITAN", _TERMS),
            context_size=context_size,
            options=options,
            optimization=optimization,
            execution=execution,
            **own,
        )

    def build_student(
        self,
        known: Mapping[str, Modality],
        encoding: Any,
        crops: Any,
        context_size: int | tuple[int, ...],
        *,
        has_masks: bool,
    ) -> tuple[GridCrops, Backbone]:
        """Return the views, fitted to the region, and the student."""
        _check_grid(known[self.name], context_size)
        chosen = as_dataclass(SlideEncoding, encoding)
        fitted = as_dataclass(GridCrops, crops).fitted(context_size)
        sizes = named_sizes(_SIZES, chosen.size, chosen.architecture, "encoding")
        arguments: dict[str, Any] = {
            **{n: v for n, v in vars(sizes).items() if v is not None},
            "mask_token": has_masks,
            "normalization": chosen.normalization,
        }
        if chosen.weights is None:
            return fitted, TITANBackbone(known, **arguments)
        loaded, _ = load_initial(
            TITANBackbone, chosen.weights, "titan",
            modalities=known, arguments=arguments, same=("modalities",),
        )  # fmt: skip
        if has_masks and loaded.mask_token is None:
            raise WeightsError(
                f"model.init_args.encoding.weights: {chosen.weights!r} holds a TITANBackbone "
                "without a mask token, but tiles are hidden from the student. Give patches no "
                "weight (loss_weights.patch: 0), or start from weights with a mask token."
            )
        return fitted, loaded

    def check(self, modalities: Mapping[str, Modality]) -> None:
        """Refuse features that do not lie on a grid."""
        super().check(modalities)
        for modality in modalities.values():
            _check_grid(modality, self.context_size or modality.size)

    # -- views ------------------------------------------------------------------------------

    @property
    def region(self) -> tuple[int, int]:
        """Rows and columns of a region."""
        assert self.context_size is not None
        rows, columns = sides_of(self.context_size, 2, "model.init_args.context_size")
        return rows, columns

    def draw(self, batch: Batch, generators: Generators) -> CropDraws:
        """Draw the views of every item and the hidden tiles of the large ones."""
        generator, items = generators.local, len(batch[self.name])
        occupied = valid_mask(batch, self.modality) & present_mask(batch, self.name).unsqueeze(1)
        occupied = occupied.unflatten(1, self.region)
        views = tuple(
            draw_grid_view(self.crops.views, occupied, size, self.modality.num_channels, generator)
            for size in self.crops.plan()
        )
        mask, most = None, 0
        if self.masks is not None:
            rows, columns = self.crops.large
            flat = draw_block_masks(self.masks, (rows, columns), GLOBALS * items, generator)
            mask = flat.view(items, GLOBALS, -1)
            most = self.masks.most_tokens(GLOBALS * items, rows * columns)
        return CropDraws(views=views, mask=mask, most_hidden=most)

    def encode_crops(self, batch: Batch, draws: CropDraws) -> CropTokens:
        """Cut the views and encode them, those of one size in one pass."""
        check_batch(batch, self.backbone.modalities, training=True)
        values, usable = unit_values(self.backbone, batch, self.name)
        cut = [
            self._view(values, usable, view, size)
            for view, size in zip(draws.views, self.crops.plan(), strict=True)
        ]
        present = present_mask(batch, self.name)
        large = self._joined(cut[:GLOBALS], present)
        small = self._joined(cut[GLOBALS:], present) if cut[GLOBALS:] else None
        mask = None
        if draws.mask is not None:
            seen = large[key(self.name, "valid")].unflatten(0, (GLOBALS, len(present)))
            mask = draws.mask.transpose(0, 1) & seen
        return self.tokens(large, small, mask, present, draws.most_hidden)

    def _view(
        self, values: Tensor, usable: Tensor, view: GridView, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Gather the cells of a view, change and standardise their features."""
        cells = view_cells(view, self.region, size)
        index = cells.unsqueeze(-1).expand(-1, -1, values.shape[-1])
        seen = usable.gather(1, cells)
        changed = change_features(values.gather(1, index), seen, view, self.crops.views)
        changed = self.backbone.normalizer.standardize(changed, self.name)
        places = grid_coordinates(size, device=values.device).expand(len(values), -1, -1)
        return {
            self.name: torch.where(seen.unsqueeze(-1), changed, 0.0),
            key(self.name, "valid"): seen,
            key(self.name, "coords"): places,
        }


def _check_grid(modality: Modality, context_size: int | tuple[int, ...]) -> None:
    if modality.kind != "features" or len(modality.size) != 2:
        raise ConfigError(
            f"TITAN: modality {modality.name!r} is of kind {modality.kind!r} and size "
            f"{modality.size}; expected features of tiles on a grid of rows and columns: "
            "SlideFeatureDataModule with window.mode: grid."
        )
    if tuple(modality.size) != sides_of(context_size, 2, "model.init_args.context_size"):
        raise ConfigError(
            f"TITAN: the data have regions of {tuple(modality.size)} cells, "
            f"model.init_args.context_size is {context_size}. Set both to the same value."
        )
