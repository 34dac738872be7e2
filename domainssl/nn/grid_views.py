"""Random views of a grid of features: whole cells are cut, mirrored and turned, never resized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from domainssl.errors import ConfigError

__all__ = ["GridView", "GridViews", "change_features", "draw_grid_view", "view_cells"]


@dataclass(frozen=True, kw_only=True)
class GridViews:
    """How views of a grid are drawn; probabilities lie in [0, 1].

    Attributes:
        flip: Probability of mirroring along each axis.
        quarter_turns: Turn by 0, 90, 180 or 270 degrees; by 0 or 180 where the sides differ.
        min_foreground: Fraction of the cells of a view that should hold a tile.
        tries: Places drawn until one does; then the one with most.
        dropout: Probability that a cell's features are set to zero.
        noise: Standard deviation of Gaussian noise, over that of the channel in the view.
        posterize: Probability that every channel of a view is rounded to a few values.
        levels: Least and largest number of those values.

    Raises:
        ConfigError: A value lies outside its range.
    """

    flip: float = 0.5
    quarter_turns: bool = True
    min_foreground: float = 0.25
    tries: int = 8
    dropout: float = 0.0
    noise: float = 0.0
    posterize: float = 0.0
    levels: tuple[int, int] = (4, 16)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        checks = {n: 0 <= getattr(self, n) <= 1 for n in ("flip", "min_foreground", "posterize")}
        checks |= {
            "dropout": 0 <= self.dropout < 1,
            "noise": self.noise >= 0,
            "tries": self.tries >= 1,
            "levels": 2 <= self.levels[0] <= self.levels[-1],
        }
        for name, is_fine in checks.items():
            if not is_fine:
                raise ConfigError(f"crops.views.{name}: got {getattr(self, name)!r}, out of range.")


@dataclass(frozen=True, kw_only=True)
class GridView:
    """Parameters of one view of every item, drawn; a view has n cells.

    Attributes:
        start: First row and column, int64 (B, 2).
        flip: bool (B, 2).
        turns: Quarter turns, int64 (B,).
        dropped: bool (B, n), True where features are set to zero; None where none are.
        noise: Standard normal (B, n, C); None for none.
        levels: Values per channel, int64 (B,); 0 leaves them alone; None leaves all alone.
    """

    start: Tensor
    flip: Tensor
    turns: Tensor
    dropped: Tensor | None = None
    noise: Tensor | None = None
    levels: Tensor | None = None


def draw_grid_view(
    views: GridViews,
    occupied: Tensor,
    size: tuple[int, int],
    channels: int,
    generator: torch.Generator,
) -> GridView:
    """Draw one view of every item.

    Args:
        views: What to draw.
        occupied: bool (B, R, C), True where a cell holds a tile.
        size: Rows and columns of the view, at most R and C.
        channels: Number of features, for noise.
        generator: Source of all randomness; tensors are made on its device.
    """
    device, items = generator.device, len(occupied)
    cells = size[0] * size[1]
    room = torch.tensor(
        [n - s + 1 for n, s in zip(occupied.shape[1:], size, strict=True)], device=device
    )

    def draw(*shape: int) -> Tensor:
        return torch.rand(items, *shape, generator=generator, device=device)

    places = (draw(views.tries, 2) * room).long().clamp(max=room - 1)  # (B, tries, 2)
    shares = _share(occupied.to(device), places, size)
    enough = shares >= views.min_foreground
    first = torch.where(enough.any(1), enough.float().argmax(1), shares.argmax(1))
    turns = torch.zeros(items, dtype=torch.int64, device=device)
    if views.quarter_turns:
        turns = (draw() * 4).long().clamp(max=3)
        turns = turns if size[0] == size[1] else turns // 2 * 2
    dropped = noise = levels = None
    if views.dropout > 0:
        dropped = draw(cells) < views.dropout
    if views.noise > 0:
        noise = torch.randn(items, cells, channels, generator=generator, device=device)
    if views.posterize > 0:
        low, high = views.levels
        drawn = low + (draw() * (high - low + 1)).long().clamp(max=high - low)
        levels = torch.where(draw() < views.posterize, drawn, 0)
    return GridView(
        start=places.gather(1, first.view(-1, 1, 1).expand(-1, 1, 2)).squeeze(1),
        flip=draw(2) < views.flip,
        turns=turns,
        dropped=dropped,
        noise=noise,
        levels=levels,
    )


def _share(occupied: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the fraction of occupied cells of boxes, (B, tries), by a table of sums."""
    sums = occupied.float().cumsum(1).cumsum(2)
    sums = torch.nn.functional.pad(sums, (1, 0, 1, 0))  # (B, R + 1, C + 1)
    item = torch.arange(len(occupied), device=occupied.device).unsqueeze(1)
    top, left = places[..., 0], places[..., 1]
    bottom, right = top + size[0], left + size[1]
    inside = (
        sums[item, bottom, right] - sums[item, top, right]
        - sums[item, bottom, left] + sums[item, top, left]
    )  # fmt: skip
    return inside / (size[0] * size[1])


def view_cells(view: GridView, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return which cell of the grid stands at each place of a view, int64 (B, n).

    Args:
        view: Place, mirroring and turn.
        grid: Rows and columns of the whole, cells numbered row by row.
        size: Rows and columns of the view.
    """
    high, wide = size
    device = view.start.device
    rows = torch.arange(high, device=device).repeat_interleave(wide)
    columns = torch.arange(wide, device=device).repeat(high)
    if high == wide:  # what stands at (r, c) after a turn came from (c, n - 1 - r)
        turned = [(rows, columns)]
        for _ in range(3):
            r, c = turned[-1]
            turned.append((c, high - 1 - r))
    else:
        half = (high - 1 - rows, wide - 1 - columns)
        turned = [(rows, columns), (rows, columns), half, half]
    r, c = (torch.stack(part)[view.turns] for part in zip(*turned, strict=True))  # (B, n)
    r = torch.where(view.flip[:, :1], high - 1 - r, r)
    c = torch.where(view.flip[:, 1:], wide - 1 - c, c)
    found: Tensor = (view.start[:, :1] + r) * grid[1] + view.start[:, 1:] + c
    return found


def change_features(x: Tensor, valid: Tensor, view: GridView, views: GridViews) -> Tensor:
    """Round, disturb and drop the features of a view, in that order.

    Args:
        x: (B, n, C).
        valid: bool (B, n); others neither count nor matter.
        view: Parameters.
        views: What they were drawn from.

    Source: Posterised features: Baer et al. 2024 (frozen feature augmentation), by channel, as
    TITAN names it without its parameters.
    """
    if view.levels is None and view.noise is None and view.dropped is None:
        return x
    seen = valid.unsqueeze(-1)
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        if view.levels is not None:
            low = x.masked_fill(~seen, float("inf")).amin(1, keepdim=True)
            high = x.masked_fill(~seen, float("-inf")).amax(1, keepdim=True)
            span = torch.where(high > low, high - low, 1.0)
            steps = (view.levels - 1).clamp(min=1).view(-1, 1, 1).float()
            rounded = low + ((x - low) / span * steps).round() / steps * span
            x = torch.where((view.levels > 0).view(-1, 1, 1) & seen, rounded, x)
        if view.noise is not None:
            count = seen.sum(1, keepdim=True).clamp(min=1)
            known = torch.where(seen, x, 0.0)
            mean = known.sum(1, keepdim=True) / count
            spread = torch.where(seen, x - mean, 0.0).square().sum(1, keepdim=True) / count
            x = x + views.noise * spread.sqrt() * view.noise
        if view.dropped is not None:
            x = torch.where(view.dropped.unsqueeze(-1), 0.0, x)
    return x
