"""Small networks behind a pooled vector."""

from __future__ import annotations

from torch import nn

from domainssl.nn.norm import GlobalBatchNorm

__all__ = ["ProjectionHead"]


class ProjectionHead(nn.Sequential):
    """`Linear, batch norm, ReLU` repeated, and a last Linear; (B, E) -> (B, out).

    Args:
        inputs: Width of the vector.
        hidden: Width of the hidden layers.
        outputs: Width of the result.
        layers: Number of linear layers.
        bias: Give the linear layers a bias.
        last_norm: Normalise the result as well.

    Names are those of a plain Sequential, as published checkpoints have them.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        layers: int = 3,
        *,
        bias: bool = False,
        last_norm: bool = False,
    ) -> None:
        parts: list[nn.Module] = []
        for index in range(layers):
            is_last = index == layers - 1
            width = outputs if is_last else hidden
            parts.append(nn.Linear(inputs, width, bias=bias))
            if not is_last:
                parts += [GlobalBatchNorm(width), nn.ReLU()]
            elif last_norm:
                parts.append(GlobalBatchNorm(width))
            inputs = width
        super().__init__(*parts)
