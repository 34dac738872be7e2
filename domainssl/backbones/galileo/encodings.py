"""What Galileo adds to tokens: group, step, month and place, a quarter of the width each.

Source: Tseng et al. 2025 (arXiv 2502.09356) and the released code, whose names of parameters are
kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from domainssl.backbones.galileo.groups import ARRAYS, Array, GalileoGroup
from domainssl.errors import ConfigError, DataError

__all__ = ["UNIT_M", "GroupEncodings", "plane_positions", "steep_positions"]

UNIT_M = 10.0  # positions in the plane are counted in these
_LETTERS: dict[Array, str] = {"space_time": "s_t", "space": "sp", "time": "t", "static": "st"}


def steep_positions(positions: Tensor, width: int) -> Tensor:
    """Encode positions as `[sin(x·w), cos(x·w)]` with `w_i = 10000^(-i / (2·width))`.

    The exponent divides by twice the width, as in the released code, so that frequencies fall
    less than in the usual code of that width.

    Args:
        positions: (...).
        width: Length of the code, even.

    Returns:
        float32 (..., width).
    """
    steps = torch.arange(width // 2, dtype=torch.float64, device=positions.device)
    angle = positions.double().unsqueeze(-1) * 10000.0 ** (-steps / (2 * width))
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def plane_positions(
    grid: tuple[int, int], width: int, unit: float, device: torch.device | None = None
) -> Tensor:
    """Encode the places of patches: the column in the first half, the row in the second.

    Args:
        grid: Patches along each axis, (h, w).
        width: Length of the code, a multiple of 4.
        unit: Side of a patch in units of 10 m.
        device: Where to compute.

    Returns:
        float32 (h, w, width).
    """
    rows, columns = (
        steep_positions(torch.arange(n, device=device) * unit, width // 2) for n in grid
    )
    shape = (*grid, width // 2)
    return torch.cat([columns.unsqueeze(0).expand(shape), rows.unsqueeze(1).expand(shape)], -1)


def month_table(width: int) -> Tensor:
    """Return the code of every month, float32 (12, width): one sine, and one cosine, repeated."""
    angle = (2 * math.pi * torch.arange(12, dtype=torch.float64) / 12).unsqueeze(1)
    half = width // 2
    return torch.cat([angle.sin().expand(-1, half), angle.cos().expand(-1, half)], 1).float()


class GroupEncodings(nn.Module):
    """Base of Galileo's encoder and predictor: tables of steps and months, codes of groups.

    Args:
        groups: Groups with their arrays, in order.
        width: Token width, a multiple of 16.
        max_steps: Longest series.
        is_learned: Codes of groups are trained; else they stay zero.

    Raises:
        ConfigError: The width does not fit.
    """

    def __init__(
        self, groups: Sequence[GalileoGroup], width: int, max_steps: int, *, is_learned: bool = True
    ) -> None:
        super().__init__()
        if width % 16:
            raise ConfigError(
                f"Galileo's tokens have a width that is a multiple of 16, got {width}."
            )
        self.groups: dict[Array, list[GalileoGroup]] = {
            array: found
            for array in ARRAYS
            if (found := [group for group in groups if group.array == array])
        }
        self.max_steps = max_steps
        quarter = self.quarter = width // 4
        steps = torch.arange(max_steps)
        self.pos_embed = nn.Parameter(steep_positions(steps, quarter), requires_grad=False)
        self.month_embed = nn.Embedding.from_pretrained(month_table(quarter), freeze=True)
        for array, found in self.groups.items():
            embedding = nn.Parameter(torch.zeros(len(found), quarter), requires_grad=is_learned)
            self.register_parameter(f"{_LETTERS[array]}_channel_embed", embedding)

    def reset_linear(self) -> None:
        """Draw the weights of all linear layers by Xavier's rule, and set their biases to zero."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def encodings(
        self, shapes: Mapping[Array, Sequence[int]], months: Mapping[Array, Tensor], unit: float
    ) -> Tensor:
        """Return what is added to the tokens, array after array, (1 or B, N, E).

        Args:
            shapes: (h, w, T, G), (h, w, G), (T, G) or (G,) by array.
            months: int (B, T), 0 to 11, of `space_time` and `time`.
            unit: Side of a patch in units of 10 m.

        Raises:
            DataError: Series are too long.
        """
        parts, device = [], self.pos_embed.device
        items = max((len(m) for m in months.values()), default=1)
        for array, own in shapes.items():
            shape = (items, *own, self.quarter)
            zero = self.pos_embed.new_zeros(()).expand(shape)
            quarters = [getattr(self, f"{_LETTERS[array]}_channel_embed").expand(shape)]
            if array in ("space_time", "time"):
                steps = own[-2]
                self._check_steps(steps)
                month = self.month_embed(months[array])
                if array == "space_time":
                    month = month[:, None, None]
                quarters.append(self.pos_embed[:steps].unsqueeze(1).expand(shape))
                quarters.append(month.unsqueeze(-2).expand(shape))
            else:
                quarters += [zero] * 2
            if array in ("space_time", "space"):
                place = plane_positions((own[0], own[1]), self.quarter, unit, device)
                place = place[:, :, None] if array == "space" else place[:, :, None, None]
                quarters.append(place.expand(shape))
            else:
                quarters.append(zero)
            parts.append(torch.cat(quarters, -1).flatten(1, -2))
        return torch.cat(parts, 1)

    def _check_steps(self, steps: int) -> None:
        if steps > self.max_steps:
            raise DataError(
                f"Galileo takes series of {self.max_steps} dates at most, got {steps}. Make "
                "composites, such as one per month."
            )
