from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from domainssl.errors import ConfigError
from domainssl.sources.windows import Cut, Window

EIGHT = [(fy, fx, k) for fy in (False, True) for fx in (False, True) for k in (0, 1, 2, 3)]


def scene(height: int, width: int) -> np.ndarray:
    return (np.arange(height)[:, None] * 100 + np.arange(width)[None]).astype(np.int16)


@pytest.mark.parametrize(("flip_y", "flip_x", "turns"), EIGHT)
def test_the_affine_map_leads_every_delivered_pixel_back_to_its_place(flip_y, flip_x, turns):
    cut = Cut(begin=(2, 3), extent=(4, 4), size=(4, 4), flips=(flip_y, flip_x), turns=turns)
    out = torch.empty(4, 4, dtype=torch.int16)
    cut.write(scene(9, 11), out)
    geo = cut.geo(x0=500.0, y0=900.0, step=10.0)
    for row in range(4):
        for column in range(4):
            x = geo["a"] * (column + 0.5) + geo["b"] * (row + 0.5) + geo["c"]
            y = geo["d"] * (column + 0.5) + geo["e"] * (row + 0.5) + geo["f"]
            source_column, source_row = int((x - 500.0) // 10), int((900.0 - y) // 10)
            assert out[row, column] == source_row * 100 + source_column


@pytest.mark.parametrize(("flip_y", "flip_x", "turns"), EIGHT)
def test_views_are_those_of_numpy(flip_y, flip_x, turns):
    expected = scene(9, 11)[2:6, 3:7][:: -1 if flip_y else 1, :: -1 if flip_x else 1]
    view = Cut(begin=(2, 3), extent=(4, 4), size=(4, 4), flips=(flip_y, flip_x), turns=turns).view(
        scene(9, 11)
    )
    assert np.array_equal(view, np.rot90(expected, turns))


def test_a_resized_window_covers_the_same_ground():
    geo = Cut(begin=(10, 20), extent=(30, 30), size=(60, 60)).geo(0.0, 0.0, 10.0)
    assert (geo["a"], geo["c"], geo["c"] + 60 * geo["a"]) == (5.0, 200.0, 500.0)
    assert (geo["e"], geo["f"], geo["f"] + 60 * geo["e"]) == (-5.0, -100.0, -400.0)


def test_a_window_without_resize_keeps_dtype_and_values():
    out = torch.empty(2, 3, 3, dtype=torch.float16)
    array = np.stack([scene(5, 5), scene(5, 5) + 1]).astype(np.float16)
    Cut(begin=(1, 1), extent=(3, 3), size=(3, 3)).write(array, out)
    assert np.array_equal(out.numpy(), array[:, 1:4, 1:4])


def test_resizing_keeps_a_constant_and_a_linear_ramp():
    ramp = np.broadcast_to(np.arange(40, dtype=np.int16), (2, 40, 40))
    out = torch.empty(2, 20, 20)
    Cut(begin=(0, 0), extent=(40, 40), size=(20, 20)).write(ramp, out)
    expected = torch.arange(20) * 2 + 0.5
    assert torch.allclose(out[:, 5, 2:-2], expected[2:-2].expand(2, -1), atol=1e-4)


@pytest.mark.parametrize(
    ("side", "dtype"), [(4, torch.int16), (4, torch.float32), (6, torch.float32)]
)
def test_the_offset_goes_from_everything_but_no_data(side, dtype):
    array = np.full((2, 6, 6), 1200, np.int16)
    array[1] = 0
    out = torch.empty(2, 4, 4, dtype=dtype)
    Cut(begin=(0, 0), extent=(side, side), size=(4, 4)).write(array, out, offset=1000)
    assert torch.allclose(out[0].float(), torch.tensor(200.0)) and (out[1] == 0).all()
    assert (array[0] == 1200).all()


def test_resizing_is_antialiased_bilinear():
    array = np.random.default_rng(0).normal(size=(3, 50, 50)).astype(np.float32)
    out = torch.empty(3, 20, 20)
    Cut(begin=(0, 0), extent=(50, 50), size=(20, 20)).write(array, out)
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
    cut = Cut(begin=(0, 0), extent=(side, side), size=(20, 20))
    out, mask = torch.empty(1, 20, 20), torch.empty(20, 20, dtype=torch.bool)
    cut.write(values, out)
    cut.write_valid(valid, mask)
    assert not mask.all()
    assert mask.float().mean() > 0.5
    assert out[0][mask].abs().max() < 1e4


def pixels(size: float | tuple[float, ...], **options: Any) -> Window:
    axes = len(size) if isinstance(size, tuple) else 2
    return Window(size=size, **options).on_grid(1.0, axes=axes)


def test_drawn_windows_lie_inside_and_use_the_whole_range():
    window, rng = pixels(12, min_size=6, max_size=18), np.random.default_rng(0)
    cuts = [window.draw(rng, (15, 20)) for _ in range(300)]
    assert {cut.extent for cut in cuts} == {(s, s) for s in range(6, 16)}  # clipped to the scene
    assert all(c.slices[0].stop <= 15 and c.slices[1].stop <= 20 for c in cuts)
    assert len({(c.flips, c.turns) for c in cuts}) == 16


def test_switching_flips_off_moves_no_other_choice():
    draws = [
        pixels(12, min_size=6, flips=is_on, quarter_turns=is_on).draw(
            np.random.default_rng(1), (30, 30)
        )
        for is_on in (True, False)
    ]
    assert draws[0].slices == draws[1].slices
    assert draws[1].flips == (False, False) and draws[1].turns == 0


def test_the_evaluation_window_is_central():
    window = pixels(120, min_size=60, max_size=180)
    assert window.middle((132, 264)) == Cut(begin=(6, 72), extent=(120, 120), size=(120, 120))
    assert window.middle((100, 264)) == Cut(begin=(0, 82), extent=(100, 100), size=(120, 120))


def test_a_window_without_jitter_stays_where_held_out_ones_lie():
    still = pixels(8, jitter=False)
    assert still.draw(np.random.default_rng(0), (20, 30)).begin == (6, 11)
    assert still.draw(np.random.default_rng(0), (20, 30), (8, 16)).begin == (8, 16)


def test_jitter_moves_a_window_by_half_its_size_inside_its_room():
    window, rng = pixels(8), np.random.default_rng(0)
    begins = [window.draw(rng, (24, 24), (8, 0)).begin for _ in range(300)]
    assert {row for row, _ in begins} == set(range(4, 13))
    assert {column for _, column in begins} == set(range(5))


def test_boxes_keep_their_order_of_axes_and_turn_by_halves_where_sides_differ():
    window, rng = pixels((4, 6, 2), max_size=8), np.random.default_rng(0)
    volume = np.arange(20 * 20 * 5).reshape(1, 20, 20, 5)
    cuts = [window.draw(rng, (20, 20, 5)) for _ in range(100)]
    assert {cut.extent for cut in cuts} == {(s, round(s * 1.5), round(s / 2)) for s in range(4, 9)}
    assert {cut.turns for cut in cuts} == {0, 2}
    assert {cut.flips for cut in cuts} == set(itertools.product((False, True), repeat=3))
    assert {cut.view(volume).shape[1:] for cut in cuts} == {cut.extent for cut in cuts}
    out = torch.empty(1, 4, 6, 2)
    cuts[0].write(volume.astype(np.float32), out)
    part = volume[(0, *cuts[0].slices)]
    assert part.min() <= out.min() and out.max() <= part.max()
    assert window.middle((20, 20, 5)) == Cut(begin=(8, 7, 1), extent=(4, 6, 2), size=(4, 6, 2))


def test_cubes_turn_in_the_plane_of_their_first_two_axes():
    volume = np.arange(4 * 4 * 3).reshape(4, 4, 3)
    cut = Cut(begin=(0, 0, 0), extent=(4, 4, 3), size=(4, 4, 3), flips=(False, True, True), turns=1)
    assert np.array_equal(cut.view(volume), np.rot90(volume[:, ::-1, ::-1], 1, axes=(0, 1)))


@pytest.mark.parametrize(
    ("window", "cell_m", "px_m", "shape"),
    [
        (Window(size=64), 0.01, None, (64, 64)),
        (Window(size=(96, 32), unit="m"), 2.0, None, (48, 16)),
        (Window(size=96, unit="mm"), 0.0015, None, (64, 64)),
        (Window(size=112, unit="um"), 0.5e-6, None, (224, 224)),
        (Window(size=150), 10.0, 0.2, (3, 3)),  # pixels of an aerial image of 0.2 m
    ],
)
def test_sizes_of_every_unit_become_cells(window, cell_m, px_m, shape):
    assert window.on_grid(cell_m, px_m=px_m).shape == shape


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"40 x 40 px.*takes 60.*min_size.*at most 40"):
        pixels(120, min_size=60, max_size=180).check((40, 40), "somewhere")
    for sizes in ({"min_size": 90, "max_size": 60}, {"max_size": 20}, {"min_size": 0}):
        with pytest.raises(ConfigError, match="min_size <= max_size"):
            Window(size=60, **sizes)
    with pytest.raises(ConfigError, match=r"165 m is no multiple of 10 m.*use 160"):
        Window(size=165, unit="m").on_grid(10.0)
    with pytest.raises(ConfigError, match=r"got \(64, 64, 32\), expected a number, or a list of 2"):
        Window(size=(64, 64, 32)).on_grid(10.0)
    with pytest.raises(ConfigError, match="Did you mean 'um'"):
        Window(size=64, unit="umm")


def test_axes_are_mirrored_by_their_own_answer() -> None:
    window = Window(size=(4, 4, 4), flips=(False, True, False)).on_grid(1.0, axes=3)
    cuts = [window.draw(np.random.default_rng(i), (9, 9, 9)) for i in range(16)]
    assert {cut.flips for cut in cuts} == {(False, True, False), (False, False, False)}
    with pytest.raises(ConfigError, match=r"window.flips: got \[True, False\]"):
        Window(size=4, flips=(True, False)).on_grid(1.0, axes=3)


def test_a_cut_tells_where_its_cells_come_from() -> None:
    array = np.arange(5 * 6 * 7).reshape(5, 6, 7)
    for turns in range(4):
        cut = Cut(
            begin=(1, 2, 3),
            extent=(3, 2, 4),
            size=(3, 2, 4),
            flips=(True, False, True),
            turns=turns,
        )
        delivered, matrix = cut.view(array), cut.to_source()
        for place in np.ndindex(delivered.shape):
            source = (matrix @ [*place, 1])[:3].astype(int)
            assert delivered[place] == array[tuple(source)]


def test_a_window_without_sizes_is_refused():
    with pytest.raises(ConfigError, match=r"window: got size=\(\)"):
        Window(size=())
