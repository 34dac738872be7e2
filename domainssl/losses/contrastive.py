"""Contrastive losses between the vectors of two modalities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from domainssl.distributed import Gather, RowLayout, gather, global_mean, row_layout
from domainssl.nn.precision import full

__all__ = ["info_nce", "nt_xent", "queue_nce"]


def info_nce(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    *,
    present: Tensor | None = None,
    gather_keys: Gather = "grad",
    symmetric: bool = True,
    layout: RowLayout | None = None,
) -> Tensor:
    """Compute the symmetric InfoNCE of paired vectors over the global batch.

    `L = 1/2 [CE(s a b_all^T, y) + CE(s b a_all^T, y)]` with L2-normalised rows; every local row
    is a query once per direction, the rows of all ranks are keys.

    Args:
        a: Vectors of the first modality, (B, E); normalised here.
        b: Vectors of the second modality, (B, E); row i belongs to row i of `a`.
        scale: Factor s on the cosine, (); differentiable.
        present: bool (B,); False pairs are neither query nor key. None counts all.
        gather_keys: `grad` lets gradients reach keys on every rank (the exact gradient of the
            global loss), `detach` makes all keys constants, in a single process too.
        symmetric: Mean of both directions; otherwise only `a` asks and `b` answers.
        layout: Rows of every rank (`row_layout`), asked once per step; None asks again.

    Returns:
        The loss, (); its mean over ranks is the loss of one process with the joined batch.
        With no pair at all, a zero that is connected to the inputs.

    Source: CLIP (Radford et al. 2021); CROMA's released code gathers with `detach`.

    Examples:
        >>> a, b = torch.eye(2), torch.eye(2)  # every vector answers its partner only
        >>> round(float(info_nce(a, b, torch.tensor(1.0))), 4)
        0.3133
        >>> round(float(info_nce(a, b.flip(0), torch.tensor(1.0))), 4)
        1.3133
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = (F.normalize(full(x), dim=-1) for x in (a, b))
        if present is None:
            present = torch.ones(len(a), dtype=torch.bool, device=a.device)
        layout = layout or row_layout(a)
        keys_a, keys_b = gather(torch.stack([a, b], 1), gather_keys, layout).unbind(1)
        key_present = gather(present, "detach", layout)
        targets = torch.arange(len(a), device=a.device) + layout.start
        count = present.to(a.dtype).sum()
        total = a.new_zeros(())
        directions = ((a, keys_b), (b, keys_a))[: 2 if symmetric else 1]
        for queries, keys in directions:
            logits = scale.to(a.dtype) * queries @ keys.T
            # The lowest finite number instead of -inf: a batch without any pair stays finite.
            logits = logits.masked_fill(~key_present, torch.finfo(logits.dtype).min)
            terms = F.cross_entropy(logits, targets, reduction="none")
            total = total + torch.where(present, terms, 0.0).sum()
        return global_mean(total / len(directions), count)


def nt_xent(
    a: Tensor,
    b: Tensor,
    temperature: float,
    *,
    present: Tensor | None = None,
    gather_keys: Gather = "grad",
    layout: RowLayout | None = None,
) -> Tensor:
    """Compute NT-Xent: every vector has one positive, all others of both kinds are negatives.

    `L = mean over 2N anchors of CE([a; b]_i [a; b]_all^T / temperature, partner of i)`, the anchor
    itself left out.

    Args:
        a: Vectors of the first view or modality, (B, E); normalised here.
        b: Vectors of the second, (B, E); row i belongs to row i of `a`.
        temperature: Divides the cosines.
        present: bool (B,); False pairs are neither anchor nor candidate. None counts all.
        gather_keys: `grad` takes candidates of all ranks, with the exact gradient of the global
            loss; `none` only those of this rank, so that the loss depends on the number of ranks.
        layout: Rows of every rank (`row_layout`), asked once per step; None asks again.

    Returns:
        The loss, (); its mean over ranks is the loss of one process with the joined batch.
        With no pair at all, a zero that is connected to the inputs.

    Source: Chen et al. 2020, eq. 1; candidates of all ranks carry gradients.

    Examples:
        >>> a = torch.eye(2)
        >>> round(float(nt_xent(a, a, temperature=1.0)), 4)  # one partner, two strangers
        0.5514
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = (F.normalize(full(x), dim=-1) for x in (a, b))
        if present is None:
            present = torch.ones(len(a), dtype=torch.bool, device=a.device)
        if gather_keys == "none":
            layout = RowLayout((len(a),))
        layout = layout or row_layout(a)
        pairs = gather(torch.stack([a, b], 1), gather_keys, layout)
        keys = pairs.transpose(0, 1).flatten(0, 1)  # (2N, E), first all of a
        usable = gather(present, "none" if gather_keys == "none" else "detach", layout).repeat(2)
        own = torch.arange(len(a), device=a.device) + layout.start
        half = len(keys) // 2
        total = a.new_zeros(())
        for anchors, itself, partner in ((a, own, own + half), (b, own + half, own)):
            logits = anchors @ keys.T / temperature
            lowest = torch.finfo(logits.dtype).min
            logits = logits.masked_fill(~usable, lowest)
            logits = logits.scatter(1, itself.unsqueeze(1), lowest)
            terms = F.cross_entropy(logits, partner, reduction="none")
            total = total + torch.where(present, terms, 0.0).sum()
        return global_mean(total, 2 * present.to(a.dtype).sum())


def queue_nce(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    temperature: float,
    *,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute InfoNCE of queries against their own key and the keys of earlier batches.

    `L = mean over items of CE([q k^T, q queue^T] / temperature, first)`.

    Args:
        queries: (B, E); normalised here.
        keys: (B, E), constants; row i is the positive of query i. Normalised here.
        queue: Keys of earlier batches, (K, E), constants of unit length.
        temperature: Divides the cosines.
        present: bool (B,); False items do not ask. None counts all.

    Returns:
        The loss, (), whose mean over ranks is the loss of one process with the joined batch, and
        the logits (B, 1 + K), the positive first.

    Source: MoCo (He et al. 2020), algorithm 1.

    Examples:
        >>> q = torch.tensor([[1.0, 0.0]])
        >>> loss, logits = queue_nce(q, q, torch.tensor([[0.0, 1.0]]), temperature=1.0)
        >>> round(float(loss), 4), logits.tolist()
        (0.3133, [[1.0, 0.0]])
    """
    with torch.autocast(queries.device.type, enabled=False):
        q, k = (F.normalize(full(x), dim=-1) for x in (queries, keys.detach()))
        positive = (q * k).sum(-1, keepdim=True)
        logits = torch.cat([positive, q @ queue.detach().to(q.dtype).T], dim=1) / temperature
        terms = F.cross_entropy(
            logits, logits.new_zeros(len(q), dtype=torch.int64), reduction="none"
        )
        if present is None:
            present = torch.ones(len(q), dtype=torch.bool, device=q.device)
        total = torch.where(present, terms, 0.0).sum()
        return global_mean(total, present.to(q.dtype).sum()), logits
