"""Small networks behind a pooled vector."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainssl.errors import ConfigError
from domainssl.nn.norm import GlobalBatchNorm
from domainssl.nn.precision import full

__all__ = ["BottleneckHead", "ProjectionHead", "PrototypeHead"]


class ProjectionHead(nn.Sequential):
    """`Linear, batch norm, ReLU` repeated, and a last Linear; (B, E) -> (B, K).

    Args:
        inputs: Width of the vector, E.
        widths: Outputs of every linear layer; the last one is K.
        bias: Give the linear layers a bias.
        last_norm: Normalise the result as well.
        last_affine: Let that norm have scale and shift.

    Names are those of a plain Sequential, as published checkpoints have them.

    Raises:
        ConfigError: There is no layer, or one without outputs.
    """

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        *,
        bias: bool = False,
        last_norm: bool = False,
        last_affine: bool = True,
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
                parts.append(GlobalBatchNorm(b, affine=last_affine))
        super().__init__(*parts)


class _Prototypes(nn.Module):
    """Similarity to K prototypes: a linear layer whose rows have a length of their own.

    Args:
        inputs: Width of what comes in, E.
        count: Number of prototypes, K.
        trains_scale: Train the length of the rows (DINOv2); otherwise it stays 1 (DINO, iBOT).

    Names are those of torch's first `weight_norm`, as published checkpoints have them.
    """

    def __init__(self, inputs: int, count: int, *, trains_scale: bool = False) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=trains_scale)
        self.weight_v = nn.Parameter(nn.Linear(inputs, count, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> logits (..., K) of unit-length vectors.

        The rows are scaled, or the logits where these are fewer: K times E numbers are written
        and read several times in a step, which takes as long as a product of a small batch.
        """
        scale = self.weight_g / torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        if x.numel() < x.shape[-1] ** 2:
            logits = F.linear(x, self.weight_v)
            return logits * scale.squeeze(1).to(logits.dtype)
        return F.linear(x, self.weight_v * scale)


class BottleneckHead(nn.Module):
    """The MLP behind DINO, iBOT and SimDINO; (..., E) -> (..., bottleneck).

    Args:
        inputs: Width of the vector, E.
        hidden: Width of the hidden layers.
        bottleneck: Width of the result.
        layers: Linear layers; with one, nothing is hidden.
        batch_norm: Normalise hidden vectors over the batch of all ranks.
        normalize: Give the result unit length.

    Raises:
        ConfigError: There is no layer, or one without outputs.

    Source: Caron et al. 2021, appendix C; names and initial values as released.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        bottleneck: int,
        *,
        layers: int = 3,
        batch_norm: bool = False,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        if min(hidden, bottleneck, layers) < 1:
            raise ConfigError(
                f"model.init_args.head: got {layers} layers of width {hidden} and a bottleneck of "
                f"{bottleneck}, expected 1 or more of each."
            )
        self.normalize = normalize
        if layers == 1:
            self.mlp: nn.Module = nn.Linear(inputs, bottleneck)
        else:
            parts: list[nn.Module] = []
            for a, b in itertools.pairwise([inputs, *[hidden] * (layers - 1)]):
                parts.append(nn.Linear(a, b))
                parts += [GlobalBatchNorm(b), nn.GELU()] if batch_norm else [nn.GELU()]
            self.mlp = nn.Sequential(*parts, nn.Linear(hidden, bottleneck))
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Project tokens or pooled vectors."""
        out: Tensor = self.mlp(x)
        return self.unit(out) if self.normalize else out

    @staticmethod
    def unit(out: Tensor) -> Tensor:
        """Divide by the length, in float32."""
        with torch.autocast(out.device.type, enabled=False):
            return F.normalize(full(out), dim=-1)


class PrototypeHead(nn.Module):
    """`BottleneckHead` and similarities to prototypes; (..., E) -> logits (..., K).

    Args:
        inputs: Width of the vector, E.
        hidden: Width of the hidden layers.
        bottleneck: Width before the prototypes.
        prototypes: Number of prototypes, K.
        patch_prototypes: Number of prototypes of patches where they have their own; None lets
            patches share those of the class token.
        layers: Linear layers before the prototypes.
        batch_norm: Normalise hidden vectors over the batch of all ranks.
        trains_scale: Train the length of prototypes (DINOv2), which is 1 in DINO and iBOT.

    Source: Caron et al. 2021, appendix C; Zhou et al. 2022. Parameters have the released names.
    """

    def __init__(
        self,
        inputs: int,
        *,
        hidden: int,
        bottleneck: int,
        prototypes: int,
        patch_prototypes: int | None = None,
        layers: int = 3,
        batch_norm: bool = False,
        trains_scale: bool = False,
    ) -> None:
        super().__init__()
        body = BottleneckHead(inputs, hidden, bottleneck, layers=layers, batch_norm=batch_norm)
        self.mlp = body.mlp
        self.last_layer = _Prototypes(bottleneck, prototypes, trains_scale=trains_scale)
        self.last_layer2: _Prototypes | None = None
        if patch_prototypes is not None:
            self.last_layer2 = _Prototypes(bottleneck, patch_prototypes, trains_scale=trains_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of class tokens."""
        out: Tensor = self.last_layer(BottleneckHead.unit(self.mlp(x)))
        return out

    def patches(self, x: Tensor) -> Tensor:
        """Return the logits of patch tokens."""
        last = self.last_layer if self.last_layer2 is None else self.last_layer2
        out: Tensor = last(BottleneckHead.unit(self.mlp(x)))
        return out
