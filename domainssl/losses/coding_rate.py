"""SimDINO's losses: views of an item agree, and items fill the space (coding rate)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from domainssl.distributed import all_reduce_sum, global_mean, world_size
from domainssl.nn.precision import full

__all__ = ["coding_rate", "masked_agreement", "view_agreement"]


def view_agreement(
    student: Tensor,
    teacher: Tensor,
    *,
    present: Tensor | None = None,
    normalize: bool = True,
    same_view: bool = False,
) -> Tensor:
    """Return the mean similarity of every student view with every other view of the teacher.

    Args:
        student: All views, the teacher's views first, (V, B, E).
        teacher: G views, (G, B, E), constants.
        present: bool (B,); False items do not count. None counts all.
        normalize: Cosines; otherwise plain products of vectors that a head has normalised.
        same_view: Add the pairs of one view with itself, which the divisor does not count
            (SimDINOv2's `no_diag=False`).

    Returns:
        At most 1 for unit vectors, (); its mean over ranks is the value of one process.

    Source: Wu et al. 2025 (SimDINO), the squared-distance term for unit vectors.

    Examples:
        >>> z = torch.eye(2).expand(3, 2, 2)
        >>> float(view_agreement(z, z[:2]))
        1.0
    """
    with torch.autocast(student.device.type, enabled=False):
        s, t = full(student), full(teacher.detach()).to(full(student).dtype)
        if normalize:
            s, t = F.normalize(s, dim=-1, eps=1e-8), F.normalize(t, dim=-1, eps=1e-8)
        views, globals_ = len(s), len(t)
        others = s.sum(0).expand_as(t) if same_view else s.sum(0) - s[:globals_]
        terms = (t * others).sum(-1).sum(0)  # (B,)
        counted = torch.ones_like(terms) if present is None else present.to(terms.dtype)
        terms = torch.where(counted > 0, terms, 0.0)
        return global_mean(terms.sum() / (globals_ * (views - 1)), counted.sum())


def coding_rate(
    z: Tensor, *, eps: float, present: Tensor | None = None, reduce: bool = True
) -> Tensor:
    """Return how much of the space vectors fill, as the mean over views of a log determinant.

    `gamma / 2 · mean_v log det(I + E / (n eps) Z_v^T Z_v)` with `gamma = (E + n) / (E n)` and n
    vectors on all ranks.

    Args:
        z: Vectors of G views, (G, B, E).
        eps: Precision that the rate is measured at; smaller values weigh small directions more.
        present: bool (B,); False items do not count. None counts all.
        reduce: Sum the covariance over ranks, as one process with the joined batch would;
            otherwise every rank takes its own, still divided by the n of all ranks (released
            code's default).

    Returns:
        Larger for vectors that are spread more evenly, (); NaN if a factorisation fails.

    Source: Yu et al. 2020 (MCR²); Wu et al. 2025 (SimDINO).

    Examples:
        >>> spread = torch.eye(2).unsqueeze(0)  # orthogonal, Z^T Z = (n / E) I
        >>> round(float(coding_rate(spread, eps=0.5)), 4)  # gamma E / 2 log(1 + 1 / eps)
        1.0986
    """
    with torch.autocast(z.device.type, enabled=False):
        z = full(z)
        views, items, width = z.shape
        counted = z.new_ones(items) if present is None else present.to(z.dtype)
        rows = torch.where(counted.unsqueeze(-1) > 0, z, 0.0)
        total = counted.sum()
        n = all_reduce_sum(total) if reduce else total * world_size()
        n = n.clamp(min=1)
        covariance = torch.einsum("vbe,vbf->vef", rows, rows)
        if reduce:
            covariance = all_reduce_sum(covariance)
        identity = torch.eye(width, dtype=z.dtype, device=z.device)
        factor, failed = torch.linalg.cholesky_ex(identity + width / (n * eps) * covariance)
        # the logarithms of the diagonal add up to half the log determinant
        half = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        half = torch.where(failed > 0, torch.nan, half)
        gamma = (width + n) / (width * n)
        return gamma * half.sum() / views


def masked_agreement(student: Tensor, teacher: Tensor, weight: Tensor, images: Tensor) -> Tensor:
    """Return the negative mean cosine at masked patches; every image counts as one.

    Args:
        student: Projected masked patches, (R, E).
        teacher: The same patches of the unmasked image, (R, E), constants.
        weight: One over the number of masked patches of the row's image, (R,); 0 drops a row.
        images: Number of global views of this rank, those without a mask included, ().

    Returns:
        The loss, (); its mean over ranks is the loss of one process with the joined batch.

    Source: SimDINOv2's released code.

    Examples:
        >>> rows = torch.eye(2)
        >>> float(masked_agreement(rows, rows, torch.full((2,), 0.5), torch.tensor(2.0)))
        -0.5
    """
    with torch.autocast(student.device.type, enabled=False):
        s = full(student)
        cosine = F.cosine_similarity(s, teacher.detach().to(s.dtype), dim=-1)
        terms = torch.where(weight > 0, -cosine * weight.to(s.dtype), 0.0)
        return global_mean(terms.sum(), images)
