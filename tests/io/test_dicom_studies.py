"""Exams of DICOM exports whose names say no contrast: what the series say of themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import (
    CT,
    MR,
    PET,
    PRIVATE,
    ROOT,
    RTSTRUCT,
    blank,
    plane,
    write_seg,
    write_series,
    write_slice,
)

from domainssl.cli import main
from domainssl.datamodules.volumes import VolumeDataModule
from domainssl.errors import DataError
from domainssl.inference.volume_maps import VolumeInput, find_volumes
from domainssl.inspection.recognise import inspect_path
from domainssl.io.volume import dicom_file
from domainssl.io.volume.dicom_words import word_of
from domainssl.io.volume.exam import Wanted
from domainssl.io.volume.exams import find_exams
from domainssl.io.volume.folder import read_folder
from domainssl.io.volume.scan import Reading, read_scan
from domainssl.loading.source import Loading
from domainssl.sources.held_out import HeldOut
from domainssl.sources.preparation import prepare
from domainssl.sources.volume_options import Contrast, ExamFiles, ExamWindow, Preparation

USUAL = ((2, "AX T1 SE"), (3, "AX T2 FSE"), (4, "Ax FLAIR"), (6, "t1_mprage_KM"), (1, "LOC"))


def write(
    folder: Path, number: int, words: str, study: str = "9", *, modality: str = "MR", **more: Any
) -> None:
    """Three slices of a series; values tell its number: from 100 times the number on."""
    for k in range(3):
        path = folder / f"I{study}{number:02d}{k}"
        sop = {"MR": MR, "CT": CT, "PT": PET}[modality]
        image = write_slice(path, plane(0) + 100 * number, (-3, -4, 2.5 * k), sop=sop, slope=1,
                            intercept=0, modality=modality, series=f"{study}.{number}",
                            number=number, save=False, **more)  # fmt: skip
        image.SeriesDescription, image.StudyInstanceUID = words, f"{ROOT}.{study}"
        if number == 1:
            image.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        image.save_as(path, enforce_file_format=True)


def found(root: Path, *names: str, **contrasts: str) -> Any:
    return read_folder(str(root), Wanted(contrasts={**{n: n for n in names}, **contrasts}))


def shown(exam: Any) -> dict[str, int]:
    """The number of the series that each modality of an exam reads, by its values."""
    contrasts = {name: Contrast() for name in exam.scans}
    volumes = prepare(exam, contrasts, Preparation(foreground=False)).values
    return {name: int(values.min()) // 100 for name, values in volumes.items()}


def test_series_of_a_flat_folder_are_modalities_by_what_vendors_call_them(tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        for number, words in USUAL:
            if (patient, number) != ("p2", 4):
                write(tmp_path / patient, number, words, f"9{patient[1]}")
    exams = found(tmp_path, "t1", "t1c", flair="FLAIR", t2="T2w").items
    assert [shown(exam) for exam in exams] == [
        {"t1": 2, "t1c": 6, "flair": 4, "t2": 3}, {"t1": 2, "t1c": 6, "t2": 3},
    ]  # fmt: skip
    assert [exam.patient for exam in exams] == ["p1", "p2"]
    [both] = found(tmp_path / "p1", a="mr-6", b="ax t2*").items  # a key, a description
    assert shown(both) == {"a": 6, "b": 3} and both.id == "p1"
    with pytest.raises(DataError, match=r"they are 2 t1, 2 t2, 1 flair, 2 t1c\."):
        found(tmp_path, "swi")


def test_prediction_of_a_flat_folder_finds_the_contrasts_of_a_task(tmp_path: Path) -> None:
    for number, words in USUAL:
        write(tmp_path, number, words)
    both = VolumeInput(contrasts={"t1": Contrast(contrast="*"), "flair": Contrast()})
    [exam] = find_volumes(str(tmp_path), both)
    assert shown(exam) == {"t1": 2, "flair": 4}
    [exam] = find_volumes(str(tmp_path), both, "flair")
    assert shown(exam) == {"flair": 4}


def test_folders_of_one_study_are_one_exam_and_two_studies_are_two(tmp_path: Path) -> None:
    for number, words in USUAL:
        write(tmp_path / "p1" / f"{number}_series", number, words, "91")
        write(tmp_path / "p2", number, words, "92")
        write(tmp_path / "p2", number + 10, words, "93")
    exams = found(tmp_path, "t1", "t2").items
    assert [(exam.id, exam.patient) for exam in exams] == [
        ("p1", "p1"), ("p2/study_1", "p2"), ("p2/study_2", "p2"),
    ]  # fmt: skip
    assert shown(exams[0]) == {"t1": 2, "t2": 3}
    assert sorted(shown(exam)["t1"] for exam in exams[1:]) == [2, 12]
    assert all(shown(exam)["t2"] == shown(exam)["t1"] + 1 for exam in exams)


def test_two_series_of_one_contrast_are_left_out_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path / "p", 2, "AX T1")
    write(tmp_path / "p", 5, "Sag T1 of Invented")
    write(tmp_path / "p", 3, "AX T2")
    with pytest.raises(DataError, match=r"2 t1, 1 t2\. .*2 series of 't1': mr-2 \(t1\), mr-5"):
        found(tmp_path, "t1", "t2")
    write(tmp_path / "q", 2, "AX T1", "91")
    data = found(tmp_path, "t1", "t2")
    assert [shown(exam) for exam in data.items] == [{"t2": 3}, {"t1": 2}]
    [problem] = data.problems
    assert "2 series of 't1': mr-2 (t1), mr-5 (t1); left out" in problem
    assert "modalities.t1.contrast to the key" in problem and "Invented" not in problem
    assert shown(found(tmp_path, "t2", t1="sag*").items[0]) == {"t1": 5, "t2": 3}


def test_batches_and_inspect_take_ct_and_pet_by_their_modality(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", 4, "WB Invented", modality="CT")
    write(tmp_path / "a", 7, "AC", modality="PT")
    data = VolumeDataModule(
        str(tmp_path), {"ct": Contrast(value_unit="hu"), "pet": Contrast()},
        held_out=HeldOut(val_fraction=0.0), global_batch_size=1, loading=Loading(workers=0),
        window=ExamWindow(size=(4, 5, 3), min_foreground=0.0), exams=ExamFiles(ids="plain"),
        preparation=Preparation(foreground=False),
    )  # fmt: skip
    data.setup("fit")
    [batch] = list(data.train_dataloader())
    wanted = plane(0).T[::-1, ::-1]  # LPS files in RAS order
    np.testing.assert_array_equal(batch["ct"][0, 0, :, :, 0], wanted + 400)
    np.testing.assert_array_equal(batch["pet"][0, 0, :, :, 2], wanted + 700)
    report = inspect_path(str(tmp_path / "a"))
    assert [(s["series"], s["contrast"]) for s in report["scans"]] == [
        ("ct-4", "ct"), ("pt-7", "pet"),
    ]  # fmt: skip
    assert "modalities: {ct: {}, pet: {}}" in report["notes"][0] and not report["problems"]
    assert main(["inspect", str(tmp_path)]) == 0
    assert not [word for word in PRIVATE if word in capsys.readouterr().out + repr(report)]
    assert find_exams(str(tmp_path), Wanted(contrasts={"pet": "pet"})).items[0].series == {
        "pet": "pt-7"
    }


@pytest.mark.parametrize(
    ("word", "descriptions"),
    [
        (
            "t1",
            ["t1_mprage_sag_p2_iso", "Sag T1 FLAIR", "3D BRAVO", "T1 W/O CONTRAST", "T1 PRE GD"],
        ),
        ("t1c", ["AX T1 POST GD", "T1 C+", "t1_mprage_sag_KM", "AX T1 +C", "T1ce", "MPRAGE POST"]),
        ("t2", ["T2W_TSE", "t2_space_sag", "AX T2 PROPELLER"]),
        ("flair", ["t2_tirm_tra_dark-fluid", "AX T2 FLAIR FS", "SAG CUBE FLAIR"]),
        ("dwi", ["DWI b1000", "ep2d_diff_3scan_trace", "DTI 32 dir"]),
        ("adc", ["ep2d_diff_3scan_trace_ADC", "AX DWI ADC"]),
        ("t2star", ["t2*_gre", "AX T2 STAR"]),
        ("", ["AX PD/T2", "mIP_Images(SW)", "ep2d_diff_FA", "SUB T1", "3-PLANE LOC", "unnamed"]),
    ],
)
def test_descriptions_of_vendors_are_words(word: str, descriptions: list[str]) -> None:
    assert {text: word_of("MR", [text, ""], "") for text in descriptions} == dict.fromkeys(
        descriptions, word
    )
    assert word_of("MR", ["AX T1", ""], "Gadovist") == "t1c"  # as the file states
    assert word_of("MR", ["unnamed", "t2_tse"], "NONE") == "t2"  # the name of the protocol


def test_contours_are_counted_and_segmentations_are_the_maps_of_their_exams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "export"
    for patient in ("p1", "p2", "p3"):
        write_series(root / patient / "CT")
        (root / patient / "RT").mkdir()
        contours = blank(root / patient / "RT" / "1", RTSTRUCT)
        contours.save_as(root / patient / "RT" / "1")
    contours.save_as(root / "p3" / "CT" / "ZZ")  # beside the images
    for place in ("p1/seg", "p2/SEG301"):
        (root / place).mkdir()
        write_seg(root / place / "1.dcm", [np.eye(5, 4, dtype=np.uint8)], [2], [7])
    monkeypatch.setenv("DOMAINSSL_CACHE", str(tmp_path / "kept"))
    for many in (32, 2, 2):  # without an index, with a new one, from it
        monkeypatch.setattr("domainssl.io.volume.dicom_aside.MANY", many)
        exams = read_folder(str(root), Wanted(contrasts={"ct": "ct"}))
        assert [exam.mask for exam in exams.items] == [str(root / "p1/seg/1.dcm"), "", ""]
        contours_, maps = exams.problems
        assert "4 RTSTRUCT left out (contours are not read; turn them into a label map" in contours_
        assert "p1/RT/1, p2/RT/1, p3/CT/ZZ, p3/RT/1" in contours_
        assert "1 DICOM segmentation left out" in maps and "p2/SEG301/1.dcm" in maps
    kept = [path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert kept and not any(word in text for text in kept for word in (b"SEG301", b"RT/"))
    contrasts = {"ct": Contrast(value_unit="hu")}
    data = VolumeDataModule(
        str(root), contrasts, window=ExamWindow(size=(4, 5, 6)),
        preparation=Preparation(foreground=False), held_out=HeldOut(val_fraction=0.34),
        loading=Loading(workers=0),
    )  # fmt: skip
    data.setup("fit")
    assert sum("4 RTSTRUCT" in line for line in data.describe()) == 1
    maps = prepare(
        exams.items[0], data.contrasts, Preparation(foreground=False), with_mask=True
    ).mask
    assert maps is not None and np.unique(maps).tolist() == [0, 7] and (maps == 7).sum() == 4
    report = inspect_path(str(root))
    assert any("4 RTSTRUCT" in note for note in report["notes"]) and not report["problems"]
    assert any("2 DICOM segmentations" in note for note in report["notes"])


def test_files_of_a_flat_folder_are_looked_at_once_and_again_where_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (2, 3, 4):
        for k in range(4):
            path = tmp_path / f"{number}-{k}"
            write_slice(path, plane(k) + number, (0, 0, 2.0 * k), series=str(number), number=number,
                        sop=MR, modality="MR")  # fmt: skip
            os.utime(path, (1e9, 1e9 + 0.5))
    looked: list[str] = []
    original = dicom_file._looked_at

    def counting(path: str, *more: Any) -> Any:
        looked.append(path)
        return original(path, *more)

    monkeypatch.setattr(dicom_file, "_looked_at", counting)
    monkeypatch.setattr(dicom_file, "is_settled", lambda facts, now: True)
    for _ in range(2):
        for number in (2, 3, 4):
            scan = read_scan(tmp_path, Reading(series=f"mr-{number}"))
            assert scan.values[0, -1, -1, 0] == 24 + number - 1024
    assert len(looked) == 12
    write_slice(tmp_path / "2-0", plane(0) + 9, (0, 0, 0.0), series="2", number=2, sop=MR,
                modality="MR", intercept=0)  # fmt: skip
    scan = read_scan(tmp_path, Reading(series="mr-2"))
    assert scan.values[0, -1, -1, 0] == 24 + 9 and len(looked) == 13
