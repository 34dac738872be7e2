"""Views of feature grids are whole cells, mirrored and turned, where tissue is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from domainssl.errors import ConfigError
from domainssl.nn.grid_views import (
    GridView,
    GridViews,
    change_features,
    draw_grid_view,
    view_cells,
)


def view(start, flip=(False, False), turns=0):
    return GridView(
        start=torch.tensor([start]), flip=torch.tensor([flip]), turns=torch.tensor([turns])
    )


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("flip", [(False, False), (True, False), (False, True)])
def test_cells_are_cut_turned_and_mirrored_as_numpy_does(turns, flip):
    numbers = np.arange(30).reshape(5, 6)
    found = view_cells(view((1, 2), flip, turns), (5, 6), (3, 3))[0].reshape(3, 3).numpy()
    every = [np.rot90(numbers[1:4, 2:5], t) for t in range(4)]
    every += [np.flip(part, 1) for part in every]  # the eight symmetries of a square
    assert any(np.array_equal(found, part) for part in every)
    if not any(flip):
        assert np.array_equal(found, every[turns])
    elif turns == 0:
        assert np.array_equal(found, np.flip(numbers[1:4, 2:5], flip.index(True)))


def test_a_view_that_is_no_square_is_turned_by_half():
    numbers = np.arange(30).reshape(5, 6)
    found = view_cells(view((1, 2), turns=2), (5, 6), (2, 3))[0].reshape(2, 3).numpy()
    assert np.array_equal(found, np.rot90(numbers[1:3, 2:5], 2))


def test_views_are_drawn_where_tissue_is():
    occupied = torch.zeros(64, 12, 12, dtype=torch.bool)
    occupied[:, 6:, 6:] = True
    g = torch.Generator().manual_seed(0)
    drawn = draw_grid_view(GridViews(min_foreground=0.9, tries=64), occupied, (4, 4), 1, g)
    cells = view_cells(drawn, (12, 12), (4, 4))
    share = occupied.flatten(1).gather(1, cells).float().mean(1)
    assert (share >= 0.9).float().mean() > 0.9 and drawn.turns.unique().tolist() == [0, 1, 2, 3]
    empty = draw_grid_view(GridViews(), torch.zeros_like(occupied), (12, 12), 1, g)
    assert (empty.start == 0).all()


def test_features_are_rounded_disturbed_and_dropped_among_valid_tiles_alone():
    x = torch.linspace(0, 1, 9).view(1, 9, 1).repeat(2, 1, 1)
    x[:, -1] = 1000.0
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[:, -1] = False
    base = view((0, 0))
    same = {"start": base.start, "flip": base.flip, "turns": base.turns}
    rounded = change_features(
        x, valid, GridView(**same, levels=torch.tensor([2, 0])), GridViews(posterize=1.0)
    )
    assert set(rounded[0, :8, 0].tolist()) == {0.0, 0.875} and torch.equal(rounded[1], x[1])
    noise = torch.ones(2, 9, 1)
    moved = change_features(x, valid, GridView(**same, noise=noise), GridViews(noise=0.5))
    spread = x[0, :8].std(unbiased=False)
    torch.testing.assert_close(moved - x, 0.5 * spread.expand(2, 9, 1), atol=1e-4, rtol=1e-4)
    dropped = torch.zeros(2, 9, dtype=torch.bool)
    dropped[0, 3] = True
    gone = change_features(x, valid, GridView(**same, dropped=dropped), GridViews(dropout=0.5))
    assert gone[0, 3] == 0 and torch.equal(gone[1], x[1])


@pytest.mark.parametrize("wrong", [{"flip": 2.0}, {"levels": (1, 4)}, {"dropout": 1.0}])
def test_choices_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"views.{next(iter(wrong))}"):
        GridViews(**wrong)
