"""What the runs of recipes share."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def _quiet_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning's log handler keeps the stderr of the test that imported it
    monkeypatch.setattr(logging, "raiseExceptions", False)
