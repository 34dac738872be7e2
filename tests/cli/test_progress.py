"""Progress of work in pieces where stderr is the log of a job."""

from __future__ import annotations

import pytest

from domainssl.cli import progress


def test_a_log_gets_a_line_a_minute_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Bar("exams") as shown:
        for done in range(0, 201, 2):
            shown(done, 200)
            now[0] += 1.0
    lines = capsys.readouterr().err.split("\n")
    assert [line for line in lines if "exams" in line] == ["120 of 200 exams, about 0:00:40 left"]
