"""What a student learns from its teacher: classes, masked patches, and how both stay spread out.

DINO and iBOT compare distributions over prototypes; a teacher's logits become probabilities by a
centre that is subtracted (`centered_softmax`) or by Sinkhorn's iterations (`sinkhorn`).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from domainssl.distributed import (
    RowLayout,
    all_reduce_max,
    all_reduce_sum,
    gather,
    global_mean,
    row_layout,
)
from domainssl.nn.precision import full

__all__ = [
    "RowMean",
    "centered_softmax",
    "class_distillation",
    "koleo",
    "moved_center",
    "patch_distillation",
    "sinkhorn",
]

RowMean = Literal["global", "per_rank"]


def centered_softmax(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Return the teacher's probabilities, `softmax((logits - center) / temperature)`.

    Args:
        logits: (..., K).
        center: Running mean of the teacher's logits, (K,).
        temperature: Below the student's, so that the target is the sharper one.

    Returns:
        Constants, (..., K).

    Source: Caron et al. 2021, eq. 1 and 4.

    Examples:
        >>> centered_softmax(torch.tensor([[1.0, 3.0]]), torch.tensor([1.0, 3.0]), 0.04).tolist()
        [[0.5, 0.5]]
    """
    with torch.autocast(logits.device.type, enabled=False):
        return ((full(logits.detach()) - center) / temperature).softmax(-1)


def moved_center(
    center: Tensor, total: Tensor, count: Tensor, momentum: float, mean: RowMean = "global"
) -> Tensor:
    """Move a centre towards the mean of the teacher's logits over all ranks.

    Args:
        center: (K,).
        total: Sum of this rank's logits, (K,).
        count: Number of logits in it, ().
        momentum: Share of the old centre.
        mean: Over the rows of all ranks, or the unweighted mean of the means of the ranks that
            have rows (released code). They differ where ranks hold different numbers of rows.

    Returns:
        The new centre, equal on all ranks; the old one where no rank has a row.

    Examples:
        >>> moved_center(torch.zeros(2), torch.tensor([2.0, 4.0]), torch.tensor(2.0), 0.9).tolist()
        [0.10000000149011612, 0.20000000298023224]
    """
    total, count = total.detach().to(center.dtype), count.detach().to(center.dtype)
    if mean == "per_rank":
        total, count = total / count.clamp(min=1), (count > 0).to(center.dtype)
    sums = all_reduce_sum(torch.cat([total, count.reshape(1)]))
    found = sums[:-1] / sums[-1].clamp(min=1)
    return torch.where(sums[-1] > 0, center * momentum + found * (1 - momentum), center)


@torch.no_grad()
def sinkhorn(
    logits: Tensor, temperature: float, *, iterations: int = 3, present: Tensor | None = None
) -> Tensor:
    """Return probabilities that use every prototype about equally often.

    `Q = exp(logits / temperature)`, then alternately: every prototype's column is divided by its
    sum over all rows of all ranks, every row by its own sum.

    Args:
        logits: The teacher's, (R, K); ranks may hold different numbers of rows.
        temperature: Divides the logits.
        iterations: Of both divisions.
        present: bool (R,); False rows do not count and become zero. None counts all.

    Returns:
        (R, K); rows sum to 1.

    Source: SwAV (Caron et al. 2020), as DINOv2 uses it. The largest logit of all ranks is
    subtracted before `exp`, which changes nothing but overflow.

    Examples:
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]])  # both rows prefer the first column
        >>> sinkhorn(logits, 1.0, iterations=20).round(decimals=2).tolist()
        [[0.6200000047683716, 0.3799999952316284], [0.3799999952316284, 0.6200000047683716]]
    """
    with torch.autocast(logits.device.type, enabled=False):
        scaled = full(logits) / temperature
        if present is None:
            present = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        counted = present.unsqueeze(1)
        lowest = torch.finfo(scaled.dtype).min
        shown = scaled.masked_fill(~counted, lowest)
        local = shown.amax() if len(shown) else scaled.new_full((), lowest)
        q = torch.where(counted, (scaled - all_reduce_max(local)).exp(), 0.0)
        tiny = torch.finfo(q.dtype).tiny
        for _ in range(iterations):
            q = q / all_reduce_sum(q.sum(0, keepdim=True)).clamp(min=tiny)
            q = q / q.sum(1, keepdim=True).clamp(min=tiny)
        return q


def class_distillation(
    student: Tensor, teacher: Tensor, *, temperature: float = 0.1, present: Tensor | None = None
) -> Tensor:
    """Compute the cross-entropy of every student view with every other view of the teacher.

    `L = mean_{a, v != a} mean_b -sum_k teacher_ab softmax(student_vb / temperature)`.

    Args:
        student: Logits of all views, the teacher's views first, (V, B, K).
        teacher: Probabilities of G views, (G, B, K), constants.
        temperature: Divides the student's logits.
        present: bool (B,); False items do not count. None counts all.

    Returns:
        The loss, (); its mean over ranks is the loss of one process with the joined batch. With
        no item at all, a zero that is connected to `student`.

    Source: Caron et al. 2021, eq. 3; DINOv2 splits the same sum into local and global pairs.

    Examples:
        >>> student = torch.zeros(4, 1, 2)  # undecided
        >>> round(float(class_distillation(student, torch.tensor([[[1.0, 0.0]]] * 2))), 4)
        0.6931
    """
    with torch.autocast(student.device.type, enabled=False):
        views, globals_ = len(student), len(teacher)
        logs = (full(student) / temperature).log_softmax(-1)
        others = logs.sum(0) - logs[:globals_]  # of all views but a
        terms = -(teacher.to(logs.dtype) * others).sum(-1).sum(0)  # (B,)
        counted = torch.ones_like(terms) if present is None else present.to(terms.dtype)
        terms = torch.where(counted > 0, terms, 0.0)
        return global_mean(terms.sum() / (globals_ * (views - 1)), counted.sum())


def patch_distillation(
    student: Tensor, teacher: Tensor, weight: Tensor, images: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """Compute the cross-entropy at masked patches; every image counts as one.

    Args:
        student: Logits at masked patches, (R, K).
        teacher: Probabilities at the same patches of the unmasked image, (R, K), constants.
        weight: One over the number of masked patches of the row's image, (R,); 0 drops a row.
        images: Number of global views of this rank, those without a mask included, ().
        temperature: Divides the student's logits.

    Returns:
        The loss, (); its mean over ranks is the loss of one process with the joined batch.

    Source: Zhou et al. 2022 (iBOT), eq. 3. Images without a mask count as zero in both released
    codes, so the term is half as large when half of the images are masked.

    Examples:
        >>> rows, sure = torch.zeros(2, 2), torch.tensor([[1.0, 0.0]] * 2)
        >>> half = torch.full((2,), 0.5)  # two masked patches of one image, of two images
        >>> round(float(patch_distillation(rows, sure, half, torch.tensor(2.0))), 4)
        0.3466
    """
    with torch.autocast(student.device.type, enabled=False):
        logs = (full(student) / temperature).log_softmax(-1)
        terms = -(teacher.to(logs.dtype) * logs).sum(-1) * weight.to(logs.dtype)
        return global_mean(torch.where(weight > 0, terms, 0.0).sum(), images)


def koleo(
    x: Tensor,
    *,
    present: Tensor | None = None,
    neighbours: Literal["global", "rank"] = "global",
    layout: RowLayout | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Push every vector away from its nearest neighbour (Kozachenko-Leonenko entropy).

    `L = mean_i -log(|x_i - x_nearest(i) + eps| + eps)` of unit-length vectors.

    Args:
        x: (B, E); normalised here.
        present: bool (B,); False vectors are neither anchors nor neighbours. None counts all.
        neighbours: Look for them in the batch of all ranks, or of this one (released code).
        layout: Rows of every rank (`row_layout`), asked once per step; None asks again.
        eps: Keeps the logarithm of duplicates finite.

    Returns:
        The loss, (); its mean over ranks is, with global neighbours, the loss of one process.

    Source: Sablayrolles et al. 2019, as DINOv2 uses it; the neighbour gets gradient, too.

    Examples:
        >>> apart = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # at distance 2
        >>> round(float(koleo(apart)), 4)
        -0.6931
    """
    with torch.autocast(x.device.type, enabled=False):
        z = F.normalize(full(x), dim=-1, eps=eps)
        if present is None:
            present = torch.ones(len(z), dtype=torch.bool, device=z.device)
        if neighbours == "rank":
            keys, usable, start = z, present, 0
        else:
            layout = layout or row_layout(z)
            keys, usable = gather(z, "grad", layout), gather(present, "detach", layout)
            start = layout.start
        with torch.no_grad():
            cosine = (z @ keys.T).masked_fill(~usable, -2.0)
            own = torch.arange(len(z), device=z.device) + start
            best = cosine.scatter(1, own.unsqueeze(1), -2.0).max(1)
        distance = F.pairwise_distance(z, keys[best.indices], eps=eps)
        counts = present & (best.values > -1.5)
        terms = torch.where(counts, -(distance + eps).log(), 0.0)
        return global_mean(terms.sum(), counts.to(z.dtype).sum())
