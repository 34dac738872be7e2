"""Contrast of the tokens of several modalities at the same place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from domainssl.distributed import Gather, RowLayout, gather, global_mean, row_layout

__all__ = ["token_nce"]

_MAX_ELEMENTS = 2**24  # similarities held at once; above it anchors are taken item by item


def _negatives(
    anchors: Tensor, keys: Tensor, key_valid: Tensor, first: Tensor, temperature: float
) -> Tensor:
    """Log-sum-exp over all keys but those of the anchor's own item and modality.

    Args:
        anchors: (b, M, P, E).
        keys: (B, M, P, E) of all ranks.
        key_valid: bool (B, M, P).
        first: Global position of the first anchor, ().
        temperature: Divides the cosines.

    Returns:
        (b, M, P).
    """
    items, modalities = anchors.shape[:2]
    similarity = torch.einsum("bmpe,cnqe->bmpcnq", anchors, keys) / temperature
    place = torch.arange(items, device=anchors.device) + first
    same_item = place[:, None] == torch.arange(len(keys), device=anchors.device)
    same_sensor = torch.eye(modalities, dtype=torch.bool, device=anchors.device)
    block = same_item[:, None, :, None] & same_sensor[None, :, None, :]  # (b, M, B, M)
    left_out = block[..., None] | ~key_valid  # (b, M, B, M, P): no entry per pair of tokens
    lowest = torch.finfo(similarity.dtype).min
    return similarity.masked_fill(left_out.unsqueeze(2), lowest).flatten(3).logsumexp(-1)


def token_nce(
    tokens: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 0.1,
    gather_keys: Gather = "grad",
    layout: RowLayout | None = None,
) -> Tensor:
    """Contrast every token with those of other modalities at its place, over the global batch.

    `L = mean_i [log sum_{j not in X(i)} exp(cos_ij / t) - log sum_{j in P(i)} exp(cos_ij / t)]`
    with P(i) the tokens of the same item and patch in other modalities, and X(i) all tokens of
    the same item and modality, i included.

    Args:
        tokens: (B, M, P, E), the same patches in every modality; normalised here.
        valid: bool (B, M, P); False tokens are neither anchor nor key, and an anchor without a
            valid positive does not count. None counts all.
        temperature: t.
        gather_keys: `grad` takes keys of all ranks, with the exact gradient of the global loss;
            `none` only those of this rank, so that the loss depends on the number of ranks.
        layout: Rows of every rank (`row_layout`), asked once per step; None asks again.

    Returns:
        The loss, (); its mean over ranks is the loss of one process with the joined batch. With
        no anchor at all, a zero that is connected to the tokens.

    Source: OmniSat (arXiv 2404.08351), section 3.3; the released code does not gather.

    Examples:
        >>> tokens = torch.eye(2).view(1, 1, 2, 2).expand(1, 2, 2, 2)  # two sensors, two patches
        >>> round(float(token_nce(tokens, temperature=1.0)), 4)
        0.3133
    """
    with torch.autocast(tokens.device.type, enabled=False):
        z = tokens if tokens.dtype == torch.float64 else tokens.float()
        z = z / z.norm(dim=-1, keepdim=True).clamp(min=1e-8)
        if valid is None:
            valid = torch.ones(z.shape[:3], dtype=torch.bool, device=z.device)
        if gather_keys == "none":
            layout = RowLayout((len(z),))
        layout = layout or row_layout(z)
        keys = gather(z, gather_keys, layout)
        key_valid = gather(valid, "none" if gather_keys == "none" else "detach", layout)
        first = layout.start
        step = max(1, _MAX_ELEMENTS // (z[0, ..., 0].numel() * keys[..., 0].numel()))
        parts = []
        for start in range(0, len(z), step):
            place = torch.tensor(first + start, device=z.device)
            inputs = (z[start : start + step], keys, key_valid, place, temperature)
            if len(z) <= step:
                parts.append(_negatives(*inputs))
            else:
                parts.append(checkpoint(_negatives, *inputs, use_reentrant=False))
        positive, has_positive = _positives(z, valid, temperature)
        counts = valid & has_positive
        terms = torch.where(counts, torch.cat(parts) - positive, 0.0)
        return global_mean(terms.sum(), counts.to(z.dtype).sum())


def _positives(z: Tensor, valid: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the same patch in other modalities, (B, M, P), and whether there is one."""
    similarity = torch.einsum("bmpe,bnpe->bpmn", z, z) / temperature
    others = ~torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    counted = others & valid.transpose(1, 2).unsqueeze(2)  # (B, P, M, M)
    lowest = torch.finfo(similarity.dtype).min
    total = similarity.masked_fill(~counted, lowest).logsumexp(-1)
    return total.transpose(1, 2), counted.any(-1).transpose(1, 2)
