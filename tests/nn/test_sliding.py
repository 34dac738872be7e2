"""Windows and blending equal MONAI's, and hold no more than the rows under work."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from domainssl.errors import ConfigError, DataError
from domainssl.inference.sliding import Slabs
from domainssl.nn.sliding import Blend, Box, Windows, class_map, slide_over, window_weights

monai_inferers = pytest.importorskip("monai.inferers")


def network(x: Tensor) -> Tensor:
    """Three channels that depend on the place in the window, so that blending shows."""
    ramp = torch.linspace(0.5, 1.5, x.shape[-1]) * torch.linspace(1, 2, x.shape[2]).view(
        -1, *[1] * (x.ndim - 3)
    )
    return torch.cat([x * ramp, x.sin() + ramp, x.flip(-1)], 1)


def slid(values: Tensor, size: Any, overlap: Any, **options: Any) -> Tensor:
    """Values (1, 1, *S) predicted by ours, (C, *S)."""
    out = torch.full((3, *values.shape[2:]), math.nan)

    def sink(box: Box, found: Tensor) -> None:
        assert out[(slice(None), *box)].isnan().all()  # every cell comes once
        out[(slice(None), *box)] = found

    slide_over(
        lambda box: {"ct": values[(..., *box)]},
        lambda batch: network(batch["ct"]),
        Windows(values.shape[2:], size, overlap),
        sink,
        **options,
    )
    return out


CASES: list[tuple[Any, Any, Any]] = [
    ((23, 17, 19), (8, 8, 8), 0.25),
    ((23, 17, 19), (8, 5, 19), 0.5),
    ((16, 16, 16), (8, 8, 8), 0.0),
    ((9, 21, 5), (4, 7, 5), (0.9, 0.3, 0.7)),
    ((7, 20, 4), (10, 8, 9), 0.25),  # shorter than a window on two axes
    ((31, 26), (8, 7), 0.6),
    ((5, 30), (12, 12), 0.4),
    ((33,), (8,), 0.25),
]


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize(("shape", "size", "overlap"), CASES)
def test_predictions_equal_those_of_monai(shape: Any, size: Any, overlap: Any, mode: Any) -> None:
    values = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    wanted = monai_inferers.sliding_window_inference(
        values, size, 3, network, overlap=overlap, mode=mode
    )
    torch.testing.assert_close(
        slid(values, size, overlap, mode=mode, batch_size=3), wanted[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("size", [(8, 8, 8), (7, 96, 5), (1, 3), (160, 160)])
def test_weights_equal_those_of_monai(size: tuple[int, ...]) -> None:
    from monai.data.utils import compute_importance_map

    found = window_weights(size, "gaussian")
    assert found is not None
    torch.testing.assert_close(found, compute_importance_map(size, "gaussian"))
    assert window_weights(size, "constant") is None


def test_halo_takes_every_cell_from_the_window_in_whose_middle_it_lies_most() -> None:
    values = torch.arange(20.0).view(1, 1, 20)
    windows = Windows((20,), 8, 0.5)  # begin at 0, 4, 8, 12
    seen = torch.zeros(20)

    def number(batch: Any) -> Tensor:
        return batch["ct"][:, :, :1].expand(-1, -1, 8)  # the window's first cell

    slide_over(
        lambda box: {"ct": values[(..., *box)]},
        number,
        windows,
        lambda box, v: seen.__setitem__(box, v[0]),
        mode="halo",
    )
    assert seen.tolist() == [0.0] * 6 + [4.0] * 4 + [8.0] * 4 + [12.0] * 6


def test_only_the_rows_that_the_next_windows_overlap_stay_open() -> None:
    windows, most, at_ends = Windows((62, 26, 26), 8, 0.25), 0, []
    blend = Blend(windows, lambda box, values: None)
    for index, _ in windows:
        blend.add(index, torch.ones(2, 8, 8, 8))
        most = max(most, blend.held)
        if index[1:] == (len(windows.begins[1]) - 1, len(windows.begins[2]) - 1):
            at_ends.append(blend.held)
    assert at_ends == [2 * 2 * 26 * 26] * (len(at_ends) - 1) + [0]  # 2 of 8 rows, 2 channels
    assert most < 2 * (2 * 26 * 26 + 8 * 8 * 26)  # and one row of windows along the last axis


def test_filled_up_windows_say_what_is_valid_in_every_resolution() -> None:
    seen: dict[str, Tensor] = {}

    def predict(batch: Any) -> Tensor:
        seen.update(batch)
        return torch.zeros(1, 1, 8, 8)

    item = {"s2": torch.ones(1, 2, 4, 6), "aerial": torch.ones(1, 3, 16, 24), "id": ["a"],
            "s2.window": torch.ones(1, 2, 2), "t": torch.ones(1, 5, 2, 4, 6)}  # fmt: skip
    slide_over(lambda box: dict(item), predict, Windows((4, 6), 8), lambda *a: None)
    assert seen["s2"].shape == (1, 2, 8, 8) and seen["s2.window"].shape == (1, 2, 2)
    rows, columns = torch.arange(8) - 2, torch.arange(8) - 1
    wanted = ((rows >= 0) & (rows < 4))[:, None] & ((columns >= 0) & (columns < 6))
    assert torch.equal(seen["s2.valid"][0], wanted)
    assert torch.equal(
        seen["aerial.valid"][0], wanted.repeat_interleave(4, 0).repeat_interleave(4, 1)
    )
    assert seen["aerial"].sum() == 3 * 16 * 24


def test_a_continued_call_gives_the_same_rows() -> None:
    values = torch.randn(1, 1, 30, 13, generator=torch.Generator().manual_seed(1))
    whole, windows = slid(values, 8, 0.5), Windows((30, 13), 8, 0.5)
    rows = windows.rows()
    assert rows[0] == 0 and rows[-1] == 30
    for begin in rows:
        read, rest = [], torch.zeros(3, 30, 13)
        slide_over(
            lambda box, read=read: read.append(box) or {"ct": values[(..., *box)]},
            lambda batch: network(batch["ct"]),
            windows,
            lambda box, v, rest=rest: rest[:, *box].copy_(v),
            begin=begin,
        )
        assert torch.equal(rest[:, begin:], whole[:, begin:]) and not rest[:, :begin].any()
        assert all(box[0].stop > begin for box in read)


def test_slabs_arrive_in_order_and_complete() -> None:
    values = torch.randn(1, 1, 21, 13, 11, generator=torch.Generator().manual_seed(2))
    slabs: list[tuple[int, Any]] = []
    slide_over(
        lambda box: {"ct": values[(..., *box)]},
        lambda batch: network(batch["ct"]),
        Windows((21, 13, 11), 6, 0.5),
        Slabs((21, 13, 11), lambda row, found: slabs.append((row, found))),
        finish=class_map,
    )
    starts = [row for row, _ in slabs]
    assert starts == [sum(len(found) for _, found in slabs[:i]) for i in range(len(slabs))]
    found = np.concatenate([found for _, found in slabs])
    assert np.array_equal(found, slid(values, 6, 0.5).argmax(0).numpy())
    assert found.dtype == np.uint8


def test_class_maps_of_many_classes_have_room_for_their_numbers() -> None:
    values = torch.zeros(300, 4)
    values[[299, 256, 0, 128], range(4)] = 1
    assert class_map(values).tolist() == [299, 256, 0, 128]
    assert class_map(values[:256])[3] == 128


@pytest.mark.parametrize(
    ("size", "overlap", "text"),
    [
        ((8, 8), 0.25, "windows.size: got [8, 8], expected one number, or 3"),
        ((8, 0, 8), 0.25, "windows.size: got [8, 0, 8], expected at least 1"),
        (8, 1.0, "windows.overlap: got [1.0, 1.0, 1.0], expected a share"),
        (8, (0.5, 0.5), "or 3 of them"),
        (8, -0.1, "windows.overlap"),
        (8, math.nan, "windows.overlap"),
    ],
)
def test_windows_that_cannot_be_are_refused(size: Any, overlap: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Windows((20, 20, 20), size, overlap)
    assert text in str(caught.value)


def test_other_mistakes_are_named() -> None:
    windows = Windows((8, 8), 4)
    with pytest.raises(ConfigError, match=r"blending: got 'gauss', .* Did you mean 'gaussian'"):
        Blend(windows, print, mode="gauss")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="begin: got row 2, expected the end of a slab: 0, 3, 4"):
        Blend(windows, print, begin=2)
    with pytest.raises(DataError, match=r"shape \(3, 4, 5\) and type float32.*4 x 4 cells"):
        Blend(windows, print).add((0, 0), torch.zeros(3, 4, 5))
    with pytest.raises(DataError, match="type int64"):
        Blend(windows, print).add((0, 0), torch.zeros(3, 4, 4, dtype=torch.int64))
    one = {"a": torch.zeros(1, 1, 4, 4)}
    with pytest.raises(ConfigError, match="batch_size: got 0"):
        slide_over(lambda b: one, lambda b: b["a"], windows, print, batch_size=0)
    with pytest.raises(DataError, match="1 predictions for a batch of 2"):
        slide_over(lambda b: one, lambda b: b["a"][:1], windows, print, batch_size=2)
    boxes = iter([one, {**one, "b": one["a"]}])
    with pytest.raises(DataError, match="only some of them have b"):
        slide_over(lambda b: next(boxes), lambda b: b["a"], windows, print, batch_size=2)
    with pytest.raises(DataError, match="a has 3 pixels for 2 cells"):
        slide_over(
            lambda b: {"a": torch.zeros(1, 1, 3, 2)}, lambda b: b["a"], Windows((2, 2), 5), print
        )
