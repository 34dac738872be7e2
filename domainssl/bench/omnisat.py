"""OmniSat's token contrast against the same loss with a full mask matrix and loops over tokens.

The other side joins the tokens of all modalities, compares all of them with all of them, and
leaves blocks out and picks positives by two matrices of one entry per pair of tokens, which a
Python loop over items, modalities and patches fills, as the released code does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from domainssl.bench.models import peak_memory
from domainssl.bench.report import Goal, Row, Settings, interleaved, ratio
from domainssl.losses.tokens import token_nce

__all__ = ["direct", "measure"]

_MODALITIES, _PATCHES, _WIDTH, _TEMPERATURE = 3, 36, 256, 0.1  # TreeSatAI Time Series as published


def direct(tokens: Tensor, temperature: float) -> Tensor:
    """Compute the loss over all pairs of tokens with masks in memory, (B, M, P, E) -> ()."""
    items, modalities, patches, _ = tokens.shape
    z = F.normalize(tokens.transpose(0, 1).reshape(-1, tokens.shape[-1]), dim=-1)  # (M·B·P, E)
    scores = z @ z.T / temperature
    excluded, positive = (torch.zeros(scores.shape, dtype=torch.bool) for _ in range(2))
    for modality in range(modalities):
        for item in range(items):
            first = (modality * items + item) * patches
            excluded[first : first + patches, first : first + patches] = True
            for patch in range(patches):
                for other in range(modalities):
                    if other != modality:
                        positive[first + patch, (other * items + item) * patches + patch] = True
    excluded, positive = excluded.to(z.device), positive.to(z.device)
    every = scores.masked_fill(excluded, -torch.inf).logsumexp(-1)
    return (every - scores.masked_fill(~positive, -torch.inf).logsumexp(-1)).mean()


def measure(settings: Settings) -> Iterator[Row]:
    """Yield the ratio of times and that of peak memory."""
    count = settings.pick(64 if settings.device.startswith("cuda") else 16, 3, settings.batch)
    patches, width = (4, 16) if settings.quick else (_PATCHES, _WIDTH)
    generator = torch.Generator().manual_seed(0)
    shape = (count, _MODALITIES, patches, width)
    tokens = torch.randn(shape, generator=generator).to(settings.device).requires_grad_()
    ours = _step(lambda: token_nce(tokens, temperature=_TEMPERATURE), tokens)
    other = _step(lambda: direct(tokens, _TEMPERATURE), tokens)
    _check_equal(ours(), other())
    note = f"batch {count}, {_MODALITIES} sensors, {patches} patches, width {width}, with gradient"
    rounds = settings.pick(5, 1, settings.rounds)
    yield ratio(
        "omnisat",
        "full masks / ours, time",
        interleaved(ours, other, rounds, settings.device),
        Goal("at least", 1.0),
        note,
        ("ours", "full masks"),
    )
    mine, theirs = (peak_memory(run, settings.device) for run in (ours, other))
    yield Row(
        "omnisat",
        "ours / full masks, peak memory",
        (mine / theirs,),
        "",
        Goal("at most", 1.0),
        f"{note}; ours {mine / 2**20:.1f} MiB, full masks {theirs / 2**20:.1f} MiB",
    )


def _step(loss: Callable[[], Tensor], tokens: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return what computes a loss and its gradient."""

    def step() -> tuple[Tensor, Tensor]:
        value = loss()
        (gradient,) = torch.autograd.grad(value, tokens)
        return value.detach(), gradient

    return step


def _check_equal(ours: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    for what, a, b in zip(("loss", "gradient"), ours, other, strict=True):
        difference, size = float((a - b).norm()), float(b.norm())
        if difference > 1e-4 * size:
            raise RuntimeError(
                f"bench omnisat: the two sides differ, {what} by {difference:.3g} of {size:.3g}; "
                "their times cannot be compared."
            )
