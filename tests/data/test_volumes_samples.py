"""The embedded samples of scans: real files, and classes that hide from plain statistics."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domainssl.datamodules.samples import volumes
from domainssl.datamodules.samples.volumes_brain import (
    BRAIN,
    CONTRASTS,
    HEADS,
    brain,
    upright_head,
    write_brain,
    write_upright_head,
)
from domainssl.datamodules.samples.volumes_ctmr import CTMR, TISSUES, CtOrMr, ctmr, write_ctmr
from domainssl.datamodules.samples.volumes_petct import (
    PETCT,
    UPRIGHT,
    petct,
    upright_ct,
    write_petct,
    write_upright,
)
from domainssl.datamodules.samples.volumes_plan import ORIENTATIONS
from domainssl.datamodules.samples.volumes_regions import (
    ORGANS,
    lesions,
    organs,
    write_lesions,
    write_organs,
)
from domainssl.datamodules.samples.volumes_visits import VISITS, visits
from domainssl.errors import ConfigError
from domainssl.evaluation.probes import knn_accuracy, linear_probe_accuracy
from domainssl.io.volume.exam import Wanted
from domainssl.io.volume.exams import find_exams
from domainssl.io.volume.scan import Reading, read_labels, read_scan

nibabel: Any = pytest.importorskip("nibabel", reason="needs the extra medical")

PLANS = {"petct": PETCT, "upright": UPRIGHT, "ctmr": CTMR, "brain": BRAIN, "heads": HEADS}
SCANS = [
    ("petct", "ct"), ("petct", "pet"), ("upright", "ct"), ("ctmr", "scan"), ("heads", "t1"),
    *(("brain", c) for c in CONTRASTS),
]  # fmt: skip
WRITERS = {
    "petct": write_petct, "upright": write_upright, "ctmr": write_ctmr, "brain": write_brain,
    "heads": write_upright_head,
}  # fmt: skip


def _draw(sample: str, number: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The scans of a held-out exam and its layers."""
    if sample == "petct":
        found = petct("val", number)
        return {"ct": found.ct, "pet": found.pet}, found.layers
    if sample == "upright":
        found = upright_ct("val", number)
        return {"ct": found.ct}, found.layers
    if sample == "ctmr":
        exam = ctmr("val", number)
        return {"scan": exam.scan}, exam.layers
    head = (upright_head if sample == "heads" else brain)("val", number)
    return head.scans, head.layers


@pytest.fixture(scope="module")
def exams() -> dict[str, list[tuple[dict[str, np.ndarray], np.ndarray]]]:
    """The held-out exams of every sample."""
    return {name: [_draw(name, n) for n in range(p.exams["val"])] for name, p in PLANS.items()}


def _scans(exams: dict, sample: str, scan: str) -> tuple[np.ndarray, torch.Tensor]:
    """A scan of all exams that have it, float32 (N, X, Y, Z), and the classes."""
    has = [number for number, (scans, _) in enumerate(exams[sample]) if scan in scans]
    labels = torch.from_numpy(PLANS[sample].classes("val")[has])
    return np.stack([exams[sample][number][0][scan] for number in has]), labels


def statistics(values: np.ndarray) -> torch.Tensor:
    """Mean, deviation and five percentiles per item, (N, 7)."""
    x = values.reshape(len(values), -1)
    percentiles = np.percentile(x, [5, 25, 50, 75, 95], axis=1)
    return torch.from_numpy(np.stack([x.mean(1), x.std(1), *percentiles], 1)).float()


def energies(layers: np.ndarray) -> torch.Tensor:
    """Energy of changes along each axis, over that of all, as logarithms, (N, 3)."""
    steps = [np.square(np.diff(layers, axis=axis)).mean((1, 2, 3)) for axis in (1, 2, 3)]
    found = np.log(np.stack(steps, 1))
    return torch.from_numpy(found - found.mean(1, keepdims=True)).float()


def _middle(values: np.ndarray, side: int) -> np.ndarray:
    """Cut a cube out of the middle, or all there is along shorter axes."""
    cuts = [slice(max(0, n - side) // 2, max(0, n - side) // 2 + side) for n in values.shape[1:]]
    return values[(slice(None), *cuts)]


@pytest.mark.parametrize(("sample", "scan"), SCANS)
@pytest.mark.parametrize("side", [64, 32, 24], ids=["whole", "window", "small window"])
def test_statistics_do_not_tell_the_classes(exams, sample, scan, side) -> None:
    values, labels = _scans(exams, sample, scan)
    found = statistics(_middle(values, side))
    assert linear_probe_accuracy(found, labels) < 0.4  # chance is 0.25
    assert knn_accuracy(found, labels) < 0.4


@pytest.mark.parametrize(("sample", "scan"), SCANS)
def test_direction_of_the_layers_tells_the_classes(exams, sample, scan) -> None:
    values, labels = _scans(exams, sample, scan)
    x = torch.from_numpy(np.log(values.clip(0) + 0.2) if scan != "ct" else values.clip(-200, 300))
    if scan == "scan":  # CT, from -1000 on, beside MR
        x = torch.from_numpy(values)
    x = torch.nn.functional.avg_pool3d(_unit(x)[:, None], 4, 2)[:, 0].numpy()
    assert linear_probe_accuracy(energies(_middle(x, 9)), labels) > 0.6


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Standardise the middle of every item, where it has tissue, and clip."""
    flat = torch.from_numpy(_middle(x.numpy(), 24)).flatten(1)
    low, high = flat.quantile(0.05, 1), flat.quantile(0.95, 1)
    scaled = (x - low.view(-1, 1, 1, 1)) / (high - low).view(-1, 1, 1, 1)
    return scaled.clip(0, 1)


@pytest.mark.parametrize("sample", ["petct", "brain"])
def test_layers_are_what_the_scans_of_an_exam_share(exams, sample) -> None:
    shared, other = [], []
    pairs = zip(exams[sample][:12], exams[sample][12:24], strict=True)
    for (scans, layers), (_, strange) in pairs:
        inside = (layers != 0) & (strange != 0)
        for name, values in scans.items():
            x = values[inside] if name == "ct" else np.log(values[inside] + 0.2)
            shared.append(abs(np.corrcoef(x, layers[inside])[0, 1]))
            other.append(abs(np.corrcoef(x, strange[inside])[0, 1]))
    assert np.mean(shared) > 0.45 and np.mean(other) < 0.15


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_classes_are_balanced_and_patients_are_in_one_split(plan) -> None:
    rows = [plan.row(split, n, {}) for split, total in plan.exams.items() for n in range(total)]
    assert len({row["id"] for row in rows}) == len(rows)
    splits = {s: {r["patient"] for r in rows if r["split"] == s} for s in ("train", "val")}
    assert not splits["train"] & splits["val"]
    assert len(splits["val"]) == plan.exams["val"] * 7 // 8
    for split, count in plan.exams.items():
        for half in (0, 1):  # CT and MR
            assert np.bincount(plan.classes(split)[half::2]).tolist() == [count // 8] * 4
    assert {row["label"] for row in rows} == set(plan.patterns)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("sample", PLANS)
def test_files_hold_the_phantom_whatever_their_axes(tmp_path: Path, sample, number) -> None:
    row = WRITERS[sample](tmp_path, "val", number)
    affines = []
    for name, values in _draw(sample, number)[0].items():
        scan = read_scan(str(tmp_path / row[name]), Reading())
        step = {"ct": 0.51, "pet": 0.006, "scan": 2.1}.get(name, 0.51)
        np.testing.assert_allclose(scan.values[0], values, atol=step)
        affines.append(scan.affine)
        if number == 4:
            assert scan.facts.format == "nifti"
    assert all(np.allclose(affines[0], affine, atol=1e-3) for affine in affines)
    first = nibabel.load(tmp_path / row[next(iter(_draw(sample, number)[0]))])
    place = number // 2 if sample == "ctmr" else number
    assert nibabel.aff2axcodes(first.affine) == tuple(ORIENTATIONS[place % len(ORIENTATIONS)])
    assert first.header.get_xyzt_units()[0] == "mm"


def test_one_case_is_a_dicom_series_on_the_grid_of_its_labels(tmp_path: Path) -> None:
    row, exam = write_ctmr(tmp_path, "train", 0), ctmr("train", 0)
    scan = read_scan(str(tmp_path / row["scan"]), Reading())
    labels = read_labels(str(tmp_path / row["mask"]), Reading())
    assert scan.facts.modality == "CT" and row["source"] == "ct"
    assert scan.valid is not None and not scan.valid[0, 0, 0] and scan.valid[32, 32, 32]
    np.testing.assert_allclose(scan.values[0][scan.valid], exam.scan[scan.valid], atol=2.1)
    np.testing.assert_allclose(scan.affine, labels.affine, atol=1e-3)
    np.testing.assert_array_equal(labels.values[0], exam.labels)
    assert exam.labels.max() == len(TISSUES) - 1


def test_a_quarter_turn_leaves_the_pattern_of_upright_tissue_as_it_is() -> None:
    bodies = [(UPRIGHT, number, upright_ct("val", number).layers) for number in range(12)]
    heads = [(HEADS, number, upright_head("val", number).layers) for number in range(6)]
    for plan, number, layers in [*bodies, *heads]:
        layers = layers[:, 8:32, 8:32] if (layers[20] != 0).all() else layers[8:32, 8:32, 8:32]
        x, y, z = energies(layers[None])[0].tolist()
        name = plan.patterns[plan.classes("val")[number]]
        assert {"axial": z > x + 1 and z > y + 1, "fibres": z < x - 1 and z < y - 1}.get(
            name, abs(x - y) < 1
        ), (name, x, y, z)


def test_lesions_show_in_some_contrasts_only() -> None:
    heads = [brain("train", number) for number in range(24)]
    changes: dict[str, list[list[float]]] = {name: [[], []] for name in CONTRASTS}
    for head in heads:
        for name, values in head.scans.items():
            healthy = np.median(values[(head.lesions == 0) & (head.layers != 0)])
            for kind in (1, 2):
                if (head.lesions == kind).sum() > 10:
                    ratio = np.median(values[head.lesions == kind]) / healthy
                    changes[name][kind - 1].append(float(ratio))
    oedema, core = ({n: np.mean(c[i]) for n, c in changes.items()} for i in (0, 1))
    assert min(oedema["t2"], oedema["flair"]) > 1.3 and oedema["t1"] < 1.1
    assert core["t1c"] > 1.4 and core["t1"] < 1.2


def test_some_exams_of_the_brain_lack_a_contrast(exams) -> None:
    counts = [len(scans) for scans, _ in exams["brain"]]
    assert set(counts) == {3, 4} and 8 < counts.count(3) < 32
    gone = {name for scans, _ in exams["brain"] for name in CONTRASTS if name not in scans}
    assert gone == set(CONTRASTS)


@pytest.mark.parametrize("sample", PLANS)
def test_files_are_the_same_every_time(tmp_path: Path, sample) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        WRITERS[sample](tmp_path / folder, "train", 0)
    paths = [path for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert paths
    for path in paths:
        twin = tmp_path / "second" / path.relative_to(tmp_path / "first")
        assert path.read_bytes() == twin.read_bytes()


@pytest.mark.parametrize(("sample", "columns"), [
    ("petct", "id patient split ct pet label"),
    ("upright", "id patient split ct label"),
    ("heads", "id patient split t1 label"),
    ("ctmr", "id patient split scan source label mask"),
    ("brain", "id patient split t1 t1c t2 flair label mask"),
])  # fmt: skip
def test_manifest_lists_exams_with_paths_that_exist(
    tmp_path: Path, monkeypatch, sample, columns
) -> None:
    monkeypatch.setitem(PLANS[sample].exams, "train", 4)  # type: ignore[arg-type]
    monkeypatch.setitem(PLANS[sample].exams, "val", 2)  # type: ignore[arg-type]
    volumes.build(sample, tmp_path)
    with open(tmp_path / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == columns.split()
    assert [row["split"] for row in rows] == ["train"] * 4 + ["val"] * 2
    files = {"ct", "pet", "scan", "mask", *CONTRASTS} & set(rows[0])
    assert all((tmp_path / row[name]).exists() for row in rows for name in files if row[name])


def test_an_unknown_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sample:petc: no such sample.*Did you mean 'petct'"):
        volumes.sample_root("petc")


@pytest.mark.parametrize("sample", ["organs", "lesions"])
def test_regions_are_told_by_their_layers_and_not_by_brightness(sample: str) -> None:
    exams = [organs("val", n) if sample == "organs" else lesions("val", n) for n in range(8)]
    maps = [exam.labels if isinstance(exam, CtOrMr) else exam.lesions for exam in exams]
    kinds = range(int(max(labels.max() for labels in maps)) + 1)
    axes = (0, 1, 2) if sample == "organs" else (0, 2)  # across which the layers of a kind change
    levels, spreads, steepest = [], [], []
    for exam, labels in zip(exams, maps, strict=True):
        inside = exam.layers != 0
        parts = [inside & (labels == kind) for kind in kinds]
        values = [exam.layers[part] for part in parts]
        levels.append([float(v.mean()) for v in values])
        spreads.append([float(v.std()) for v in values])
        for part, axis in zip(parts[1:], axes, strict=True):
            steps = [np.square(np.diff(exam.layers, axis=a)) for a in range(3)]
            there = [np.delete(part, -1, axis=a) for a in range(3)]
            found = [float(s[t].mean()) for s, t in zip(steps, there, strict=True)]
            steepest.append(int(np.argmax(found)) == axis)
    assert np.abs(np.mean(levels, 0)).max() < 0.35 and np.ptp(np.mean(spreads, 0)) < 0.25
    assert np.mean(steepest) > 0.85


@pytest.mark.parametrize("write", [write_organs, write_lesions])
def test_maps_of_regions_lie_on_the_grid_of_their_scans(tmp_path: Path, write) -> None:
    row = write(tmp_path, "val", 3)
    labels = read_labels(str(tmp_path / row["mask"]), Reading())
    scan = read_scan(str(tmp_path / row["scan" if "scan" in row else "t2"]), Reading())
    np.testing.assert_allclose(scan.affine, labels.affine, atol=1e-3)
    drawn = organs("val", 3).labels if "scan" in row else lesions("val", 3).lesions
    np.testing.assert_array_equal(labels.values[0], drawn)
    assert ORGANS.row("val", 3, row)["label"] == ""


def test_when_the_tissue_of_a_patient_changed_is_told_by_the_layers_of_its_visits_alone() -> None:
    patients = [visits("val", number) for number in range(48)]
    classes = VISITS.classes("val")[:48]
    for patient, changed in zip(patients, classes, strict=True):
        assert patient.days[0] == 0 and all(150 <= n < 240 for n in np.diff(patient.days))
        found = energies(np.stack(patient.layers))
        is_axial = (found[:, 2] > found[:, 0]).tolist()  # steps along z
        assert is_axial == [False] * (4 - changed) + [True] * changed
    raw = [
        torch.cat([f.mean(0), f.std(0)])
        for f in (statistics(_middle(np.stack(patient.scans), 24)) for patient in patients)
    ]
    labels = torch.from_numpy(classes)
    assert linear_probe_accuracy(torch.stack(raw), labels) < 0.5  # chance is 0.25


def test_visits_are_rows_with_days_of_patients_with_one_class(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(VISITS.exams, "train", 2)  # type: ignore[arg-type]
    monkeypatch.setitem(VISITS.exams, "val", 1)  # type: ignore[arg-type]
    volumes.build("visits", tmp_path)
    wanted = Wanted(contrasts={"flair": "flair"}, mask="", dates="day")
    exams = find_exams(str(tmp_path), wanted).items
    assert [exam.id for exam in exams[:5]] == [
        "t000_v0",
        "t000_v1",
        "t000_v2",
        "t000_v3",
        "t001_v0",
    ]
    whose: dict[str, list[Any]] = {}
    for exam in exams:
        whose.setdefault(exam.patient, []).append(exam)
    assert len(whose) == 3
    for number, own in enumerate(list(whose.values())[:2]):
        assert {exam.label for exam in own} == {VISITS.patterns[VISITS.classes("train")[number]]}
        assert tuple(exam.day for exam in own) == visits("train", number).days
