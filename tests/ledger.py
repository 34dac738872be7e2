"""What the tests cost: processor seconds by folder, child processes included.

The seconds of a test hold those of its fixtures and of the child processes that ended in it; what a
fixture of the whole session costs stands in a line of its own. A test that hands work to a process
which lives longer books its seconds with `add`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

__all__ = ["Ledger", "add"]

SHARED = "fixtures of the session"
COLLECTION = "imports and collection"
COSTLIEST = 25

_elsewhere = 0.0


def add(seconds: float) -> None:
    """Book processor seconds that a process which goes on running spent for the current test."""
    global _elsewhere
    _elsewhere += seconds


def _spent() -> float:
    """Processor seconds of this process, of its children that ended, and what was added."""
    times = os.times()
    return sum(times[:4]) + _elsewhere


class Ledger:
    """A pytest plugin; under xdist every worker counts and the controller prints."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.tests: dict[str, float] = {}
        self.recipes: dict[str, float] = defaultdict(float)
        self.shared = 0.0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.seconds[COLLECTION] += _spent()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        began, inner = _spent(), self.shared
        result = yield
        if fixturedef.scope == "session":  # what it asked for itself is already counted
            self.shared += _spent() - began - (self.shared - inner)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        began, shared = _spent(), self.shared
        result = yield
        seconds = _spent() - began - (self.shared - shared)
        parts = item.nodeid.split("::")[0].split("/")
        group = "/".join(parts[:2]) if len(parts) > 2 else parts[0]
        self.seconds[group] += seconds
        self.counts[group] += 1
        self.tests[item.nodeid] = seconds
        recipe = getattr(item, "callspec", None) and item.callspec.params.get("recipe")
        if isinstance(recipe, str):
            self.recipes[f"{parts[-1]} {recipe}"] += seconds
        return result

    def pytest_sessionfinish(self) -> None:
        self.seconds[SHARED] += self.shared
        output = getattr(self.config, "workeroutput", None)
        if output is not None:
            output["ledger"] = {
                "seconds": dict(self.seconds), "counts": dict(self.counts),
                "tests": self.tests, "recipes": dict(self.recipes),
            }  # fmt: skip

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        found = getattr(node, "workeroutput", {}).get("ledger", {})
        for name in ("seconds", "counts", "recipes"):
            for key, value in found.get(name, {}).items():
                getattr(self, name)[key] += value
        self.tests |= found.get("tests", {})

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if len(self.tests) < 2:
            return
        write = terminalreporter.write_line
        terminalreporter.section("processor seconds")
        for group, seconds in sorted(self.seconds.items(), key=lambda pair: -pair[1]):
            count = f"{self.counts[group]:5d} tests" if self.counts.get(group) else ""
            write(f"{seconds:8.1f}  {group:32s}{count}")
        write(f"{sum(self.seconds.values()):8.1f}  all")
        for title, found in (("tests", self.tests), ("recipes", self.recipes)):
            if found:
                terminalreporter.section(f"costliest {title}, processor seconds")
                for name in sorted(found, key=lambda name: -found[name])[:COSTLIEST]:
                    write(f"{found[name]:8.1f}  {name}")
