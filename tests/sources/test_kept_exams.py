"""Windows from the cache equal those of exams in memory; other preparations are other entries."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exam_files import spot_scan, write_scan

from domainssl.errors import ConfigError, StorageError
from domainssl.io.volume.exam import Exam
from domainssl.loading.plan import Piece
from domainssl.sources import preparation as module
from domainssl.sources.preparation import kept_exams
from domainssl.sources.volume_options import Contrast, ExamWindow, Preparation
from domainssl.sources.volumes import VolumeSource

CT, PET = Contrast(value_unit="hu"), Contrast()
CONTRASTS = {"ct": CT, "pet": PET}
NOT_KEPT, KEPT = Preparation(keep_mb=0), Preparation(cache="memmap")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOMAINSSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def exams(tmp_path: Path) -> list[Exam]:
    """Two exams of one grid; the second has no PET."""
    made = []
    for name in ("a", "b"):
        folder = tmp_path / name
        path = spot_scan(folder / "ct.nii.gz", noise=9)
        scans = {"ct": str(path)}
        affine = np.diag([2.0, 2, 3, 1])
        affine[:3, 3] = (-45, -20, -10)
        if name == "a":
            noise = np.random.default_rng(1).gamma(2, 3, (40, 36, 30)).astype(np.float32)
            scans["pet"] = str(write_scan(folder / "pet.nii.gz", noise, affine))
        classes = np.random.default_rng(2).integers(0, 4, (40, 36, 30)).astype(np.uint8)
        mask = write_scan(folder / "labels.nii.gz", classes, affine)
        made.append(Exam(id=name, patient=name, scans=scans, mask=str(mask)))
    return made


def key(
    exam: Exam, preparation: Preparation = KEPT, masks: bool = True, **contrasts: Contrast
) -> str:
    found = kept_exams([exam], {**CONTRASTS, **contrasts}, preparation, with_masks=masks)
    return found.keys[0]


def source(exams: list[Exam], preparation: Preparation) -> VolumeSource:
    window = ExamWindow(size=(24, 24, 16), flips=True, per_exam=3)
    kept, keys = None, []
    if preparation.cache != "none":
        kept = kept_exams(exams, CONTRASTS, preparation, with_masks=True)
        keys = [key(exam, preparation) for exam in exams]
    return VolumeSource(
        exams=exams,
        ids=[exam.id for exam in exams],
        modalities={n: c.modality(n, window.shape, None) for n, c in CONTRASTS.items()},
        contrasts=CONTRASTS,
        window=window,
        preparation=preparation,
        labels=None,
        has_masks=True,
        seed=3,
        is_training=True,
        prepared=kept,
        keys=keys,
    )


def assert_equal(a: Any, b: Any) -> None:
    assert a.data.keys() == b.data.keys()
    for name in a.data:
        np.testing.assert_array_equal(np.asarray(a.data[name]), np.asarray(b.data[name]), name)


@pytest.mark.parametrize("tier", ["memmap", "zarr"])
@pytest.mark.parametrize("spacing", [None, (2.5, 3.0, 2.0)])
def test_windows_from_disk_equal_those_from_memory(exams, tier, spacing) -> None:
    plain = replace(NOT_KEPT, spacing_mm=spacing)
    kept = replace(plain, cache=tier)
    for block in (0, 1):
        piece = Piece(block, 0, 3)
        wanted = source(exams, plain).load(piece, 1)
        assert_equal(source(exams, kept).load(piece, 1), wanted)  # prepared now
        assert_equal(source(exams, kept).load(piece, 1), wanted)  # read from disk


def test_an_exam_is_read_once_and_then_never_again(exams, monkeypatch) -> None:
    preparation = KEPT
    first = source(exams, preparation).load(Piece(0, 0, 1), 0)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(module, "prepare", refuse)
    assert_equal(source(exams, preparation).load(Piece(0, 0, 1), 0), first)
    with pytest.raises(AssertionError, match="read again"):
        source(exams, replace(preparation, margin_mm=2.0)).load(Piece(0, 0, 1), 0)


def test_entries_depend_on_all_that_changes_them_and_on_nothing_else(exams) -> None:
    exam, other = exams
    same = [replace(KEPT, keep_mb=1), replace(KEPT, cache="zarr", cache_dir="/x")]
    assert {key(exam, preparation) for preparation in same} == {key(exam)}
    others = [
        key(exam, replace(KEPT, spacing_mm=(2, 2, 2))),
        key(exam, replace(KEPT, foreground=False)),
        key(exam, replace(KEPT, resample_to="ct")),
        key(exam, replace(KEPT, cache_half=True)),
        key(exam, replace(KEPT, cache_key="content")),
        key(exam, masks=False),
        key(exam, pet=Contrast(percentiles=(0.5, 99.5))),
        key(other),
        key(replace(exam, source="ct")),
        key(replace(exam, volumes={"pet": 1})),
    ]
    assert len({key(exam), *others}) == len(others) + 1
    by_content = replace(KEPT, cache_key="content")
    before = key(exam), key(exam, by_content)
    os.utime(exam.mask, ns=(1, 1))
    assert key(exam) != before[0] and key(exam, by_content) == before[1]
    Path(exam.mask).write_bytes(Path(exam.mask).read_bytes() + b"0")
    assert key(exam, by_content) != before[1]


def test_integers_stay_integers_and_half_precision_is_checked(exams) -> None:
    half = replace(KEPT, cache_half=True)
    kept = kept_exams(exams, CONTRASTS, half, with_masks=True)
    part = kept.fetch(exams[0], key(exams[0], half)).whole()
    assert part.values["ct"].dtype == np.int16 and part.values["pet"].dtype == np.float16
    assert part.mask is not None and part.mask.dtype == np.uint8
    spread = replace(half, spacing_mm=(1.9, 1.9, 2.9))
    hot = replace(exams[1], scans={"ct": str(spot_scan(Path(exams[1].scans["ct"]), peak=31_000))})
    kept = kept_exams([hot], CONTRASTS, spread, with_masks=True)
    with pytest.raises(ConfigError, match=r"'ct' by more than 0\.5.*cache_half: false"):
        kept.make(kept.keys[0])


def test_a_full_disk_ends_a_run_and_is_no_bad_sample(exams, monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("domainssl.io.volume.cache.write_entry", refuse)
    with pytest.raises(StorageError, match="No space left on device"):
        source(exams, KEPT).load(Piece(0, 0, 1), 0)


@pytest.mark.parametrize(("name", "value"), [("cache", "zar"), ("cache_key", "contents")])
def test_an_unknown_choice_names_its_key(name, value) -> None:
    with pytest.raises(ConfigError, match=rf"preparation\.{name}: got '{value}'.*Did you mean"):
        Preparation(**{name: value})
