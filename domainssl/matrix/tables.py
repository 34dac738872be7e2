"""What runs over several seeds have learned, as tables of a Markdown page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from domainssl.bench.report import cpu_name
from domainssl.errors import ConfigError
from domainssl.evaluation.criteria import GAIN, RETRIEVAL_FACTOR
from domainssl.files import write_text
from domainssl.matrix.runs import Finished, Outcome

__all__ = ["BEGIN", "END", "check_page", "markdown", "write_page"]

BEGIN = "<!-- learning:begin -->"
END = "<!-- learning:end -->"
_LIBRARIES = ("python", "torch", "lightning", "numpy")


def markdown(finished: Sequence[Finished], command: str) -> str:
    """Return the tables of these runs: a summary, probes, retrieval, single runs, versions.

    Args:
        finished: Runs, those of one recipe together.
        command: The words that repeat them.
    """
    groups: dict[str, list[Finished]] = {}
    for each in finished:
        groups.setdefault(each.run.name, []).append(each)
    outcomes = {
        name: [each.outcome for each in group if each.outcome is not None]
        for name, group in groups.items()
    }
    trained = {name: group for name, group in outcomes.items() if group}
    seeds = sorted({each.run.seed for each in finished})
    parts = [
        f"`{command}`, seeds {', '.join(map(str, seeds))}. Shares in %, mean ± standard deviation "
        "over the seeds.",
        "### Criteria",
        _table(("recipe", "seed", "criteria met", "missed", "CPU seconds"), _single(groups)),
    ]
    if trained:
        parts += [
            "### Linear probe, 10 labels per class",
            _table(
                ("recipe", "features", "chance", "raw statistics", "untrained", "trained", "met"),
                (row for name, group in trained.items() for row in _probes(name, group)),
            ),
            "### Retrieval across modalities, R@1",
            _table(
                ("recipe", "from", "to", "chance", "untrained", "trained", "met"),
                (row for name, group in trained.items() for row in _retrievals(name, group)),
            ),
            *_section(
                "### Retrieval across scanners by class, mean average precision",
                ("recipe", "from", "to", "chance", "raw statistics", "untrained", "trained"),
                [row for name, group in trained.items() for row in _across_scanners(name, group)],
            ),
            "### Versions",
            "\n".join(f"* {line}" for line in _versions(finished)),
        ]
    return "\n\n".join(parts)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _section(title: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return a title and its table; nothing without rows."""
    return (title, _table(titles, rows)) if rows else ()


def _single(groups: Mapping[str, Sequence[Finished]]) -> Iterator[tuple[str, ...]]:
    for name, group in groups.items():
        for each in group:
            seed = str(each.run.seed)
            if each.outcome is None:
                yield f"`{name}`", seed, "the run failed", "all", ""
                continue
            criteria = each.outcome.criteria()
            missed = [c for c in criteria if not c.passed]
            met = f"{len(criteria) - len(missed)} of {len(criteria)}"
            told = "; ".join(
                f"{c.name} ({100 * c.found:.1f}, needed {c.relation} {100 * c.needed:.1f})"
                for c in missed
            )
            yield f"`{name}`", seed, met, told, f"{each.cost['cpu_seconds']:.0f}"


def _probes(name: str, group: Sequence[Outcome]) -> Iterator[tuple[str, ...]]:
    prefix = "val/probe/"
    for key in [key for key in group[0].metrics if key.startswith(prefix)]:
        features = key.removeprefix(prefix)
        sources = ("raw/", "untrained/", "")
        values = [_spread(group, f"val/{source}probe/{features}") for source in sources]
        classes = group[0].metrics["val/classes"]
        met = _met(group, f"probe of {features} ")
        yield f"`{name}`", features, f"{100 / classes:.1f}", *values, met


def _retrievals(name: str, group: Sequence[Outcome]) -> Iterator[tuple[str, ...]]:
    metrics = group[0].metrics
    modalities = [
        key.removeprefix("val/rankme/")
        for key in metrics
        if key.startswith("val/rankme/") and "+" not in key and not key.endswith("/joint")
    ]
    for a in modalities:
        for b in modalities:
            key = f"retrieval/{a}-{b}/R@1"
            if f"val/{key}" not in metrics:
                continue
            values = [_spread(group, f"val/{source}{key}") for source in ("untrained/", "")]
            met = _met(group, f"R@1 of {a}-{b} ")
            yield f"`{name}`", a, b, f"{100 / group[0].items:.1f}", *values, met


def _across_scanners(name: str, group: Sequence[Outcome]) -> Iterator[tuple[str, ...]]:
    prefix, suffix = "val/retrieval/", "/mAP"
    for key in sorted(group[0].metrics):
        if key.startswith(prefix) and key.endswith(suffix):
            pair = key.removeprefix(prefix).removesuffix(suffix)
            chance = _spread(group[:1], f"{prefix}{pair}/chance")
            sources = ("raw/", "untrained/", "")
            values = [_spread(group, f"val/{s}retrieval/{pair}{suffix}") for s in sources]
            yield f"`{name}`", *pair.split("-"), chance, *values


def _met(group: Sequence[Outcome], start: str) -> str:
    """Return in how many runs all criteria of this name hold; empty when none is asked for."""
    asked = [[c for c in outcome.criteria() if c.name.startswith(start)] for outcome in group]
    if not any(asked):
        return "not judged"
    return f"{sum(all(c.passed for c in criteria) for criteria in asked)} of {len(group)}"


def _spread(group: Sequence[Outcome], key: str) -> str:
    """Return mean and sample standard deviation over runs, in percent."""
    values = [100 * outcome.metrics.get(key, math.nan) for outcome in group]
    mean = statistics.fmean(values)
    if math.isnan(mean):
        return "–"
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def _versions(finished: Sequence[Finished]) -> list[str]:
    """Return what the runs ran on, once per difference."""
    lines = [
        f"{cpu_name()}, one thread per run; a probe counts as met {100 * GAIN:g} points above the "
        f"untrained backbone and above raw statistics, retrieval at {RETRIEVAL_FACTOR:g} times "
        "chance in contrastive methods"
    ]
    for each in finished:
        if each.outcome is None:
            continue
        found = each.surroundings["versions"]
        git = each.surroundings.get("git")
        revision = f" at {git['commit'][:10]}" if git else ""
        revision += " with local changes" if git and git["has_local_changes"] else ""
        libraries = ", ".join(f"{name} {found[name]}" for name in _LIBRARIES if name in found)
        lines.append(f"domainssl {found['domainssl']}{revision}, {libraries}")
    return list(dict.fromkeys(lines))


def check_page(path: Path) -> None:
    """Refuse a page that has no place for the tables; call it before the runs begin.

    Raises:
        ConfigError: The file exists and does not hold both markers once, in order.
    """
    if path.exists():
        _around(path)
    elif not path.parent.is_dir():
        raise ConfigError(f"learning --write={path}: the folder {path.parent} does not exist.")


def write_page(path: Path, text: str) -> None:
    """Put the tables between the markers of a page, or begin a page.

    Raises:
        ConfigError: The file exists without the markers.
    """
    before, after = _around(path) if path.exists() else ("# Learning\n\n", "\n")
    write_text(path, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def _around(path: Path) -> tuple[str, str]:
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(
            f"learning --write={path}: the page has no place for the tables. Put a line {BEGIN} "
            f"and below it a line {END} where they belong; what lies between is replaced."
        )
    before, _, rest = text.partition(BEGIN)
    return before, rest.partition(END)[2]
