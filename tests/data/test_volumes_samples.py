"""The embedded samples of scans: real files, and classes that hide from plain statistics."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domainssl.datamodules.samples import volumes
from domainssl.datamodules.samples.volumes_scene import PATTERNS
from domainssl.errors import ConfigError
from domainssl.evaluation.probes import knn_accuracy, linear_probe_accuracy

nibabel: Any = pytest.importorskip("nibabel", reason="needs the extra medical")

PETCT = ("ct", "pet")


def statistics(values: np.ndarray) -> torch.Tensor:
    """Mean, deviation and five percentiles per item, (N, 7)."""
    x = values.reshape(len(values), -1)
    percentiles = np.percentile(x, [5, 25, 50, 75, 95], axis=1)
    return torch.from_numpy(np.stack([x.mean(1), x.std(1), *percentiles], 1)).float()


def energies(values: np.ndarray) -> torch.Tensor:
    """Share of the slow changes along each axis in their sum, (N, 3)."""
    x = values - values.mean((1, 2, 3), keepdims=True)
    power = np.abs(np.fft.fftn(x, axes=(1, 2, 3))) ** 2
    kept = [power[:, 1:5, :2, :2], power[:, :2, 1:5, :2], power[:, :2, :2, 1:5]]
    sums = np.stack([part.sum((1, 2, 3)) for part in kept], 1)
    return torch.from_numpy(np.log(np.hstack([sums, power.sum((1, 2, 3))[:, None]]))).float()


@pytest.fixture(scope="module")
def exams() -> list:
    """The held-out exams of `sample:petct`."""
    return [volumes.petct("val", number) for number in range(volumes.EXAMS["val"])]


@pytest.fixture(scope="module")
def labels() -> torch.Tensor:
    return torch.from_numpy(volumes.classes("val"))


@pytest.mark.parametrize("scans", [("ct",), ("pet",), PETCT], ids="+".join)
@pytest.mark.parametrize("side", [40, 32], ids=["whole", "window"])
def test_statistics_do_not_tell_the_classes_of_petct(exams, labels, scans, side) -> None:
    cut = slice((40 - side) // 2, (40 + side) // 2)
    parts = [statistics(np.stack([getattr(e, m)[cut, cut, cut] for e in exams])) for m in scans]
    found = torch.cat(parts, 1)
    assert linear_probe_accuracy(found, labels) < 0.35  # chance is 0.25
    assert knn_accuracy(found, labels) < 0.38


@pytest.mark.parametrize("scan", PETCT)
def test_direction_of_the_layers_tells_the_classes_of_petct(exams, labels, scan) -> None:
    tissue = slice(8, 32)
    x = np.stack([getattr(e, scan)[tissue, tissue, tissue] for e in exams])
    x = np.log(x + 0.5) if scan == "pet" else x.clip(-200, 300)
    assert linear_probe_accuracy(energies(x), labels) > 0.75


def test_layers_are_what_ct_and_pet_share(exams) -> None:
    shared, other = [], []
    for exam, stranger in zip(exams[:12], exams[12:24], strict=True):
        inside = exam.layers != 0
        for scan in (exam.ct[inside], np.log(exam.pet[inside] + 0.2)):
            shared.append(np.corrcoef(scan, exam.layers[inside])[0, 1])
            other.append(abs(np.corrcoef(scan, stranger.layers[inside])[0, 1]))
    assert np.mean(shared) > 0.5 and np.mean(other) < 0.15


def test_exams_are_balanced_and_patients_are_in_one_split(tmp_path: Path) -> None:
    for split, count in volumes.EXAMS.items():
        assert np.bincount(volumes.classes(split)).tolist() == [count // 4] * 4
    rows = [
        volumes._row(split, n, {}) for split, total in volumes.EXAMS.items() for n in range(total)
    ]
    assert len({row["id"] for row in rows}) == 192
    patients = {
        split: {r["patient"] for r in rows if r["split"] == split} for split in ("train", "val")
    }
    assert not patients["train"] & patients["val"] and len(patients["val"]) == 84
    assert {row["label"] for row in rows} == set(PATTERNS)


@pytest.mark.parametrize("number", range(5))
def test_files_of_petct_hold_the_phantom_whatever_their_axes(tmp_path: Path, number: int) -> None:
    row = volumes._write_petct(tmp_path, "train", number)
    exam = volumes.petct("train", number)
    files = {scan: nibabel.load(tmp_path / row[scan]) for scan in PETCT}
    ras = {scan: nibabel.as_closest_canonical(file) for scan, file in files.items()}
    np.testing.assert_allclose(ras["ct"].get_fdata(), exam.ct, atol=0.51)
    np.testing.assert_allclose(ras["pet"].get_fdata(), exam.pet, atol=0.006)
    np.testing.assert_allclose(ras["ct"].affine, ras["pet"].affine, atol=1e-4)
    assert nibabel.aff2axcodes(files["ct"].affine) == tuple(volumes._ORIENTATIONS[number])
    assert files["ct"].header.get_xyzt_units()[0] == "mm"


def test_files_are_the_same_every_time(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        volumes._write_petct(tmp_path / folder, "val", 3)
    for path in (tmp_path / "first").rglob("*.nii.gz"):
        twin = tmp_path / "second" / path.relative_to(tmp_path / "first")
        assert path.read_bytes() == twin.read_bytes()


def test_manifest_lists_exams_with_paths_that_exist(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(volumes, "EXAMS", {"train": 4, "val": 4})
    volumes.SAMPLES["petct"][1](tmp_path)
    with open(tmp_path / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "patient", "split", "ct", "pet", "label"]
    assert [row["split"] for row in rows] == ["train"] * 4 + ["val"] * 4
    assert all((tmp_path / row[scan]).is_file() for row in rows for scan in PETCT)


def test_an_unknown_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sample:petc: no such sample.*Did you mean 'petct'"):
        volumes.sample_root("petc")
