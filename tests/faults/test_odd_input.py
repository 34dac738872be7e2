"""Damaged small files, odd names and folders: one message of ours, status 2, nothing raw."""

from __future__ import annotations

import errno
import json
import logging
import os
import warnings
from pathlib import Path

import pytest
import torch
from cli_runs import RECIPE

from domainssl import load_backbone
from domainssl.backbones.card import export_backbone
from domainssl.backbones.croma import CROMABackbone
from domainssl.cache import clear, entries, locked_build
from domainssl.cli import main
from domainssl.cli.config.nodes import Mistake, parse
from domainssl.cli.console import console, printable_logs
from domainssl.datamodules.statistics import statistics_of
from domainssl.errors import ConfigError, DataError, WeightsError
from domainssl.io.ssl4eo.labels import labels
from domainssl.modality import Modality
from domainssl.screen import printable

S1 = Modality(name="s1", kind="image", channels=("VV", "VH"), value_unit="db", size=(16, 16),
              gsd_m=10.0, mean=(-12.0, -19.0), std=(5.0, 6.0))  # fmt: skip


# ------------------------------------------------------------------------------------- names


def test_control_characters_are_written_out():
    assert printable("plain ünïcode 漢字\n\tx") == "plain ünïcode 漢字\n\tx"
    assert printable("\x1b[31mred\x07\r\x9b\u202e\udcff") == r"\x1b[31mred\x07\r\x9b\u202e\udcff"


@pytest.mark.parametrize(
    "name", ["\x1b[31mred\x07", "[/x]", "[bold]", "a b", "-x", "ü\u202e", "n" * 240, "\udcff"]
)
def test_a_file_of_any_name_gives_one_message_and_nothing_raw(tmp_path, capsys, name):
    path = tmp_path / f"{name}.tif"
    path.parent.mkdir(exist_ok=True)  # a name with a slash is a folder and a file
    path.write_bytes(b"x")
    for words, status in (([str(path)], 1), ([str(tmp_path)], 1), ([str(path) + "x"], 2)):
        assert main(["inspect", *words]) == status
        found = "".join(capsys.readouterr())
        assert "Traceback" not in found and "\x1b" not in found and "\u202e" not in found
        if name in ("[/x]", "[bold]", "a b"):
            assert name in found


@pytest.mark.parametrize("name", ["[/x]", "\x1b[31m", "n" * 300, "a\0b", "../" * 2000])
def test_a_configuration_or_path_of_any_name_gives_status_2(folder, capsys, name):
    (folder / "tiny.yaml").write_text(RECIPE)
    for words in (
        ["inspect", name],
        ["fit", f"--config={name}.yaml"],
        ["fit", "--config=tiny.yaml", f"--ckpt_path={name}"],
        ["export", f"--checkpoint={name}", "--output=out"],
    ):
        assert main(words) == 2
        found = "".join(capsys.readouterr())
        assert "Traceback" not in found and "\x1b" not in found


def test_names_are_written_out_in_tables_logs_and_warnings(capsys):
    from rich.table import Table

    table = Table("name")
    table.add_row("\x1b[2J")
    console().print(table)
    assert "\\x1b" in capsys.readouterr().out
    record = logging.getLogRecordFactory()
    with printable_logs():
        logging.getLogger("x").warning("%s", "\x1b[2J")
        assert warnings.formatwarning("\x1b", UserWarning, "f", 1).count("\x1b") == 0
    assert logging.getLogRecordFactory() is record
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EEXIST, errno.EISDIR]
)
def test_a_folder_that_cannot_be_used_is_one_message(monkeypatch, capsys, number):
    import domainssl.cli.verbs.doctor as verb

    def fail(_: object) -> int:
        raise OSError(number, os.strerror(number), "some\x1bwhere" + "n" * 400)

    monkeypatch.setattr(verb, "run", fail)
    assert main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert os.strerror(number) in error and "Traceback" not in error and "\x1b" not in error


def test_a_run_dir_that_is_a_file_is_one_message(folder, capsys):
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "file").write_text("x")
    for place in ("file", "file/below"):
        assert main(["fit", "--config=tiny.yaml", f"--run_dir={place}"]) == 2
        found = "".join(capsys.readouterr())
        assert "Traceback" not in found and "file" in found
    assert (folder / "file").read_text() == "x"


# -------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{a: " * 5_000, "- " * 3_000 + "x", "a: " + "[" * 60 + "]" * 60]
)
def test_deep_nesting_is_a_mistake_with_its_place(text):
    mistakes: list[Mistake] = []
    parse(text, "deep.yaml", mistakes)
    assert len(mistakes) == 1
    assert "nested more than" in str(mistakes[0]) or "Not valid YAML" in str(mistakes[0])
    assert "deep.yaml" in str(mistakes[0])


def test_aliases_that_unfold_to_billions_are_a_mistake():
    text = "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    for one, two in zip("abcdefghi", "bcdefghij", strict=True):
        text += f"{two}: &{two} [{','.join([f'*{one}'] * 10)}]\n"
    mistakes: list[Mistake] = []
    parse(text, "bomb.yaml", mistakes)
    assert "unfolds to an enormous tree" in str(mistakes[0])


@pytest.mark.parametrize(
    "content",
    [b"[" * 2_000, b"\xff\xfe\x00", b"a: &a [1]\ns1: *a", b"s1: {mean: x}", b"s1: 3", b"", b"- 1",
     b"s1: {mean: [1, .nan], std: [1, 1]}", b"s1: {mean: [1], std: [1]}", b"s1: {std: [1, 1]}",
     b"2020-13-45"],
)  # fmt: skip
def test_statistics_that_make_no_sense_are_a_configuration_error(tmp_path, content):
    path = tmp_path / "statistics.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="statistics"):
        statistics_of(S1, str(path))


# ---------------------------------------------------------------------------- cards and tables


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = CROMABackbone(
        {"s1": S1, "s2": {**S1.to_dict(), "name": "s2"}}, width=32, depth=2, heads=2
    )
    return export_backbone(backbone, tmp_path_factory.mktemp("export")).parent


@pytest.mark.parametrize(
    "change",
    [
        {"arguments": None}, {"arguments": {}}, {"arguments": {"patch": 0}}, {"sha256": 3},
        {"name": ["CROMABackbone"]}, {"name": "os.system"}, {"format": "other"}, {"more": 1},
        {"modalities": []}, {"sha256": ...}, {"name": ...}, {"arguments": ...},
    ],
)  # fmt: skip
def test_a_card_with_missing_or_wrong_fields_is_named(exported, tmp_path, change):
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    card = json.loads((tmp_path / "backbone.json").read_text())
    for key, value in change.items():
        card.pop(key, None) if value is ... else card.update({key: value})
    (tmp_path / "backbone.json").write_text(json.dumps(card))
    with pytest.raises(WeightsError, match=r"backbone|Unknown"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 200_000, b"\xff", b"3"])
def test_a_card_that_is_something_else_is_named(exported, tmp_path, content):
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "backbone.json").write_bytes(content)
    with pytest.raises(WeightsError, match=r"backbone\.json"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    "facts", [{}, {"name": 3, "arguments": {}}, {"name": "CROMABackbone", "arguments": {}}]
)
def test_a_checkpoint_with_an_odd_backbone_entry_is_named(tmp_path, facts):
    torch.save({"backbone": facts, "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(WeightsError, match=r"a\.ckpt"):
        load_backbone(tmp_path / "a.ckpt")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_a_damaged_cache_entry_is_listed_and_can_be_cleared(tmp_path, monkeypatch, content):
    monkeypatch.setenv("DOMAINSSL_CACHE", str(tmp_path))
    built = locked_build("thing", "1", lambda folder: None)
    (built / ".domainssl.json").write_bytes(content)
    assert [(e.name, e.version) for e in entries()] == [("thing-1", "?")]
    assert clear("thing-1") == [built] and not built.exists()


@pytest.mark.parametrize(
    "content",
    ["sample,label\nä,0\n".encode("latin-1"), "sample,label\na,0\n".encode("utf-16"), b"",
     b"sample;label\na;0\n", b"sample,label\na,x\n", b"sample,label\na,99999999999999999999\n",
     b"sample,label\na,-1\n", b'sample,label\n"a' + b"x" * 200_000, b"PK\x03\x04" + bytes(100)],
)  # fmt: skip
def test_labels_in_another_encoding_or_form_are_named(tmp_path, content):
    path = tmp_path / "labels" / "train.csv"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.csv"):
        labels(str(tmp_path), "train")
