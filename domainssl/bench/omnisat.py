"""OmniSat's contrast and image path against plain forms of the same work.

The image path, encoder and decoder of aerial patches, is compared with torch's own batch norm,
pooling and unpooling on maps that are not channels last.

The other side of the contrast joins the tokens of all modalities, compares all of them with all of
them, and leaves blocks out and picks positives by two matrices of one entry per pair of tokens,
which a Python loop over items, modalities and patches fills, as the released code does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from domainssl.bench.models import peak_memory
from domainssl.bench.report import Goal, Row, Settings, interleaved, ratio
from domainssl.losses.tokens import token_nce
from domainssl.nn.bypass import PatchDecoder, PatchEncoder
from domainssl.nn.norm import GlobalBatchNorm

__all__ = ["direct", "measure", "plain"]

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


def plain(encoder: PatchEncoder, decoder: PatchDecoder, x: Tensor) -> Tensor:
    """Encode and decode patches (N, C, p, p) by torch's modules, the way the released code does."""
    poolings: list[tuple[Tensor, torch.Size]] = []
    for layer in encoder.proj:
        if isinstance(layer, torch.nn.MaxPool2d):
            size = x.shape
            x, indices = F.max_pool2d(x, 2, return_indices=True)
            poolings.insert(0, (indices, size))
        elif isinstance(layer, GlobalBatchNorm):
            x = F.batch_norm(x, None, None, layer.weight, layer.bias, True, eps=layer.eps)
        else:
            x = layer(x)
    for (indices, size), layer in zip(poolings, decoder.decode[1::2], strict=True):
        x = layer(F.max_unpool2d(x, indices, [2, 2], output_size=list(size[-2:])))
    return x


def _image_path(settings: Settings) -> Row:
    side, width, channels = (8, 16, 4) if settings.quick else (50, 256, 4)
    count = settings.pick(36, 2, None)
    torch.manual_seed(0)
    encoder, decoder = PatchEncoder(channels, width, side), PatchDecoder(channels, width, side)
    encoder, decoder = encoder.to(settings.device), decoder.to(settings.device)
    x = torch.randn(count, channels, side, side, device=settings.device)
    counts = torch.ones(count, dtype=torch.bool, device=settings.device)
    watched = [*encoder.parameters(), *decoder.parameters()]

    def with_loss(out: Tensor) -> Tensor:
        return (out - x).square().mean()

    ours = _step(lambda: with_loss(decoder(*encoder(x, counts))), *watched)
    other = _step(lambda: with_loss(plain(encoder, decoder, x)), *watched)
    _check_equal(ours(), other())
    return ratio(
        "omnisat",
        "plain / ours, image path, time",
        interleaved(ours, other, settings.pick(5, 1, settings.rounds), settings.device),
        Goal("at least", 1.0),
        f"{count} patches of {side} px, width {width}, encoder and decoder with gradient",
        ("ours", "plain"),
    )


def measure(settings: Settings) -> Iterator[Row]:
    """Yield the ratios of times and that of peak memory."""
    yield _image_path(settings)
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
        subject="omnisat",
        what="ours / full masks, peak memory",
        values=(mine / theirs,),
        unit="",
        goal=Goal("at most", 1.0),
        note=f"{note}; ours {mine / 2**20:.1f} MiB, full masks {theirs / 2**20:.1f} MiB",
    )


def _step(loss: Callable[[], Tensor], *inputs: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return what computes a loss and its gradient by all inputs, one behind the other."""

    def step() -> tuple[Tensor, Tensor]:
        value = loss()
        gradients = torch.autograd.grad(value, inputs)
        return value.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    return step


def _check_equal(ours: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    for what, a, b in zip(("loss", "gradient"), ours, other, strict=True):
        difference, size = float((a - b).norm()), float(b.norm())
        if difference > 1e-4 * size:
            raise RuntimeError(
                f"bench omnisat: the two sides differ, {what} by {difference:.3g} of {size:.3g}; "
                "their times cannot be compared."
            )
