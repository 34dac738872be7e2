"""What the cells of the matrix have measured, kept as JSON beside the page that shows it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from domainssl.errors import ConfigError
from domainssl.evaluation.criteria import Criterion
from domainssl.files import write_text
from domainssl.matrix.cells import Cell
from domainssl.matrix.runs import Finished, Outcome

__all__ = ["Entry", "Measured", "merged", "read_record", "write_record"]

_KEPT = ("probe/", "retrieval/", "rankme/", "items", "classes")
_SOURCES = ("val/", "val/raw/", "val/untrained/")
_DIGITS = 5
_LIBRARIES = ("domainssl", "python", "torch", "lightning", "numpy")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run of a cell.

    Attributes:
        seed: Of everything random.
        outcome: What it measured; None when it failed.
        cost: `cpu_seconds`, `wall_seconds`, `memory_mb`.
        commit: Revision of the code, with `+` for local changes; empty outside a repository.
        versions: Of the libraries.
        error: Last line of a run that failed.
    """

    seed: int
    outcome: Outcome | None
    cost: Mapping[str, float] = field(default_factory=dict)
    commit: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    error: str = ""

    def criteria(self) -> list[Criterion]:
        """Judge the run; nothing where it failed."""
        return [] if self.outcome is None else self.outcome.criteria()

    @property
    def has_learned(self) -> bool:
        """Whether the run ended and met every criterion."""
        return self.outcome is not None and self.outcome.has_learned


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A cell with its runs.

    Attributes:
        name: Of the cell.
        objective: Class of the method.
        column: Kind of data.
        is_recipe: Whether a recipe holds the cell.
        recipes: Where model and data come from.
        sha256: Hash of the configuration.
        reason: Why the cell cannot exist; empty where it can.
        runs: By seed.
    """

    name: str
    objective: str
    column: str
    is_recipe: bool
    recipes: tuple[str, ...]
    sha256: str
    reason: str = ""
    runs: tuple[Measured, ...] = ()

    @property
    def outcomes(self) -> list[Outcome]:
        """What the runs that ended measured."""
        return [run.outcome for run in self.runs if run.outcome is not None]

    @property
    def mean(self) -> Outcome | None:
        """The mean of every metric over the runs; None where there is none, or one failed."""
        found = self.outcomes
        if not found or len(found) < len(self.runs):
            return None
        names = dict.fromkeys(name for outcome in found for name in outcome.metrics)
        means = {k: statistics.fmean(o.metrics.get(k, math.nan) for o in found) for k in names}
        return replace(found[0], metrics=means)


def _entry(cell: Cell, runs: Sequence[Measured]) -> Entry:
    return Entry(
        name=cell.name,
        objective=cell.objective,
        column=cell.column,
        is_recipe=cell.is_recipe,
        recipes=cell.recipes,
        sha256=cell.sha256,
        reason=cell.reason,
        runs=tuple(sorted(runs, key=lambda run: run.seed)),
    )


def merged(
    cells: Sequence[Cell], before: Sequence[Entry], finished: Sequence[Finished]
) -> list[Entry]:
    """Return all cells with their runs: new ones, and earlier ones of the same configuration.

    Args:
        cells: Every cell that there is now; what an earlier record holds beside them is dropped.
        before: The earlier record.
        finished: Runs of this call.
    """
    earlier = {(entry.name, entry.sha256): entry for entry in before}
    entries = []
    for cell in cells:
        known = earlier.get((cell.name, cell.sha256))
        runs = {run.seed: run for run in (known.runs if known else ())}
        runs |= {each.run.seed: _measured(each) for each in finished if each.run.name == cell.name}
        entries.append(_entry(cell, list(runs.values())))
    return entries


def _measured(finished: Finished) -> Measured:
    seed = finished.run.seed
    if finished.outcome is None:
        lines = finished.error.strip().splitlines() or ["failed"]
        return Measured(seed=seed, outcome=None, error=lines[-1])
    git = finished.surroundings.get("git")
    commit = f"{git['commit'][:10]}{'+' if git['has_local_changes'] else ''}" if git else ""
    found = finished.surroundings.get("versions", {})
    values = asdict(finished.outcome)
    metrics = {
        key: round(value, _DIGITS)
        for key, value in finished.outcome.metrics.items()
        if any(key.startswith(f"{source}{kept}") for source in _SOURCES for kept in _KEPT)
    }
    return Measured(
        seed=seed,
        outcome=Outcome(**{**values, "metrics": metrics}),
        cost={key: round(value, 1) for key, value in finished.cost.items()},
        commit=commit,
        versions={name: found[name] for name in _LIBRARIES if name in found},
    )


def write_record(path: Path, entries: Sequence[Entry]) -> None:
    """Write the entries as JSON, one line per run, so that a change shows as one."""
    cells = []
    for entry in entries:
        content = asdict(entry)
        runs = ",\n   ".join(json.dumps(run, sort_keys=True) for run in content.pop("runs"))
        text = json.dumps(content, sort_keys=True)
        cells.append(f'{text[:-1]}, "runs": [{runs}]}}')
    write_text(path, "[\n " + ",\n ".join(cells) + "\n]\n")


def read_record(path: Path) -> list[Entry]:
    """Read what `write_record` has written; nothing where there is no file.

    Raises:
        ConfigError: The file holds something else.
    """
    if not path.is_file():
        return []
    try:
        return [_read_entry(content) for content in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"matrix --write: {path} is no record of the matrix ({error}). Move it away, or name "
            "another page; the record lies beside the page, with the ending .json."
        ) from error


def _read_entry(content: dict[str, Any]) -> Entry:
    runs = []
    for run in content.pop("runs"):
        outcome = run.pop("outcome")
        runs.append(Measured(outcome=Outcome(**outcome) if outcome else None, **run))
    content["recipes"] = tuple(content["recipes"])
    return Entry(**content, runs=tuple(runs))
