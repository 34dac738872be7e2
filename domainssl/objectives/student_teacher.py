"""What DINO, iBOT and SimDINO share: crops of two sizes, a student, and a teacher that follows it.

The teacher sees two large crops, the student those and several small ones. The teacher's weights
are a running mean of the student's, so it gives targets that move slowly; it is what is exported,
evaluated and loaded afterwards. Everything holds for images, series (each crop takes a date of its
own) and volumes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from domainssl.backbones.base import Backbone, Features
from domainssl.distributed import all_reduce_sum, row_layout, world_size
from domainssl.errors import ConfigError
from domainssl.losses.self_distillation import koleo
from domainssl.modality import (
    Batch,
    Modality,
    as_modalities,
    check_batch,
    key,
    present_mask,
)
from domainssl.nn.block_masks import BlockMasks, draw_block_masks
from domainssl.nn.norm import counted_rows
from domainssl.nn.patching import grid_of
from domainssl.nn.spread import effective_rank
from domainssl.nn.views import View, draw_view
from domainssl.objectives.base import Generators, Step
from domainssl.objectives.student_parts import Crops, StudentEncoding, make_student
from domainssl.objectives.teacher import _Taught
from domainssl.objectives.view_steps import check_photometric, unit_values, view_of
from domainssl.options import as_dataclass
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["CropDraws", "CropTokens", "Rows"]

GLOBALS = 2


@dataclass(frozen=True, kw_only=True)
class CropDraws:
    """Random choices of one step.

    Attributes:
        views: The large crops, then the small ones: `View`, or what a subclass draws.
        mask: Hidden patches of the student's large crops, bool (B, 2, N), or (B, 1, N) where a
            method has one; None without masks.
        most_hidden: Number of hidden patches that no batch of this size exceeds.
    """

    views: tuple[Any, ...]
    mask: Tensor | None
    most_hidden: int


@dataclass(frozen=True, kw_only=True)
class CropTokens:
    """What student and teacher say about the crops of a batch.

    Attributes:
        student: Vectors of all crops, the large ones first, (2 + V, B, E).
        teacher: Vectors of the large crops, (2, B, E), constants.
        student_patches: Patches of the masked large crops, (2, B, N, E).
        teacher_patches: Patches of the same crops without a mask, (2, B, N, E), constants.
        mask: bool (2, B, N), True where the student's patch was hidden and holds data.
        valid: bool (2, B, N), True where a patch of the large crops holds data.
        anchor: Patches of the large crops from an earlier teacher, (2, B, N, E), constants.
        present: bool (B,), True where the item has the modality.
        most_hidden: See `CropDraws`.
    """

    student: Tensor
    teacher: Tensor
    student_patches: Tensor | None
    teacher_patches: Tensor | None
    mask: Tensor | None
    present: Tensor
    most_hidden: int
    valid: Tensor | None = None
    anchor: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """Number of large crops of items that are there, ()."""
        return GLOBALS * self.present.sum()


@dataclass(frozen=True)
class Rows:
    """Hidden patches of a batch, in a number of rows that does not depend on the draws.

    Attributes:
        student: (R, E).
        teacher: (R, E).
        weight: One over the number of hidden patches of the row's crop, (R,); 0 fills up.
    """

    student: Tensor
    teacher: Tensor
    weight: Tensor

    @classmethod
    def of(cls, tokens: CropTokens) -> Rows:
        """Gather the hidden patches without waiting for the device to count them."""
        assert tokens.student_patches is not None
        assert tokens.teacher_patches is not None
        assert tokens.mask is not None
        mask = tokens.mask & tokens.present.unsqueeze(-1)
        weight = mask / mask.sum(-1, keepdim=True).clamp(min=1)
        flat = mask.flatten()
        count = min(tokens.most_hidden, len(flat))
        order = (~flat).to(torch.uint8).argsort(stable=True)[:count]
        return cls(
            tokens.student_patches.flatten(0, 2)[order],
            tokens.teacher_patches.flatten(0, 2)[order],
            weight.flatten()[order].float(),
        )


class _StudentTeacher(_Taught):
    """Base of methods whose targets come from a running mean of the student.

    A subclass builds its heads, calls `make_teacher`, and writes `terms`.

    Args:
        modalities: Exactly one.
        encoding: What the backbone is built from.
        crops: Sizes, number and changes of the crops.
        masks: Which patches of the large crops are hidden from the student; None hides none.
        momentum: Share of the teacher that a step keeps, at the start of the run; it rises to 1
            by half a cosine.
        context_size: Size of the window that the DataModule yields.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.
    """

    backbone: Backbone
    exported: ClassVar[str] = "teacher.backbone"
    drops_invalid_patches: bool = True
    compares_patches: bool = False  # where none are hidden, too
    masked_crops: ClassVar[int] = GLOBALS  # of an item
    head: nn.Module

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        encoding: StudentEncoding,
        *,
        crops: Crops,
        masks: BlockMasks | None,
        momentum: float,
        context_size: int | tuple[int, ...],
        optimization: Optimization,
        execution: Execution,
    ) -> None:
        super().__init__(
            momentum=momentum,
            optimization=optimization,
            execution=execution,
            context_size=context_size,
        )
        known = as_modalities(modalities)
        method = type(self).__name__
        if len(known) != 1:
            raise ConfigError(
                f"{method} cuts crops of one modality, the data have {list(known)}. Choose "
                "one in the DataModule; a scan that may be CT or MR is one modality, `scan`."
            )
        (self.name,) = known
        self.masks = masks
        self.crops, self.backbone = self.build_student(
            known, encoding, crops, context_size, has_masks=masks is not None
        )
        if masks is not None and masks.fraction == 0:
            raise ConfigError("model.init_args.masks.fraction: got 0, expected a share above 0.")

    def build_student(
        self,
        known: Mapping[str, Modality],
        encoding: StudentEncoding,
        crops: Crops,
        context_size: int | tuple[int, ...],
        *,
        has_masks: bool,
    ) -> tuple[Any, Backbone]:
        """Return the crops, fitted to the data, and the student.

        A subclass with crops of another kind gives them `large`, the size of the large ones.

        Args:
            known: The one modality.
            encoding: What the backbone is built from.
            crops: As configured.
            context_size: Size of the window that the DataModule yields.
            has_masks: Patches are hidden from the student.

        Raises:
            ConfigError: Encoder, sizes or changes do not fit.
        """
        chosen = as_dataclass(StudentEncoding, encoding)
        fitted = as_dataclass(Crops, crops).fitted(known[self.name], context_size, chosen)
        backbone = make_student(known, chosen, fitted, has_masks=has_masks)
        form = backbone.normalizer.forms[self.name]
        for which in ("first", "second", "local"):
            check_photometric(fitted.views(which), form, known[self.name], f"crops.{which}")
        return fitted, backbone

    def project_crops(self, tokens: CropTokens) -> Tensor:
        """Return what the student's head makes of all crops, (V, B, K)."""
        with counted_rows(tokens.present.repeat(len(tokens.student))):
            out: Tensor = self.head(tokens.student.flatten(0, 1))
        return out.unflatten(0, (-1, len(tokens.present)))

    def koleo_term(
        self, tokens: CropTokens, neighbours: Literal["global", "rank"] = "global"
    ) -> Tensor:
        """Return the sum of KoLeo over the large crops, from vectors before the head."""
        layout = row_layout(tokens.present)
        found = [
            koleo(view, present=tokens.present, neighbours=neighbours, layout=layout)
            for view in tokens.student[: len(tokens.teacher)]
        ]
        return torch.stack(found).sum()

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield everything that is trained: there is one modality."""
        yield from (p for p in self.parameters() if p.requires_grad)

    def features(self, batch: Batch) -> Features:
        """Return the teacher's features."""
        features: Features = self.teacher["backbone"](batch)
        return features

    # -- crops ------------------------------------------------------------------------------

    @property
    def modality(self) -> Modality:
        """The one modality."""
        return self.backbone.modalities[self.name]

    def draw(self, batch: Batch, generators: Generators) -> CropDraws:
        """Draw the crops of every item and the hidden patches of the large ones."""
        x, modality = batch[self.name], self.modality
        generator, items, frames = generators.local, len(x), None
        if modality.kind == "series":
            frames = batch.get(key(self.name, "frames"))
            if frames is None:
                frames = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        window = tuple(x.shape[-modality.spatial_dims :])
        views = tuple(
            draw_view(self.crops.views(which), window, items, generator, frames, size)
            for which, size in self.crops.plan()
        )
        mask, most = None, 0
        if self.masks is not None:
            grid = self.mask_grid()
            images = self.masked_crops * items
            flat = draw_block_masks(self.masks, grid, images, generator)
            mask = flat.view(items, self.masked_crops, -1)
            most = self.masks.most_tokens(images, math.prod(grid))
        return CropDraws(views=self.same_dates(views), mask=mask, most_hidden=most)

    def same_dates(self, views: tuple[View, ...]) -> tuple[View, ...]:
        """Change the dates of some crops; the base leaves every crop its own."""
        return views

    def mask_grid(self) -> tuple[int, ...]:
        """Return the patches of a large crop per axis."""
        patch = getattr(self.backbone, "patch_size", 1)
        return grid_of(self.crops.large, patch, "crops.global_size")

    def encode_crops(self, batch: Batch, draws: CropDraws) -> CropTokens:
        """Cut the crops and encode them, those of one size in one pass."""
        cut, present = self.cut_crops(batch, draws.views), present_mask(batch, self.name)
        large = self._joined(cut[:GLOBALS], present)
        small = self._joined(cut[GLOBALS:], present) if cut[GLOBALS:] else None
        mask = None if draws.mask is None else draws.mask.transpose(0, 1)
        return self.tokens(large, small, mask, present, draws.most_hidden)

    def cut_crops(self, batch: Batch, views: tuple[View, ...]) -> list[dict[str, Tensor]]:
        """Cut the crops; each is a normalised batch without `present`."""
        check_batch(batch, self.backbone.modalities, training=True)
        values, usable = unit_values(self.backbone, batch, self.name)
        return [
            view_of(
                self.backbone, batch, self.name, values, usable, view, self.crops.views(w), size
            )
            for view, (w, size) in zip(views, self.crops.plan(), strict=True)
        ]

    def _joined(self, crops: list[dict[str, Tensor]], present: Tensor) -> dict[str, Tensor]:
        """Lay crops of one size behind each other, (views · B, ...)."""
        joined = {name: torch.cat([crop[name] for crop in crops]) for name in crops[0]}
        joined[key(self.name, "present")] = present.repeat(len(crops))
        return joined

    def tokens(
        self,
        large: Mapping[str, Tensor],
        small: Mapping[str, Tensor] | None,
        mask: Tensor | None,
        present: Tensor,
        most_hidden: int,
    ) -> CropTokens:
        """Run student and teacher on normalised crops.

        Args:
            large: Both large crops of all items, (2·B, ...), view by view.
            small: The small ones, (V·B, ...); None for none.
            mask: Hidden patches of the large crops, bool (2, B, N); None for none.
            present: bool (B,).
            most_hidden: See `CropDraws`.
        """
        items = len(present)
        replace = None if mask is None else {self.name: mask.flatten(0, 1)}
        seen = self.backbone.encode(large, replace=replace)
        vectors = [self.vector(seen)]
        if small is not None:
            vectors.append(self.vector(self.backbone.encode(small)))
        with torch.no_grad():
            target = self.teacher["backbone"].encode(large)  # type: ignore[operator]
        found: dict[str, Any] = {"student_patches": None, "teacher_patches": None, "mask": None}
        if mask is not None or self.compares_patches:
            split = (GLOBALS, items)
            valid = target.token_valid[self.name].unflatten(0, split)
            found = {
                "student_patches": seen.tokens[self.name].unflatten(0, split),
                "teacher_patches": target.tokens[self.name].unflatten(0, split),
                "valid": valid,
                "mask": mask if mask is None or not self.drops_invalid_patches else mask & valid,
            }
        return CropTokens(
            student=torch.cat(vectors).unflatten(0, (-1, items)),
            teacher=self.vector(target).unflatten(0, (GLOBALS, items)),
            present=present,
            most_hidden=most_hidden,
            **found,
        )

    def vector(self, features: Features) -> Tensor:
        """Return the class token of a crop, or what stands for it, (B, E)."""
        found = features.cls.get(self.name)
        return features.pooled[self.name] if found is None else found

    def terms(self, tokens: CropTokens) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weighted losses, and what `after_step` and `monitors` need."""
        raise NotImplementedError(f"{type(self).__name__} must implement terms(tokens).")

    def forward(self, batch: Batch, draws: CropDraws, outputs: bool = False) -> Step:
        """Compute the terms; items without the modality do not count."""
        tokens = self.encode_crops(batch, draws)
        losses, kept = self.terms(tokens)
        kept |= {"vectors": tokens.teacher[0], "present": tokens.present}
        if outputs:
            kept["embeddings"] = {self.name: tokens.teacher[0]}
        return Step(losses, kept)

    # -- what follows a step ----------------------------------------------------------------

    def monitors(self, step: Step) -> dict[str, Tensor]:
        """Return the teacher's effective rank and spread over the batch, and its momentum."""
        rows = step.outputs["vectors"].float()
        present = step.outputs["present"]
        unit = nn.functional.normalize(rows, dim=-1) * present.unsqueeze(-1)
        count = all_reduce_sum(present.float().sum()).clamp(min=1)
        mean = all_reduce_sum(unit.sum(0)) / count
        squares = all_reduce_sum(((unit - mean).square() * present.unsqueeze(-1)).sum(0)) / count
        return {
            "teacher_rank": all_reduce_sum(effective_rank(rows, present)) / world_size(),
            "teacher_std": squares.sqrt().mean() * rows.shape[1] ** 0.5,
            "momentum": torch.tensor(self.momentum_now()),
        }
