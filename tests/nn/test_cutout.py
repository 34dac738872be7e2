"""Boxes of noise: sides, shares, noise by its own extremes, and nothing outside."""

from __future__ import annotations

import pytest
import torch

from domainssl.errors import ConfigError
from domainssl.nn.cutout import Boxes, CutOut, box_mask, box_noise, draw_boxes, side_ranges

SIZE = (40, 48, 64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sides_places_and_volumes_of_boxes() -> None:
    boxes = draw_boxes(CutOut(), SIZE, 16, generator())
    sides, used = boxes.stop - boxes.start, boxes.used
    assert side_ranges(SIZE, CutOut()) == [(2, 10), (2, 12), (3, 16)]
    assert (sides[used] >= 1).all() and (sides[used] < torch.tensor([10, 12, 16])).all()
    assert (boxes.stop <= torch.tensor(SIZE)).all() and (boxes.start >= 0).all()
    volume = (sides.prod(-1) * used).sum(1) / (40 * 48 * 64)
    largest = 9 * 11 * 15 / (40 * 48 * 64)
    assert (volume <= 0.3 + largest).all()
    assert volume.min() < 0.1 < 0.2 < volume.max()
    assert not used[:, -1].any()  # there were boxes to spare


def test_small_volumes_get_boxes_of_one_voxel_at_least() -> None:
    boxes = draw_boxes(CutOut(), (8, 8, 16), 4, generator())
    assert ((boxes.stop - boxes.start) >= 1).all()


def test_the_mask_is_the_union_of_the_boxes() -> None:
    boxes = draw_boxes(CutOut(), SIZE, 2, generator())
    found = box_mask(boxes, SIZE)
    expected = torch.zeros(2, *SIZE, dtype=torch.bool)
    for item in range(2):
        rows = zip(boxes.start[item], boxes.stop[item], boxes.used[item], strict=True)
        for start, stop, used in rows:
            if used:
                expected[item][tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    assert torch.equal(found, expected)


def test_noise_of_the_last_box_runs_from_zero_to_one_over_all_channels() -> None:
    start = torch.tensor([[[0, 0, 0], [2, 2, 2]]])
    stop = torch.tensor([[[4, 4, 4], [5, 6, 7]]])
    boxes = Boxes(start, stop, torch.tensor([[True, True]]))
    noise = torch.randn(1, 2, 24, 24, 32, generator=generator())
    out = box_noise(boxes, noise, CutOut(largest_side=0.5))
    last = out[0, :, 2:5, 2:6, 2:7]
    assert float(last.min()) == 0 and float(last.max()) == 1
    first = noise[0, :, :4, :4, :4]
    expected = (noise[0, :, 0, 0, 0] - first.min()) / (first.max() - first.min())
    torch.testing.assert_close(out[0, :, 0, 0, 0], expected)
    assert not out[0, :, 5:, 6:].any()


def test_a_box_of_one_voxel_is_finite() -> None:
    """The published code divides zero by zero there."""
    one = Boxes(torch.tensor([[[1, 1, 1]]]), torch.tensor([[[2, 2, 2]]]), torch.tensor([[True]]))
    assert box_noise(one, torch.randn(1, 1, 8, 8, 8), CutOut()).isfinite().all()


def test_shares_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="least_side < largest_side"):
        CutOut(least_side=0.3)
