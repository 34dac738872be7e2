"""Visits of a patient are a series with relative days; dates themselves are kept nowhere."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exam_files import write_scan

from domainssl.datamodules.volumes import VolumeDataModule
from domainssl.errors import ConfigError, DataError
from domainssl.inspection.data import inspect_data
from domainssl.loading.source import Loading
from domainssl.modality import check_batch
from domainssl.sources.held_out import HeldOut
from domainssl.sources.volume_options import Contrast, ExamFiles, ExamWindow, Preparation

VISITS = (  # id, patient, date, value of ct, whether there is a pet
    ("late", "p1", "2020-01-31T09:30:00", 30, True),
    ("early", "p1", "2019-12-31", 10, False),
    ("middle", "p1", "20200105", 20, True),
    ("only", "p2", "2001-02-03", 40, False),
)


def _scan(path: Path, value: int, shift: float = 0.0) -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[0, 3] = shift
    write_scan(path, np.full((8, 8, 8), value, np.int16), affine)


def _manifest(root: Path, visits: Any = VISITS, shift: float = 0.0) -> Path:
    lines = ["id,patient,when,ct,pet,label"]
    for name, patient, when, value, has_pet in visits:
        _scan(root / f"{name}.nii.gz", value, shift * (name == "late"))
        if has_pet:
            _scan(root / f"{name}_pet.nii.gz", value + 1)
        lines.append(f"{name},{patient},{when},{name}.nii.gz,{f'{name}_pet.nii.gz' * has_pet},a")
    (root / "manifest.csv").write_text("\n".join(lines))
    return root


def _data(root: Path, names: tuple[str, ...] = ("ct", "pet"), **more: Any) -> VolumeDataModule:
    files = {"dates": "when", "ids": "plain", **more.pop("exams", {})}
    return VolumeDataModule(
        str(root),
        {name: Contrast(value_unit="hu" if name == "ct" else "arbitrary") for name in names},
        **{
            "global_batch_size": 2,
            "window": ExamWindow(size=6, min_foreground=0.0),
            "held_out": HeldOut(val_fraction=0.0),
            "exams": ExamFiles(**files),
            "preparation": Preparation(foreground=False),
            "loading": Loading(workers=0),
            **more,
        },
    )


def _batch(data: VolumeDataModule) -> dict[str, Any]:
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    return dict(batch)


def test_visits_are_a_series_in_the_order_of_their_days(tmp_path: Path) -> None:
    data = _data(_manifest(tmp_path))
    batch = _batch(data)
    check_batch(batch, data.modalities, training=True)
    assert data.modalities["ct"].axes == "B T C X Y Z" and batch["ct"].shape == (2, 3, 1, 6, 6, 6)
    rows = [batch["id"].index(name) for name in ("p1", "p2")]
    assert batch["ct"][rows, :, 0, 0, 0, 0].tolist() == [[10, 20, 30], [40, 0, 0]]
    assert batch["ct.dates"][rows].tolist() == [[0, 5, 31], [0, 0, 0]]
    assert batch["ct.frames"][rows].tolist() == [[True] * 3, [True, False, False]]
    assert batch["ct.valid"][rows[0]].all() and not batch["ct.valid"][rows[1], 1:].any()
    # the first visit has no pet, the other patient has none at all
    assert batch["pet"][rows[0], :, 0, 0, 0, 0].tolist() == [0, 21, 31]
    assert batch["pet.frames"][rows[0]].tolist() == [False, True, True]
    assert not batch["pet.valid"][rows[0], 0].any()
    assert batch["pet.present"][rows].tolist() == [True, False]
    assert data.persons == {"p1": 0, "p2": 1} and batch["label"].tolist() == [0, 0]


def test_at_most_so_many_visits_are_read_and_no_date_is_kept(tmp_path: Path) -> None:
    data = _data(_manifest(tmp_path), ("ct",), exams={"max_visits": 2, "ids": "hashed"})
    batch = _batch(data)
    assert sorted(map(tuple, batch["ct.dates"].tolist())) == [(0, 0), (0, 31)]
    kept = pickle.dumps(data.source("train")) + repr((data.identity(), data.describe())).encode()
    assert not any(text in kept for text in (b"2020", b"2019-12", b"2001-02"))
    assert not {"p1", "p2"} & set(batch["id"])


def test_inspect_tells_days_and_takes_none_for_a_date(tmp_path: Path) -> None:
    report = inspect_data(_data(_manifest(tmp_path), ("ct",)))
    facts = report["splits"]["train"]["modalities"]["ct"]
    assert facts["days"] == [0, 31] and "dates" not in facts
    assert not any("date" in text for text in report["problems"])


def test_a_window_is_at_one_place_in_all_visits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 100, (12, 12, 12)).astype(np.int16)
    for number in range(2):
        write_scan(tmp_path / f"{number}.nii.gz", values + 1000 * number, np.eye(4))
    table = "id,patient,when,ct\na,p,0,0.nii.gz\nb,p,400,1.nii.gz\n"
    (tmp_path / "manifest.csv").write_text(table)
    batch = _batch(_data(tmp_path, ("ct",), global_batch_size=1))
    assert (batch["ct"][0, 1] - batch["ct"][0, 0] == 1000).all()
    assert batch["ct.dates"].tolist() == [[0, 400]]


@pytest.mark.parametrize("scans", [False, True])
def test_dates_of_bids_sessions(tmp_path: Path, scans: bool) -> None:
    folder = tmp_path / "sub-01"
    for session, value in (("ses-b", 1), ("ses-a", 2)):
        _scan(folder / session / "anat" / f"sub-01_{session}_T1w.nii.gz", value)
    for session, day in (("ses-b", "1912-03-01T08:00:00"), ("ses-a", "1912-03-11T08:00:00")):
        if scans:
            text = f"filename\tacq_time\nanat/sub-01_{session}_T1w.nii.gz\t{day}\n"
            (folder / session / f"sub-01_{session}_scans.tsv").write_text(text)
    if not scans:
        text = "session_id\tacq_time\nses-a\t1912-03-11\nses-b\t1912-03-01\n"
        (folder / "sub-01_sessions.tsv").write_text(text)
    batch = _batch(_data(tmp_path, ("t1",), global_batch_size=1, exams={"dates": "acq_time"}))
    assert batch["t1.dates"].tolist() == [[0, 10]] and batch["id"] == ["sub-01"]
    assert batch["t1"][0, :, 0, 0, 0, 0].tolist() == [1, 2]


def test_what_has_no_distance_in_time_is_refused(tmp_path: Path) -> None:
    def refused(when: str, text: str, shift: float = 0.0) -> None:
        visits = (VISITS[1], (*VISITS[0][:2], when, *VISITS[0][3:]))
        with pytest.raises(DataError, match=text):
            _batch(_data(_manifest(tmp_path, visits, shift), ("ct",), global_batch_size=1))

    refused("m12", "the date of late in 'when' is neither a date such as 2019-05-03 nor")
    refused("", "1 of 2 exams have no date in 'when', such as late")
    refused("31", "holds dates and numbers of days for the exams of one patient")
    refused("2020-01-31", r"late: lies up to 1 mm \(0.5 voxels\) off, compared with .* early", 1.0)
    with pytest.raises(DataError, match="no column 'whenn' with dates.*Did you mean 'when'"):
        _batch(_data(_manifest(tmp_path), exams={"dates": "whenn"}))
    with pytest.raises(ConfigError, match="layout 'folder' states no dates"):
        _batch(_data(tmp_path, ("ct",), exams={"layout": "folder"}))
    with pytest.raises(ConfigError, match="foreground: false"):
        _data(tmp_path, preparation=Preparation())
    with pytest.raises(ConfigError, match="max_visits"):
        ExamFiles(max_visits=2)
