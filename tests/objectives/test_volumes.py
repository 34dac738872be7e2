"""Methods that began with images, on volumes and contrasts: what stays true in three axes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from domainssl.backbones.croma import CROMABackbone
from domainssl.errors import ConfigError, DataError
from domainssl.modality import Batch, Modality
from domainssl.nn.alibi import DistanceBias
from domainssl.objectives.base import Generators, Objective
from domainssl.objectives.croma import CROMA
from domainssl.objectives.decur import DeCUR, EncoderSizes
from domainssl.training.module import Step

SIZE, SPACING = (16, 8, 12), (1.0, 1.0, 2.5)  # no cube, thick slices


def volume(name: str, channels: int = 1, size: tuple[int, ...] = SIZE, **facts: Any) -> Modality:
    facts = {"spacing_mm": SPACING, "mean": (1.0,) * channels, "std": (2.0,) * channels, **facts}
    return Modality(
        name, "volume", tuple(f"c{i}" for i in range(channels)), "arbitrary", size, **facts
    )


def contrasts(*names: str) -> dict[str, Any]:
    return {name: volume(name) for name in names}


def exams(known: dict[str, Modality], items: int = 3) -> Batch:
    """Made-up scans: 5 % of the voxels invalid, the last item without its last contrast."""
    g = torch.Generator().manual_seed(1)
    batch: Batch = {"id": [f"exam{i}" for i in range(items)]}
    for name, m in known.items():
        level = 2 * torch.randn(items, m.num_channels, *[1] * len(m.size), generator=g)
        batch[name] = 1 + level + torch.randn(items, m.num_channels, *m.size, generator=g)
        batch[f"{name}.valid"] = torch.rand(items, *m.size, generator=g) > 0.05
        batch[f"{name}.present"] = torch.ones(items, dtype=torch.bool)
    batch[f"{list(known)[-1]}.present"][-1] = False
    return batch


def refilled(batch: Batch, known: dict[str, Modality], filler: float) -> Batch:
    """Put other values where nothing was measured."""
    out = dict(batch)
    for name in known:
        counted = batch[f"{name}.valid"] & batch[f"{name}.present"].view(-1, 1, 1, 1)
        out[name] = torch.where(counted.unsqueeze(1), batch[name], filler)
    return out


def croma(**changes: Any) -> CROMA:
    known = {"pet": volume("pet"), "ct": volume("ct", 2)}
    roles = {"radar": "pet", "optical": "ct", "size": "tiny", "architecture": {"decoder_width": 48}}
    return CROMA(known, **{**roles, "context_size": SIZE, "patch_size": 4, **changes})


def decur(**changes: Any) -> DeCUR:
    sizes = EncoderSizes(width=24, depth=1, heads=2, patch_size=4)
    arguments = {"encoder": "transformer", "sizes": sizes, "projector": (16, 16)}
    return DeCUR(contrasts("t1", "flair"), **{**arguments, "context_size": SIZE, **changes})


METHODS = {"croma": croma, "decur": decur}


@pytest.fixture(params=METHODS)
def model(request: pytest.FixtureRequest) -> Objective:
    torch.manual_seed(0)
    found: Objective = METHODS[request.param]().eval()
    return found


def step(model: Objective, batch: Batch, outputs: bool = False) -> Step:
    draws = model.draw(batch, Generators(*(torch.Generator().manual_seed(i) for i in (1, 2))))
    found: Step = model(batch, draws, outputs)
    return found


def test_volumes_give_finite_losses_and_every_parameter_a_gradient(model: Objective) -> None:
    losses = step(model.train(), exams(model.backbone.modalities)).losses
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert total.isfinite()
    without = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not without


def test_losses_do_not_depend_on_what_was_not_measured(model: Objective) -> None:
    known = model.backbone.modalities
    batch = exams(known)
    with torch.no_grad():
        one, other = (step(model, refilled(batch, known, f)).losses for f in (0.0, -7e3))
    assert {n: x.item() for n, x in one.items()} == {n: x.item() for n, x in other.items()}


def test_features_name_the_grid_and_its_coordinates_in_order(model: Objective) -> None:
    known = model.backbone.modalities
    with torch.no_grad():
        features = model.backbone(exams(known))
    for name in known:
        assert features.grid[name] == (4, 2, 3)
        assert features.tokens[name].shape[:2] == (3, 24)
        assert features.coords[name][[1, 3, 6]].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
        assert not features.token_valid[list(known)[-1]][-1].any()


# -- distances and CROMA ------------------------------------------------------------------------


def backbone(kind: str, size: tuple[int, ...], patch: Any, **facts: Any) -> CROMABackbone:
    torch.manual_seed(0)
    known = {
        n: Modality(n, kind, ("a", "b"), "arbitrary", size, **facts)  # type: ignore[arg-type]
        for n in ("t1", "t2")
    }
    return CROMABackbone(
        known, "t1", "t2", width=32, depth=2, heads=4, patch_size=patch, normalization="identity"
    ).eval()


def sensor_bias(model: CROMABackbone, grid: tuple[int, ...]) -> Tensor:
    places = model.coordinates(grid, None) * model._proportions("t1")
    return DistanceBias(places, places, model.slopes).full(torch.float32)[0]


def test_distances_in_three_axes_are_those_of_a_table_made_by_hand() -> None:
    model = backbone("volume", (4, 2, 4), 2)  # cells at (0|1, 0, 0|1)
    root = 2**0.5
    table = torch.tensor([[0, 1, 1, root], [1, 0, root, 1], [1, root, 0, 1], [root, 1, 1, 0]])
    for bias, slope in zip(
        sensor_bias(model, (2, 1, 2)), (2**-2, 2**-4, 2**-6, 2**-8), strict=True
    ):
        torch.testing.assert_close(bias, -slope * table)


def test_thick_slices_are_as_far_apart_as_they_are_thick() -> None:
    for axes in itertools.permutations(range(3)):
        spacing = tuple((1.0, 1.0, 3.0)[axis] for axis in axes)
        model = backbone("volume", (4, 4, 4), 2, spacing_mm=spacing)
        own = sensor_bias(model, (2, 2, 2))[0] / -model.slopes[0]
        thick = 4 >> spacing.index(3.0)  # index of the neighbour along the thick axis
        near = [2 ** (2 - a) for a in range(3) if spacing[a] == 1.0]
        assert float(own[0, thick]) == 3.0
        assert [float(own[0, i]) for i in near] == [1.0, 1.0]
        assert float(own[0, 7]) == pytest.approx(11**0.5)


def test_one_slice_with_patches_of_depth_one_is_an_image() -> None:
    flat = backbone("image", (16, 8), 4)
    deep = backbone("volume", (16, 8, 1), (4, 4, 1), spacing_mm=(1.0, 1.0, 5.0))
    deep.load_state_dict(flat.state_dict())
    x = {n: torch.randn(2, 2, 16, 8) for n in ("t1", "t2")}
    with torch.no_grad():
        a, b = flat(x), deep({n: v.unsqueeze(-1) for n, v in x.items()})
    for name, tokens in a.tokens.items():
        torch.testing.assert_close(b.tokens[name], tokens, rtol=1e-5, atol=1e-6)
    assert a.grid["joint"] == (4, 2) and b.grid["joint"] == (4, 2, 1)


def test_turned_and_mirrored_volumes_give_turned_and_mirrored_tokens() -> None:
    one = backbone("volume", (4, 2, 3), 1, spacing_mm=(1.0, 1.0, 3.0))
    other = backbone("volume", (3, 2, 4), 1, spacing_mm=(3.0, 1.0, 1.0))
    other.load_state_dict(one.state_dict())
    x = {n: torch.randn(2, 2, 4, 2, 3) for n in ("t1", "t2")}
    with torch.no_grad():
        a = one.feature_maps(x)
        b = other.feature_maps({n: v.transpose(2, 4).flip(3) for n, v in x.items()})
    for name, found in a.items():
        torch.testing.assert_close(b[name], found.transpose(2, 4).flip(3), rtol=1e-4, atol=1e-5)


def test_scans_of_two_spacings_are_joined_where_they_show_the_same_place() -> None:
    torch.manual_seed(0)
    known = {
        "pet": volume("pet", size=(8, 4, 4), spacing_mm=(4.0, 4.0, 4.0)),
        "ct": volume("ct", size=(16, 8, 16), spacing_mm=(2.0, 2.0, 1.0)),
    }
    model = CROMABackbone(known, "pet", "ct", width=32, depth=2, heads=4, patch_size=4).eval()
    x = {n: torch.randn(1, 1, *m.size) for n, m in known.items()}
    with torch.no_grad():
        assert model(x).grid["joint"] == (2, 1, 1)
        with pytest.raises(DataError, match=r"covers \(32.0, 16.0, 16.0\) mm and 'ct' .* 8.0\) mm"):
            model({**x, "ct": torch.randn(1, 1, 16, 8, 8)})


def test_other_pairs_than_radar_and_optical_are_named_by_their_roles() -> None:
    with pytest.raises(ConfigError, match=r"have \['t1', 't2'\].*the one that asks"):
        CROMA(contrasts("t1", "t2"), size="tiny", context_size=SIZE, patch_size=4)
    small = {"t1": volume("t1"), "t2": volume("t2", size=(8, 8, 12))}
    with pytest.raises(ConfigError, match=r"one grid.*\(16, 8, 12\).*\(8, 8, 12\)"):
        CROMA(small, size="tiny", radar="t1", optical="t2", context_size=SIZE, patch_size=4)


def test_pictures_have_the_shape_of_the_scan() -> None:
    model = croma().eval()
    known = model.backbone.modalities
    shown = step(model, exams(known), outputs=True).outputs["reconstruction"]
    for name, modality in known.items():
        for picture in shown[name].values():
            assert picture.shape == (3, modality.num_channels, *SIZE)


# -- DeCUR and its siblings ---------------------------------------------------------------------


def test_crops_have_the_proportions_of_the_view() -> None:
    model = decur(views={"t1": {"crop_area": (0.3, 0.6)}, "flair": {"crop_area": (1.0, 1.0)}})
    draws = model.draw(exams(model.backbone.modalities, 64), Generators(*[torch.Generator()] * 2))
    for view in draws["t1"]:
        share = view.extent.prod(1)
        assert float(share.min()) > 0.29 and float(share.max()) < 0.61
        ratio = view.extent.max(1).values / view.extent.min(1).values
        assert float(ratio.max()) < 4 / 3 + 1e-5
    whole = draws["flair"][0].extent
    torch.testing.assert_close(whole, torch.ones_like(whole), rtol=0.35, atol=0)
