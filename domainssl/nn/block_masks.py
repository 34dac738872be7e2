"""Hide blocks of patches, as BEiT, iBOT and DINOv2 do, on grids of any number of axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from domainssl.errors import ConfigError

__all__ = ["BlockMasks", "draw_block_masks"]

_TRIES = 10  # boxes drawn per block, as released
_BLOCKS = 24  # blocks per image at most; each takes about half of what is left to hide


@dataclass(frozen=True, kw_only=True)
class BlockMasks:
    """Which share of the images is masked, and how much of each.

    Attributes:
        fraction: Share of the images with a mask, rounded down to whole images.
        ratio: Least and largest share of hidden patches; cut into as many equal slices as there
            are masked images, and the i-th draws its share in slice i.
        least_tokens: Least area of a block in patches; None takes a third of the shortest side of
            the grid in every direction (iBOT).
        aspect: Least ratio of two sides of a block.

    Raises:
        ConfigError: A value lies outside its range.
    """

    fraction: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    least_tokens: int | None = 4
    aspect: float = 0.3

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", tuple(self.ratio))
        checks = {
            "fraction": (0 <= self.fraction <= 1, "a share in [0, 1]"),
            "ratio": (
                len(self.ratio) == 2 and 0 <= self.ratio[0] <= self.ratio[1] < 1,
                "two rising shares in [0, 1)",
            ),
            "least_tokens": (self.least_tokens is None or self.least_tokens >= 1, "1 or more"),
            "aspect": (0 < self.aspect <= 1, "a ratio in (0, 1]"),
        }
        for name, (is_fine, expected) in checks.items():
            if not is_fine:
                raise ConfigError(
                    f"masks.{name}: got {getattr(self, name)!r}, expected {expected}."
                )

    def most_tokens(self, images: int, tokens: int) -> int:
        """Return the largest number of hidden patches in a batch, known before drawing."""
        count = int(self.fraction * images)
        low, high = self.ratio
        upper = (low + (high - low) * (i + 1) / max(1, count) for i in range(count))
        return sum(math.ceil(tokens * share) for share in upper)


def draw_block_masks(
    masks: BlockMasks, grid: Sequence[int], images: int, generator: torch.Generator
) -> Tensor:
    """Draw a mask for every image; most reach their share exactly, none exceeds it.

    Args:
        masks: What to draw.
        grid: Patches along each axis.
        images: Number of images I.
        generator: Source of all randomness; tensors are made on its device.

    Returns:
        bool (I, N), True = hidden, patches in row-major order.

    Source: DINOv2's `MaskingGenerator` and collation (2D); here all images draw in step, and in 3D
    blocks are cuboids with the same range of ratios between any two sides.
    """
    device, tokens = generator.device, math.prod(grid)
    count = int(masks.fraction * images)
    edges = torch.linspace(*masks.ratio, count + 1, device=device)
    share = edges[:-1] + edges.diff() * torch.rand(count, generator=generator, device=device)
    wanted = torch.zeros(images, device=device)
    wanted[:count] = (tokens * share).floor()
    left = wanted[torch.randperm(images, generator=generator, device=device)]
    hidden = torch.zeros(images, tokens, dtype=torch.bool, device=device)
    is_open = left > 0
    for _ in range(_BLOCKS):
        boxes = _draw_boxes(masks, grid, left, generator)  # (I, tries, N)
        new = (boxes & ~hidden.unsqueeze(1)).sum(-1)
        fits = (new > 0) & (new <= left.unsqueeze(1))
        first = fits.float().argmax(1, keepdim=True)
        is_open = is_open & fits.any(1)
        box = boxes.gather(1, first.unsqueeze(-1).expand(-1, 1, tokens)).squeeze(1)
        hidden = hidden | (box & is_open.unsqueeze(1))
        left = torch.where(is_open, left - new.gather(1, first).squeeze(1), left)
        is_open = is_open & (left > 0)
    return hidden


def _draw_boxes(
    masks: BlockMasks, grid: Sequence[int], left: Tensor, generator: torch.Generator
) -> Tensor:
    """Draw ten boxes per image, bool (I, tries, N); one that does not fit the grid is empty."""
    dims, device = len(grid), generator.device
    least = masks.least_tokens
    if least is None:
        least = max(1, (min(grid) // 3) ** dims)

    def draw(*shape: int) -> Tensor:
        return torch.rand(len(left), _TRIES, *shape, generator=generator, device=device)

    area = least + (left.unsqueeze(1) - least) * draw()
    spread = -math.log(masks.aspect)
    if dims == 2:
        half = (draw() - 0.5) * spread  # half the logarithm of the ratio of both sides
        logs = torch.stack([half, -half], -1)
    else:
        logs = (draw(dims) - 0.5) * spread
        logs = logs - logs.mean(-1, keepdim=True)
    sides = (area.clamp(min=0).pow(1 / dims).unsqueeze(-1) * logs.exp()).round()
    # in 2D a block never spans a side, as released
    limits = torch.tensor([max(n, 2) if dims == 2 else n + 1 for n in grid], device=device)
    fits = (sides < limits).all(-1)
    places = draw(dims)
    boxes = fits.view(*fits.shape, *[1] * dims)
    for axis, n in enumerate(grid):
        side = sides[..., axis]
        start = (places[..., axis] * (n - side + 1)).floor()
        along = torch.arange(n, device=device)
        inside = (along >= start.unsqueeze(-1)) & (along < (start + side).unsqueeze(-1))
        shape = [*fits.shape, *[1] * dims]
        shape[2 + axis] = n
        boxes = boxes & inside.view(shape)
    return boxes.expand(*fits.shape, *grid).flatten(2)
