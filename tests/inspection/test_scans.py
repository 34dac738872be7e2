"""What `inspect` reports of scans, folders of scans and DICOM folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from dicom_files import PRIVATE, RTSTRUCT, blank, plane, write_series, write_slice
from rich.console import Console
from scan_files import oblique, ramp, write_nifti

from domainssl.arguments import plain
from domainssl.cli import main
from domainssl.cli.checkup import checkup
from domainssl.errors import DataError
from domainssl.inspection.following import following
from domainssl.inspection.recognise import inspect_path, render


def text_of(report: dict) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(report))
    return console.export_text()


def test_a_file_is_described_by_grid_and_scaled_values(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", ramp(), slope=0.5, intercept=10.0)
    report = inspect_path(str(path))
    json.dumps(plain(report))
    assert report["kind"] == "scans" and report["problems"] == []
    [scan] = report["scans"]
    assert scan["path"] == str(path) and scan["format"] == "nifti" and scan["dtype"] == "int16"
    assert scan["shape"] == [6, 5, 4] and scan["orientation"] == "LAS"
    assert scan["spacing"] == [0.8, 1.2, 3.0] and scan["spacing_unit"] == "mm"
    [row] = scan["values"]
    assert (row["min"], row["max"]) == (10.0, 10 + 0.5 * ramp().max())
    text = text_of(report)
    for part in ("1 scan, 1 measured", "LAS", "0.8 1.2 3", "652.5000", "no problems found"):
        assert part in text


def test_volumes_labels_validity_and_warnings_are_shown(tmp_path: Path) -> None:
    series = np.stack([ramp(), ramp() + 1000], axis=-1)
    write_nifti(tmp_path / "bold.nii.gz", series, pixdim=(1, 1, 1, 2))
    write_nifti(tmp_path / "seg.nii.gz", (ramp() % 3).astype(np.uint8))
    holes = ramp(dtype="float32")
    holes[:3] = np.nan
    write_nifti(tmp_path / "holes.nii.gz", holes)
    bold, nan, seg = inspect_path(str(tmp_path))["scans"]
    assert bold["volumes"] == 2 and "by pixdim" in bold["warnings"][0]
    assert [row["band"] for row in bold["values"]] == ["volume 0", "volume 1"]
    assert bold["values"][1]["max"] == ramp().max() + 1000
    assert seg["label_values"] == {"0": 40, "1": 40, "2": 40} and nan["valid_fraction"] == 0.5
    assert "label_values" not in nan


def test_constant_scans_and_odd_slices_are_named(tmp_path: Path) -> None:
    write_nifti(tmp_path / "same.nii.gz", np.full((6, 5, 4), 40, np.int16))
    jump = ramp(dtype="float32")
    jump[:, :, 2] *= 100
    write_nifti(tmp_path / "jump.nii.gz", jump)
    write_nifti(tmp_path / "void.nii.gz", np.full((6, 5, 4), np.nan, np.float32))
    text = text_of(inspect_path(str(tmp_path)))
    assert "same.nii.gz: all: all valid voxels are 40" in text
    assert "void.nii.gz: all: no voxel is valid" in text and "void.nii.gz: all: all" not in text
    assert "slice 2 ranges from 80000 to 88500, 100 times the usual range" in text


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "no voxel is valid"), (0, "all valid voxels are 0")]
)
def test_a_scan_that_shows_nothing_is_a_problem_without_a_next_command(
    tmp_path: Path, value: float, said: str
) -> None:
    """Its inspection ended with `no problems found`."""
    write_nifti(tmp_path / "a.nii.gz", np.full((6, 5, 4), value, np.float32))
    report = inspect_path(str(tmp_path / "a.nii.gz"))
    assert report["problems"] == [f"{tmp_path / 'a.nii.gz'}: {said}"]
    (tmp_path / "a.nii.gz").write_bytes((tmp_path / "a.nii.gz").read_bytes()[:-9])
    assert following(inspect_path(str(tmp_path / "a.nii.gz"))) == []


def test_a_folder_of_exams_has_contrasts_grids_and_orientations(tmp_path: Path) -> None:
    for case in ("one", "two"):
        (tmp_path / case).mkdir()
        for name in ("t1", "flair"):
            write_nifti(tmp_path / case / f"{name}.nii.gz", ramp())
    moved = oblique()
    moved[0, 3] += 2
    write_nifti(tmp_path / "two" / "flair.nii.gz", ramp(), moved)
    write_nifti(tmp_path / "two" / "t1c.nii.gz", ramp(), np.diag([2.0, 2, 2, 1]))
    report = inspect_path(str(tmp_path))
    assert report["count"] == 5 and report["contrasts"] == {"flair": 2, "t1": 2}
    notes = " ".join(report["notes"])
    assert "t1.nii.gz: not on the grid of" in notes and "2 mm" in notes
    assert "2 orientations: LAS (4), RAS (1)" in notes


def test_broken_files_are_problems_that_name_them(tmp_path: Path) -> None:
    write_nifti(tmp_path / "good.nii.gz", ramp())
    write_nifti(tmp_path / "bare.nii.gz", ramp(), code=0)
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "good.nii.gz").read_bytes()[:-30])
    (tmp_path / "._good.nii.gz").write_bytes(b"\0\5\26\7")
    report = inspect_path(str(tmp_path))
    assert report["count"] == 3 and len(report["problems"]) == 2
    found = " ".join(report["problems"])
    assert "assume_pixdim" in found and "cut.nii.gz" in found and "._good" not in text_of(report)
    assert main(["inspect", str(tmp_path)]) == 1


def test_series_of_a_dicom_folder_and_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "export"
    write_series(folder, number=3)
    write_slice(folder / "z0", plane(0), series="2", number=7)
    write_slice(folder / "sc", plane(0), None, series="4", modality="OT")
    blank(folder / "RS1", RTSTRUCT, "8").save_as(folder / "RS1")
    assert main(["inspect", str(folder)]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "series ct-3" in text and "series ct-7" in text and "`series: <key>`" in text
    assert "1 RTSTRUCT: RS1" in text and "1 image without position: sc" in text
    assert main(["inspect", str(folder), "--json"]) == 1
    written = capsys.readouterr().out
    report = json.loads(written)
    assert [scan["series"] for scan in report["scans"]] == ["ct-3", "ct-7"]
    assert report["scans"][0]["modality"] == "CT" and report["scans"][0]["value_unit"] == "hu"
    assert report["scans"][0]["spacing"] == [1.5, 2.0, 2.5]
    assert not [word for word in PRIVATE if word in text + written]


def test_contours_alone_are_named_with_the_remedy(tmp_path: Path) -> None:
    blank(tmp_path / "RS1.dcm", RTSTRUCT).save_as(tmp_path / "RS1.dcm")
    for path in (tmp_path, tmp_path / "RS1.dcm"):
        [problem] = inspect_path(str(path))["problems"]
        assert "1 RTSTRUCT: RS1.dcm (contours are not read" in problem


def test_nothing_of_the_kind_is_told_what_is_understood(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="nor scans"):
        inspect_path(str(tmp_path))
    with pytest.raises(DataError, match=r"a scan \(NIfTI, NRRD"):
        inspect_path(str(tmp_path / "a.txt"))


def test_doctor_names_the_decoders_of_dicom() -> None:
    [row] = [row for row in checkup() if row.check == "DICOM decoders"]
    assert row.status == "ok" and "JPEG Lossless" in row.found and "JPEG-LS" in row.found
