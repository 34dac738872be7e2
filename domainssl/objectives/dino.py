"""DINO: a student matches its teacher's distribution over prototypes; with iBOT also at patches.

Source: Caron et al., ICCV 2021 (arXiv 2104.14294); Zhou et al., ICLR 2022 (iBOT, arXiv 2111.07832);
Oquab et al. 2023 (DINOv2, arXiv 2304.07193); and their released code.

One training step: cut two large crops and several small ones (`draw`), hide patches of the large
ones from the student where `loss_weights.patch` is above 0, and let every crop of the student match
the teacher's distribution for the other large crops. Centring or Sinkhorn's iterations keep the
teacher from giving all items one prototype; KoLeo spreads items out; Gram anchoring (DINOv3) keeps
the similarities between patches what they were for an earlier teacher.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from domainssl.backbones.vit import ViTBackbone
from domainssl.distributed import all_reduce_sum
from domainssl.errors import ConfigError
from domainssl.losses.latent import gram_anchoring
from domainssl.losses.self_distillation import (
    centered_softmax,
    class_distillation,
    moved_center,
    patch_distillation,
    sinkhorn,
)
from domainssl.modality import Batch, Modality
from domainssl.nn.block_masks import BlockMasks
from domainssl.nn.heads import PrototypeHead
from domainssl.nn.norm import counted_rows
from domainssl.nn.views import View, Views
from domainssl.objectives.base import Step
from domainssl.objectives.gram import GramAnchor, on_grid
from domainssl.objectives.student_parts import PUBLISHED, Crops, StudentEncoding
from domainssl.objectives.student_teacher import CropDraws, CropTokens, Rows, _StudentTeacher
from domainssl.objectives.terms import term_weights
from domainssl.objectives.view_steps import unit_values, view_of
from domainssl.options import MethodOptions, as_dataclass, decide, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization
from domainssl.training.schedules import TeacherTemperature

__all__ = ["DINO", "DINOHead", "DINOOptions", "DINOTeacher"]

_TERMS = {"cls": 1.0, "patch": 0.0, "koleo": 0.0, "gram": 0.0}


@dataclass(frozen=True, kw_only=True)
class DINOHead:
    """The network between backbone and prototypes.

    Attributes:
        prototypes: Of the class token, K.
        patch_prototypes: Of patches where they have their own (`options.patch_head`); None is
            `prototypes`.
        hidden: Width of the hidden layers.
        bottleneck: Width before the prototypes.
        layers: Linear layers before the prototypes.
        batch_norm: Normalise hidden vectors over the batch.
        frozen_epochs: Epochs in which prototypes are not trained.
    """

    prototypes: int = 65536
    patch_prototypes: int | None = None
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3
    batch_norm: bool = False
    frozen_epochs: int = 1


@dataclass(frozen=True, kw_only=True)
class DINOTeacher:
    """How the teacher follows the student and makes its targets.

    Attributes:
        momentum: Share of the teacher that a step keeps at first; rises to 1 by half a cosine.
        temperature: Of class tokens.
        patch_temperature: Of patches.
        student_temperature: Divides the student's logits.
        center_momentum: Share of the centre that a step keeps.
        sinkhorn_iterations: With `options.centering: sinkhorn`.
    """

    momentum: float = 0.996
    temperature: TeacherTemperature = TeacherTemperature()
    patch_temperature: TeacherTemperature = TeacherTemperature()
    student_temperature: float = 0.1
    center_momentum: float = 0.9
    sinkhorn_iterations: int = 3

    def __post_init__(self) -> None:
        for name in ("temperature", "patch_temperature"):
            value = as_dataclass(TeacherTemperature, getattr(self, name))
            object.__setattr__(self, name, value)
        if self.student_temperature <= 0:
            raise ConfigError(
                f"model.init_args.teacher.student_temperature: got {self.student_temperature!r}, "
                "expected more than 0; 0.1 is usual."
            )
        for name in ("momentum", "center_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"model.init_args.teacher.{name}: got {getattr(self, name)!r}, expected a "
                    "share in [0, 1]."
                )


@dataclass(frozen=True, kw_only=True)
class DINOOptions(MethodOptions):
    """Where DINO, iBOT, DINOv2 and good sense differ; None follows `reference`."""

    centering: Literal["center", "sinkhorn"] | None = option(
        ours="center",
        reference="center",
        text="What makes targets of the teacher's logits: a centre that is subtracted, or "
        "Sinkhorn's iterations (large models of DINOv2).",
    )
    center_mean: Literal["global", "per_rank"] | None = option(
        ours="global",
        reference="per_rank",
        text="The centre follows the mean over the rows of all ranks, or the unweighted mean of "
        "the means of all ranks (released code).",
    )
    patch_center: Literal["hidden", "all"] | None = option(
        ours="hidden",
        reference="all",
        text="The centre of patches follows hidden patches (DINOv2) or all (iBOT).",
    )
    temperature_every: Literal["step", "epoch"] | None = option(
        ours="step",
        reference="epoch",
        text="The teacher's temperature rises with every step (DINOv2) or every epoch (DINO, "
        "iBOT).",
    )
    patch_head: Literal["shared", "last_layer", "separate"] | None = option(
        ours="shared",
        reference="last_layer",
        text="Patches share head and prototypes with the class token (DINOv2's default), have "
        "prototypes of their own (iBOT), or a whole head (DINOv2's large models).",
    )
    teacher_patch_head: Literal["same", "shared"] | None = option(
        ours="same",
        reference="shared",
        text="The teacher's patches use the mean of the student's patch prototypes, or, as "
        "released by iBOT, that of its class prototypes.",
    )
    trains_scale: bool | None = option(
        ours=False,
        reference=False,
        text="Train the length of prototypes (DINOv2); otherwise it is 1 (DINO, iBOT).",
    )
    koleo_neighbours: Literal["global", "rank"] | None = option(
        ours="global",
        reference="rank",
        text="KoLeo looks for neighbours in the batch of all ranks, or of one (DINOv2).",
    )
    invalid_patches: Literal["drop", "count"] | None = option(
        ours="drop",
        reference="count",
        text="Hidden patches without a valid pixel count in no term, or like all others.",
    )
    local_dates: Literal["each", "one"] | None = option(
        ours="each",
        reference="one",
        text="Every small crop of a series has its own date, or all share one (SSL4EO-S12).",
    )


class DINO(_StudentTeacher):
    """Pretrain a `ViTBackbone`, or an encoder of `EncoderBackbone`, by self-distillation.

    Args:
        modalities: One image, series or volume, by name; linked from the DataModule by the CLI.
        encoding: What the backbone is built from.
        crops: Sizes, number and changes of the crops.
        head: Sizes of the head.
        masks: Which patches are hidden, where `loss_weights.patch` is above 0.
        teacher: Momentum, temperatures and centring.
        loss_weights: Of the terms `cls` (1), `patch` (0; iBOT and DINOv2 have 1), `koleo` (0;
            DINOv2 has 0.1) and `gram` (0; DINOv3 has up to 2, late in training).
        gram: The anchor of the term `gram`.
        context_size: Size of the window that the DataModule yields, one number or one per axis.
        options: Single choices, and whether the released code decides the others.
        optimization: Optimiser and schedule; clipping is `optimization.clip`.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modality, the encoder or sizes cannot be used.
    """

    head: PrototypeHead

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: StudentEncoding = StudentEncoding(),
        crops: Crops = Crops(),
        head: DINOHead = DINOHead(),
        masks: BlockMasks = BlockMasks(),
        teacher: DINOTeacher = DINOTeacher(),
        loss_weights: dict[str, float] | None = None,
        gram: GramAnchor = GramAnchor(),
        context_size: int | tuple[int, ...] = 224,
        options: DINOOptions = DINOOptions(),
        optimization: Optimization = PUBLISHED,
        execution: Execution = Execution(),
    ) -> None:
        weights = term_weights(loss_weights, "DINO", _TERMS)
        settings = as_dataclass(DINOTeacher, teacher)
        has_patches = weights["patch"] > 0
        super().__init__(
            modalities,
            encoding,
            crops=crops,
            masks=as_dataclass(BlockMasks, masks) if has_patches else None,
            momentum=settings.momentum,
            context_size=context_size,
            optimization=optimization,
            execution=execution,
        )
        self.loss_weights, self.settings = weights, settings
        self.options = decide(DINOOptions, options)
        self.drops_invalid_patches = self.options.invalid_patches == "drop"
        self.head_sizes = as_dataclass(DINOHead, head)
        self._make_heads(has_patches)
        self.gram = as_dataclass(GramAnchor, gram)
        self._make_anchor()

    def _make_heads(self, has_patches: bool) -> None:
        sizes, kind = self.head_sizes, self.options.patch_head
        width = self.backbone.embed_dim[self.name]
        patches = sizes.patch_prototypes or sizes.prototypes

        def head(prototypes: int, own: int | None = None) -> PrototypeHead:
            return PrototypeHead(
                width, hidden=sizes.hidden, bottleneck=sizes.bottleneck, prototypes=prototypes,
                patch_prototypes=own, layers=sizes.layers, batch_norm=sizes.batch_norm,
                trains_scale=bool(self.options.trains_scale),
            )  # fmt: skip

        own_layer = has_patches and kind == "last_layer"
        self.head = head(sizes.prototypes, patches if own_layer else None)
        parts: dict[str, nn.Module] = {"head": copy.deepcopy(self.head)}
        if own_layer and self.options.teacher_patch_head == "shared":
            if patches != sizes.prototypes:
                raise ConfigError(
                    f"model.init_args.head: {patches} prototypes of patches and {sizes.prototypes} "
                    "of the class token, but options.teacher_patch_head: shared compares patches "
                    "with the latter. Make them equal, or choose same."
                )
            parts["head"].last_layer2 = None  # type: ignore[assignment]
        self.patch_head: PrototypeHead | None = None
        if has_patches and kind == "separate":
            self.patch_head = head(patches)
            parts["patch_head"] = copy.deepcopy(self.patch_head)
        self.make_teacher(**parts)
        count = patches if has_patches and kind != "shared" else sizes.prototypes
        if own_layer and self.options.teacher_patch_head == "shared":
            count = sizes.prototypes
        self.register_buffer("center", torch.zeros(sizes.prototypes))
        self.register_buffer("patch_center", torch.zeros(count if has_patches else 0))
        self.center: Tensor
        self.patch_center: Tensor

    # -- the anchor of patches --------------------------------------------------------------

    def _make_anchor(self) -> None:
        """Keep a copy of the teacher's backbone, which is part of checkpoints."""
        self.anchor: nn.ModuleDict | None = None
        self.compares_patches = self.loss_weights["gram"] > 0
        if not self.compares_patches:
            return
        if not isinstance(self.backbone, ViTBackbone):
            raise ConfigError(
                "model.init_args.loss_weights.gram: similarities of patches are those of a "
                "transformer. Use encoding.encoder: vit, or give the term no weight."
            )
        self.anchor = nn.ModuleDict({"backbone": copy.deepcopy(self.teacher["backbone"])})
        self.anchor.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DINO:
        """Keep the anchor in evaluation mode, as the teacher."""
        super().train(mode)
        anchor = getattr(self, "anchor", None)
        if anchor is not None:
            anchor.eval()
        return self

    def encode_crops(self, batch: Batch, draws: CropDraws) -> CropTokens:
        """Cut the crops and encode them, for the anchor without changes of values."""
        tokens = super().encode_crops(batch, draws)
        if self.anchor is None or self.progress.step < self.gram.start_steps:
            return tokens
        values, usable = unit_values(self.backbone, batch, self.name)
        size = tuple(self.gram.scale * side for side in self.crops.large)
        cut = [
            view_of(self.backbone, batch, self.name, values, usable, view, Views(), size)
            for view in draws.views[: len(tokens.teacher)]
        ]
        large = self._joined(cut, tokens.present)
        with torch.no_grad():
            found: Any = self.anchor["backbone"].encode(large)  # type: ignore[operator]
            grid = found.grid[self.name][-self.modality.spatial_dims :]
            patches = on_grid(found.tokens[self.name], grid, self.mask_grid())
        return dataclasses.replace(tokens, anchor=patches.unflatten(0, tokens.teacher.shape[:2]))

    def _gram_term(self, tokens: CropTokens) -> Tensor:
        assert tokens.student_patches is not None
        assert tokens.valid is not None
        student = tokens.student_patches.flatten(0, 1)
        if tokens.anchor is None:  # too early
            return 0.0 * student.float().sum()
        counted = (tokens.valid & tokens.present.unsqueeze(-1)).flatten(0, 1)
        return gram_anchoring(student, tokens.anchor.flatten(0, 1), self.gram.mode, counted)

    def same_dates(self, views: tuple[View, ...]) -> tuple[View, ...]:
        """Give all small crops the date of the first one, where the options say so."""
        if self.options.local_dates == "each" or len(views) < 4:
            return views
        date = views[2].date
        return (*views[:3], *(dataclasses.replace(view, date=date) for view in views[3:]))

    # -- losses -----------------------------------------------------------------------------

    def temperature(self, kind: Literal["temperature", "patch_temperature"]) -> float:
        """Return the teacher's temperature of this step."""
        schedule: TeacherTemperature = getattr(self.settings, kind)
        assert self.options.temperature_every is not None
        return schedule.at(self.progress, self.options.temperature_every)

    def terms(self, tokens: CropTokens) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Compute the weighted terms from what student and teacher say about the crops."""
        present, weights = tokens.present, self.loss_weights
        large = present.repeat(len(tokens.teacher))
        loss, kept = self._class_term(self.project_crops(tokens), tokens, large)
        losses = {"cls": weights["cls"] * loss}
        if tokens.mask is not None:
            loss, more = self._patch_term(tokens)
            losses["patch"] = weights["patch"] * loss
            kept |= more
        if weights["koleo"] > 0:
            neighbours = self.options.koleo_neighbours or "global"
            losses["koleo"] = weights["koleo"] * self.koleo_term(tokens, neighbours)
        if weights["gram"] > 0:
            losses["gram"] = weights["gram"] * self._gram_term(tokens)
        return losses, kept

    def _class_term(
        self, student: Tensor, tokens: CropTokens, large: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        head = self.teacher["head"]
        with torch.no_grad():
            logits = head(tokens.teacher.flatten(0, 1))
            targets = self._targets(logits, self.center, "temperature", large)
            counted = torch.where(large.unsqueeze(1), logits.float(), 0.0)
            certain = -(targets * targets.clamp(min=1e-12).log()).sum(-1)
            kept = {
                "class_total": counted.sum(0),
                "class_count": large.sum(),
                "entropy": torch.where(large, certain, 0.0).sum(),
                "mean_target": torch.where(large.unsqueeze(1), targets, 0.0).sum(0),
            }
        loss = class_distillation(
            student,
            targets.unflatten(0, (len(tokens.teacher), -1)),
            temperature=self.settings.student_temperature,
            present=tokens.present,
        )
        return loss, kept

    def _patch_term(self, tokens: CropTokens) -> tuple[Tensor, dict[str, Any]]:
        rows = Rows.of(tokens)
        ours = self.head if self.patch_head is None else self.patch_head
        theirs: Any = self.teacher["head" if self.patch_head is None else "patch_head"]
        hidden = rows.weight > 0
        is_own = self.patch_head is not None
        with counted_rows(hidden):
            student = ours(rows.student) if is_own else ours.patches(rows.student)
        with torch.no_grad():
            logits = theirs(rows.teacher) if is_own else theirs.patches(rows.teacher)
            targets = self._targets(logits, self.patch_center, "patch_temperature", hidden)
            counted, total = hidden, logits.float()
            if self.options.patch_center == "all":
                assert tokens.teacher_patches is not None
                every = tokens.teacher_patches
                counted = tokens.present.view(1, -1, 1).expand(every.shape[:3]).flatten()
                flat = every.flatten(0, 2)
                total = (theirs(flat) if is_own else theirs.patches(flat)).float()
            kept = {
                "patch_total": torch.where(counted.unsqueeze(1), total, 0.0).sum(0),
                "patch_count": counted.sum(),
            }
        loss = patch_distillation(
            student,
            targets,
            rows.weight,
            tokens.images,
            temperature=self.settings.student_temperature,
        )
        return loss, kept

    def _targets(
        self,
        logits: Tensor,
        center: Tensor,
        kind: Literal["temperature", "patch_temperature"],
        present: Tensor,
    ) -> Tensor:
        temperature = self.temperature(kind)
        if self.options.centering == "center":
            return centered_softmax(logits, center, temperature)
        iterations = self.settings.sinkhorn_iterations
        return sinkhorn(logits, temperature, iterations=iterations, present=present)

    # -- what follows a step ----------------------------------------------------------------

    def after_step(self, step: Step) -> None:
        """Move the teacher and its centres, and take the anchor; the step has used the old ones."""
        super().after_step(step)
        if self.anchor is not None and self.gram.is_taken(self.progress.step + 1):
            now = self.teacher["backbone"].parameters()
            for kept, current in zip(self.anchor.parameters(), now, strict=True):
                kept.copy_(current)
        for name, center in (("class", self.center), ("patch", self.patch_center)):
            if f"{name}_total" in step.outputs:
                moved = moved_center(
                    center,
                    step.outputs[f"{name}_total"],
                    step.outputs[f"{name}_count"],
                    self.settings.center_momentum,
                    self.options.center_mean or "global",
                )
                center.copy_(moved)

    def monitors(self, step: Step) -> dict[str, Tensor]:
        """Return, besides rank and spread, how decided and how even the teacher is.

        `teacher_entropy` is the mean entropy of its distributions, `prototype_entropy` that of
        their mean, both as shares of the largest, log K: the first falls to 0 for certain targets,
        the second when all items get one prototype.
        """
        out = step.outputs
        sums = torch.cat([out["mean_target"], torch.stack([out["entropy"], out["class_count"]])])
        sums = all_reduce_sum(sums.float())
        count = sums[-1].clamp(min=1)
        mean, most = sums[:-2] / count, math.log(len(sums) - 2)
        return {
            **super().monitors(step),
            "teacher_entropy": sums[-2] / count / most,
            "prototype_entropy": -(mean * mean.clamp(min=1e-12).log()).sum() / most,
            "center_norm": self.center.norm(),
            "teacher_temperature": torch.tensor(self.temperature("temperature")),
        }

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clip, then leave prototypes alone in the first epochs, as released."""
        super().configure_gradient_clipping(*args, **kwargs)
        if self.progress.epoch < self.head_sizes.frozen_epochs:
            for name, parameter in self.named_parameters():
                if "last_layer" in name:
                    parameter.grad = None
