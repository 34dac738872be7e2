"""Losses on features of a teacher: data2vec's targets, and similarities that have to stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from domainssl.distributed import all_reduce_sum, global_mean
from domainssl.nn.precision import full

__all__ = ["gram_anchoring", "layer_targets", "masked_regression", "spread_penalty"]

_EPSILON = 1e-5


def layer_targets(
    layers: Sequence[Tensor],
    norm: Literal["layer", "instance", "none"] = "layer",
    *,
    last_norm: bool = True,
) -> Tensor:
    """Return the mean of what some layers of a teacher say, normalised before and after.

    Args:
        layers: (B, N, E) each.
        norm: Of every layer: over the channels of each token (`layer`, data2vec), over the tokens
            of each item and channel (`instance`, data2vec 2.0), or `none`.
        last_norm: Normalise the mean over the channels as well.

    Returns:
        Constants, (B, N, E).

    Source: Baevski et al. 2022 (data2vec), section 3.3, and its released code.

    Examples:
        >>> layer_targets([torch.tensor([[[1.0, 3.0]]])]).round(decimals=2).tolist()
        [[[-1.0, 1.0]]]
    """
    with torch.autocast(layers[0].device.type, enabled=False):
        found = [full(layer.detach()) for layer in layers]
        if norm == "layer":
            found = [F.layer_norm(x, x.shape[-1:], eps=_EPSILON) for x in found]
        elif norm == "instance":
            found = [
                F.instance_norm(x.transpose(1, 2), eps=_EPSILON).transpose(1, 2) for x in found
            ]
        mean = torch.stack(found).mean(0)
        return F.layer_norm(mean, mean.shape[-1:], eps=_EPSILON) if last_norm else mean


def masked_regression(
    prediction: Tensor, target: Tensor, counted: Tensor, beta: float | None = None
) -> Tensor:
    """Compute the mean difference over the counted tokens of all ranks and their channels.

    Args:
        prediction: (B, N, E).
        target: Constants, (B, N, E).
        counted: bool (B, N).
        beta: Where the smooth L1 loss goes from squares to straight lines; None takes squares.

    Returns:
        The loss, (); its mean over ranks is that of one process with the joined batch.

    Examples:
        >>> zero, counted = torch.zeros(1, 2, 1), torch.tensor([[True, False]])
        >>> float(masked_regression(zero + 3, zero, counted))
        9.0
        >>> float(masked_regression(zero + 3, zero, counted, beta=2.0))
        2.0
    """
    with torch.autocast(prediction.device.type, enabled=False):
        a, b = full(prediction), full(target.detach())
        terms = F.mse_loss(a, b, reduction="none")
        if beta is not None:
            terms = F.smooth_l1_loss(a, b, reduction="none", beta=beta)
        each = torch.where(counted, terms.mean(-1), 0.0)
        return global_mean(each.sum(), counted.to(each.dtype).sum())


def spread_penalty(rows: Tensor, counted: Tensor, margin: float) -> Tensor:
    """Compute how far the deviation of the channels over the rows of all ranks is below a margin.

    `mean over channels of relu(margin - sqrt(var + 1e-6))`, variance unbiased.

    Args:
        rows: (R, E).
        counted: bool (R,).
        margin: Deviation that is enough.

    Returns:
        The loss, (); zero, connected to the rows, where fewer than two rows count.

    Examples:
        >>> rows = torch.tensor([[0.0], [2.0]])  # deviation 1.41
        >>> round(float(spread_penalty(rows, torch.tensor([True, True]), margin=2.0)), 2)
        0.59
    """
    with torch.autocast(rows.device.type, enabled=False):
        values, weight = full(rows), counted.unsqueeze(1)
        count = all_reduce_sum(counted.to(values.dtype).sum())
        mean = all_reduce_sum(torch.where(weight, values, 0.0).sum(0)) / count.clamp(min=1)
        squares = all_reduce_sum(torch.where(weight, (values - mean).square(), 0.0).sum(0))
        deviation = (squares / (count - 1).clamp(min=1) + 1e-6).sqrt()
        return torch.where(count > 1, (margin - deviation).relu().mean(), 0.0 * squares.sum())


def gram_anchoring(
    student: Tensor,
    teacher: Tensor,
    mode: Literal[
        "none", "remove_neg", "teacher_only_intended", "teacher_only_as_released"
    ] = "none",
    counted: Tensor | None = None,
) -> Tensor:
    """Compare the similarities between the patches of an image with those of an anchor.

    `mean over images and pairs of (s_ij - t_ij)^2`, with cosines s of the student and t of a
    teacher kept from earlier in training.

    Args:
        student: Patch features, (B, P, E); normalised here.
        teacher: Patch features of the anchor on the same grid, constants, (B, P, E).
        mode: Set no similarity to zero (`none`, published configurations), the negative ones of
            both sides (`remove_neg`), those of the teacher and, where both are negative, of the
            student (`teacher_only_intended`), or of the teacher alone, which is what the released
            code makes of that option (`teacher_only_as_released`).
        counted: bool (B, P); pairs count whose patches both do. None counts all.

    Returns:
        The loss, (); its mean over ranks is that of one process with the joined batch.

    Source: DINOv3 (Simeoni et al. 2025), section 4.2, and its released code.

    Examples:
        >>> patches = torch.eye(2).unsqueeze(0)
        >>> float(gram_anchoring(patches, patches)), float(gram_anchoring(patches, -patches + 1))
        (0.0, 0.0)
    """
    with torch.autocast(student.device.type, enabled=False):
        s, t = (F.normalize(full(x), dim=-1) for x in (student, teacher.detach()))
        ours, theirs = s @ s.transpose(1, 2), t @ t.transpose(1, 2)
        if mode == "teacher_only_intended":
            ours = ours.masked_fill((ours < 0) & (theirs < 0), 0.0)
        elif mode == "remove_neg":
            ours = ours.clamp(min=0)
        if mode != "none":
            theirs = theirs.clamp(min=0)
        terms = (ours - theirs).square()
        if counted is None:
            return global_mean(terms.sum(), terms.new_tensor(float(terms.numel())))
        pairs = counted.unsqueeze(1) & counted.unsqueeze(2)
        return global_mean(torch.where(pairs, terms, 0.0).sum(), pairs.to(terms.dtype).sum())
