"""A lightweight temporal attention encoder: one vector per patch from a series of dates.

Source: Garnot, Landrieu (2020), "Lightweight Temporal Self-Attention"; the layer order is that of
OmniSat (arXiv 2404.08351). Frames that do not count enter neither softmax nor any statistic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainssl._torch import conv_with_bias
from domainssl.errors import ConfigError
from domainssl.nn.calendar import date_sinusoids
from domainssl.nn.norm import GlobalBatchNorm

__all__ = ["LTAE", "linear_before_norm", "masked_group_norm"]

_GROUPS = 4  # of the layers' group normalisations


def linear_before_norm(
    x: Tensor, layer: nn.Linear | nn.Conv2d | nn.Conv3d, norm: nn.Module
) -> Tensor:
    """Apply a layer whose bias a batch normalisation takes away again.

    In training the bias has no effect and the gradient zero; written so, the gradient is exactly
    zero instead of the rounding error of a sum, which differs between numbers of ranks.
    """
    bias = layer.bias
    if norm.training and bias is not None:
        bias = bias.detach() + 0 * bias
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight, bias)
    return conv_with_bias(layer, x, bias)


def masked_group_norm(x: Tensor, counts: Tensor, layer: nn.GroupNorm) -> Tensor:
    """Normalise groups of channels over a sequence, leaving out what does not count.

    Args:
        x: (N, T, D).
        counts: bool (N, T); False frames are normalised but not measured.
        layer: Groups, epsilon, scale and shift.

    Returns:
        (N, T, D) in float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        groups = x.float().unflatten(-1, (layer.num_groups, -1))  # (N, T, D) -> (N, T, G, D/G)
        weight = counts.float()[:, :, None, None]
        count = (weight.sum(1, keepdim=True) * groups.shape[-1]).clamp(min=1)
        mean = (groups * weight).sum((1, 3), keepdim=True) / count
        centred = groups - mean
        variance = (centred.square() * weight).sum((1, 3), keepdim=True) / count
        unit = (centred * (variance + layer.eps).rsqrt()).flatten(-2)
        return unit * layer.weight.float() + layer.bias.float()


class _Attention(nn.Module):
    """One learned query per head; the values are the heads' own channels."""

    def __init__(self, width: int, heads: int, key_width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.key_width, self.dropout = heads, key_width, dropout
        self.Q = nn.Parameter(torch.empty(heads, key_width))
        self.fc1_k = nn.Linear(width, heads * key_width)
        nn.init.normal_(self.Q, std=math.sqrt(2.0 / key_width))
        nn.init.normal_(self.fc1_k.weight, std=math.sqrt(2.0 / key_width))

    def forward(self, x: Tensor, attends: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, D) and bool (N, T) -> (N, D) and weights (N, Hd, T) before dropout."""
        # A key bias adds the same number to all dates of a head, which the softmax takes away.
        bias = self.fc1_k.bias.detach() + 0 * self.fc1_k.bias
        keys = F.linear(x, self.fc1_k.weight, bias).unflatten(-1, (self.heads, self.key_width))
        with torch.autocast(x.device.type, enabled=False):
            logits = torch.einsum("nthk,hk->nht", keys.float(), self.Q.float())
            logits = logits / math.sqrt(self.key_width)
            counted = attends.unsqueeze(1)
            logits = logits.masked_fill(~counted, torch.finfo(logits.dtype).min)
            weights = logits.softmax(-1) * counted  # all zero where nothing counts
            values = x.float().unflatten(-1, (self.heads, -1))  # (N, T, D) -> (N, T, Hd, D/Hd)
            dropped = F.dropout(weights, self.dropout, self.training)
            out = torch.einsum("nht,nthc->nhc", dropped, values).flatten(1)
        return out, weights


class LTAE(nn.Module):
    """Encode a series of every patch, with its dates, into one token.

    Args:
        inputs: Values of a patch on one date.
        width: Token width D.
        heads: Attention heads, and groups of the group normalisations.
        key_width: Width of a key.
        widths_in: Widths of the layers before attention; the last one is D.
        widths_out: Widths of the layers after attention; the last one is D.
        dropout: After every layer before attention, and before the last normalisation.
        attention_dropout: On the attention weights.
        calendar_length: Base of the date sinusoids.
        input_norm: Normalise groups of channels over the dates before attention.
        norm: After every layer: over the batch (OmniSat), or over four groups of the channels of
            each patch and date, whatever else is in the batch (AnySat).

    Raises:
        ConfigError: Widths do not fit together.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        heads: int = 16,
        key_width: int = 8,
        widths_in: Sequence[int] = (32, 128, 256),
        widths_out: Sequence[int] = (256, 512, 256),
        dropout: float = 0.2,
        attention_dropout: float = 0.1,
        calendar_length: int = 367,
        input_norm: bool = False,
        norm: Literal["batch", "group"] = "batch",
    ) -> None:
        super().__init__()
        if widths_in[-1] != width or widths_out[-1] != width or width % heads:
            raise ConfigError(
                f"L-TAE: widths_in {list(widths_in)} and widths_out {list(widths_out)} must end "
                f"with the token width {width}, a multiple of the {heads} heads."
            )
        self.width, self.heads, self.calendar_length = width, heads, calendar_length
        before: list[nn.Module] = []
        for a, b in zip([inputs, *widths_in[:-1]], widths_in, strict=True):
            before += [nn.Linear(a, b), _norm(b, norm), nn.ReLU(), nn.Dropout(dropout)]
        after: list[nn.Module] = []
        for a, b in zip([width, *widths_out[:-1]], widths_out, strict=True):
            after += [nn.Linear(a, b), _norm(b, norm), nn.ReLU()]
        # Places in the lists are those of the published state dict.
        self.inconv = nn.ModuleList(before)
        self.in_norm = nn.GroupNorm(heads, width) if input_norm else None
        self.attention_heads = _Attention(width, heads, key_width, attention_dropout)
        self.mlp = nn.ModuleList(after)
        self.dropout = nn.Dropout(dropout)
        self.out_norm = nn.GroupNorm(heads, width)

    def forward(
        self, x: Tensor, days: Tensor, attends: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode patches.

        Args:
            x: Values of every patch on every date, (B, P, T, V).
            days: Days of the calendar, (B, T).
            attends: bool (B, P, T); False dates are not seen.
            counts: bool (B, P); False patches do not count in batch statistics.

        Returns:
            Tokens (B, P, D), and the attention of every date averaged over heads and patches,
            (B, T), without gradient and before dropout.
        """
        batch, patches, dates, _ = x.shape
        rows = (attends & counts.unsqueeze(-1)).flatten()
        h = _layers(self.inconv, x.flatten(0, 2), rows).unflatten(0, (batch * patches, dates))
        seen = attends.flatten(0, 1)
        if self.in_norm is not None:
            h = masked_group_norm(h, seen, self.in_norm)
        code = date_sinusoids(days, self.width // self.heads, self.calendar_length)
        code = code.repeat(1, 1, self.heads)  # (B, T, D/Hd) -> (B, T, D)
        h = h.unflatten(0, (batch, patches)) + code.unsqueeze(1)
        out, weights = self.attention_heads(h.flatten(0, 1), seen)
        out = self.dropout(_layers(self.mlp, out, counts.flatten()))
        tokens: Tensor = self.out_norm(out).unflatten(0, (batch, patches))
        attention = weights.detach().unflatten(0, (batch, patches)).mean((1, 2))
        return tokens, attention


def _norm(width: int, norm: Literal["batch", "group"]) -> nn.Module:
    if norm == "batch":
        return GlobalBatchNorm(width)
    if width % _GROUPS:
        raise ConfigError(f"L-TAE: the width {width} is not a multiple of its {_GROUPS} groups.")
    return nn.GroupNorm(_GROUPS, width)


def _layers(layers: nn.ModuleList, x: Tensor, rows: Tensor) -> Tensor:
    """Run linear layers, batch normalisations over the counted rows, and the rest."""
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Linear) and isinstance(layers[i + 1], GlobalBatchNorm):
            x = linear_before_norm(x, layer, layers[i + 1])
        elif isinstance(layer, GlobalBatchNorm):
            x = layer(x, rows)
        else:
            x = cast(Tensor, layer(x))
    return x
