"""What a run on exams writes names neither files nor patients."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from exam_files import spot_scan

from domainssl.cli.run.record import _shown
from domainssl.datamodules.volumes import VolumeDataModule
from domainssl.sources.held_out import HeldOut
from domainssl.sources.volume_options import Contrast, ExamFiles

RECIPE = "recipes/petct_croma.yaml"


@pytest.fixture
def clinic(tmp_path: Path) -> Path:
    """Twelve exams whose folders name patients."""
    for i in range(12):
        place = (-12 - i, 21, 33 - i)
        case = tmp_path / "clinic" / f"Miller{i:02d}"
        spot_scan(case / "ct.nii.gz", at_mm=place, noise=20)
        spot_scan(case / "pet.nii.gz", at_mm=place, noise=20, air=0)
    return tmp_path / "clinic"


def holding(folder: Path, *words: str) -> list[str]:
    """Return the files that hold one of the words, in their names too."""
    found = []
    for path in sorted(folder.rglob("*")):
        content = path.name.encode() + (path.read_bytes() if path.is_file() else b"")
        found += [f"{path}: {word}" for word in words if word.encode() in content]
    return found


def test_no_file_of_a_run_names_a_patient(
    cli, clinic: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--config", RECIPE, f"--data.root={clinic}"]
    words += ["--data.held_out.val_fraction=0.4", "--data.global_batch_size=4"]
    words += ["--data.preparation.cache=memmap", "--data.preparation.cache_dir=kept"]
    monkeypatch.setattr("sys.argv", ["domainssl", "fit", *words])
    run = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--run_dir=run"]
    run += ["--trainer.check_val_every_n_epoch=1", "--callbacks.panels.init_args.every_n_epochs=1"]
    result = cli("fit", *words, *run)
    assert result.status == 0, result.text
    assert str(clinic) in result.text  # the terminal shows what the user gave
    assert (folder / "run" / "backbone").is_dir() and any((folder / "kept").rglob("*.npy"))
    assert holding(folder / "run", "Miller") == holding(folder / "kept", "Miller") == []
    named = {found.split(":")[0] for found in holding(folder / "run", str(clinic))}
    assert named == {str(folder / "run" / "config.yaml")}  # the configuration is the user's own
    (clinic / "Miller05" / "ct.nii.gz").write_bytes(b"no scan")
    stats = ["stats", *words[:3], "--jobs", "0", "--data.held_out.val_fraction=0"]
    refused = cli(*stats)
    assert refused.status == 2 and "Miller05" in refused.err
    measured = cli(*stats, "--skip_bad")
    assert measured.status in (0, 2), measured.text
    files = list(folder.glob("stats.yaml*"))
    assert files and not [f for f in files if b"Miller" in f.read_bytes()]


def test_the_command_line_is_recorded_without_root_and_patients() -> None:
    data = VolumeDataModule(
        "/data/clinic",
        {"ct": Contrast()},
        held_out=HeldOut(patients=("smith",)),
        exams=ExamFiles(manifest="smith.csv"),
    )
    words = ["fit", "--data.root=/data/clinic", "--data.root", "/data/clinic/", "--data.seed=3",
             "--data.held_out.patients=[smith]", "[smith]"]  # fmt: skip
    assert [_shown(word, data) for word in words] == [
        "fit", "--data.root=(withheld)", "--data.root", "(withheld)", "--data.seed=3",
        "--data.held_out.patients=(withheld)", "(withheld)",
    ]  # fmt: skip
    public = VolumeDataModule("/data/x", {"ct": Contrast()}, exams=ExamFiles(ids="plain"))
    assert _shown("--data.root=/data/x", public) == "--data.root=/data/x"


def test_a_table_of_ids_is_written_where_the_user_asks_for_it(clinic: Path, tmp_path: Path) -> None:
    table = tmp_path / "ids.csv"
    files = ExamFiles(id_table=str(table))
    data = VolumeDataModule(str(clinic), {"ct": Contrast(value_unit="hu")}, exams=files)
    data.setup("fit")
    assert table.stat().st_mode & 0o077 == 0
    with table.open() as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    source = data.source("val")
    assert len(rows) == 12
    assert [rows[i]["exam"] for i in source.ids] == [e.id for e in source.exams]  # type: ignore[attr-defined]


def test_phantoms_keep_their_names() -> None:
    sample = VolumeDataModule("sample:petct")
    sample.setup("fit")
    assert not sample.withheld
    assert all(not re.fullmatch("[0-9a-f]{16}", i) for i in sample.source("val").ids)  # type: ignore[attr-defined]
