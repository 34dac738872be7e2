"""`embed` on volumes: NIfTI with the affine of the grid of patches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_data import REAL_DATA
from scan_files import oblique, write_nifti

from domainssl.backbones.vit import ViTBackbone
from domainssl.errors import ConfigError, DataError
from domainssl.inference import dense
from domainssl.inference.run import embed
from domainssl.inference.volume_maps import find_volumes, volume_batch, volume_input
from domainssl.io.raster.geozarr import VectorStore
from domainssl.io.volume.scan import describe_scan, read_scan
from domainssl.pieces import Plan
from domainssl.sources.preparation import prepare

nibabel = pytest.importorskip("nibabel")
REAL = REAL_DATA / "medical"


def backbone(spacing_mm: tuple[float, ...] | None = None, patch: Any = 4) -> ViTBackbone:
    facts = {
        "kind": "volume", "channels": ("ct",), "value_unit": "hu", "size": (16, 16, 16),
        "spacing_mm": spacing_mm,
    }  # fmt: skip
    torch.manual_seed(0)
    sizes = {"width": 12, "depth": 1, "heads": 2}
    return ViTBackbone({"ct": facts}, sizes, patch, normalization="window(-100,400)").eval()


@dataclass
class Holder:
    """What `volume_input` asks of a task."""

    backbone: ViTBackbone


def blob(shape: tuple[int, ...]) -> np.ndarray:
    x, y, z = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return (10 * x + 7 * y + 12 * z).astype(np.int16)


def test_vectors_lie_where_their_patches_lie_whatever_the_axes_of_the_file(tmp_path: Path) -> None:
    affine = oblique()[:, [2, 0, 1, 3]]
    affine[:3, 0] *= -1
    path = write_nifti(tmp_path / "scan.nii.gz", blob((22, 17, 30)), affine)
    embed(backbone(), path, tmp_path / "e.nii.gz")
    image = nibabel.load(tmp_path / "e.nii.gz")
    scan = read_scan(path)
    cells = tuple(-(-n // 4) for n in scan.values.shape[1:])
    assert image.shape == (*cells, 12) and image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.get_sform(), image.get_qform(), atol=1e-4)
    for cell in ((0, 0, 0), (3, 2, 1)):
        centre = scan.affine @ [*(4 * c + 1.5 for c in cell), 1]
        np.testing.assert_allclose(image.affine @ [*cell, 1], centre, atol=1e-3)
    values = torch.from_numpy(scan.values[:, :16, :16, :16].astype(np.float32))[None]
    with torch.no_grad():
        tokens = backbone()({"ct": values}).tokens["ct"][0].unflatten(0, (4, 4, 4))
    np.testing.assert_allclose(image.get_fdata()[0, 0, 0], tokens[0, 0, 0], atol=1e-5)
    assert (tmp_path / "e.nii.gz.png").is_file()


def test_scans_without_a_unit_are_scaled_by_limits_of_the_whole_scan(tmp_path: Path) -> None:
    facts = {"kind": "volume", "channels": ("t1",), "value_unit": "arbitrary", "size": (8, 8, 8)}
    torch.manual_seed(0)
    tiny = ViTBackbone(
        {"t1": facts}, {"width": 12, "depth": 1, "heads": 2}, 4, normalization="item"
    )
    tiny.eval()
    scan = blob((16, 24, 16))
    found = {}
    for name, values in {"one": scan, "gain": 3 * scan + 50}.items():
        path = write_nifti(tmp_path / f"{name}.nii.gz", values.astype(np.int16), np.eye(4))
        embed(tiny, path, tmp_path / f"e_{name}.nii.gz")
        found[name] = nibabel.load(tmp_path / f"e_{name}.nii.gz").get_fdata()
    np.testing.assert_allclose(found["gain"], found["one"], atol=2e-3)
    [exam] = find_volumes(str(tmp_path / "one.nii.gz"), inputs := volume_input(Holder(tiny)), None)
    whole = prepare(exam, inputs.contrasts, inputs.preparation)
    batch = volume_batch(whole, (slice(0, 8),) * 3)
    own = torch.tensor([[[scan[:8, :8, :8].min(), scan[:8, :8, :8].max()]]], dtype=torch.float32)
    with torch.no_grad():
        tokens, others = (
            tiny({**batch, "t1.window": limits}).tokens["t1"][0, 0].numpy()
            for limits in (batch["t1.window"], own)
        )
    np.testing.assert_allclose(found["one"][0, 0, 0], tokens, atol=1e-5)
    assert np.abs(found["one"][0, 0, 0] - others).max() > 0.01


@pytest.mark.skipif(not REAL.is_dir(), reason="the real scans are not on this machine")
def test_a_real_scan_keeps_its_affine(tmp_path: Path) -> None:
    path = REAL / "nibabel" / "anatomical.nii"
    facts = describe_scan(path)
    embed(backbone(patch=8), path, tmp_path / "e.nii.gz")
    image = nibabel.load(tmp_path / "e.nii.gz")
    change = np.diag([8.0, 8.0, 8.0, 1.0])
    change[:3, 3] = 3.5
    np.testing.assert_allclose(image.affine, facts.affine @ change, atol=1e-3)


def test_simpleitk_agrees_on_the_place_of_the_first_patch(tmp_path: Path) -> None:
    itk: Any = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    path = write_nifti(tmp_path / "scan.nii.gz", blob((22, 17, 30)), oblique())
    embed(backbone(), path, tmp_path / "e.zarr")
    embed(backbone(), path, tmp_path / "e.nii.gz", dtype="float32")
    theirs = itk.ReadImage(str(tmp_path / "e.nii.gz"))
    origin = np.array(theirs.GetOrigin()[:3]) * (-1, -1, 1)  # LPS -> RAS
    np.testing.assert_allclose(origin, nibabel.load(tmp_path / "e.nii.gz").affine[:3, 3], atol=1e-3)


def test_voxels_get_the_size_of_the_card_and_int8_its_scale(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "s.nii.gz", blob((16, 16, 16)), np.diag([2.0, 2.0, 2.0, 1.0]))
    tiny = backbone(spacing_mm=(1.0, 1.0, 1.0))
    embed(tiny, path, tmp_path / "e.nii.gz", dtype="int8")
    embed(tiny, path, tmp_path / "e.zarr")
    image, scale = (nibabel.load(tmp_path / f"e{n}.nii.gz") for n in ("", "_scale"))
    np.testing.assert_allclose(np.linalg.norm(image.affine[:3, :3], axis=0), 4.0)
    store = VectorStore(tmp_path / "e.zarr")
    exact = np.moveaxis(store.group["embedding"][...], 0, -1)
    stored = np.asarray(image.dataobj).astype(np.float32)
    assert image.get_data_dtype() == np.int8 and np.isfinite(exact).any()
    near = np.where(stored == -128, np.nan, stored * np.asarray(scale.dataobj)[..., None])
    np.testing.assert_allclose(near, exact, atol=0.02)
    np.testing.assert_allclose(store.facts["affine_ras_mm"], image.affine, atol=1e-5)


def test_exams_of_a_folder_are_hashed_kept_and_never_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOMAINSSL_ID_KEY", "0123456789abcdef")
    (tmp_path / "in").mkdir()
    for name in ("anna", "bert"):
        write_nifti(tmp_path / "in" / f"{name}.nii.gz", blob((20, 16, 16)), np.eye(4))
    first = embed(backbone(), tmp_path / "in", tmp_path / "out")
    assert first.pieces == 2 and first.resumed == 0
    names = [p.name for p in (tmp_path / "out").iterdir()]
    assert len(names) == 6 and not any("anna" in n or n.startswith(".") for n in names)
    assert embed(backbone(), tmp_path / "in", tmp_path / "out").resumed == 2
    first.outputs[0].unlink()  # its record is there, so that it was taken for complete
    assert embed(backbone(), tmp_path / "in", tmp_path / "out").resumed == 1
    assert first.outputs[0].is_file()
    with pytest.raises(ConfigError, match="else: halo was none, is 0"):
        embed(backbone(), tmp_path / "in", tmp_path / "out", halo=0)
    done = embed(
        backbone(), tmp_path / "in", tmp_path / "out", halo=0, plan=Plan(jobs=0, restart=True)
    )
    assert done.resumed == 0


@pytest.mark.parametrize("mask", ["anna_seg.nii.gz", "labels/anna.nii.gz"])
def test_segmentation_maps_are_no_exams(tmp_path: Path, mask: str) -> None:
    for name in ("anna.nii.gz", mask):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write_nifti(tmp_path / "in" / name, blob((16, 16, 16)), np.eye(4))
    done = embed(backbone(), tmp_path / "in", tmp_path / "out", ids="plain")
    assert [p.name for p in done.outputs] == ["anna.nii.gz"]
    (tmp_path / "in" / "anna.nii.gz").unlink()
    with pytest.raises(DataError, match="only 1 segmentation maps"):
        embed(backbone(), tmp_path / "in", tmp_path / "out")


def test_a_killed_call_goes_on_in_the_middle_of_an_exam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_SHARD_PIXELS", 8)
    path = write_nifti(tmp_path / "s.nii.gz", blob((30, 20, 24)), np.eye(4))
    embed(backbone(), path, tmp_path / "whole.nii.gz")
    write, count = VectorStore.write, [0]

    def killed(store: VectorStore, box: Any, values: Any) -> None:
        count[0] += 1
        if count[0] == 20:
            raise KeyboardInterrupt
        write(store, box, values)

    monkeypatch.setattr(VectorStore, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        embed(backbone(), path, tmp_path / "killed.nii.gz")
    assert not (tmp_path / "killed.nii.gz").exists()
    embed(backbone(), path, tmp_path / "killed.nii.gz")
    whole, again = (tmp_path / f"{n}.nii.gz" for n in ("whole", "killed"))
    assert whole.read_bytes() == again.read_bytes()
    assert count[0] < 2 * 48
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    # killed after the record of an exam was written, its last file
    for name in ("lock", "json.part-1", "claims/.build.lock", "part-embed/done/0"):
        left = tmp_path / f".killed.nii.gz.{name}"
        left.parent.mkdir(parents=True, exist_ok=True)
        left.touch()
    (tmp_path / ".other.nii.gz.part-embed").mkdir()  # of an exam that another call is at
    assert embed(backbone(), path, tmp_path / "killed.nii.gz").resumed == 1
    hidden = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert hidden == [".other.nii.gz.part-embed"]
