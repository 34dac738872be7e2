"""Exams: places and values survive reading, resampling and cropping; what is missing is masked."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from exam_files import SPOT_MM, spot, spot_scan, write_scan

from domainssl.datamodules.volumes import VolumeDataModule
from domainssl.errors import ConfigError, DataError
from domainssl.inspection.data import subject_of
from domainssl.inspection.statistics import measure
from domainssl.io.volume.exam import Exam
from domainssl.io.volume.scan import Reading
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading
from domainssl.pieces import Plan
from domainssl.sources.augmentation import Augmentation
from domainssl.sources.held_out import HeldOut
from domainssl.sources.preparation import prepare
from domainssl.sources.volume_options import (
    Contrast,
    ExamFiles,
    ExamLabels,
    ExamWindow,
    Preparation,
)

CT = {"ct": Contrast(value_unit="hu")}
NONE = HeldOut(val_fraction=0.0)


def _batches(data: VolumeDataModule, epoch: int = 0) -> list[dict[str, Any]]:
    data.setup("fit")
    data.epoch = epoch
    return list(data.train_dataloader())


def _data(root: Path, modalities: dict[str, Contrast] | None = None, **more: Any) -> Any:
    arguments: dict[str, Any] = {
        "held_out": NONE,
        "global_batch_size": 1,
        "window": ExamWindow(size=(24, 24, 16), min_foreground=0.0),
        "exams": ExamFiles(ids="plain"),
        "loading": Loading(workers=0),
        **more,
    }
    return VolumeDataModule(str(root), modalities or CT, **arguments)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("spacing", [None, (2.5, 3.0, 2.0)])
def test_a_bright_spot_keeps_its_place_in_the_world(
    tmp_path: Path, codes: str, spacing: tuple[float, float, float] | None
) -> None:
    spot_scan(tmp_path / "p1" / "ct.nii.gz", codes=codes)
    window = ExamWindow(size=(40, 40, 44), flips=True, quarter_turns=True)
    data = _data(tmp_path, window=window, preparation=Preparation(spacing_mm=spacing))
    step = max(spacing or (2.0, 2.0, 3.0))
    for epoch in range(3):
        (batch,) = _batches(data, epoch)
        values = np.where(batch["ct.valid"][0], batch["ct"][0, 0], -1000)
        assert np.abs(spot(values, batch["ct.affine"][0]) - SPOT_MM).max() <= step
        lengths = sorted(np.linalg.norm(np.array(batch["ct.affine"][0])[:3, :3], axis=0))
        assert np.allclose(lengths, sorted(spacing or (2.0, 2.0, 3.0)))


def test_a_small_exam_is_padded_and_the_padding_is_not_valid(tmp_path: Path) -> None:
    spot_scan(tmp_path / "p1" / "ct.nii.gz", shape=(12, 20, 10), at_mm=(-33, 0, 5))
    (batch,) = _batches(_data(tmp_path, preparation=Preparation(foreground=False)))
    valid = batch["ct.valid"][0]
    assert batch["ct"].shape == (1, 1, 24, 24, 16) and valid.sum() == 12 * 20 * 10
    assert batch["ct"][0, 0][valid].unique().tolist() == [-1000.0, 40.0, 1000.0]
    assert not batch["ct"][0, 0][~valid].any()


def test_the_volume_is_cut_to_what_is_not_air(tmp_path: Path) -> None:
    spot_scan(tmp_path / "p1" / "ct.nii.gz", shape=(32, 32, 24))
    data = _data(tmp_path, preparation=Preparation(margin_mm=2.0))
    (batch,) = _batches(data)
    source: Any = data.source("train")
    found, _ = source._volume(0)
    assert found.shape == (32 - 8 + 2, 32 - 8 + 2, 24 - 8 + 2)  # a voxel of margin on every side
    assert batch["ct.valid"].all()


def test_a_window_of_air_is_not_valid_and_the_body_is_sought_first(tmp_path: Path) -> None:
    shape = (60, 20, 20)
    values = np.full(shape, -1000, np.int16)
    values[:12] = 40
    write_scan(tmp_path / "p1" / "ct.nii.gz", values, np.diag([1.0, 1, 1, 1]))
    whole = Preparation(foreground=False)
    seek = ExamWindow(size=(10, 10, 10), min_foreground=0.9, tries=200)
    (batch,) = _batches(_data(tmp_path, window=seek, preparation=whole))
    assert (batch["ct"] == 40).float().mean() >= 0.9 and batch["ct.valid"].all()
    take = ExamWindow(size=(10, 10, 10), min_foreground=0.0)
    data = _data(tmp_path, window=take, preparation=whole)
    data.setup("fit")
    found = set()
    for epoch in range(24):
        rows = data.source("train").load(Piece(0, 0, 1), epoch).data
        has_body = bool((rows["ct"] == 40).any())
        assert bool(rows["ct.valid"].any()) == has_body
        found.add(has_body)
    assert found == {True, False}


def test_limits_are_percentiles_of_the_whole_volume_or_the_window_in_hu(tmp_path: Path) -> None:
    values = np.zeros((30, 30, 30), np.int16)
    values[10:20, 10:20, 10:20] = np.arange(1, 1001).reshape(10, 10, 10)
    write_scan(tmp_path / "p1" / "mr.nii.gz", values, np.eye(4))
    data = _data(
        tmp_path,
        {"mr": Contrast(percentiles=(5, 95))},
        window=ExamWindow(size=(4, 4, 4), per_exam=3),
    )
    limits = [batch["mr.window"][0, 0].tolist() for batch in _batches(data)]
    expected = np.percentile(np.arange(1, 1001), (5, 95)).tolist()
    assert np.allclose(limits, [expected] * 3, rtol=1e-6)
    spot_scan(tmp_path / "p1" / "ct.nii.gz")
    (batch,) = _batches(_data(tmp_path))
    assert batch["ct.window"][0, 0].tolist() == [-1000.0, 1000.0]


def test_a_missing_contrast_is_absent_and_its_filler_finite(tmp_path: Path) -> None:
    spot_scan(tmp_path / "p1" / "t1.nii.gz", air=0)
    spot_scan(tmp_path / "p1" / "t2.nii.gz", air=0)
    spot_scan(tmp_path / "p2" / "t1.nii.gz", air=0)
    both = {"t1": Contrast(), "t2": Contrast()}
    batches = {b["id"][0]: b for b in _batches(_data(tmp_path, both))}
    assert batches["p1"]["t2.present"].tolist() == [True]
    absent = batches["p2"]
    assert absent["t2.present"].tolist() == [False] and not absent["t2.valid"].any()
    assert absent["t2"].isfinite().all() and absent["t1.valid"].all()
    assert torch.equal(batches["p1"]["t1"], batches["p1"]["t2"])  # one window for both


def test_removed_voxels_are_not_valid(tmp_path: Path) -> None:
    spot_scan(tmp_path / "p1" / "t1.nii.gz", air=0, shape=(24, 24, 16))
    removed = np.zeros((24, 24, 16), np.uint8)
    removed[:, 12:] = 1
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = (-45.0, -20.0, -10.0)
    write_scan(tmp_path / "p1" / "anon_mask.nii.gz", removed, affine)
    data = _data(tmp_path, {"t1": Contrast()}, preparation=Preparation(foreground=False))
    (batch,) = _batches(data)
    assert torch.equal(batch["t1.valid"][0], torch.from_numpy(removed == 0))
    t1 = str(tmp_path / "p1" / "t1.nii.gz")  # nnssl has a map of each contrast
    maps = {"t1": str(tmp_path / "p1" / "anon_mask.nii.gz")}
    exam = Exam(id="e", patient="p", scans={"t1": t1, "t2": t1}, anonymized=maps)
    done = prepare(exam, dict.fromkeys(exam.scans, Contrast()), Preparation(foreground=False))
    assert np.array_equal(done.valid["t1"], removed == 0) and done.valid["t2"].all()


def test_contrasts_on_other_grids_are_refused_or_resampled(tmp_path: Path) -> None:
    spot_scan(tmp_path / "p1" / "ct.nii.gz")
    spot_scan(tmp_path / "p1" / "pet.nii.gz", spacing=(3, 3, 3), shape=(27, 24, 30), air=0)
    both = {**CT, "pet": Contrast()}
    with pytest.raises(DataError, match=r"preparation.resample_to: ct"):
        _batches(_data(tmp_path, both))
    window = ExamWindow(size=(40, 36, 30))
    data = _data(tmp_path, both, preparation=Preparation(resample_to="ct"), window=window)
    (batch,) = _batches(data)
    for name in both:
        found = spot(batch[name][0, 0].numpy(), batch[f"{name}.affine"][0])
        assert np.abs(found - SPOT_MM).max() <= 3.0, name


def test_voxels_beyond_a_resampled_map_are_of_no_class(tmp_path: Path) -> None:
    scan = spot_scan(tmp_path / "ct.nii.gz", shape=(12, 12, 10))
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = (-45.0, -20.0, 5.0)  # begins five planes higher
    mask = write_scan(tmp_path / "seg.nii.gz", np.ones((12, 12, 5), np.uint8), affine)
    exam = Exam(id="e", patient="p", scans={"ct": str(scan)}, mask=str(mask))
    options = Preparation(foreground=False, resample_to="ct")
    done = prepare(exam, CT, options, with_mask=True)
    assert done.mask is not None and [*done.mask[3, 3]] == [-1] * 5 + [1] * 5


def test_masks_and_classes_come_along(tmp_path: Path) -> None:
    rows = ["id,patient,ct,label,mask"]
    for i, label in enumerate(("b", "a", "")):
        spot_scan(tmp_path / f"e{i}" / "scan.nii.gz", shape=(20, 20, 16))
        classes = np.zeros((20, 20, 16), np.uint8)
        classes[5:9] = 3
        affine = np.diag([2.0, 2.0, 3.0, 1.0])
        affine[:3, 3] = (-45.0, -20.0, -10.0)
        write_scan(tmp_path / f"e{i}" / "labels.nii.gz", classes, affine)
        mask = "" if i == 1 else f"e{i}/labels.nii.gz"
        rows.append(f"e{i},p{i},e{i}/scan.nii.gz,{label},{mask}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    data = _data(tmp_path, preparation=Preparation(foreground=False))
    batches = {b["id"][0]: b for b in _batches(data)}
    assert data.label_names == ("a", "b") and data.num_classes == 2
    assert {n: b["label"].item() for n, b in batches.items()} == {"e0": 1, "e1": 0, "e2": -1}
    assert (batches["e1"]["mask"] == -1).all()
    mask, valid = batches["e0"]["mask"], batches["e0"]["ct.valid"]
    assert (mask == 3).sum() == 4 * 20 * 16 and torch.equal(mask == -1, ~valid)
    named = _data(tmp_path, labels=ExamLabels(classes=("b", "c")))
    with pytest.raises(ConfigError, match="'a'"):
        _batches(named)


def test_a_scan_says_whether_it_is_ct_or_mr(tmp_path: Path) -> None:
    spot_scan(tmp_path / "a.nii.gz")
    spot_scan(tmp_path / "b.nii.gz", air=0)
    table = "id,scan,source\na,a.nii.gz,ct\nb,b.nii.gz,MR\n"
    (tmp_path / "manifest.csv").write_text(table)
    scan = {"scan": Contrast(sources=("ct", "mr"))}
    data = _data(tmp_path, scan)
    batches = {b["id"][0]: b for b in _batches(data)}
    assert batches["a"]["scan.source"].tolist() == [0]
    assert data.source_names == {"scan": ("ct", "mr")} and set(data.persons) == {"a", "b"}
    assert batches["b"]["scan.source"].tolist() == [1]
    assert batches["a"]["scan.window"][0, 0].tolist() == [-1000.0, 1000.0]
    assert batches["b"]["scan.window"][0, 0].tolist() == [39.5, 40.5]
    (tmp_path / "manifest.csv").write_text(table.replace("MR", "us"))
    with pytest.raises(DataError, match=r"b\.nii\.gz: 'us', expected one of ct, mr"):
        _batches(_data(tmp_path, scan))


def test_windows_in_millimetres_need_a_voxel_size(tmp_path: Path) -> None:
    window = ExamWindow(size=(48, 48, 60), unit="mm")
    with pytest.raises(ConfigError, match="spacing_mm"):
        _data(tmp_path, window=window)
    data = _data(tmp_path, window=window, preparation=Preparation(spacing_mm=(2, 2, 3)))
    assert data.modalities["ct"].size == (24, 24, 20)
    assert data.modalities["ct"].spacing_mm == (2.0, 2.0, 3.0)


def test_patients_are_in_one_part(tmp_path: Path) -> None:
    rows = ["id,patient,ct"]
    for i in range(6):
        spot_scan(tmp_path / f"e{i}.nii.gz", shape=(12, 12, 12))
        rows.append(f"e{i},p{i // 2},e{i}.nii.gz")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    data = _data(tmp_path, held_out=HeldOut(val_fraction=0.3))
    data.setup("fit")
    parts = {s: {e.patient for e in found} for s, found in data.splits.items()}
    assert len(parts["val"]) == 1 and parts["train"] | parts["val"] == {"p0", "p1", "p2"}
    named = _data(tmp_path, held_out=HeldOut(patients=("p1",)))
    named.setup("fit")
    assert [e.id for e in named.splits["val"]] == ["e2", "e3"]
    with pytest.raises(ConfigError, match=r"no patient 'p9'"):
        _data(tmp_path, held_out=HeldOut(patients=("p9",))).setup("fit")
    with pytest.raises(ConfigError, match=r"held_out.gap"):
        _data(tmp_path, held_out=HeldOut(gap=3.0))


@pytest.mark.parametrize("tier", ["memmap", "zarr"])
def test_prepared_exams_on_disk_give_the_same_batches(tmp_path: Path, tier: str) -> None:
    for i in range(3):
        spot_scan(tmp_path / "data" / f"p{i}" / "ct.nii.gz", noise=30, shape=(30, 26, 20))
        spot_scan(tmp_path / "data" / f"p{i}" / "pet.nii.gz", air=0, shape=(30, 26, 20))
    both = {**CT, "pet": Contrast()}
    cached = Preparation(cache=tier, cache_dir=str(tmp_path / "cache"))  # type: ignore[arg-type]
    plain = _batches(_data(tmp_path / "data", both))
    data = _data(tmp_path / "data", both, preparation=cached)
    data.setup("fit")
    (what,) = data.preparations()
    assert len(what.keys) == 3 and not what.is_ready(what.keys[0])
    what.make(what.keys[0])
    for ours, theirs in zip(_batches(data), plain, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            same = torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else (
                ours[name] == value
            )  # fmt: skip
            assert same, name
    assert all(what.is_ready(key) for key in what.keys)
    other = _data(tmp_path / "data", both, preparation=replace(cached, margin_mm=0.0))
    other.setup("fit")
    assert not set(other.preparations()[0].keys) & set(what.keys)


def test_a_rotated_and_scaled_window_keeps_the_spot_at_its_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        spot_scan(tmp_path / "p1" / f"{name}.nii.gz", air=0, shape=(48, 44, 34))
    window = ExamWindow(
        size=(30, 30, 20),
        flips=True,
        quarter_turns=True,
        min_foreground=0.5,
        augmentation=Augmentation(probability=1.0, rotation_deg=25, scale=0.2),
    )
    data = _data(tmp_path, {"a": Contrast(), "b": Contrast()}, window=window)
    data.setup("fit")
    seen = 0
    for epoch in range(6):
        batch = data.source("train").load(Piece(0, 0, 1), epoch).data
        assert torch.equal(batch["a"], batch["b"]) and batch["a"].shape == (1, 1, 30, 30, 20)
        affine = np.array(batch["a.affine"][0])
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
        assert 0.79 < sizes[0] / 2 < 1.26 and abs(sizes[0] - sizes[1]) < 1e-6
        if batch["a"].max() > 900:
            seen += 1
            assert np.abs(spot(batch["a"][0, 0].numpy(), affine) - SPOT_MM).max() < 3.0
    assert seen >= 3
    again = data.source("train").load(Piece(0, 0, 1), 5).data
    assert torch.equal(again["a"], batch["a"])


def test_contrasts_share_bias_field_and_gamma_and_ct_keeps_its_units(tmp_path: Path) -> None:
    for name in ("ct", "a", "b"):
        spot_scan(tmp_path / "p1" / f"{name}.nii.gz", background=200, air=0, shape=(24, 24, 16))
    change = Augmentation(probability=1.0, bias_field=0.3, gamma=(1.5, 2.0))
    contrasts = {**CT, "a": Contrast(percentiles=(0, 100)), "b": Contrast(percentiles=(0, 100))}
    whole = Preparation(foreground=False)
    before, after = (
        _batches(_data(tmp_path, contrasts, preparation=whole, window=ExamWindow(
            size=(24, 24, 16), augmentation=augmentation)))[0]
        for augmentation in (Augmentation(), change)
    )  # fmt: skip
    assert torch.equal(before["ct"], after["ct"]) and torch.equal(after["a"], after["b"])
    assert not torch.equal(before["a"], after["a"]) and after["a"].isfinite().all()
    assert torch.equal(before["a.window"], after["a.window"])
    noisy = replace(change, bias_field=0.0, gamma=(1.0, 1.0), noise=0.1)
    (batch,) = _batches(_data(tmp_path, contrasts, preparation=whole, window=ExamWindow(
        size=(24, 24, 16), augmentation=noisy)))  # fmt: skip
    difference = batch["a"] - before["a"]
    assert 0 < difference.std() <= 0.11 * 800 and not torch.equal(batch["a"], batch["b"])


def test_volumes_of_a_file_are_exams_of_their_own_if_asked_for(tmp_path: Path) -> None:
    values = np.zeros((12, 12, 12, 3), np.int16)
    values[3:9, 3:9, 3:9] = (10, 20, 30)
    write_scan(tmp_path / "p1" / "mr.nii.gz", values, np.eye(4))
    size = ExamWindow(size=(6, 6, 6), min_foreground=1.0, tries=400)
    with pytest.raises(DataError, match="3 volumes"):
        _batches(_data(tmp_path, {"mr": Contrast()}, window=size))
    split = Contrast(reading=Reading(volume="split"))
    tight = Preparation(margin_mm=0)
    batches = _batches(_data(tmp_path, {"mr": split}, window=size, preparation=tight))
    found = {b["id"][0]: b["mr"].unique().tolist() for b in batches}
    assert found == {"p1#0": [10.0], "p1#1": [20.0], "p1#2": [30.0]}
    one = Contrast(reading=Reading(volume=1))
    (batch,) = _batches(_data(tmp_path, {"mr": one}, window=size, preparation=tight))
    assert batch["id"] == ["p1"] and batch["mr"].unique().tolist() == [20.0]


def test_a_source_is_the_same_after_pickling(tmp_path: Path) -> None:
    spot_scan(tmp_path / "p1" / "ct.nii.gz", noise=20)
    data = _data(tmp_path)
    data.setup("fit")
    source = data.source("train")
    here = source.load(Piece(0, 0, 1), 3).data
    assert len(pickle.dumps(source)) < 20_000  # no volume travels to the workers
    there = pickle.loads(pickle.dumps(source)).load(Piece(0, 0, 1), 3).data
    assert torch.equal(here["ct"], there["ct"]) and torch.equal(here["ct.valid"], there["ct.valid"])


def test_an_exam_that_cannot_be_read_is_named_or_replaced(tmp_path: Path) -> None:
    for i in range(4):
        spot_scan(tmp_path / f"p{i}" / "ct.nii.gz")
    good = (tmp_path / "p2" / "ct.nii.gz").read_bytes()
    (tmp_path / "p2" / "ct.nii.gz").write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=r"p2/ct\.nii\.gz[\s\S]*on_bad_sample: replace"):
        _batches(_data(tmp_path))
    loading = Loading(workers=0, max_bad_fraction=0.5)
    batches = _batches(_data(tmp_path, on_bad_sample="replace", loading=loading))
    assert len(batches) == 4 and {b["id"][0] for b in batches} == {"p0", "p1", "p3"}


def test_classes_that_are_numbers_keep_their_order(tmp_path: Path) -> None:
    spot_scan(tmp_path / "a.nii.gz")
    rows = [f"e{i},a.nii.gz,{i}" for i in (10, 9, 2)]
    (tmp_path / "manifest.csv").write_text("\n".join(["id,ct,label", *rows]))
    data = _data(tmp_path, labels=ExamLabels(names=("air", "body")))
    data.setup("fit")
    assert data.label_names == ("2", "9", "10") and data.mask_names == {0: "air", 1: "body"}


def test_classes_are_merged_by_name(tmp_path: Path) -> None:
    spot_scan(tmp_path / "a.nii.gz")
    rows = [f"e{i},a.nii.gz,{name}" for i, name in enumerate(("m1", "healthy", "m2", ""))]
    (tmp_path / "manifest.csv").write_text("\n".join(["id,ct,label", *rows]))
    data = _data(tmp_path, labels=ExamLabels(merge={"m1": "ill", "m2": "ill"}))
    data.setup("fit")
    assert data.label_names == ("healthy", "ill")
    source: Any = data.source("train")
    assert source.labels == [1, 0, 1, -1]
    with pytest.raises(ConfigError, match="no exam is of the class 'm3'; there are healthy, m1"):
        _data(tmp_path, labels=ExamLabels(merge={"m3": "ill"})).setup("fit")


def test_real_scans_and_series_reach_the_batch(shared_data: Path) -> None:
    """Means over the whole scan, as nibabel and pydicom give them; skipped without the files."""
    whole = {"preparation": Preparation(foreground=False), "labels": None}
    folder = shared_data / "medical" / "totalsegmentator"
    ct = Contrast(contrast="example_ct_sm", value_unit="hu")
    window = ExamWindow(size=(128, 128, 160))
    (batch,) = _batches(_data(folder, {"ct": ct}, window=window, **whole))
    stored = nibabel.nifti1.load(folder / "example_ct_sm.nii.gz")
    values = batch["ct"][0, 0][batch["ct.valid"][0]]
    assert len(values) == np.prod(stored.shape)
    assert values.double().mean().item() == pytest.approx(stored.get_fdata().mean(), rel=1e-6)
    series = {"ct": Contrast(contrast="*", value_unit="hu", sources=("ct", "mr"))}
    (batch,) = _batches(
        _data(folder / "ct_dicom", series, window=ExamWindow(size=(64, 64, 8)), **whole)
    )
    assert batch["ct.source"].tolist() == [0]
    assert np.linalg.norm(np.array(batch["ct.affine"][0])[:3, 2]) == pytest.approx(2.0, rel=1e-4)


def test_contrasts_of_a_decathlon_file_reach_their_modalities(tmp_path: Path) -> None:
    values = np.zeros((8, 8, 8, 2), np.float32)
    values[..., 0], values[..., 1] = 5, np.arange(8) + 1
    write_scan(tmp_path / "imagesTr" / "a.nii.gz", values, np.diag([-1.0, -1, 1, 1]))
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[0] = 2  # the first stored column lies on the right
    write_scan(tmp_path / "labelsTr" / "a.nii.gz", labels, np.diag([-1.0, -1, 1, 1]))
    entry = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
    content = {"modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "no", "2": "yes"}}
    (tmp_path / "dataset.json").write_text(json.dumps({**content, "training": [entry]}))
    contrasts = {"adc": Contrast(contrast="ADC"), "t2": Contrast(contrast="T2")}
    data = _data(tmp_path, contrasts, window=ExamWindow(size=(8, 8, 8)))
    (batch,) = _batches(data)
    assert (batch["t2"] == 5).all() and batch["adc"][0, 0, 3, 3].tolist() == [*range(1, 9)]
    assert (batch["mask"][0, -1] == 2).all() and not batch["mask"][0, :-1].any()
    assert data.mask_names == {0: "no", 2: "yes"}
    assert "segmentation maps: 1 (0 no, 2 yes)" in data.describe()


def test_the_description_tells_sizes_and_orientations_of_files(tmp_path: Path) -> None:
    spot_scan(tmp_path / "p1" / "ct.nii.gz", codes="LPS")
    spot_scan(tmp_path / "p2" / "ct.nii.gz", codes="RAS", shape=(40, 36, 34), spacing=(2, 2, 2.5))
    data = _data(tmp_path)
    data.setup("fit")
    (line,) = [text for text in data.describe() if text.startswith("ct:")]
    assert line.endswith("of 2: 40 x 36 x 30..34 voxels of 2 x 2 x 2.5..3 mm, LPS RAS, int16")


def test_statistics_of_exams_are_measured_over_valid_voxels_and_used(tmp_path: Path) -> None:
    spot_scan(tmp_path / "p1" / "ct.nii.gz", shape=(20, 20, 12), noise=30, at_mm=(500, 0, 0))
    window = ExamWindow(size=(24, 24, 16))
    data = _data(tmp_path, window=window, preparation=Preparation(margin_mm=0))
    data.setup("fit")
    measured = measure(subject_of(data, "train"), tmp_path / "stats.yaml", Plan(jobs=0))
    entry = measured.report["modalities"]["ct"]
    body = nibabel.nifti1.load(tmp_path / "p1" / "ct.nii.gz").get_fdata()[4:16, 4:16, 4:8]
    assert entry["mean"] == pytest.approx([body.mean()]) and entry["valid_pixels"] == body.size
    used = _data(tmp_path, window=window, statistics=str(tmp_path / "stats.yaml"))
    assert used.modalities["ct"].std == pytest.approx((body.std(),))


def test_statistics_that_modalities_state_reach_the_model(tmp_path: Path) -> None:
    stated = {"ct": Contrast(value_unit="hu", mean=[48.0], std=[69.0])}  # type: ignore[arg-type]
    assert _data(tmp_path, stated).modalities["ct"].mean == (48.0,)
    assert _data(tmp_path, stated).modalities["ct"].std == (69.0,)
    assert _data(tmp_path, stated, statistics="card").modalities["ct"].mean is None
    assert _data(tmp_path).modalities["ct"].mean is None


def test_stats_name_a_file_of_zeros_and_one_of_a_single_value(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in (("p1", None), ("p2", 0), ("p3", 77)):
        spot_scan(tmp_path / name / "mr.nii.gz", background=500, air=10, noise=40)
        if value is not None:
            values = np.full((40, 36, 30), value, np.int16)
            write_scan(tmp_path / name / "mr.nii.gz", values, np.diag([2.0, 2, 3, 1]))
    data = VolumeDataModule(
        str(tmp_path), {"mr": Contrast()}, 1, held_out=NONE, window=ExamWindow(size=(16, 16, 16)),
        exams=ExamFiles(ids="plain"),
    )  # fmt: skip
    data.setup("fit")
    found = measure(subject_of(data, "train"), tmp_path / "stats.yaml", Plan(jobs=0))
    named = {text.partition(":")[0] for text in found.report["data"]["blank"]["mr"]}
    assert named == {"p2", "p3"}
    told = [
        record.getMessage() for record in caplog.records if "all valid voxels" in record.message
    ]
    assert len(told) == 2 and all("mr.nii.gz" in text and "leave the scan out" in text
                                  for text in told)  # fmt: skip
