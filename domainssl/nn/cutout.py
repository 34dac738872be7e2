"""Random boxes of noise, or of another item, in place of part of a volume.

Boxes are drawn until their volumes add up to a share of the volume, as the published loop does:
what two boxes have in common counts twice, and the last one may exceed the share. Nothing here
waits for the device: a fixed number of boxes is drawn, and those after the last needed one are off.

Source: SwinUNETR self-supervised pretraining (Tang et al. 2022), `patch_rand_drop` of its code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from domainssl.errors import ConfigError

__all__ = ["Boxes", "CutOut", "box_mask", "box_noise", "draw_boxes", "side_ranges"]


@dataclass(frozen=True)
class CutOut:
    """How boxes are drawn.

    Attributes:
        share: Largest share of the volume; each item draws its own uniformly below it.
        least_side: Smallest side of a box as a share of the volume's side.
        largest_side: Sides are shorter than this share.

    Raises:
        ConfigError: The shares are out of order.
    """

    share: float = 0.3
    least_side: float = 0.05
    largest_side: float = 0.25

    def __post_init__(self) -> None:
        if not (0 <= self.share < 1 and 0 < self.least_side < self.largest_side <= 1):
            raise ConfigError(
                f"cutout: got {self}; expected 0 <= share < 1 and 0 < least_side < largest_side "
                "<= 1."
            )


@dataclass(frozen=True)
class Boxes:
    """Boxes of every item, in the order in which they are laid down.

    Attributes:
        start: First voxel, int64 (B, K, D).
        stop: One past the last voxel, int64 (B, K, D).
        used: bool (B, K); False boxes are not there.
    """

    start: Tensor
    stop: Tensor
    used: Tensor


def side_ranges(size: Sequence[int], cutout: CutOut) -> list[tuple[int, int]]:
    """Return [low, high) of the sides of boxes per axis, of one voxel at least."""
    lows = [max(1, int(cutout.least_side * side)) for side in size]
    highs = [int(cutout.largest_side * side) for side in size]
    return [(low, max(low + 1, high)) for low, high in zip(lows, highs, strict=True)]


def draw_boxes(
    cutout: CutOut, size: Sequence[int], items: int, generator: torch.Generator
) -> Boxes:
    """Draw the boxes of every item.

    Args:
        cutout: How.
        size: Voxels per axis.
        items: Number of items B.
        generator: Source of all randomness; tensors are made on its device.
    """
    device = generator.device
    ranges = side_ranges(size, cutout)
    low, high = (torch.tensor(ends, device=device) for ends in zip(*ranges, strict=True))
    whole = torch.tensor(size, device=device)
    # twice as many as reach the share on average: a volume that still falls short is one in 1e9
    middle = [(a + b - 1) / 2 / side for (a, b), side in zip(ranges, size, strict=True)]
    count = 8 + math.ceil(2 * cutout.share / math.prod(middle))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(items, *shape, generator=generator, device=device)

    wanted = uniform(1) * cutout.share * math.prod(size)
    room = whole - (cutout.least_side * whole.double()).long()  # first voxels lie before it
    start = (uniform(count, len(size)) * room).long().minimum(room - 1)
    sides = low + (uniform(count, len(size)) * (high - low)).long().minimum(high - low - 1)
    stop = (start + sides).minimum(whole)
    volume = (stop - start).prod(-1)  # (B, K)
    before = volume.cumsum(1) - volume
    return Boxes(start, stop, before < wanted)


def box_mask(boxes: Boxes, size: Sequence[int]) -> Tensor:
    """Return which voxels lie in a box, bool (B, *size)."""
    items, axes = len(boxes.start), len(size)
    shape = [side + 1 for side in size]
    steps = boxes.start.new_zeros(items, math.prod(shape))
    for corner in range(2**axes):  # a box is a product of differences of steps
        ends = [corner >> axis & 1 for axis in range(axes)]
        place = boxes.start.new_zeros(boxes.used.shape)
        for axis, end in enumerate(ends):
            place = place * shape[axis] + (boxes.stop if end else boxes.start)[..., axis]
        sign = -1 if sum(ends) % 2 else 1
        steps.scatter_add_(1, place, sign * boxes.used.long())
    depth = steps.view(items, *shape)
    for axis in range(axes):
        depth = depth.cumsum(axis + 1).narrow(axis + 1, 0, size[axis])
    return depth > 0


def box_noise(boxes: Boxes, noise: Tensor, cutout: CutOut) -> Tensor:
    """Bring the noise of every box to [0, 1] by its own extremes, over all channels together.

    Args:
        boxes: Where.
        noise: (B, C, *S); every box takes the values that lie in it.
        cutout: How the boxes were drawn, for their largest size.

    Returns:
        The shape of `noise`: in every voxel that of the last box that covers it, elsewhere zero.
    """
    size = noise.shape[2:]
    spans = [high - 1 for _, high in side_ranges(size, cutout)]
    flat = boxes.start.new_zeros(boxes.used.shape).view(*boxes.used.shape, *[1] * len(size))
    inside = boxes.used.view(flat.shape)
    for axis, (span, side) in enumerate(zip(spans, size, strict=True)):
        steps = torch.arange(span, device=noise.device).view(-1, *[1] * (len(size) - 1 - axis))
        rest = [1] * len(size)
        place = boxes.start[..., axis].view(*boxes.used.shape, *rest) + steps
        inside = inside & (place < boxes.stop[..., axis].view(*boxes.used.shape, *rest))
        flat = flat * side + place.clamp(max=side - 1)
    inside = inside.flatten(2)  # (B, K, P)
    flat = torch.where(inside, flat.flatten(2), 0).flatten(1)  # (B, K·P)

    def extreme(values: Tensor, sign: int) -> Tensor:
        found = (sign * values).flatten(1).gather(1, flat).view(inside.shape)
        return sign * found.masked_fill(~inside, -math.inf).amax(2)  # (B, K)

    high, low = extreme(noise.amax(1), 1), extreme(noise.amin(1), -1)
    order = torch.arange(inside.shape[1], device=noise.device).view(1, -1, 1)
    laid = torch.where(inside, order, -1).flatten(1)
    owner = torch.full((len(noise), math.prod(size)), -1, device=noise.device)
    owner = owner.scatter_reduce(1, flat, laid, "amax")
    own = owner.clamp(min=0)
    lows = low.gather(1, own).unsqueeze(1)
    spread = (high - low).gather(1, own).unsqueeze(1)  # zero in a box of one voxel and channel
    values = noise.flatten(2)
    scaled = torch.where(spread > 0, (values - lows) / spread, 0.0)
    return torch.where(owner.unsqueeze(1) >= 0, scaled, 0.0).view(noise.shape)
