"""Losses on the correlations between embedding dimensions: Barlow Twins, DeCUR, VICReg.

`C = A^T B / N` is D x D. Where the global batch N is smaller than D it is never formed:

    sum_ij C_ij^2 = ||A^T B||_F^2 / N^2 = sum_kl (A A^T)_kl (B B^T)_kl / N^2

needs two N x N Gram matrices, and the diagonal of C is a sum over columns of A * B. Both forms
are exact; they agree to rounding, in value and gradient.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from domainssl.distributed import (
    RowLayout,
    all_reduce_sum,
    gather,
    global_mean,
    row_layout,
    world_size,
)
from domainssl.nn.precision import full

__all__ = [
    "CorrelationForm",
    "Redundancy",
    "VICRegTerms",
    "barlow_twins",
    "decur_cross",
    "local_gradient",
    "redundancy",
    "standardize",
    "vicreg",
]

CorrelationForm = Literal["auto", "gram", "matrix"]


class Redundancy(NamedTuple):
    """Distance of a correlation matrix from its target.

    Attributes:
        diagonal: `sum_i (C_ii - target)^2`, ().
        off_diagonal: `sum_{i != j} C_ij^2`, ().
    """

    diagonal: Tensor
    off_diagonal: Tensor

    def weighted(self, off_diagonal: float) -> Tensor:
        """Return `diagonal + off_diagonal * weight`."""
        return self.diagonal + off_diagonal * self.off_diagonal


def _weight(x: Tensor, present: Tensor | None) -> Tensor:
    if present is None:
        return x.new_ones(len(x))
    return present.to(x.dtype)


def _squared_norm(
    a: Tensor,
    b: Tensor,
    form: CorrelationForm,
    layout: RowLayout | None,
    weight: Tensor | None = None,
) -> Tensor:
    """`||A^T diag(weight) B||_F^2` over the rows of all ranks, (), the same on every rank.

    The weights of the Gram form multiply its N x N entries, so that no weighted copy of N x D
    values is kept for the backward pass.
    """
    layout = layout or row_layout(a)
    if form == "auto":
        form = "gram" if layout.total < a.shape[1] else "matrix"
    if form == "matrix":
        rows = a if weight is None else a * weight.unsqueeze(1)
        return all_reduce_sum(rows.T @ b).square().sum()
    products = (a @ gather(a, "grad", layout).T) * (b @ gather(b, "grad", layout).T)
    if weight is not None:
        products = products * weight.unsqueeze(1) * gather(weight, "detach", layout)
    return all_reduce_sum(products.sum())


def redundancy(
    a: Tensor,
    b: Tensor,
    *,
    target: float = 1.0,
    present: Tensor | None = None,
    divisor: float | None = None,
    form: CorrelationForm = "auto",
    layout: RowLayout | None = None,
) -> Redundancy:
    """Compare the correlations of standardised embeddings with `target` times the identity.

    Args:
        a: Standardised embeddings, (B, D).
        b: The same of the other view or modality, (B, D); row i belongs to row i of `a`.
        target: Wanted value of the diagonal, 1 or 0.
        present: bool (B,); False rows do not count. None counts all.
        divisor: Number to divide `A^T B` by; None takes the number of counted rows of all ranks.
        form: `gram` never forms the D x D matrix, `matrix` does, `auto` takes what is smaller.
        layout: Rows of every rank (`row_layout`), asked once per step; None asks again.

    Returns:
        Both terms, equal on all ranks, with the gradient of one process with the joined batch;
        zeros that are connected to the inputs when no rank has a counted row.

    Examples:
        >>> a = standardize(torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]))
        >>> [round(float(term), 3) for term in redundancy(a, a)]
        [0.0, 0.0]
        >>> [round(float(term), 3) for term in redundancy(a, a.flip(1))]  # columns exchanged
        [2.0, 2.0]
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = full(a), full(b)
        weight = _weight(a, present)
        count = all_reduce_sum(weight.sum())
        n = count.clamp(min=1) if divisor is None else divisor
        diagonal = all_reduce_sum(weight @ (a * b)) / n
        squares = _squared_norm(a, b, form, layout, weight) / n**2
        has_pairs = (count > 0).to(a.dtype)
        return Redundancy(
            diagonal=(diagonal - target).square().sum() * has_pairs,
            off_diagonal=(squares - diagonal.square().sum()) * has_pairs,
        )


def standardize(z: Tensor, present: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Return columns with mean 0 and variance 1 over the counted rows of all ranks, (B, D).

    Examples:
        >>> [round(float(z), 3) for z in standardize(torch.tensor([[0.0], [2.0]]))]
        [-1.0, 1.0]
    """
    with torch.autocast(z.device.type, enabled=False):
        z = full(z)
        weight = _weight(z, present).unsqueeze(1)
        count = all_reduce_sum(weight.sum()).clamp(min=1)
        centred = z - all_reduce_sum((z * weight).sum(0)) / count
        var = all_reduce_sum((centred.square() * weight).sum(0)) / count
        return centred * (var + eps).rsqrt()


def barlow_twins(
    a: Tensor,
    b: Tensor,
    *,
    off_diagonal: float = 0.0051,
    present: Tensor | None = None,
    form: CorrelationForm = "auto",
) -> Tensor:
    """Compute `sum_i (C_ii - 1)^2 + off_diagonal * sum_{i != j} C_ij^2` of raw embeddings.

    Args:
        a: Embeddings, (B, D); standardised here.
        b: Embeddings of the other view or modality, (B, D).
        off_diagonal: Weight (lambda) of what is off the diagonal.
        present: bool (B,); False rows do not count. None counts all.
        form: See `redundancy`.

    Source: Zbontar et al. 2021, eq. 1 and 2; the batch norm of the released code.

    Examples:
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> round(float(barlow_twins(z, -z)), 3)  # both correlations are -1 instead of 1
        8.0
    """
    a, b = standardize(a, present), standardize(b, present)
    return redundancy(a, b, present=present, form=form).weighted(off_diagonal)


def decur_cross(
    a: Tensor,
    b: Tensor,
    common: int,
    *,
    off_diagonal: float = 0.0051,
    present: Tensor | None = None,
    divisor: float | None = None,
    form: CorrelationForm = "auto",
    layout: RowLayout | None = None,
) -> tuple[Tensor, Tensor]:
    """Align the first dimensions of two modalities and decorrelate the others.

        L_common = sum_{i<k} (C_ii - 1)^2 + off_diagonal * sum_{i != j < k} C_ij^2
        L_unique = sum_{i>=k} C_ii^2      + off_diagonal * sum_{i != j, both >= k} C_ij^2

    Correlations between common and unique dimensions do not count.

    Args:
        a: Standardised embeddings of the first modality, (B, D).
        b: The same of the second modality, (B, D).
        common: Number k of common dimensions.
        off_diagonal: Weight of what is off the diagonal.
        present: bool (B,); False rows do not count. None counts all.
        divisor: See `redundancy`.
        form: See `redundancy`.
        layout: See `redundancy`.

    Returns:
        `L_common` and `L_unique`, ().

    Source: Wang et al., DeCUR, ECCV 2024 (arXiv 2309.05300), section 3.

    Examples:
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> [float(term) for term in decur_cross(z, z, common=1)]  # the second one is not unique
        [0.0, 1.0]
    """
    parts, layout = [], layout or row_layout(a)
    for span, target in ((slice(None, common), 1.0), (slice(common, None), 0.0)):
        terms = redundancy(
            a[:, span], b[:, span], target=target, present=present, divisor=divisor, form=form,
            layout=layout,
        )  # fmt: skip
        parts.append(terms.weighted(off_diagonal))
    return parts[0], parts[1]


class VICRegTerms(NamedTuple):
    """Unweighted terms of VICReg, () each."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def vicreg(
    a: Tensor,
    b: Tensor,
    *,
    present: Tensor | None = None,
    target_std: float = 1.0,
    eps: float = 1e-4,
    divisor: float | None = None,
    form: CorrelationForm = "auto",
    layout: RowLayout | None = None,
) -> VICRegTerms:
    """Compute the invariance, variance and covariance terms of VICReg.

        invariance = mean (a - b)^2
        variance   = mean over both of mean_d relu(target_std - sqrt(var_d + eps))
        covariance = sum over both of sum_{i != j} cov_ij^2 / D

    with unbiased variance and covariance over the counted rows of all ranks.

    Args:
        a: Embeddings, (B, D).
        b: Embeddings of the other view or modality, (B, D).
        present: bool (B,); False rows do not count. None counts all.
        target_std: Standard deviation below which the variance term acts.
        eps: Added to the variance.
        divisor: Number the covariance is divided by; None takes the number of rows minus one.
        form: See `redundancy`.
        layout: See `redundancy`.

    Source: Bardes et al. 2022, eq. 1 to 6. The SSL4EO baselines divide the covariance of the
    gathered batch by the local batch minus one; pass `divisor` for that.

    Examples:
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> [round(float(term), 3) for term in vicreg(z, 0 * z)]  # the second one has collapsed
        [1.0, 0.495, 0.0]
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b, layout = full(a), full(b), layout or row_layout(a)
        weight = _weight(a, present)
        rows = weight.unsqueeze(1)
        count = all_reduce_sum(weight.sum())
        difference = torch.where(rows > 0, a - b, 0.0).square().mean(1).sum()
        invariance = global_mean(difference, weight.sum())
        variance, covariance = a.new_zeros(()), a.new_zeros(())
        for x in (a, b):
            mean = all_reduce_sum((x * rows).sum(0)) / count.clamp(min=1)
            centred = (x - mean) * rows
            squares = all_reduce_sum(centred.square().sum(0))
            spread = (squares / (count - 1).clamp(min=1) + eps).sqrt()
            variance = variance + F.relu(target_std - spread).mean() / 2
            total = _squared_norm(centred, centred, form, layout) - squares.square().sum()
            n = (count - 1).clamp(min=1) if divisor is None else divisor
            covariance = covariance + total / n**2 / x.shape[1]
        has_rows = (count > 1).to(a.dtype)
        return VICRegTerms(invariance, variance * has_rows, covariance * has_rows)


def local_gradient(loss: Tensor) -> Tensor:
    """Return a loss whose gradient is 1/W of its own, as an all-reduce without backward gives.

    Examples:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> local_gradient(x**2).backward()
        >>> float(x.grad)  # one process: the gradient itself
        6.0
    """
    return loss.detach() + (loss - loss.detach()) / world_size()
