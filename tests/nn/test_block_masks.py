"""Masks of blocks: how many images, how much of each, and in which shapes."""

from __future__ import annotations

import math

import pytest
import torch

from domainssl.errors import ConfigError
from domainssl.nn.block_masks import BlockMasks, draw_block_masks


def draw(masks: BlockMasks, grid: tuple[int, ...], images: int, seed: int = 0) -> torch.Tensor:
    return draw_block_masks(masks, grid, images, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", [(14, 14), (6, 6, 6), (8, 4, 2)])
def test_half_of_the_images_get_masks_of_rising_shares_and_none_exceeds_its_slice(grid):
    masks, tokens = BlockMasks(fraction=0.5, ratio=(0.1, 0.5)), math.prod(grid)
    for seed in range(5):
        counts = draw(masks, grid, 17, seed).sum(1)
        assert int((counts > 0).sum()) == 8
        upper = sorted(int(tokens * (0.1 + 0.4 * (i + 1) / 8)) for i in range(8))
        found = sorted(int(n) for n in counts if n)
        assert all(n <= most for n, most in zip(found, upper, strict=True))
        assert int(counts.sum()) <= masks.most_tokens(17, tokens)


def test_most_masks_reach_their_number_and_the_others_fall_a_few_short():
    counts = draw(BlockMasks(fraction=1.0, ratio=(0.3, 0.3)), (14, 14), 512).sum(1)
    short = 58 - counts
    assert int(short.min()) == 0
    assert 0.85 < float((short == 0).float().mean()) < 0.97  # DINOv2's generator: 0.90 to 0.94
    assert float(short.float().mean()) < 1


def test_masks_come_in_blocks():
    mask = draw(BlockMasks(fraction=1.0, ratio=(0.4, 0.4)), (16, 16), 64).view(-1, 16, 16)
    pairs = (mask[:, 1:] & mask[:, :-1]).float().mean()
    assert float(pairs) > 1.5 * 0.4**2  # neighbours are masked together, not independently


def test_ibot_masks_every_image_in_large_blocks():
    masks = BlockMasks(fraction=1.0, ratio=(0.3, 0.3), least_tokens=None)
    assert (draw(masks, (14, 14), 32).sum(1) > 0).all()


@pytest.mark.parametrize("grid", [(1, 8), (2, 2), (1, 1, 1)])
def test_small_grids_neither_fail_nor_are_hidden_completely(grid):
    mask = draw(BlockMasks(fraction=1.0, ratio=(0.5, 0.5), least_tokens=1), grid, 8)
    assert mask.shape == (8, math.prod(grid))
    assert (mask.sum(1) <= math.prod(grid) // 2).all()


def test_no_image_is_masked_where_none_is_asked_for():
    assert not draw(BlockMasks(fraction=0.0), (4, 4), 3).any()


def test_ratios_outside_their_range_are_refused():
    with pytest.raises(ConfigError, match=r"masks.ratio: got \(0.5, 0.1\)"):
        BlockMasks(ratio=(0.5, 0.1))
