"""Jitter of dyes: values by hand, identity, and where it may be used."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from domainssl.backbones.vit import ViTBackbone
from domainssl.errors import ConfigError
from domainssl.modality import Modality
from domainssl.nn.normalization import Form
from domainssl.nn.stain import HED, hed_jitter
from domainssl.nn.views import Views, draw_view
from domainssl.objectives.view_steps import check_photometric, unit_values, view_of

ONE, NONE = torch.ones(1, 3), torch.zeros(1, 3)
RGB = Modality(name="he", kind="image", channels=("r", "g", "b"), value_unit="rgb8", size=(8, 8))


def _colours(density: list[float]) -> torch.Tensor:
    return torch.tensor([math.exp(-d) for d in density]).view(1, 3, 1, 1)


def test_nothing_changes_without_jitter() -> None:
    x = torch.rand(4, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0], x[0, :, 0, 1] = 0.0, 1.0
    view = draw_view(Views(stain=0.0, stain_probability=1.0), (5, 7), 4, torch.Generator())
    assert (hed_jitter(x, view.stain[:, 0], view.stain[:, 1]) - x).abs().max() < 1e-3


def test_more_hematoxylin_is_more_of_its_own_colour() -> None:
    unit = [v / math.hypot(*HED[0]) for v in HED[0]]
    gain = torch.tensor([[1.2, 1.0, 1.0]])
    found = hed_jitter(_colours([0.5 * v for v in unit]), gain, NONE)
    assert torch.allclose(found, _colours([0.6 * v for v in unit]), atol=1e-5)
    # 0.1 of hematoxylin on glass: exp(-0.1 * 0.65 / 0.99825) = 0.93696 in red
    white = hed_jitter(torch.ones(1, 3, 1, 1), ONE, torch.tensor([[0.1, 0.0, 0.0]])).flatten()
    assert torch.allclose(white, torch.tensor([0.93696, 0.93228, 0.97137]), atol=1e-5)
    eosin = hed_jitter(_colours([0.5 * v for v in unit]), torch.tensor([[1.0, 1.5, 0.5]]), NONE)
    assert torch.allclose(eosin, _colours([0.5 * v for v in unit]), atol=1e-5)  # there is none
    assert (hed_jitter(torch.ones(1, 3, 1, 1), ONE, torch.full((1, 3), -0.2)) <= 1).all()


def test_draws_lie_in_their_range_and_leave_other_draws_alone() -> None:
    def drawn(views: Views) -> object:
        return draw_view(views, (8, 8), 500, torch.Generator().manual_seed(3))

    plain, jittered = drawn(Views()), drawn(Views(stain=0.2, stain_probability=0.5))
    assert torch.equal(plain.start, jittered.start)  # type: ignore[attr-defined]
    stain = jittered.stain  # type: ignore[attr-defined]
    change = stain - torch.tensor([1.0, 0.0]).view(1, 2, 1)
    assert change.abs().max() <= 0.2 and change.std() > 0.05
    untouched = (change == 0).flatten(1).all(1).float().mean()
    assert 0.4 < untouched < 0.6
    assert torch.equal(plain.stain[:, 0], torch.ones(500, 3))  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", ["zscore", "identity", "scale(255)", "window(0,255)"])
def test_forms_that_keep_white_and_black_are_accepted(form: str) -> None:
    check_photometric(Views(stain_probability=0.5), Form.parse(form), RGB, "crops.first")


def test_other_values_than_colours_are_refused() -> None:
    views = Views(stain_probability=0.5)
    with pytest.raises(ConfigError, match=r"crops\.first\.stain_probability.*'mean2std'"):
        check_photometric(views, Form.parse("mean2std"), RGB, "crops.first")
    radar = Modality(name="s1", kind="image", channels=("VV", "VH"), value_unit="db", size=(8, 8))
    with pytest.raises(ConfigError, match="2 channels of the unit 'db'"):
        check_photometric(views, Form.parse("zscore"), radar, "views.s1")


def test_a_view_changes_dyes_before_it_is_standardised() -> None:
    known = {"he": dataclasses.replace(RGB, mean=(180.0, 130.0, 200.0), std=(30.0, 25.0, 30.0))}
    backbone = ViTBackbone(known, {"width": 24, "depth": 1, "heads": 2}, patch_size=4)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 254 + 1
    views = Views(crop_area=(1.0, 1.0), crop_aspect=1.0, flip=0.0, stain=0.2, stain_probability=1.0)
    view = draw_view(views, (8, 8), 2, torch.Generator().manual_seed(2))
    values, usable = unit_values(backbone, {"he": x}, "he")
    found = view_of(backbone, {"he": x}, "he", values, usable, view, views, (8, 8))["he"]
    wanted = 255 * hed_jitter(x / 255, view.stain[:, 0], view.stain[:, 1])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (known["he"].mean, known["he"].std))
    assert torch.allclose(found, (wanted - mean) / std, atol=1e-3)
    assert (wanted - x).abs().mean() > 3
