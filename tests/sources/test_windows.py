from __future__ import annotations

import numpy as np
import pytest
import torch

from domainssl.sources.windows import Crop, Window

EIGHT = [(fy, fx, k) for fy in (False, True) for fx in (False, True) for k in (0, 1, 2, 3)]


def scene(height: int, width: int) -> np.ndarray:
    return (np.arange(height)[:, None] * 100 + np.arange(width)[None]).astype(np.int16)


@pytest.mark.parametrize(("flip_y", "flip_x", "turns"), EIGHT)
def test_the_affine_map_leads_every_delivered_pixel_back_to_its_place(flip_y, flip_x, turns):
    window = Window(2, 3, 4, 4, flip_y, flip_x, turns)
    out = torch.empty(4, 4, dtype=torch.int16)
    window.write(scene(9, 11), out)
    geo = window.geo(x0=500.0, y0=900.0, step=10.0)
    for row in range(4):
        for column in range(4):
            x = geo["a"] * (column + 0.5) + geo["b"] * (row + 0.5) + geo["c"]
            y = geo["d"] * (column + 0.5) + geo["e"] * (row + 0.5) + geo["f"]
            source_column, source_row = int((x - 500.0) // 10), int((900.0 - y) // 10)
            assert out[row, column] == source_row * 100 + source_column


@pytest.mark.parametrize(("flip_y", "flip_x", "turns"), EIGHT)
def test_views_are_those_of_numpy(flip_y, flip_x, turns):
    expected = scene(9, 11)[2:6, 3:7][:: -1 if flip_y else 1, :: -1 if flip_x else 1]
    view = Window(2, 3, 4, 4, flip_y, flip_x, turns).view(scene(9, 11))
    assert np.array_equal(view, np.rot90(expected, turns))


def test_a_resized_window_covers_the_same_ground():
    geo = Window(10, 20, 30, 60).geo(0.0, 0.0, 10.0)
    assert (geo["a"], geo["c"], geo["c"] + 60 * geo["a"]) == (5.0, 200.0, 500.0)
    assert (geo["e"], geo["f"], geo["f"] + 60 * geo["e"]) == (-5.0, -100.0, -400.0)


def test_a_window_without_resize_keeps_dtype_and_values():
    out = torch.empty(2, 3, 3, dtype=torch.float16)
    array = np.stack([scene(5, 5), scene(5, 5) + 1]).astype(np.float16)
    Window(1, 1, 3, 3).write(array, out)
    assert np.array_equal(out.numpy(), array[:, 1:4, 1:4])


def test_resizing_keeps_a_constant_and_a_linear_ramp():
    ramp = np.broadcast_to(np.arange(40, dtype=np.int16), (2, 40, 40))
    out = torch.empty(2, 20, 20)
    Window(0, 0, 40, 20).write(ramp, out)
    expected = torch.arange(20) * 2 + 0.5
    assert torch.allclose(out[:, 5, 2:-2], expected[2:-2].expand(2, -1), atol=1e-4)


@pytest.mark.parametrize(
    ("side", "dtype"), [(4, torch.int16), (4, torch.float32), (6, torch.float32)]
)
def test_the_offset_goes_from_everything_but_no_data(side, dtype):
    array = np.full((2, 6, 6), 1200, np.int16)
    array[1] = 0
    out = torch.empty(2, 4, 4, dtype=dtype)
    Window(0, 0, side, 4).write(array, out, offset=1000)
    assert torch.allclose(out[0].float(), torch.tensor(200.0)) and (out[1] == 0).all()
    assert (array[0] == 1200).all()


def test_resizing_is_antialiased_bilinear():
    array = np.random.default_rng(0).normal(size=(3, 50, 50)).astype(np.float32)
    out = torch.empty(3, 20, 20)
    Window(0, 0, 50, 20).write(array, out)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(array)[None], (20, 20), mode="bilinear", antialias=True
    )
    assert torch.equal(out, expected[0])


@pytest.mark.parametrize("side", [8, 37, 80])
def test_a_resized_pixel_is_invalid_as_soon_as_one_of_its_sources_is(side):
    values = np.zeros((1, 80, 80), np.float32)
    valid = np.ones((80, 80), bool)
    valid[side // 2, side // 3] = False
    values[0, side // 2, side // 3] = 1e9  # whatever stands there must not leak into valid pixels
    window = Window(0, 0, side, 20)
    out, mask = torch.empty(1, 20, 20), torch.empty(20, 20, dtype=torch.bool)
    window.write(values, out)
    window.write_valid(valid, mask)
    assert not mask.all()
    assert mask.float().mean() > 0.5
    assert out[0][mask].abs().max() < 1e4


def test_drawn_windows_lie_inside_and_use_the_whole_range():
    crop, rng = Crop(6, 18, 12), np.random.default_rng(0)
    windows = [crop.draw(rng, 15, 20) for _ in range(300)]
    assert {w.side for w in windows} == set(range(6, 16))  # clipped to the scene
    assert all(w.top + w.side <= 15 and w.left + w.side <= 20 for w in windows)
    assert len({(w.is_flipped_y, w.is_flipped_x, w.turns) for w in windows}) == 16


def test_switching_flips_off_moves_no_other_choice():
    with_flips = Crop(6, 12, 12).draw(np.random.default_rng(1), 30, 30)
    without = Crop(6, 12, 12, flips=False, quarter_turns=False).draw(
        np.random.default_rng(1), 30, 30
    )
    assert (with_flips.top, with_flips.left, with_flips.side) == (
        without.top, without.left, without.side,
    )  # fmt: skip
    assert not without.is_flipped_x and without.turns == 0


def test_the_evaluation_window_is_central():
    assert Crop().centre(132, 264) == Window(6, 72, 120, 120)
    assert Crop().centre(100, 264) == Window(0, 82, 100, 120)


def test_scenes_smaller_than_the_smallest_window_are_refused():
    with pytest.raises(ValueError, match=r"40 x 40 px.*Lower min_px to at most 40"):
        Crop().check(40, 40, "somewhere")
    with pytest.raises(ValueError, match="expected 1 <= min_px <= max_px"):
        Crop(90, 60)
