"""AnySat against numbers made by running the published code with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_files import FOLDER, IS_OURS, Golden, golden_files
from torch import Tensor

from domainssl.backbones.anysat.backbone import AnySatBackbone
from domainssl.backbones.anysat.encoder import parts_on_grid
from domainssl.backbones.anysat.sensors import SENSORS
from domainssl.backbones.base import Features
from domainssl.modality import Modality
from domainssl.nn.calendar import Calendar

FILES = golden_files("anysat")


def test_golden_files_exist() -> None:
    assert FILES or not IS_OURS, f"no anysat_*.safetensors in {FOLDER}"


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def _own(name: str) -> str:
    return name.replace("-", "_")


def build(golden: Golden, names: list[str], patch_m: float, dense: str = "") -> AnySatBackbone:
    """Read the weights of the file as those of the release are read."""
    c = golden.config
    widths = [width / c["embed_dim"] for width in c["mlp_in"]]
    assert c["mlp"] == [c["embed_dim"]]
    modalities = {
        _own(n): Modality(
            name=_own(n), kind=golden.facts["sensors"][n]["kind"],
            channels=SENSORS[_own(n)].bands, value_unit="arbitrary",
            gsd_m=golden.facts["sensors"][n]["gsd_m"],
        )
        for n in names
    }  # fmt: skip
    variant = {
        "architecture": {
            "width": c["embed_dim"], "depth": c["depth"], "heads": c["num_heads"],
            "ffn_ratio": c["mlp_ratio"], "series_heads": c["n_head"], "key_width": c["d_k"],
            "series_widths": widths,
        },
        # the days of the file are those of the published network
        "calendar": Calendar("1970-01-01"), "normalization": "identity",
        "patch_m": patch_m, "dense": _own(dense) or None,
    }  # fmt: skip
    state = {"state_dict": golden.below("state/")}
    made, report = AnySatBackbone.from_reference(state, variant, modalities)
    assert not report.missing
    assert not [n for n in report.unexpected if not n.startswith("projector_")]
    return made.eval()


def batch(golden: Golden, case: dict[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name in case["modalities"]:
        prefix = f"input/{name}@{case['side_m']}"
        found[_own(name)] = golden[f"{prefix}/x"].float()
        if golden.has(f"{prefix}/dates"):
            found[f"{_own(name)}.dates"] = golden[f"{prefix}/dates"]
        if name in case["masked"]:
            found[f"{_own(name)}.valid"] = golden[f"mask/{case['label']}/{name}"]
    return found


def published(features: Features, backbone: AnySatBackbone, case: dict[str, Any]) -> Tensor:
    """Return features in the layout of the published output."""
    tokens, (rows, columns) = features.tokens["joint"], features.grid["joint"]
    if case["output"] == "tile":
        return features.pooled["joint"]
    if case["output"] == "patch":
        return tokens.unflatten(1, (rows, columns))
    if case["output"] == "all":
        return torch.cat([features.cls["joint"].unsqueeze(1), tokens], 1)
    # the published map lays the parts of a patch as one raster, in which they are not ordered
    cells, per_cell = backbone._division(str(backbone.dense))
    side, height, width = cells * per_cell, *features.grid["dense"]
    places = torch.arange(height * width).view(1, height, width, 1)
    cut = places.view(1, rows, side, columns, side).transpose(2, 3).reshape(1, -1, side**2, 1)
    laid = parts_on_grid(cut, (rows, columns), cells, per_cell).flatten()
    out = torch.empty_like(features.tokens["dense"])
    out[:, laid] = features.tokens["dense"]
    return out.unflatten(1, (height, width))


def test_features_of_all_outputs_are_the_published_ones(golden: Golden) -> None:
    for case in golden.facts["cases"]:
        made = build(golden, case["modalities"], case["patch_m"], case["output_modality"])
        with torch.no_grad():
            ours = published(made(batch(golden, case)), made, case)
        theirs = golden[f"output/{case['label']}"]
        assert ours.shape == theirs.shape, case["label"]
        worst = float((ours - theirs).abs().max())
        assert worst <= golden.facts["tolerance"], f"{case['label']}: {worst:.2e}"


def test_weights_go_back_under_the_released_names(golden: Golden) -> None:
    named = golden.facts["sensors"]
    made = build(golden, list(named), 60.0)
    state, written = golden.below("state/"), made.to_reference()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())


def test_sensors_are_those_of_the_published_configuration(golden: Golden) -> None:
    assert {_own(name) for name in golden.facts["sensors"]} == {*SENSORS}
    for name, facts in golden.facts["sensors"].items():
        sensor = SENSORS[_own(name)]
        assert (len(sensor.bands), sensor.kind, sensor.gsd_m) == (
            facts["bands"], facts["kind"], facts["gsd_m"],
        )  # fmt: skip
        if sensor.kind == "image":
            assert sensor.part_px == facts["part_px"]
        else:
            assert sensor.calendar_length == facts["calendar_length"]
            assert sensor.input_norm == facts["input_norm"]
            assert sensor.whole or facts["reduce_scale"] == round(sensor.gsd_m / 10)
