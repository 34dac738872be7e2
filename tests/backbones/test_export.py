"""Export and load: bit-equal features, and refusal of everything that does not fit."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyBackbone, tiny_modalities

from domainssl import export_backbone, list_backbones, load_backbone
from domainssl.backbones.card import ExportError
from domainssl.backbones.croma import PUBLISHED_MODALITIES, CROMABackbone
from domainssl.backbones.encoders.backbone import EncoderBackbone
from domainssl.backbones.encoders.files import published_modality
from domainssl.backbones.pretrained import PRETRAINED
from domainssl.backbones.registry import backbone_class
from domainssl.backbones.tile_encoders import TILE_ENCODERS
from domainssl.errors import DataError, WeightsError
from domainssl.modality import Modality

SIZES = {"width": 32, "depth": 2, "heads": 4}


@pytest.fixture
def backbone() -> CROMABackbone:
    torch.manual_seed(0)
    return CROMABackbone(dict(PUBLISHED_MODALITIES), **SIZES).eval()


def _batch() -> dict[str, torch.Tensor]:
    return {"s1": torch.randn(2, 2, 16, 16) - 12, "s2": torch.randn(2, 12, 16, 16) * 900 + 1500}


def test_features_are_bit_equal_after_export_and_load(
    backbone: CROMABackbone, tmp_path: Path
) -> None:
    backbone.normalizer.get_buffer("mean_s1").fill_(-11.123456789)
    export_backbone(backbone, tmp_path / "out", provenance={"objective": "CROMA"})
    batch = _batch()
    for path in ("", "backbone.json", "backbone.safetensors"):
        loaded = load_backbone(tmp_path / "out" / path)
        with torch.no_grad():
            a, b = backbone(batch), loaded(batch)
        for name in ("s1", "s2", "joint"):
            assert torch.equal(a.tokens[name], b.tokens[name])
            assert torch.equal(a.pooled[name], b.pooled[name])


def test_the_card_says_what_goes_in(backbone: CROMABackbone, tmp_path: Path) -> None:
    card = json.loads(export_backbone(backbone, tmp_path, licence="MIT").read_text())
    assert card["modalities"]["s2"]["channels"][8:10] == ["B8A", "B09"]
    assert card["modalities"]["s2"]["value_unit"] == "dn"
    assert card["normalization"] == {"s1": "mean2std", "s2": "mean2std"}
    assert card["licence"] == "MIT"
    assert card["embed_dim"] == {"s1": 32, "s2": 32, "joint": 32}


def test_an_export_is_not_overwritten_unless_asked(backbone: CROMABackbone, tmp_path: Path) -> None:
    export_backbone(backbone, tmp_path)
    with pytest.raises(WeightsError, match="--overwrite"):
        export_backbone(backbone, tmp_path)
    export_backbone(backbone, tmp_path, overwrite=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": [*PUBLISHED_MODALITIES["s2"].channels[:-1]]}, "11 bands.*expect 12 in the"),
        ({"channels": [*PUBLISHED_MODALITIES["s2"].channels[::-1]]}, "another order"),
        ({"value_unit": "reflectance"}, "'reflectance', the weights expect 'dn'"),
        ({"kind": "series"}, "kind is 'series'"),
    ],
)
def test_data_that_do_not_fit_are_refused_with_the_reason(
    backbone: CROMABackbone, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    export_backbone(backbone, tmp_path)
    facts = {**PUBLISHED_MODALITIES["s2"].to_dict(), "mean": None, "std": None, **change}
    with pytest.raises(WeightsError, match=message):
        load_backbone(tmp_path, modalities={"s2": facts})


def test_a_batch_with_a_wrong_band_count_is_refused(backbone: CROMABackbone) -> None:
    with pytest.raises(DataError, match=r"batch.s2.*\(2, 13, 16, 16\).*C=12.*B8A B09 B11"):
        backbone({"s2": torch.zeros(2, 13, 16, 16)})


def test_a_batch_without_any_modality_is_refused(backbone: CROMABackbone) -> None:
    with pytest.raises(DataError, match=r"\['s1', 's2'\].*\['sar'\]"):
        backbone({"sar": torch.zeros(2, 2, 16, 16)})


def test_changed_tensors_are_noticed(backbone: CROMABackbone, tmp_path: Path) -> None:
    export_backbone(backbone, tmp_path)
    path = tmp_path / "backbone.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(WeightsError, match="damaged or of another export"):
        load_backbone(tmp_path)


def test_a_pickled_file_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "executed").touch, ())

    path = tmp_path / "weights.pt"
    torch.save({"state_dict": Trap()}, path)
    with pytest.raises(WeightsError, match="holds pickled objects"):
        load_backbone("croma_base", weights=path)
    assert not (tmp_path / "executed").exists()


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(WeightsError, match="Did you mean 'croma_base'"):
        load_backbone("croma_bas")
    assert list_backbones("croma_*") == ["croma_base", "croma_large", "croma_tiny"]


def test_a_name_alone_is_no_silent_untrained_backbone() -> None:
    with pytest.raises(WeightsError, match="weights='random'"):
        load_backbone("croma_base")


def test_a_failed_export_leaves_no_file_taken_for_a_whole_one(
    backbone: CROMABackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export_backbone(backbone, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failed_export_leaves_the_earlier_one_as_it_was(
    backbone: CROMABackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    export_backbone(backbone, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with torch.no_grad():
        next(backbone.parameters()).add_(1.0)
    with pytest.raises(ExportError, match=r"was not exported.*No space left.*an earlier export"):
        export_backbone(backbone, tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_values_that_are_not_finite_count_as_invalid(backbone: CROMABackbone) -> None:
    batch = _batch()
    spoilt = {**batch, "s2": batch["s2"].clone()}
    spoilt["s2"][0, :, :4, :4] = float("nan")
    valid = torch.ones(2, 16, 16, dtype=torch.bool)
    valid[0, :4, :4] = False
    with torch.no_grad():
        expected = backbone({**batch, "s2.valid": valid}).pooled["joint"]
        assert torch.equal(backbone(spoilt).pooled["joint"], expected)


def test_sensors_of_different_footprints_are_refused(backbone: CROMABackbone) -> None:
    batch = {**_batch(), "s2": torch.zeros(2, 12, 32, 32)}
    with pytest.raises(DataError, match=r"160.0, 160.0.*320.0, 320.0.*one footprint"):
        backbone(batch)


def test_a_bare_tensor_is_refused_with_the_form_that_is_taken(backbone: CROMABackbone) -> None:
    with pytest.raises(DataError, match=r"\{'s1': x\}; got Tensor"):
        backbone(torch.zeros(2, 12, 16, 16))  # type: ignore[arg-type]


def test_the_folder_of_a_run_leads_to_its_export(backbone: CROMABackbone, tmp_path: Path) -> None:
    export_backbone(backbone, tmp_path / "backbone")
    assert type(load_backbone(tmp_path)) is CROMABackbone


def test_cards_name_the_class_with_its_module_and_old_ones_still_load(tmp_path):
    backbone = TinyBackbone(tiny_modalities())
    export_backbone(backbone, tmp_path / "new")
    path = tmp_path / "new" / "backbone.json"
    card = json.loads(path.read_text())
    assert card["name"] == "tiny.TinyBackbone"
    path.write_text(json.dumps({**card, "name": "TinyBackbone"}))
    torch.testing.assert_close(load_backbone(tmp_path / "new").state_dict(), backbone.state_dict())


def test_a_bare_name_of_two_classes_is_refused_with_both():
    twins = [type("Twin", (TinyBackbone,), {"__module__": module}) for module in ("one", "two")]
    with pytest.raises(WeightsError, match=r"'Twin' may be any of one\.Twin, two\.Twin"):
        backbone_class("Twin")
    assert backbone_class("two.Twin") is twins[1]


def test_a_class_of_ours_is_found_after_its_file_moved():
    assert backbone_class("domainssl.backbones.elsewhere.CROMABackbone").__module__ == (
        "domainssl.backbones.croma"
    )
    with pytest.raises(WeightsError, match="Unknown backbone class 'other.CROMABackbone'"):
        backbone_class("other.CROMABackbone")


def test_published_weights_are_listed_with_what_is_known_of_them() -> None:
    every = list_backbones(pretrained=True)
    tags = [found.tag for found in every]
    assert tags == sorted(set(tags)) and {found.backbone for found in every} <= set(
        list_backbones()
    )
    base, mirror = list_backbones("croma_base.*", pretrained=True)
    assert (base.tag, base.file, base.licence) == ("croma_base.ssl4eo", "CROMA_base.pt", "MIT")
    assert base.units == {"s1": "db", "s2": "dn"}
    assert base.sha256 is not None and base.sha256[:8] in str(mirror.file)  # as torchgeo names it
    assert base.address == f"hf://antofuller/CROMA/CROMA_base.pt@{base.revision}"
    assert base.bands["s1"] == ("VV", "VH") and len(base.bands["s2"]) == 12
    for found in every:  # what the loader assumes of such a file is what the list says
        for name, bands in found.bands.items():
            known = None if name == "ct" else published_modality(len(bands))
            assert known is None or (known.channels, known.value_unit) == (bands, found.units[name])
        assert found.revision is None or re.fullmatch("[0-9a-f]{40}", found.revision)
        assert found.sha256 is None or re.fullmatch("[0-9a-f]{64}", found.sha256)


def test_every_architecture_with_published_weights_has_a_record() -> None:
    named = {found.backbone for found in list_backbones(pretrained=True)}
    without = {
        "beit_base",
        "croma_tiny",
        "omnisat_tiny",
        "titan_tiny",
        "vit_tiny",
    }  # of this library alone
    without |= {"maestro_tiny", "maestro_small", "maestro_large"}  # sizes of the paper, no weights
    without |= {"anysat_tiny", "anysat_small"}  # announced, not released
    without |= {"csip_resnet18"}  # the authors name no file
    without |= {"less_small", "less_base"}  # no weights released
    without |= {"resenc_l"}  # reads checkpoints of nnssl; where published ones lie is not recorded
    without |= {"swin_unetr_standard"}  # files written with MONAI 1.5 and later
    assert set(list_backbones()) - named == without
    assert {*TILE_ENCODERS, "titan"} <= named


def weights_table() -> str:
    """Return all records as the Markdown table of docs/weights.md; a dash is not known."""
    lines = [
        "| tag | method | where | file | revision | sha256 | licence | bands and unit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in PRETRAINED.values():
        bands = "; ".join(
            f"{name}: {' '.join(names)}" + (f" ({row.units[name]})" if name in row.units else "")
            for name, names in row.bands.items()
        )
        where = row.repository or "-"
        if "://" in where:
            where = f"[{where.split('/')[3]}/{where.split('/')[4]}]({where})"
        cells = (
            f"`{row.tag}`", row.method, where, row.file or "-", (row.revision or "-")[:12],
            (row.sha256 or "-")[:12], row.licence or "-", bands or "-",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_page_of_weights_is_made_from_the_records() -> None:
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
    assert weights_table() in page, "print(weights_table()) of this file"


def test_all_published_backbones_of_earth_observation_name_what_proves_their_features() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "weights.md").read_text(encoding="utf-8")
    section = page.split("## Proof of the features")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    proven = {name for row in rows for name in re.findall(r"`([a-z0-9_]+)`", row[1])}
    others = {"he", "ct", "scan", "t1", "ihc", "rgb"}  # pathology, medicine, photographs
    tags = [w for w in list_backbones(pretrained=True) if not others & set(w.bands)]
    assert {w.backbone for w in tags} - {"titan"} == proven
    for row in rows:
        names = re.findall(r"`([a-z0-9_]+)`", row[1])
        assert set(row[4].strip().split(", ")) == {
            w.licence or "not stated" for w in tags if w.backbone in names
        }, row[1]
        tests = re.findall(r"`(tests/[^`:]+)::(\w+)`", row[6])
        assert tests or "layout only" in row[5], row[1]
        for file, name in tests:
            assert f"def {name}(" in (root / file).read_text(encoding="utf-8"), (file, name)


def test_a_tag_brings_the_arguments_that_its_file_does_not_tell(tmp_path: Path) -> None:
    bands = tuple(f"SR_B{i}" for i in range(1, 8))
    landsat = {"landsat": Modality(
        name="landsat", kind="image", channels=bands, value_unit="arbitrary",
    )}  # fmt: skip
    encoder = EncoderBackbone(landsat, "resnet18", normalization="identity")
    torch.save(encoder.to_reference("landsat"), tmp_path / "resnet18.pth")
    asked: dict[str, Any] = {"weights": tmp_path / "resnet18.pth", "modalities": landsat}
    loaded = load_backbone("ssl4eo_resnet18.landsat_oli_sr_moco", **asked)
    assert str(loaded.normalizer.forms["landsat"]) == "scale(255)"
    turned = dataclasses.replace(landsat["landsat"], channels=bands[::-1])
    with pytest.raises(WeightsError, match=r"the same bands in another order.*_oli_sr_moco' are"):
        load_backbone(
            "ssl4eo_resnet18.landsat_oli_sr_moco", **{**asked, "modalities": {"landsat": turned}}
        )
    own = {"normalization": "scale(10000)"}
    loaded = load_backbone("ssl4eo_resnet18.landsat_oli_sr_moco", **asked, arguments=own)
    assert str(loaded.normalizer.forms["landsat"]) == "scale(10000)"


def test_a_tag_without_its_file_says_where_to_get_it() -> None:
    with pytest.raises(
        WeightsError, match="CROMA_base.pt from antofuller/CROMA .licence MIT.* hf://antofuller"
    ):
        load_backbone("croma_base.ssl4eo")
    with pytest.raises(WeightsError, match="Did you mean 'croma_base.ssl4eo'"):
        load_backbone("croma_base.ssl4e")
    with pytest.raises(WeightsError, match="Published weights: croma_large.ssl4eo, croma_large"):
        load_backbone("croma_large")
    with pytest.raises(WeightsError, match="no/such.pt does not exist"):
        load_backbone("croma_base.ssl4eo", weights="no/such.pt")
