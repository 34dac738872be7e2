"""Benchmarks are commands: here they only have to run and to print numbers, never to be fast."""

import json
import math

import pytest

from domainssl.bench.report import SUBJECTS, Goal, Row, Settings, interleaved, ratio
from domainssl.cli import main
from domainssl.errors import ConfigError

_NEW_PROCESSES = {"startup", "evaluate"}


@pytest.mark.parametrize("subject", [name for name in SUBJECTS if name not in _NEW_PROCESSES])
def test_a_quick_run_prints_finite_positive_numbers(subject, tmp_path, capsys) -> None:
    file = tmp_path / "out.json"
    assert main(["bench", subject, "--quick", "--device=cpu", f"--json={file}"]) == 0
    report = json.loads(file.read_text())
    assert report["rows"] and {row["subject"] for row in report["rows"]} == {subject}
    for row in report["rows"]:
        assert row["values"] and all(math.isfinite(value) for value in row["values"])
        assert row["min"] <= row["median"] <= row["max"]
        may_be_negative = subject in ("overhead", "step", "tiles") or "exponent" in row["what"]
        assert may_be_negative or row["min"] > 0  # differences and slopes may have either sign
    around = report["environment"]
    assert around["device"] == "cpu" and around["threads"] > 0 and around["torch"]
    printed = capsys.readouterr().out
    assert all(row["what"] in printed for row in report["rows"])
    assert f"python -m domainssl bench {subject}" in printed


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "figures"), [("startup", 3), ("evaluate", 2)])
def test_what_starts_is_measured_in_new_interpreters(subject, figures, tmp_path) -> None:
    file = tmp_path / "out.json"
    assert main(["bench", subject, "--quick", "--device=cpu", f"--json={file}"]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == figures and all(row["median"] > 0 for row in rows)


def test_forms_of_the_loss_that_differ_are_not_compared() -> None:
    from domainssl.bench import decur

    z = decur._projections(8, 16, "cpu")
    gram, raw = decur._step(z, "gram", False), decur._step(z, "gram", True)
    decur._check_equal(z, gram, decur._step(z, "matrix", False))
    with pytest.raises(RuntimeError, match="the two forms differ by"):
        decur._check_equal(z, gram, lambda: 2 * raw())


def test_an_unknown_subject_is_refused_with_the_nearest_name(capsys) -> None:
    assert main(["bench", "strem", "--device=cpu"]) == 2
    said = capsys.readouterr().err
    assert "unknown subject 'strem'" in said and "'stream'" in said


@pytest.mark.parametrize("word", ["--rounds=0", "--batch=1", "--workers=-1", "--device=gpu"])
def test_settings_that_cannot_be_measured_are_refused(word, capsys) -> None:
    assert main(["bench", "distances", word]) == 2
    assert f"bench {word.split('=')[0]}: got" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["scan", "--workers=2"], ["tiles", "stats", "--compile"]])
def test_settings_that_no_subject_reads_are_refused(words, capsys) -> None:
    assert main(["bench", *words, "--device=cpu"]) == 2
    assert f"bench {words[-1].split('=')[0]}: is read by s" in capsys.readouterr().err


def test_a_missing_cuda_device_is_said(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        Settings(device="cuda").resolved()


def test_both_sides_run_in_turn_after_one_unmeasured_run_each() -> None:
    calls: list[str] = []
    ticks = iter(range(100))
    pairs = interleaved(
        lambda: calls.append("a"), lambda: calls.append("b"), 3, clock=lambda: float(next(ticks))
    )
    assert calls == ["a", "b"] * 4
    assert pairs == [(1.0, 1.0)] * 3


def test_a_ratio_is_taken_per_pair_and_judged_by_its_median() -> None:
    row = ratio("step", "x", [(1.0, 2.0), (2.0, 2.0), (1.0, 3.0)], Goal("at least", 2.0))
    assert row.values == (2.0, 1.0, 3.0)
    assert row.median == 2.0 and row.verdict == "met"
    assert (
        Row(subject="step", what="x", values=(2.1,), goal=Goal("at most", 2.0)).verdict == "missed"
    )
    assert Row(subject="step", what="x", values=(2.1,)).verdict == ""
