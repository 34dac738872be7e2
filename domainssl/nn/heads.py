"""Small networks behind a pooled vector."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from domainssl.errors import ConfigError
from domainssl.nn.norm import GlobalBatchNorm

__all__ = ["ProjectionHead"]


class ProjectionHead(nn.Sequential):
    """`Linear, batch norm, ReLU` repeated, and a last Linear; (B, E) -> (B, K).

    Args:
        inputs: Width of the vector, E.
        widths: Outputs of every linear layer; the last one is K.
        bias: Give the linear layers a bias.
        last_norm: Normalise the result as well.

    Names are those of a plain Sequential, as published checkpoints have them.

    Raises:
        ConfigError: There is no layer, or one without outputs.
    """

    def __init__(
        self, inputs: int, widths: Sequence[int], *, bias: bool = False, last_norm: bool = False
    ) -> None:
        if not widths or min(widths) < 1:
            raise ConfigError(
                f"model.init_args.projector: got {list(widths)}, expected the width of each layer, "
                "such as [8192, 8192, 8192]."
            )
        parts: list[nn.Module] = []
        for index, (a, b) in enumerate(itertools.pairwise([inputs, *widths]), 1):
            parts.append(nn.Linear(a, b, bias=bias))
            if index < len(widths):
                parts += [GlobalBatchNorm(b), nn.ReLU()]
            elif last_norm:
                parts.append(GlobalBatchNorm(b))
        super().__init__(*parts)
