"""Class maps of volumes lie on the grid of their scan, whatever its format, axes and voxel size."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scan_files import lps_lines, oblique, write_nifti, write_nrrd
from torch import Tensor

from domainssl.backbones.vit import ViTBackbone
from domainssl.errors import ConfigError, DataError, StorageError
from domainssl.inference.predict import PredictOptions, claim_folder
from domainssl.inference.volume_maps import VolumePrediction, find_volumes, volume_input
from domainssl.io.volume.facts import reading_of_words
from domainssl.io.volume.scan import read_labels
from domainssl.pieces import Plan, build
from domainssl.sources.preparation import prepare

nibabel = pytest.importorskip("nibabel")
BESIDE = [".scan.nii.gz.source", *(f"scan.nii.gz{ending}" for ending in ("", ".json", ".png"))]


class Thresholds:
    """A task that knows the class of a voxel by its value: 0 below 100, 1 below 200, 2."""

    classes = ("background", "organ", "lesion")

    def __init__(
        self, *names: str, spacing_mm: tuple[float, ...] | None = None, window: int = 8
    ) -> None:
        facts = {
            "kind": "volume", "channels": ("a",), "value_unit": "hu", "spacing_mm": spacing_mm,
        }  # fmt: skip
        self.backbone: Any = ViTBackbone(
            {names[0]: facts}, {"width": 6, "depth": 1, "heads": 1}, 4, normalization="identity"
        )
        self.backbone.modalities = dict.fromkeys(names, self.backbone.modality)
        self.context_size = window

    def logits(self, batch: Any) -> Tensor:
        x = sum(batch[name] for name in self.backbone.modalities if name in batch)
        assert x.shape[2:] == (self.context_size,) * 3 and x.dtype == torch.float32
        return torch.cat([x < 100, (x >= 100) & (x < 200), x >= 200], 1).float()


def predicted(task: Any, path: Path, folder: Path, **options: Any) -> VolumePrediction:
    inputs = volume_input(task)
    work = VolumePrediction(
        folder=folder, exams=find_volumes(str(path), inputs), task=task, inputs=inputs,
        options=PredictOptions(**options),
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    build(work, Plan(jobs=0), noun="exams")
    return work


def blob(shape: tuple[int, ...]) -> np.ndarray:
    x, y, z = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return (10 * x + 7 * y + 12 * z).astype(np.int16)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_the_map_has_axes_affine_and_values_of_the_file(axes: Any, tmp_path: Path) -> None:
    values, affine = blob((13, 9, 21)), oblique()[:, [*axes, 3]]
    affine[:3, 0] *= -1
    path = write_nifti(tmp_path / "scan.nii.gz", values, affine)
    predicted(Thresholds("ct"), path, tmp_path / "out", overlap=0.5, batch_size=2)
    found = nibabel.load(tmp_path / "out/scan.nii.gz")
    wanted = (values >= 100).astype(int) + (values >= 200)
    assert np.array_equal(np.asarray(found.dataobj), wanted) and found.get_data_dtype() == np.uint8
    np.testing.assert_allclose(found.affine, affine, atol=1e-4)
    for form in (found.header.get_sform(coded=True), found.header.get_qform(coded=True)):
        assert form[1] == 1
        np.testing.assert_allclose(form[0], affine, atol=1e-4)
    assert b"2 lesion" in found.header.extensions[0].get_content()
    assert sorted(os.listdir(tmp_path / "out")) == BESIDE
    ours = read_labels(tmp_path / "out/scan.nii.gz")
    assert ours.facts.orientation == read_labels(path).facts.orientation


def test_voxel_sizes_are_undone(tmp_path: Path) -> None:
    values = np.zeros((12, 16, 10), np.int16)
    values[2:8, 4:12, 2:8] = 150  # 6 x 8 x 6 voxels of 2 x 1 x 3 mm
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    path = write_nifti(tmp_path / "scan.nii", values, affine)
    task = Thresholds("ct", spacing_mm=(1.0, 1.0, 1.0))
    predicted(task, path, tmp_path / "out")
    found = nibabel.load(tmp_path / "out/scan.nii.gz")
    assert np.array_equal(found.affine, affine)
    inside = np.asarray(found.dataobj) == 1
    assert inside.sum() == pytest.approx(6 * 8 * 6, rel=0.15)
    centre = np.argwhere(inside).mean(0)
    np.testing.assert_allclose(centre, [4.5, 7.5, 4.5], atol=0.26)


def test_dicom_and_sheared_grids_are_predicted_too(tmp_path: Path) -> None:
    from domainssl.datamodules.samples.volumes_files import write_dicom

    values, affine = blob((12, 10, 9)), np.diag([0.7, 0.7, 2.0, 1.0])
    write_dicom(tmp_path / "series", values, affine, modality="CT", patient="phantom")
    predicted(Thresholds("ct"), tmp_path / "series", tmp_path / "out")
    found = nibabel.load(tmp_path / "out/series.nii.gz")
    ras = nibabel.as_closest_canonical(found)
    assert np.array_equal(np.asarray(ras.dataobj), (values >= 100).astype(int) + (values >= 200))
    np.testing.assert_allclose(ras.affine, affine, atol=1e-4)
    sheared = affine.copy()
    sheared[1, 2] = 0.5
    path = write_nifti(tmp_path / "tilted.nii", values, sheared)
    predicted(Thresholds("ct"), path, tmp_path / "out")
    tilted = nibabel.load(tmp_path / "out/tilted.nii.gz")
    assert int(tilted.header["qform_code"]) == 0 and int(tilted.header["sform_code"]) == 1
    np.testing.assert_allclose(tilted.affine, sheared, atol=1e-6)


def test_nrrd_and_a_foreground_that_is_cut_out_are_brought_back(tmp_path: Path) -> None:
    values = np.full((20, 18, 16), -1000, np.int16)
    values[4:12, 5:14, 3:12] = blob((8, 9, 9)) + 20
    path = write_nrrd(tmp_path / "scan.nrrd", values, lps_lines(oblique()))
    task = Thresholds("ct")
    inputs = volume_input(task, {"preparation": {"foreground": True, "margin_mm": 0.0}})
    work = VolumePrediction(
        folder=tmp_path, exams=find_volumes(str(path), inputs), task=task, inputs=inputs
    )
    work.make("scan")
    found = nibabel.load(tmp_path / "scan.nii.gz")
    assert np.array_equal(np.asarray(found.dataobj), (values >= 100).astype(int) + (values >= 200))
    np.testing.assert_allclose(found.affine, oblique(), atol=1e-4)


def test_a_killed_call_goes_on_within_an_exam(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "scan.nii", blob((30, 9, 9)))
    whole = np.asarray(
        nibabel.load(predicted(Thresholds("ct"), path, tmp_path / "a").path("scan")).dataobj
    )

    class Killed(Thresholds):
        left = 3

        def logits(self, batch: Any) -> Tensor:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().logits(batch)

    with pytest.raises(KeyboardInterrupt):
        predicted(Killed("ct"), path, tmp_path / "b", batch_size=4)
    hidden = sorted(p.name for p in (tmp_path / "b").iterdir())
    assert hidden == [".scan.nii.gz.part-map", ".scan.nii.gz.part-rows"]
    seen: list[int] = []

    class Counting(Thresholds):
        def logits(self, batch: Any) -> Tensor:
            seen.append(len(batch["ct"]))
            return super().logits(batch)

    predicted(Counting("ct"), path, tmp_path / "b", batch_size=4)
    found = nibabel.load(tmp_path / "b/scan.nii.gz")
    assert np.array_equal(np.asarray(found.dataobj), whole) and sum(seen) < 20
    assert sorted(os.listdir(tmp_path / "b")) == BESIDE
    seen.clear()
    predicted(Counting("ct"), path, tmp_path / "b")
    assert not seen  # what is there is not made again


def test_a_full_disk_is_said_before_a_map_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to a memory map of a file without a place on the disk ends the process (SIGBUS)."""

    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write_nifti(tmp_path / "scan.nii", blob((8, 8, 8)))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"0\.0 MB for a map.*No space left on device\)"):
        predicted(Thresholds("ct"), path, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_predictions_of_another_task_or_with_other_options_never_mix(tmp_path: Path) -> None:
    task = Thresholds("ct")
    claim_folder(tmp_path, task, PredictOptions().facts(), restart=False)
    claim_folder(tmp_path, task, PredictOptions(batch_size=4).facts(), restart=False)
    claim_folder(tmp_path, task, PredictOptions(overlap=2).facts(), restart=False)  # was refused
    claim_folder(tmp_path, task, PredictOptions().facts(), restart=False)
    (tmp_path / "scan.nii.gz").write_bytes(b"a map")
    with pytest.raises(ConfigError, match=r"made otherwise \(overlap differ"):
        claim_folder(tmp_path, task, PredictOptions(overlap=0.5).facts(), restart=False)
    with torch.no_grad():
        next(task.backbone.parameters()).add_(1)
    with pytest.raises(ConfigError, match=r"\(weights differ"):
        claim_folder(tmp_path, task, PredictOptions().facts(), restart=False)
    claim_folder(tmp_path, task, PredictOptions().facts(), restart=True)
    (tmp_path / "predict.json").write_text("[]")
    with pytest.raises(DataError, match="no record of what was made, but a list"):
        claim_folder(tmp_path, task, PredictOptions().facts(), restart=False)


def test_inputs_that_cannot_be_predicted_are_named(tmp_path: Path) -> None:
    two, path = (
        volume_input(Thresholds("t1", "t2")),
        str(write_nifti(tmp_path / "a.nii", blob((4, 4, 4)))),
    )
    with pytest.raises(ConfigError, match=r"one scan, but the task knows t1, t2\. .*--modality t1"):
        find_volumes(path, two)
    assert find_volumes(path, two, "t2")[0].scans == {"t2": path}
    with pytest.raises(ConfigError, match="--modality t3: the task does not know it"):
        find_volumes(path, two, "t3")
    with pytest.raises(DataError, match="nothing lies there"):
        find_volumes(str(tmp_path / "b.nii"), two)
    work = VolumePrediction(
        folder=tmp_path, exams=find_volumes(path, two, "t1"), task=Thresholds("t1"), inputs=two,
        options=PredictOptions(window=(4, 4)),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"--window: got \[4, 4\], expected one number, or 3"):
        work.make("a")


def test_every_scan_of_a_folder_is_taken_where_the_modality_is_said(tmp_path: Path) -> None:
    inputs = volume_input(Thresholds("flair"))
    for name in ("p1", "p2"):
        write_nifti(tmp_path / f"{name}.nii.gz", np.zeros((4, 4, 4), np.float32))
    first = next(iter(inputs.contrasts))
    with pytest.raises(DataError, match=f"no scan ends with.*--modality {first}"):
        find_volumes(str(tmp_path), inputs)
    found = find_volumes(str(tmp_path), inputs, first)
    assert [(exam.id, [*exam.scans]) for exam in found] == [("p1", [first]), ("p2", [first])]


def test_exams_of_a_folder_are_predicted_with_the_contrasts_they_have(tmp_path: Path) -> None:
    for case, contrasts in {"p1": ("t1", "t2"), "p2": ("t2",)}.items():
        (tmp_path / "in" / case).mkdir(parents=True)
        for name in contrasts:
            write_nifti(tmp_path / "in" / case / f"{name}.nii.gz", blob((8, 8, 8)))
    work = predicted(Thresholds("t1", "t2"), tmp_path / "in", tmp_path / "out")
    maps = {
        p.name: np.asarray(nibabel.load(p).dataobj) for p in (tmp_path / "out").glob("*.nii.gz")
    }
    assert sorted(maps) == sorted(f"{key}.nii.gz" for key in work.keys) and len(maps) == 2


def test_numbers_that_are_not_finite_are_no_class(tmp_path: Path) -> None:
    class Broken(Thresholds):
        def logits(self, batch: Any) -> Tensor:
            return super().logits(batch) * float("nan")

    path = write_nifti(tmp_path / "scan.nii", blob((8, 8, 8)))
    with pytest.raises(DataError, match="not finite"):
        predicted(Broken("ct"), path, tmp_path / "out")
    assert not (tmp_path / "out/scan.nii.gz").exists()


def test_what_files_leave_open_is_said_with_the_option_scan(tmp_path: Path) -> None:
    values = blob((12, 10, 9))
    pair = np.stack([values, values + 100], -1)
    path = write_nifti(tmp_path / "scan.nii", pair, code=0, pixdim=(1.0, 2.0, 3.0))
    given = reading_of_words(["orientation=assume_pixdim", "volume=1"])
    inputs = volume_input(Thresholds("ct"), None, given)
    [exam] = find_volumes(str(path), inputs)
    prepared = prepare(exam, inputs.contrasts, inputs.preparation)
    np.testing.assert_array_equal(prepared.values["ct"][0], values + 100)
    assert inputs.facts == {"scan": given} and prepared.affine[2, 2] == 3.0
    with pytest.raises(DataError, match=r"`--scan orientation=assume_pixdim`"):
        prepare(exam, volume_input(Thresholds("ct")).contrasts, inputs.preparation)
    for word, found in (("volum=1", "Did you mean 'volume'"), ("volume=split", "give its index"),
                        ("space", "expected KEY=VALUE"), ("space=LSP", "got 'LSP'")):  # fmt: skip
        with pytest.raises(ConfigError, match=found):
            reading_of_words([word])


@pytest.mark.parametrize("size", [40.0, 0.001])
def test_voxels_in_another_unit_are_named_with_both_numbers(tmp_path: Path, size: float) -> None:
    """40 mm ended in a traceback for want of memory, 0.001 mm became a map of one voxel."""
    affine = np.diag([size, size, size, 1.0])
    path = write_nifti(tmp_path / "scan.nii.gz", blob((40, 36, 33)), affine)
    with pytest.raises(
        DataError, match=rf"scan.nii.gz: 40 x 36 x 33 voxels of {size:g} x .* mm; w"
    ):
        predicted(Thresholds("ct", spacing_mm=(1.0, 1.0, 1.0)), path, tmp_path / "out")


def test_units_are_looked_at_where_a_decoder_reads_a_pyramid(caplog: Any) -> None:
    """Tasks of maps passed by what `forward` looks at: values times a million got a map."""
    backbone: Any = Thresholds("ct").backbone
    backbone.watch_units()
    backbone.feature_pyramid({"ct": torch.linspace(-2e8, 4e8, 512).view(1, 1, 8, 8, 8)})
    assert "Features of other units mean nothing" in caplog.text
