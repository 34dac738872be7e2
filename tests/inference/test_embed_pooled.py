"""One vector per exam, slide and bag: the mean over what was seen, in one table."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bag_files
import numpy as np
import pytest
import torch
from dicom_files import write_series
from scan_files import write_nifti
from slide_files import write_ome, write_tiff

from domainssl.backbones.slide import TITANBackbone
from domainssl.backbones.vit import ViTBackbone
from domainssl.cli import main
from domainssl.errors import ConfigError, DataError
from domainssl.inference.run import embed
from domainssl.inference.volume_maps import find_volumes, scans_for
from domainssl.io.ids import ids_of
from domainssl.modality import Modality
from domainssl.pieces import Plan

pandas = pytest.importorskip("pandas")
SMALL = {"width": 12, "depth": 1, "heads": 2}
CT = Modality(
    name="ct", kind="volume", channels=("ct",), value_unit="hu", size=(8, 8, 8),
    mean=(40.0,), std=(300.0,),
)  # fmt: skip


def vectors(path: Path) -> dict[str, np.ndarray]:
    table = pandas.read_parquet(path)
    return {row.id: np.array(row.embedding) for row in table.itertuples()}


def test_an_exam_larger_than_a_window_is_the_mean_over_its_windows(
    tmp_path: Path, capsys: Any
) -> None:
    torch.manual_seed(0)
    backbone = ViTBackbone({"ct": CT}, SMALL, 4).eval()
    rng = np.random.default_rng(0)
    (tmp_path / "scans").mkdir()
    values = rng.normal(0, 300, (8, 8, 12)).astype(np.float32)
    for name, own in (("a", values), ("b", values[..., :8])):
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", own, np.eye(4))
    done = embed(backbone, tmp_path / "scans", tmp_path / "ct.parquet", pooled=True, ids="plain")
    assert done.pieces == 2 and done.outputs == [tmp_path / "ct.parquet"]
    found = vectors(tmp_path / "ct.parquet")
    x = torch.from_numpy(values)[None, None]
    with torch.no_grad():
        first = backbone({"ct": x[..., :8]}).pooled["ct"][0]
        rest = torch.nn.functional.pad(x[..., 8:], (0, 4))
        valid = torch.nn.functional.pad(torch.ones(1, 8, 8, 4, dtype=torch.bool), (0, 4))
        second = backbone({"ct": rest, "ct.valid": valid}).pooled["ct"][0]
    np.testing.assert_allclose(found["b"], first, atol=1e-5)
    np.testing.assert_allclose(found["a"], (first + 0.5 * second) / 1.5, atol=1e-5)
    with pytest.raises(ConfigError, match="give a .parquet file"):
        embed(backbone, tmp_path / "scans", tmp_path / "out", pooled=True)


def test_a_call_that_ended_between_the_table_and_its_record_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from domainssl.inference import parted_table

    (tmp_path / "scans").mkdir()
    for name in "ab":
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", np.ones((8, 8, 8), np.int16), np.eye(4))
    backbone = ViTBackbone({"ct": CT}, SMALL, 4).eval()
    words = backbone, tmp_path / "scans", tmp_path / "ct.parquet"

    def ends(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parted_table, "write_items", ends)
        with pytest.raises(KeyboardInterrupt):
            embed(*words, pooled=True, ids="plain")
    assert (tmp_path / "ct.parquet").is_file() and not (tmp_path / "ct.parquet.json").exists()
    embed(*words, pooled=True, ids="plain")
    assert set(vectors(tmp_path / "ct.parquet")) == {"a", "b"}
    assert (tmp_path / "ct.parquet.json").is_file()
    (tmp_path / "ct.parquet").unlink()  # its record is there, so that it was taken for complete
    assert embed(*words, pooled=True, ids="plain").outputs == [tmp_path / "ct.parquet"]


def test_a_manifest_lists_exams_with_their_contrasts(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for name in ("x", "y"):
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", np.zeros((4, 4, 4), np.float32))
    table = tmp_path / "scans.csv"
    table.write_text("id,path\np1,scans/x.nii.gz\np2,scans/y.nii.gz\n")
    one = find_volumes(str(table), scans_for(ViTBackbone({"ct": CT}, SMALL, 4)))
    assert [(exam.id, Path(exam.scans["ct"]).name) for exam in one] == [
        ("p1", "x.nii.gz"), ("p2", "y.nii.gz"),
    ]  # fmt: skip
    table.write_text("id,t1,flair\np1,scans/x.nii.gz,scans/y.nii.gz\np2,scans/y.nii.gz,\n")
    mri = {
        name: Modality(
            **{**CT.to_dict(), "name": name, "value_unit": "arbitrary", "channels": ("m",)}
        )
        for name in ("t1", "flair")
    }
    two = find_volumes(str(table), scans_for(SimpleNamespace(modalities=mri)))
    assert [sorted(exam.scans) for exam in two] == [["flair", "t1"], ["t1"]]


@pytest.mark.parametrize("form", ["dicom", "nifti"])
def test_a_folder_with_a_scan_per_contrast_is_one_exam(tmp_path: Path, form: str) -> None:
    facts = {**CT.to_dict(), "value_unit": "arbitrary", "channels": ("m",)}
    mri = {name: Modality(**{**facts, "name": name}) for name in ("t1", "flair")}
    exam = tmp_path / "exam"
    exam.mkdir()
    for number, name in enumerate(mri):
        if form == "nifti":
            write_nifti(exam / f"{name}.nii.gz", np.zeros((4, 4, 4), np.float32))
            continue
        (exam / name).mkdir()
        write_series(exam / name, SeriesDescription=name, SeriesInstanceUID=f"1.2.{number}")
    [found] = find_volumes(str(exam), scans_for(SimpleNamespace(modalities=mri)))
    assert found.id == "exam" and sorted(found.scans) == ["flair", "t1"]
    for name, contrast in (("p1", "t1"), ("p2", "flair")):
        (tmp_path / "all" / name).mkdir(parents=True)
        write_nifti(tmp_path / "all" / name / f"{contrast}.nii.gz", np.zeros((4, 4, 4), np.float32))
    two = find_volumes(str(tmp_path / "all"), scans_for(SimpleNamespace(modalities=mri)))
    assert [one.id for one in two] == ["p1", "p2"]
    (tmp_path / "all" / "p2" / "flair.nii.gz").rename(tmp_path / "all" / "p2" / "t1.nii.gz")
    two = find_volumes(str(tmp_path / "all"), scans_for(SimpleNamespace(modalities=mri)))
    assert [sorted(one.scans) for one in two] == [["t1"], ["t1"]]  # no exam has the other contrast


def test_bags_become_a_vector_per_slide_by_a_slide_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    facts = Modality(
        name="tile_features", kind="features", channels=tuple(f"f{i}" for i in range(bag_files.D)),
        value_unit="arbitrary", mpp_um=0.5, mean=(20.0,) * bag_files.D, std=(20.0,) * bag_files.D,
    )  # fmt: skip
    backbone = TITANBackbone({"tile_features": facts}, width=16, depth=1, heads=2).eval()
    bag_files.trident(tmp_path / "job", "float32")
    embed(backbone, tmp_path / "job", tmp_path / "slides.parquet", dtype="int8",
          id_table=tmp_path / "ids.csv")  # fmt: skip
    table = pandas.read_parquet(tmp_path / "slides.parquet")
    [row] = table.itertuples()
    coords = np.array(bag_files.LATTICE)
    places = ((coords - coords.min(0)) / bag_files.SIZE).astype(np.float32)
    values = np.stack([bag_files.feature(*place) for place in bag_files.LATTICE])
    batch = {
        "tile_features": torch.from_numpy(values)[None],
        "tile_features.coords": torch.from_numpy(places[:, ::-1].copy())[None],
    }
    with torch.no_grad():
        wanted = backbone(batch).pooled["tile_features"][0].numpy()
    [(identity, path)] = pandas.read_csv(tmp_path / "ids.csv").itertuples(index=False)
    assert row.id == identity == ids_of(["slide"], "hashed")[0] and path.endswith("/slide.h5")
    assert (tmp_path / "ids.csv").stat().st_mode & 0o077 == 0
    embed(backbone, tmp_path / "job", tmp_path / "named.parquet", ids="plain")
    assert pandas.read_parquet(tmp_path / "named.parquet").id.tolist() == ["slide"]
    os.rename(path, tmp_path / f"{identity}.h5")  # as `tile` names bags
    embed(backbone, tmp_path / f"{identity}.h5", tmp_path / "same.parquet")
    assert pandas.read_parquet(tmp_path / "same.parquet").id.tolist() == [identity]
    assert np.abs(np.array(row.embedding) * row.scale - wanted).max() <= 0.51 * row.scale
    (tmp_path / "slides.csv").write_text(f"id,path\na,{identity}.h5\nb,gone.h5\n")
    done = embed(
        backbone,
        tmp_path / "slides.csv",
        tmp_path / "listed.parquet",
        ids="plain",
        plan=Plan(jobs=0, skip_bad=True),
    )
    assert list(done.left_out) == ["b"] and "gone.h5 does not exist" in done.left_out["b"]


def test_slides_become_the_mean_over_their_tissue(tmp_path: Path) -> None:
    he = Modality(
        name="he", kind="image", channels=("r", "g", "b"), value_unit="rgb8", size=(32, 32),
        mpp_um=1.0, mean=(128.0,) * 3, std=(64.0,) * 3,
    )  # fmt: skip
    torch.manual_seed(0)
    backbone = ViTBackbone({"he": he}, SMALL, 8).eval()
    pixels = np.full((256, 384, 3), 245, np.uint8)
    pixels[64:192, 128:320] = (180, 60, 140)
    write_tiff(tmp_path / "slides" / "a.tif", [pixels])
    embed(backbone, tmp_path / "slides", tmp_path / "he.parquet", pooled=True, ids="plain")
    tile = torch.tensor([180.0, 60.0, 140.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    with torch.no_grad():
        wanted = backbone({"he": tile}).pooled["he"][0].numpy()
    np.testing.assert_allclose(vectors(tmp_path / "he.parquet")["a"], wanted, atol=1e-4)
    write_tiff(tmp_path / "glass.tif", [np.full((256, 384, 3), 245, np.uint8)])
    done = embed(backbone, tmp_path / "glass.tif", tmp_path / "glass.parquet", pooled=True,
                 ids="plain")  # fmt: skip
    assert done.left_out == {"glass": "no tile holds enough tissue"}
    write_tiff(tmp_path / "bare.tif", [pixels], mpp=None)
    with pytest.raises(DataError, match=r"bare\.tif: the resolution is not known.*`embed`"):
        embed(backbone, tmp_path / "bare.tif", tmp_path / "no.parquet", pooled=True)
    embed(backbone, tmp_path / "bare.tif", tmp_path / "bare.parquet", pooled=True, ids="plain",
          mpp_um=0.5)  # fmt: skip
    np.testing.assert_allclose(vectors(tmp_path / "bare.parquet")["bare"], wanted, atol=1e-4)
    names = {"Channel": {"Name": ["DAPI", "CD3", "CD8", "CD20", "panCK"]}}
    base = np.zeros((5, 128, 128), np.uint16)
    write_ome(tmp_path / "five.ome.tif", base, "CYX", metadata=names)
    with pytest.raises(DataError, match="holds the channels DAPI"):
        embed(backbone, tmp_path / "five.ome.tif", tmp_path / "five.parquet", pooled=True)


def test_the_verb_writes_the_same_table_under_hashed_ids(tmp_path: Path) -> None:
    from domainssl import export_backbone

    torch.manual_seed(0)
    backbone = ViTBackbone({"ct": CT}, SMALL, 4).eval()
    export_backbone(backbone, tmp_path / "ct")
    write_nifti(tmp_path / "Miller.nii.gz", np.ones((8, 8, 8), np.float32))
    words = ["embed", str(tmp_path / "ct"), str(tmp_path / "Miller.nii.gz"), "--pooled"]
    assert main([*words, f"--output={tmp_path / 'e.parquet'}"]) == 0
    [name] = vectors(tmp_path / "e.parquet")
    assert len(name) == 16 and b"Miller" not in (tmp_path / "e.parquet").read_bytes()


def test_why_exams_were_left_out_is_told_and_not_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    backbone = ViTBackbone({"ct": CT}, SMALL, 4).eval()
    for name in ("Miller", "Smith"):
        (tmp_path / "in" / name).mkdir(parents=True)
        write_nifti(tmp_path / "in" / name / "ct.nii", np.ones((8, 8, 8), np.float32))
    cut = tmp_path / "in" / "Smith" / "ct.nii"
    cut.write_bytes(cut.read_bytes()[:500])
    (tmp_path / "out").mkdir()
    done = embed(backbone, tmp_path / "in", tmp_path / "out" / "e.parquet", pooled=True,
                 plan=Plan(jobs=0, skip_bad=True), id_table=tmp_path / "ids.csv")  # fmt: skip
    [identity] = done.left_out
    assert f"{identity},Smith" in (tmp_path / "ids.csv").read_text()
    assert str(cut) in caplog.text and str(cut) in done.left_out[identity]  # it is that call
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    written = [path.name.encode() + path.read_bytes() for path in files]
    assert len(written) > 3 and not any(b"Smith" in text for text in written)
