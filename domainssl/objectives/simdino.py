"""SimDINO: views of an item agree and items fill the space, without prototypes or centring.

Source: Wu et al., ICML 2025 (arXiv 2502.10385), and its released code; SimDINOv2 adds masked
patches.

One training step: cut two large crops and several small ones (`draw`), pull the student's vectors
of all crops towards the teacher's of the other large crops, and spread the vectors of the large
crops over the space by their coding rate, which takes the place of DINO's centring. With
`loss_weights.patch` above 0, hidden patches of the student match the teacher's, too.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from domainssl.errors import ConfigError
from domainssl.losses.coding_rate import coding_rate, masked_agreement, view_agreement
from domainssl.modality import Modality
from domainssl.nn.block_masks import BlockMasks
from domainssl.nn.heads import BottleneckHead
from domainssl.nn.norm import counted_rows
from domainssl.objectives.student_parts import PUBLISHED, Crops, StudentEncoding
from domainssl.objectives.student_teacher import CropTokens, Rows, _StudentTeacher
from domainssl.objectives.terms import term_weights
from domainssl.options import MethodOptions, as_dataclass, decide, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["SimDINO", "SimDINOHead", "SimDINOOptions"]

_TERMS = {"compression": 1.0, "expansion": 1.0, "patch": 0.0, "koleo": 0.0}


@dataclass(frozen=True, kw_only=True)
class SimDINOHead:
    """The network between backbone and the space that is filled.

    Attributes:
        hidden: Width of the hidden layers.
        bottleneck: Width of the space; a batch over all ranks should have a quarter as many items.
        layers: Linear layers.
        batch_norm: Normalise hidden vectors over the batch.
        separate_patches: Give patches a head of their own.
    """

    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3
    batch_norm: bool = False
    separate_patches: bool = False


@dataclass(frozen=True, kw_only=True)
class SimDINOOptions(MethodOptions):
    """Where the paper, the released code and good sense differ; None follows `reference`."""

    reduce_covariance: bool | None = option(
        ours=True,
        reference=False,
        text="The coding rate is that of the vectors of all ranks, or each rank's own with the "
        "number of all (released default).",
    )
    expansion_of: Literal["mean", "student"] | None = option(
        ours="mean",
        reference="mean",
        text="The coding rate is that of the mean of student and teacher, or of the student.",
    )
    same_view: bool | None = option(
        ours=False,
        reference=False,
        text="Pairs of one crop with itself pull as well, uncounted by the divisor (SimDINOv2's "
        "`no_diag=False`).",
    )
    normalized_head: bool | None = option(
        ours=True,
        reference=True,
        text="The head returns vectors of unit length.",
    )
    agreement: Literal["cosine", "product"] | None = option(
        ours="cosine",
        reference="cosine",
        text="Vectors of two crops are compared by their cosine, or by their plain product "
        "(SimDINOv2, whose head has to normalise).",
    )
    invalid_patches: Literal["drop", "count"] | None = option(
        ours="drop",
        reference="count",
        text="Hidden patches without a valid pixel count in no term, or like all others.",
    )


class SimDINO(_StudentTeacher):
    """Pretrain a `ViTBackbone`, or an encoder of `EncoderBackbone`, by coding rate.

    Args:
        modalities: One image, series or volume, by name; linked from the DataModule by the CLI.
        encoding: What the backbone is built from.
        crops: Sizes, number and changes of the crops.
        head: Sizes of the head.
        masks: Which patches are hidden, where `loss_weights.patch` is above 0.
        momentum: Share of the teacher that a step keeps at first; rises to 1 by half a cosine.
        eps: Precision of the coding rate: 0.5 as published, 0.05 in SimDINOv2.
        loss_weights: Of the terms `compression` (1), `expansion` (1), `patch` (0; SimDINOv2 has 1)
            and `koleo` (0).
        context_size: Size of the window that the DataModule yields, one number or one per axis.
        options: Single choices, and whether the released code decides the others.
        optimization: Optimiser and schedule; clipping is `optimization.clip`.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modality, the encoder or sizes cannot be used.
    """

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: StudentEncoding = StudentEncoding(),
        crops: Crops = Crops(),
        head: SimDINOHead = SimDINOHead(),
        masks: BlockMasks = BlockMasks(),
        momentum: float = 0.996,
        eps: float = 0.5,
        loss_weights: dict[str, float] | None = None,
        context_size: int | tuple[int, ...] = 224,
        options: SimDINOOptions = SimDINOOptions(),
        optimization: Optimization = PUBLISHED,
        execution: Execution = Execution(),
    ) -> None:
        weights = term_weights(loss_weights, "SimDINO", _TERMS)
        super().__init__(
            modalities,
            encoding,
            crops=crops,
            masks=as_dataclass(BlockMasks, masks) if weights["patch"] > 0 else None,
            momentum=momentum,
            context_size=context_size,
            optimization=optimization,
            execution=execution,
        )
        if eps <= 0:
            raise ConfigError(f"model.init_args.eps: got {eps!r}, expected more than 0.")
        self.loss_weights, self.eps = weights, eps
        self.options = decide(SimDINOOptions, options)
        self.drops_invalid_patches = self.options.invalid_patches == "drop"
        sizes = as_dataclass(SimDINOHead, head)
        self.head = self._head(sizes)
        parts: dict[str, nn.Module] = {"head": copy.deepcopy(self.head)}
        self.patch_head: BottleneckHead | None = None
        if weights["patch"] > 0 and sizes.separate_patches:
            self.patch_head = self._head(sizes)
            parts["patch_head"] = copy.deepcopy(self.patch_head)
        self.make_teacher(**parts)

    def _head(self, sizes: SimDINOHead) -> BottleneckHead:
        return BottleneckHead(
            self.backbone.embed_dim[self.name],
            sizes.hidden,
            sizes.bottleneck,
            layers=sizes.layers,
            batch_norm=sizes.batch_norm,
            normalize=bool(self.options.normalized_head),
        )

    def terms(self, tokens: CropTokens) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Compute the weighted terms from what student and teacher say about the crops."""
        present, weights, options = tokens.present, self.loss_weights, self.options
        student = self.project_crops(tokens)
        with torch.no_grad():
            teacher = self.teacher["head"](tokens.teacher.flatten(0, 1))
            teacher = teacher.unflatten(0, (-1, len(present)))
        agreement = view_agreement(
            student,
            teacher,
            present=present,
            normalize=options.agreement == "cosine",
            same_view=bool(options.same_view),
        )
        z = student[: len(teacher)]
        if options.expansion_of == "mean":
            z = (z + teacher.to(z.dtype)) / 2
        rate = coding_rate(z, eps=self.eps, present=present, reduce=bool(options.reduce_covariance))
        losses = {
            "compression": -weights["compression"] * agreement,
            "expansion": -weights["expansion"] * rate,
        }
        if tokens.mask is not None:
            losses["patch"] = weights["patch"] * self._patch_term(tokens)
        if weights["koleo"] > 0:
            losses["koleo"] = weights["koleo"] * self.koleo_term(tokens)
        return losses, {}

    def _patch_term(self, tokens: CropTokens) -> Tensor:
        rows = Rows.of(tokens)
        name = "head" if self.patch_head is None else "patch_head"
        ours: Any = getattr(self, name)
        with counted_rows(rows.weight > 0):
            student = ours(rows.student)
        with torch.no_grad():
            teacher = self.teacher[name](rows.teacher)
        return masked_agreement(student, teacher, rows.weight, tokens.images)
