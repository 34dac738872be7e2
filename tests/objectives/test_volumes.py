"""Methods that began with images, on volumes and contrasts: what stays true in three axes."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from grouped import grouped
from torch import Tensor

from domainssl import export_backbone, load_backbone
from domainssl.backbones.croma import CROMABackbone
from domainssl.backbones.maestro.backbone import MAESTROBackbone
from domainssl.backbones.omnisat import OmniSatBackbone
from domainssl.errors import ConfigError, DataError
from domainssl.modality import Batch, Modality
from domainssl.nn.alibi import DistanceBias
from domainssl.nn.metric_positions import metric_positions
from domainssl.objectives.barlow_twins import BarlowTwins
from domainssl.objectives.base import Generators, Objective
from domainssl.objectives.clip import CLIP
from domainssl.objectives.croma import CROMA
from domainssl.objectives.decur import DeCUR
from domainssl.objectives.joint_embedding import EncoderSizes
from domainssl.objectives.maestro import MAESTRO, MAESTROArchitecture
from domainssl.objectives.omnisat import OmniSat
from domainssl.objectives.simclr import SimCLR
from domainssl.objectives.vicreg import VICReg
from domainssl.training.module import Step

SIZE, SPACING = (16, 8, 12), (1.0, 1.0, 2.5)  # no cube, thick slices


def over_time(*names: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"spacing_mm": SPACING, "mean": (0,), "std": (1,)}
    return {
        n: Modality(
            name=n, kind="series", channels=("c0",), value_unit="arbitrary", size=SIZE, **facts
        )
        for n in names
    }


def volume(name: str, channels: int = 1, size: tuple[int, ...] = SIZE, **facts: Any) -> Modality:
    facts = {"spacing_mm": SPACING, "mean": (1.0,) * channels, "std": (2.0,) * channels, **facts}
    return Modality(
        name=name,
        kind="volume",
        channels=tuple(f"c{i}" for i in range(channels)),
        value_unit="arbitrary",
        size=size,
        **facts,
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
    return CROMA(
        known, **grouped(**{**roles, "context_size": SIZE, "patch_size": (4, 4, 2), **changes})
    )


def decur(cls: Any = DeCUR, **changes: Any) -> Objective:
    sizes = EncoderSizes(width=24, depth=1, heads=2, patch_size=(4, 4, 2))
    arguments = {"encoder": "transformer", "sizes": sizes, "projector": (16, 16)}
    arguments |= {"context_size": SIZE, **changes}
    model: Objective = cls(contrasts("t1", "flair"), **grouped(**arguments))
    return model


def maestro(known: dict[str, Modality] | None = None, **changes: Any) -> MAESTRO:
    """Two contrasts in one sequence, the second in two dates, and one of its own."""
    if known is None:
        known = {**contrasts("t1", "t1c"), "flair": volume("flair", 2)}
    inputs = {
        "t1": {"patch_size": 4, "group": "t1"},
        "t1c": {"patch_size": (4, 4, 2), "group": "t1"},
        "flair": {"patch_size": 4, "token_bands": [["c1"], ["c0"]]},
    }
    arguments = {"architecture": MAESTRO_SIZES, "shared_depth": 1, "normalization": "zscore"}
    return MAESTRO(
        known, **grouped(inputs={n: inputs[n] for n in known}, **{**arguments, **changes})
    )


MAESTRO_SIZES = MAESTROArchitecture(
    width=32, depth=2, heads=2, head_dim=8, ffn_ratio=2, decoder_width=24, decoder_depth=1,
    decoder_heads=2, decoder_head_dim=8,
)  # fmt: skip
SIBLINGS = {cls.__name__: partial(decur, cls) for cls in (BarlowTwins, CLIP, SimCLR, VICReg)}


def omnisat(**changes: Any) -> OmniSat:
    """Two contrasts of one spacing and one of half of it through slices."""
    known = {"t1": volume("t1"), "flair": volume("flair", 2)}
    known["t1c"] = volume("t1c", size=(16, 8, 24), spacing_mm=(1.0, 1.0, 1.25))
    sides = {"t1": 4, "flair": 4, "t1c": (4, 4, 8)}
    return OmniSat(known, **grouped(size="tiny", patch_size=sides, **changes))


METHODS = {"croma": croma, "decur": decur, "maestro": maestro, "omnisat": omnisat, **SIBLINGS}


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


def test_an_exported_backbone_returns_the_same_features(model: Objective, tmp_path: Path) -> None:
    batch = exams(model.backbone.modalities)
    export_backbone(model.backbone, tmp_path / "out")
    again = load_backbone(tmp_path / "out")
    with torch.no_grad():
        one, other = model.backbone(batch), again.eval()(batch)
    for name, tokens in one.tokens.items():
        assert torch.equal(other.tokens[name], tokens)


def test_features_name_the_grid_and_its_coordinates_in_order(model: Objective) -> None:
    known = model.backbone.modalities
    with torch.no_grad():
        features = model.backbone(exams(known))
    first = next(iter(known))
    x, y, z = features.grid[first]
    assert (x, y) == (4, 2) and z in (3, 6)
    assert features.tokens[first].shape[:2] == (3, x * y * z)
    assert features.coords[first][[1, z, y * z]].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    for name in known:
        assert features.tokens[name].shape[1] == math.prod(features.grid[name])
    assert not features.token_valid[list(known)[-1]][-1].any()


@pytest.mark.parametrize("method", ["croma", "maestro", "omnisat"])
def test_pictures_show_the_scan_with_hidden_voxels_missing(method: str) -> None:
    model = METHODS[method]().eval()
    known = model.backbone.modalities
    batch = exams(known)
    shown = step(model, batch, outputs=True).outputs["reconstruction"]
    x = model.backbone.normalize(batch)
    for name, pictures in shown.items():
        torch.testing.assert_close(pictures["input"], x[name])
        seen = pictures["visible"].isfinite()
        assert torch.equal(pictures["visible"][seen], x[name][seen])
        assert pictures["predicted"].isfinite().all() and not seen[:2].all()


# -- distances and CROMA ------------------------------------------------------------------------


def backbone(kind: str, size: tuple[int, ...], patch: Any, **facts: Any) -> CROMABackbone:
    torch.manual_seed(0)
    known = {
        n: Modality(
            name=n, kind=kind, channels=("a", "b"), value_unit="arbitrary", size=size, **facts
        )  # type: ignore[arg-type]
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
        CROMA(contrasts("t1", "t2"), **grouped(size="tiny", context_size=SIZE, patch_size=4))
    small = {"t1": volume("t1"), "t2": volume("t2", size=(8, 8, 12))}
    with pytest.raises(ConfigError, match=r"one grid.*\(16, 8, 12\).*\(8, 8, 12\)"):
        CROMA(
            small, **grouped(size="tiny", radar="t1", optical="t2", context_size=SIZE, patch_size=4)
        )


# -- MAESTRO -----------------------------------------------------------------------------------


def test_positions_of_volumes_are_means_over_cells_of_a_millimetre() -> None:
    table = metric_positions((2, 1, 1), (4, 2, 6), 24).view(2, 24)
    waves = torch.tensor([1.0, 1e-4])  # two per axis: (24 - 8) // 6
    for patch, cells in enumerate(([0.0, 1.0], [2.0, 3.0])):
        code = []
        for at in (range(6), range(2), cells):  # z, y, x
            phase = torch.tensor([float(a) for a in at]).unsqueeze(1) * waves
            code += [phase.sin().mean(0), phase.cos().mean(0)]
        expected = torch.cat([*code, torch.zeros(12)])
        torch.testing.assert_close(table[patch], expected)


def test_one_place_has_one_position_in_scans_of_different_spacing() -> None:
    known = {"t1": volume("t1", size=(16, 8, 8), spacing_mm=(1.0, 1.0, 3.0))}
    known["t1c"] = volume("t1c", size=(16, 8, 12), spacing_mm=(1.0, 1.0, 2.0))
    model = maestro(known, position_cells=None).eval().backbone
    rasters = model.prepare(model.normalize(exams(known)))
    assert [rasters[n].cells for n in known] == [(16, 8, 24), (16, 8, 24)]
    assert [rasters[n].grid for n in known] == [(4, 2, 2), (4, 2, 6)]
    fine, coarse = (
        model.codes(rasters[n], 32)[0].unflatten(0, rasters[n].grid) for n in ("t1c", "t1")
    )
    torch.testing.assert_close(fine.unflatten(2, (2, 3)).mean(3), coarse)  # three make one
    half = maestro(known, position_cells=8).backbone  # 2 mm each, along 24 mm in z
    assert half._cells("t1", (4, 2, 2), (16, 8, 8)) == (5, 3, 8)


def test_one_slice_with_flat_patches_has_the_tokens_of_an_image() -> None:
    image = Modality(
        name="t1", kind="image", channels=("a", "b"), value_unit="arbitrary", size=(8, 12)
    )
    slab = Modality(
        name="t1", kind="volume", channels=("a", "b"), value_unit="arbitrary", size=(8, 12, 1)
    )
    sizes = {"width": 24, "depth": 1, "heads": 2, "shared_depth": 0}
    flat = MAESTROBackbone({"t1": image}, {"t1": {"patch_size": 4}}, **sizes)
    deep = MAESTROBackbone({"t1": slab}, {"t1": {"patch_size": (4, 4, 1)}}, **sizes)
    state = {
        n: t.unsqueeze(-1) if n.endswith("conv.weight") else t for n, t in flat.state_dict().items()
    }
    deep.load_state_dict(state)
    x = torch.randn(2, 2, 8, 12)
    one, other = flat.prepare({"t1": x}), deep.prepare({"t1": x.unsqueeze(-1)})
    a, b = flat.embed_patches(one)["t1"], deep.embed_patches(other)["t1"]
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_hidden_tokens_cover_the_voxels_that_are_compared() -> None:
    model = maestro().eval()
    known = model.backbone.modalities
    batch = exams(known)
    rasters = model.backbone.prepare(model.backbone.normalize(batch))
    raster = rasters["t1c"]
    hidden = torch.zeros(3, 4 * 2 * 6, dtype=torch.bool)
    hidden[:, 7] = True  # (0, 1, 1): voxels 0-3, 4-7, 2-3
    patches, _ = model.patches(raster, "t1c")
    where = model.counted(hidden, raster, "t1c").expand_as(patches)
    found = patches[where].view(3, 4, 4, 2)
    assert torch.equal(found, raster.values[:, 0, 0, 0:4, 4:8, 2:4])


def test_exams_over_time_are_dates_of_a_series_of_volumes() -> None:
    known: dict[str, Any] = {
        n: Modality(
            name=n,
            kind="series",
            channels=("c0",),
            value_unit="arbitrary",
            size=SIZE,
            spacing_mm=SPACING,
            mean=(0,),
            std=(1,),
        )
        for n in ("t1", "t1c")
    }
    assert known["t1"].axes == "B T C X Y Z"
    g = torch.Generator().manual_seed(0)
    batch: Batch = {"id": ["a", "b"]}
    for name in known:
        batch[name] = torch.randn(2, 3, 1, *SIZE, generator=g)
        batch[f"{name}.valid"] = torch.rand(2, 3, *SIZE, generator=g) > 0.05
        batch[f"{name}.dates"] = torch.tensor([[18000, 18100, 18200]] * 2, dtype=torch.int32)
        batch[f"{name}.frames"] = torch.tensor([[True, True, True], [True, True, False]])
    model = maestro(known).eval()
    losses = []
    for filler in (0.0, 1e4):
        given = dict(batch)
        for name in known:
            counted = batch[f"{name}.valid"] & batch[f"{name}.frames"].view(2, 3, 1, 1, 1)
            given[name] = torch.where(counted.unsqueeze(2), batch[name], filler)
        losses.append({n: x.item() for n, x in step(model, given).losses.items()})
    assert losses[0] == losses[1]
    with torch.no_grad():
        assert model.backbone(batch).grid["t1c"] == (3, 4, 2, 6)
        assert model.backbone.feature_maps(batch)["t1c"].shape == (2, 32, 4, 2, 6)


def test_maestro_refuses_images_beside_volumes_and_widths_without_room_for_three_axes() -> None:
    known = {
        "t1": volume("t1"),
        "t1c": Modality(name="t1c", kind="image", channels=("r",), value_unit="rgb8", size=(8, 8)),
    }
    with pytest.raises(ConfigError, match="share no footprint"):
        maestro(known, normalization="identity")
    with pytest.raises(ConfigError, match="width 16 must be a multiple of 4 and at least 20"):
        MAESTROBackbone({"t1": volume("t1")}, {"t1": {"patch_size": 4}}, width=16)
    with pytest.raises(
        ConfigError, match=r"t1.patch_size: got \[4, 4\], expected one number, or 3"
    ):
        MAESTROBackbone({"t1": volume("t1")}, {"t1": {"patch_size": (4, 4)}}, width=24)


# -- OmniSat -----------------------------------------------------------------------------------


def test_one_slice_with_flat_patches_is_fused_like_an_image() -> None:
    torch.manual_seed(0)
    known = {
        n: Modality(name=n, kind="image", channels=("a",), value_unit="arbitrary", size=(12, 8))
        for n in ("t1", "t2")
    }
    slabs = {
        n: Modality(name=n, kind="volume", channels=("a",), value_unit="arbitrary", size=(12, 8, 1))
        for n in known
    }
    fusion = {"depth": 1, "heads": 2}
    sizes = {"width": 16, "fusion": fusion, "normalization": "identity"}
    flat = OmniSatBackbone(known, dict.fromkeys(known, 4), (3, 2), **sizes).eval()
    deep = OmniSatBackbone(slabs, dict.fromkeys(known, (4, 4, 1)), (3, 2, 1), **sizes).eval()
    for parameter in flat.parameters():  # relative tables and queries begin at zero
        parameter.data = torch.randn(parameter.shape) * 0.2
    state = deep.state_dict()
    assert list(state) == list(flat.state_dict())
    for name, tensor in flat.state_dict().items():
        target = state[name][..., 1] if state[name].ndim > tensor.ndim else state[name]
        target.copy_(tensor)
    x = {n: torch.randn(2, 1, 12, 8) for n in known}
    with torch.no_grad():
        a, b = flat(x), deep({n: v.unsqueeze(-1) for n, v in x.items()})
    for name, tokens in a.tokens.items():
        torch.testing.assert_close(b.tokens[name], tokens, rtol=1e-4, atol=1e-5)


def test_exams_over_time_are_attended_to_by_their_dates() -> None:
    known = {
        n: Modality(
            name=n,
            kind="series",
            channels=("c0",),
            value_unit="arbitrary",
            size=SIZE,
            spacing_mm=SPACING,
            mean=(0,),
            std=(1,),
        )
        for n in ("t1", "t1c")
    }
    sides = dict.fromkeys(known, 4)
    model = OmniSat(known, **grouped(size="tiny", patch_size=sides)).eval()
    g = torch.Generator().manual_seed(0)
    batch: Batch = {"id": ["a", "b"]}
    for name in known:
        batch[name] = torch.randn(2, 3, 1, *SIZE, generator=g)
        batch[f"{name}.dates"] = torch.tensor([[18000, 18100, 18200]] * 2, dtype=torch.int32)
        batch[f"{name}.frames"] = torch.tensor([[True, True, True], [True, True, False]])
    other = {**batch, "t1.dates": batch["t1.dates"] + torch.tensor([0, 40, 0])}
    with torch.no_grad():
        losses = step(model, batch).losses
        a, b = model.backbone(batch), model.backbone(other)
    assert all(x.isfinite() for x in losses.values())
    assert a.grid["joint"] == (4, 2, 3) and a.tokens["t1"].shape == (2, 24, 32)
    assert not torch.equal(a.tokens["t1"], b.tokens["t1"])
    for name in known:  # a filler frame is not seen
        batch[name][1, 2] = 1e4
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(batch).tokens["joint"], a.tokens["joint"])


def test_omnisat_takes_the_side_of_a_patch_in_millimetres() -> None:
    size, spacing = (32, 16, 8), (1.0, 1.0, 4.0)
    known = {n: volume(n, size=size, spacing_mm=spacing) for n in ("t1", "t1c")}
    model = OmniSat(known, **grouped(size="tiny"))
    assert model.backbone.patch_of("t1") == (16, 16, 4) and model.backbone.grid == (2, 1, 2)
    with pytest.raises(ConfigError, match=r"patch_mm: 10 mm are 10 x 2.5 pixels of 't1'"):
        OmniSat(known, **grouped(size="tiny", patch_mm=10.0))
    with pytest.raises(ConfigError, match="sides in the proportions"):
        other = {**known, "t1c": volume("t1c", size=size, spacing_mm=(1.0, 1.0, 2.0))}
        sides = {"t1": 8, "t1c": 8}
        OmniSat(other, **grouped(size="tiny", patch_size=sides, grid=(4, 2, 1)))
    with pytest.raises(ConfigError, match="'legacy' lays tokens on a square"):
        OmniSat(known, **grouped(size="tiny", reference=True))
    image = Modality(
        name="t1c", kind="image", channels=("r",), value_unit="rgb8", size=(8, 8), gsd_m=1.0
    )
    with pytest.raises(ConfigError, match="share no footprint"):
        OmniSatBackbone(
            {"t1": known["t1"], "t1c": image}, {"t1": 4, "t1c": 4}, (2, 2), normalization="identity"
        )


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
