"""Crops, flips and photometric changes do what their parameters say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from domainssl.errors import ConfigError
from domainssl.nn.views import View, Views, draw_view, geometry, photometry

ALL = Views(
    color_probability=0.8, grey_probability=0.2, blur_probability=0.5, solarize_probability=0.2
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neutral(items: int, dims: int = 2, **changes: Tensor) -> View:
    no, one = torch.zeros(items, dtype=torch.bool), torch.ones(items)
    view = View(
        start=torch.zeros(items, dims),
        extent=torch.ones(items, dims),
        flip=torch.zeros(items, dims, dtype=torch.bool),
        brightness=one,
        contrast=one,
        grey=no,
        sigma=torch.zeros(items),
        solarize=no,
        date=torch.zeros(items, dtype=torch.int64),
        gamma=one,
        stain=torch.tensor([1.0, 0.0]).view(1, 2, 1).repeat(items, 1, 3),
    )
    return dataclasses.replace(view, **changes)


def image(items: int = 2, size: tuple[int, ...] = (6, 8)) -> tuple[Tensor, Tensor]:
    x = torch.rand(items, 3, *size, generator=generator())
    return x, torch.ones(items, *size, dtype=torch.bool)


@pytest.mark.parametrize("size", [(6, 8), (4, 6, 5)])
def test_the_neutral_view_is_the_image_itself(size: tuple[int, ...]) -> None:
    x, valid = image(2, size)
    view = neutral(2, len(size))
    out, seen = geometry(x, valid, view, size)
    torch.testing.assert_close(out, x)
    assert seen.all()
    torch.testing.assert_close(photometry(out, seen, view, ALL), x)


def test_flips_and_crops_are_per_item_and_per_axis() -> None:
    x, valid = image()
    flip = torch.tensor([[True, False], [False, True]])
    out, _ = geometry(x, valid, neutral(2, flip=flip), (6, 8))
    torch.testing.assert_close(out[0], x[0].flip(1))
    torch.testing.assert_close(out[1], x[1].flip(2))
    start, extent = torch.tensor([[0.5, 0.25]] * 2), torch.tensor([[0.5, 0.5]] * 2)
    out, _ = geometry(x, valid, neutral(2, start=start, extent=extent), (3, 4))
    torch.testing.assert_close(out, x[:, :, 3:, 2:6])


def test_invalid_pixels_do_not_leak() -> None:
    x, valid = image()
    valid[:, 2:4, 3:5] = False
    other = torch.where(valid.unsqueeze(1), x, 1e6)
    view = draw_view(ALL, (6, 8), 2, generator())
    a, seen = geometry(x, valid, view, (5, 5))
    b, _ = geometry(other, valid, view, (5, 5))
    assert torch.equal(a, b)
    assert (a[(~seen).unsqueeze(1).expand_as(a)] == 0).all()
    constant, _ = geometry(torch.ones_like(x), valid, view, (5, 5))
    torch.testing.assert_close(constant, seen.unsqueeze(1).float().expand_as(a))


@pytest.mark.parametrize("size", [(64, 64), (40, 90), (16, 24, 20)])
def test_drawn_crops_have_the_asked_area_and_lie_inside(size: tuple[int, ...]) -> None:
    views = Views(crop_area=(0.2, 0.5))
    view = draw_view(views, size, 500, generator())
    area = view.extent.prod(1)
    central = (min(size) / torch.tensor(size, dtype=torch.float32)).prod()
    is_fallback = (area - central).abs() < 1e-6
    inside = area[~is_fallback]
    assert (inside > 0.2 - 1e-5).all() and (inside < 0.5 + 1e-5).all()
    assert is_fallback.float().mean() < 0.1
    assert (view.start >= 0).all() and (view.start + view.extent <= 1 + 1e-6).all()
    sides = view.extent * torch.tensor(size)
    assert (sides.max(1).values / sides.min(1).values).max() < 4 / 3 + 1e-4
    assert area.std() > 0.05 and view.start.std() > 0.1


def test_probabilities_are_kept_and_draws_depend_on_the_generator_alone() -> None:
    view = draw_view(ALL, (8, 8), 4000, generator(1))
    assert float((view.brightness != 1).float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float(view.grey.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert float((view.sigma > 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert float(view.flip.float().mean()) == pytest.approx(0.5, abs=0.03)
    again = draw_view(ALL, (8, 8), 4000, generator(1))
    for field in dataclasses.fields(view):
        assert torch.equal(getattr(view, field.name), getattr(again, field.name))


def test_only_real_dates_are_drawn() -> None:
    frames = torch.tensor([[True, True, False, True]]).expand(3000, -1)
    date = draw_view(Views(), (8, 8), 3000, generator(), frames).date
    counts = torch.bincount(date, minlength=4)
    assert int(counts[2]) == 0
    assert int(counts[[0, 1, 3]].min()) > 850


def test_photometric_changes_are_those_of_their_formulas() -> None:
    x, valid = image(5)
    bright = torch.tensor([1.4, 1, 1, 1, 1])
    contrast = torch.tensor([1, 0.6, 1, 1, 1])
    grey = torch.tensor([0, 0, 1, 0, 0], dtype=torch.bool)
    view = neutral(5, brightness=bright, contrast=contrast, grey=grey)
    out = photometry(x, valid, view, ALL)
    torch.testing.assert_close(out[0], (x[0] * 1.4).clamp(0, 1))
    mean = x[1].mean((1, 2), keepdim=True)
    torch.testing.assert_close(out[1], mean + 0.6 * (x[1] - mean))
    torch.testing.assert_close(out[2], x[2].mean(0, keepdim=True).expand(3, -1, -1))
    torch.testing.assert_close(out[3:], x[3:])


def test_blur_keeps_constants_and_spreads_points() -> None:
    x = torch.full((2, 1, 15, 15), 0.5)
    x[1] = 0
    x[1, 0, 7, 7] = 1
    view = neutral(2, sigma=torch.tensor([1.5, 1.0]))
    out = photometry(x, torch.ones(2, 15, 15, dtype=torch.bool), view, ALL)
    torch.testing.assert_close(out[0], x[0])
    expected = torch.exp(-0.5 * (torch.arange(15) - 7.0).square())
    expected = expected / expected.sum()
    torch.testing.assert_close(out[1, 0], expected.outer(expected), atol=1e-3, rtol=1e-2)


def test_grey_and_solarize_of_the_reference(golden_dir: Path) -> None:
    golden = load_file(golden_dir / "decur_tiny.safetensors")
    x = (golden["aug/img"].float() / 255).permute(2, 0, 1).unsqueeze(0)
    valid = torch.ones(1, *x.shape[2:], dtype=torch.bool)

    def eight_bit(out: Tensor) -> Tensor:
        return (out[0].permute(1, 2, 0) * 255 + 1e-3).to(torch.uint8)

    yes = torch.ones(1, dtype=torch.bool)
    assert torch.equal(
        eight_bit(photometry(x, valid, neutral(1, grey=yes), ALL)), golden["aug/gray3"]
    )
    solarized = photometry(x, valid, neutral(1, solarize=yes), ALL)
    assert torch.equal(eight_bit(solarized), golden["aug/solarize"])


@pytest.mark.parametrize("name", ["crop_area", "blur_sigma"])
def test_values_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"views.{name}"):
        Views(**{name: (2.0, 1.0)})


def test_gamma_is_an_exponent_of_each_item_and_flips_may_differ_per_axis() -> None:
    x, valid = image()
    views = Views(gamma_probability=1.0)
    view = neutral(2, gamma=torch.tensor([0.5, 2.0]))
    out = photometry(x, valid, view, views)
    torch.testing.assert_close(out[0], x[0].sqrt())
    torch.testing.assert_close(out[1], x[1].square())
    drawn = draw_view(Views(flip=(0.0, 1.0), gamma_probability=1.0), (6, 8), 64, generator())
    assert not drawn.flip[:, 0].any()
    assert drawn.flip[:, 1].all()
    assert 0.7 <= float(drawn.gamma.min()) < float(drawn.gamma.max()) <= 1.5
