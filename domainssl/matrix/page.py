"""The matrix as a Markdown page: a picture, the cells at a glance, probes, retrieval, reasons."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from domainssl.errors import ConfigError
from domainssl.evaluation.criteria import GAIN, RETRIEVAL_FACTOR, Criterion
from domainssl.files import write_text
from domainssl.matrix.picture import gain
from domainssl.matrix.record import Entry, Measured
from domainssl.matrix.runs import Outcome

__all__ = ["BEGIN", "END", "check_page", "markdown", "write_page"]

BEGIN = "<!-- matrix:begin -->"
END = "<!-- matrix:end -->"


def markdown(entries: Sequence[Entry], picture: str = "") -> str:
    """Return the tables of the cells.

    Args:
        entries: Cells with their runs.
        picture: Address of the heat map, relative to the page; none without it.
    """
    run = [entry for entry in entries if entry.runs]
    trained = [entry for entry in run if entry.outcomes]
    parts = []
    if picture:
        parts.append(f"![Gain of the probe over the untrained backbone, per cell]({picture})")
    if run:
        parts += [
            "### Cells",
            _table(
                (
                    "cell", "method", "data", "raw", "untrained", "trained", "gain", "met",
                    "mean", "CPU s", "MB", "configuration",
                ),
                map(_row, run),
            ),
        ]  # fmt: skip
    missed = [line for entry in run for line in _missed(entry)]
    if missed:
        parts += ["### Missed criteria", "\n".join(missed)]
    if trained:
        parts += [
            "### Linear probe, 10 labels per class",
            _table(
                ("cell", "features", "chance", "raw", "untrained", "trained", "met"),
                (row for entry in trained for row in _probes(entry)),
            ),
        ]
        retrieved = [row for entry in trained for row in _retrievals(entry)]
        if retrieved:
            titles = ("cell", "from", "to", "chance", "untrained", "trained", "met")
            parts += ["### Retrieval, R@1", _table(titles, retrieved)]
    waiting = [entry for entry in entries if not entry.runs and not entry.reason]
    if waiting:
        names = ", ".join(f"`{entry.name}`" for entry in waiting)
        parts += ["### Not trained yet", f"{names}."]
    impossible = [entry for entry in entries if entry.reason]
    if impossible:
        rows = ((f"`{e.objective}`", e.column, e.reason.replace("|", "/")) for e in impossible)
        parts += ["### Cells that cannot exist", _table(("method", "data", "why"), rows)]
    if trained:
        parts += ["### Versions", "\n".join(f"* {line}" for line in _versions(trained))]
    return "\n\n".join(parts)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _row(entry: Entry) -> tuple[str, ...]:
    joint = entry.outcomes[0].joint if entry.outcomes else "joint"
    values = [_spread(entry.outcomes, f"val/{s}probe/{joint}") for s in ("raw/", "untrained/", "")]
    found = gain(entry)
    met = f"{sum(run.has_learned for run in entry.runs)} of {len(entry.runs)}"
    return (
        f"`{entry.name}`", entry.objective, entry.column, *values,
        "–" if found is None else f"{100 * found:+.0f}", met,
        "met" if entry.mean is not None and entry.mean.has_learned else "missed",
        _mean_cost(entry.runs, "cpu_seconds"), _mean_cost(entry.runs, "memory_mb"),
        f"`{entry.sha256[:10]}`" + ("" if entry.is_recipe else ", composed"),
    )  # fmt: skip


def _mean_cost(runs: Sequence[Measured], key: str) -> str:
    values = [run.cost[key] for run in runs if key in run.cost]
    return f"{statistics.fmean(values):.0f}" if values else "–"


def _missed(entry: Entry) -> Iterator[str]:
    for run in entry.runs:
        if run.outcome is None:
            yield f"* `{entry.name}`, seed {run.seed}: the run failed. {run.error}"
        elif told := _told(run.criteria()):
            yield f"* `{entry.name}`, seed {run.seed}: {told}"
    if entry.mean is not None and len(entry.runs) > 1 and (told := _told(entry.mean.criteria())):
        yield f"* `{entry.name}`, mean of {len(entry.runs)} seeds: {told}"


def _told(criteria: Sequence[Criterion]) -> str:
    """Return the criteria that are missed, with what was found and needed."""
    return "; ".join(
        f"{c.name} ({scale * c.found:.1f}, needed {c.relation} {scale * c.needed:.1f})"
        for c in criteria
        for scale in (100 if c.is_share else 1,)
        if not c.passed
    )


def _probes(entry: Entry) -> Iterator[tuple[str, ...]]:
    group, prefix = entry.outcomes, "val/probe/"
    for key in [key for key in group[0].metrics if key.startswith(prefix)]:
        features = key.removeprefix(prefix)
        sources = ("raw/", "untrained/", "")
        values = [_spread(group, f"val/{source}probe/{features}") for source in sources]
        classes = group[0].metrics["val/classes"]
        met = _met(group, f"probe of {features} ")
        yield f"`{entry.name}`", features, f"{100 / classes:.1f}", *values, met


def _retrievals(entry: Entry) -> Iterator[tuple[str, ...]]:
    group = entry.outcomes
    prefix, suffix = "val/retrieval/", "/R@1"
    for key in group[0].metrics:
        if not (key.startswith(prefix) and key.endswith(suffix)):
            continue
        pair = key.removeprefix(prefix).removesuffix(suffix)
        start, _, end = pair.partition("-")
        keys = (f"val/untrained/retrieval/{pair}{suffix}", key)
        met = _met(group, f"R@1 of {pair} ")
        chance = f"{100 / group[0].items:.1f}"
        yield f"`{entry.name}`", start, end, chance, *(_spread(group, k) for k in keys), met


def _met(group: Sequence[Outcome], start: str) -> str:
    """Return in how many runs all criteria of this name hold."""
    asked = [[c for c in outcome.criteria() if c.name.startswith(start)] for outcome in group]
    if not any(asked):
        return "not judged"
    return f"{sum(all(c.passed for c in criteria) for criteria in asked)} of {len(group)}"


def _spread(group: Sequence[Outcome], key: str) -> str:
    """Return mean and sample standard deviation over runs, in percent."""
    values = [100 * outcome.metrics.get(key, math.nan) for outcome in group]
    mean = statistics.fmean(values) if values else math.nan
    if math.isnan(mean):
        return "–"
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def _versions(trained: Sequence[Entry]) -> list[str]:
    """Return which commits and libraries the runs ran on, with the cells of each."""
    lines = [
        f"one thread per run; a probe counts as met {100 * GAIN:g} points above the untrained "
        f"backbone and above raw statistics, retrieval at {RETRIEVAL_FACTOR:g} times chance in "
        "contrastive methods"
    ]
    where: dict[tuple[str, str], list[str]] = {}
    for entry in trained:
        for run in entry.runs:
            libraries = ", ".join(f"{name} {version}" for name, version in run.versions.items())
            names = where.setdefault((run.commit or "no commit", libraries), [])
            if entry.name not in names:
                names.append(entry.name)
    for (commit, libraries), names in where.items():
        lines.append(f"{', '.join(f'`{name}`' for name in names)}: commit {commit}; {libraries}")
    return lines


def check_page(path: Path) -> None:
    """Refuse a page that has no place for the tables; call it before the runs begin.

    Raises:
        ConfigError: The file exists and does not hold both markers once, in order.
    """
    if path.suffix != ".md":
        raise ConfigError(f"matrix --write={path}: expected a Markdown page, such as matrix.md.")
    if path.exists():
        _around(path)
    elif not path.parent.is_dir():
        raise ConfigError(f"matrix --write={path}: the folder {path.parent} does not exist.")


def write_page(path: Path, text: str) -> None:
    """Put the tables between the markers of a page, or begin a page.

    Raises:
        ConfigError: The file exists without the markers.
    """
    before, after = _around(path) if path.exists() else ("# The matrix\n\n", "\n")
    write_text(path, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def _around(path: Path) -> tuple[str, str]:
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(
            f"matrix --write={path}: the page has no place for the tables. Put a line {BEGIN} "
            f"and below it a line {END} where they belong; what lies between is replaced."
        )
    before, _, rest = text.partition(BEGIN)
    return before, rest.partition(END)[2]
