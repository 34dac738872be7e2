"""An evaluation as a table on screen, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from domainssl.evaluation.comparison import Row

__all__ = [
    "COLUMNS",
    "HEADLINES",
    "csv_text",
    "json_content",
    "left_off",
    "overviews",
    "pair_tables",
    "plain_row",
]

COLUMNS = (
    "backbone", "features", "protocol", "metric", "value", "low", "high", "seeds", "seed_std",
    "chance", "train_items", "test_items", "gain", "gain_low", "gain_high",
)  # fmt: skip
# what the overview shows of each protocol
HEADLINES: dict[str, str] = {
    "kNN": "accuracy",
    "linear": "accuracy",
    "MLP": "accuracy",
    "k-means": "NMI",
    "1-shot": "accuracy",
    "5-shot": "accuracy",
    "10-shot": "accuracy",
    "retrieval": "mAP",
    "kNN multi-label": "mAP",
    "linear multi-label": "mAP",
    "MLP multi-label": "mAP",
    "dense linear": "mIoU",
}

_ALIGNED = "cross-modal (aligned)"
_LONG = 24  # characters of the name of a subset
_MOST_INTERVALS = 4  # columns that leave room for them
_MOST_PAIRS = 2  # of modalities, in a row each; more become a matrix


def plain_row(row: Row) -> dict[str, Any]:
    """Return a row as plain data; what is not a number is None."""
    found = {name: getattr(row, name) for name in COLUMNS}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in found.items()
    }


def csv_text(rows: Sequence[Row]) -> str:
    """Return all rows as CSV with a heading; numbers have six digits, missing ones are empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = plain_row(row)
        writer.writerow({n: f"{v:.6g}" if isinstance(v, float) else v for n, v in plain.items()})
    return out.getvalue()


def _cell(row: Row | None) -> str:
    if row is None or math.isnan(row.value):
        return ""
    half = 50 * (row.high - row.low)
    return f"{100 * row.value:.1f}" + ("" if math.isnan(half) else f" ±{half:.0f}")


def _value(row: Row | None) -> str:
    return _cell(row).partition(" ")[0]


def overviews(rows: Sequence[Row], title: str, width: int) -> list[Table]:
    """Return tables of the headline metric of every protocol, in percent; none without any.

    Args:
        rows: All rows.
        title: Above the first table.
        width: Characters that a table may be wide; protocols beyond it follow in further tables.
    """
    all_shown = [r for r in rows if HEADLINES.get(r.protocol) == r.metric]
    by_place = {(r.backbone, r.features, r.protocol): r for r in all_shown}
    features = _features_on_screen(all_shown)
    places = [(f, r.backbone) for f in features for r in all_shown if r.features == f]
    places = list(dict.fromkeys(places))
    names = [name for name in HEADLINES if any(place[2] == name for place in by_place)]
    columns = {name: [_cell(by_place.get((b, f, name))) for f, b in places] for name in names}
    told = [(_short_name(own), backbone) for own, backbone in places]
    heads = [max(map(len, column), default=0) + 3 for column in zip(*told)]
    tables: list[Table] = []
    for shown in _side_by_side(columns, width - sum(heads) - 1):
        grid = Table(title="" if tables else title, title_justify="left", title_style="bold")
        grid.add_column("backbone", no_wrap=True)
        grid.add_column("features", no_wrap=True)
        for name in shown:
            grid.add_column(f"{name}\n{HEADLINES[name]}", justify="right", no_wrap=True)
        for position, (own, backbone) in enumerate(places):
            last = position + 1 == len(places) or places[position + 1][0] != own
            cells = [columns[name][position] for name in shown]
            grid.add_row(_escaped(backbone), told[position][0], *cells, end_section=last)
        grid.add_row("chance", "", *(_chances(rows, name) for name in shown), style="dim")
        tables.append(grid)
    if tables:
        tables[-1].caption = (
            "percent ± half of the 95 % interval over test items; chance: what features without "
            "information reach"
        )
    return tables


def left_off(rows: Sequence[Row]) -> str:
    """Say which features the tables on screen leave to the files; empty where they show all."""
    features = list(dict.fromkeys(r.features for r in rows if _is_headline(r)))
    count = len(features) - len(_features_on_screen([r for r in rows if _is_headline(r)]))
    words = [f"{count} subsets of modalities"] if count else []
    if _has_matrix(rows):
        words.append("direct retrieval, R@5, R@10 and mAP between modalities")
    return f"not shown here: {' and '.join(words)}; see the files" if words else ""


def _features_on_screen(rows: Sequence[Row]) -> list[str]:
    """Return single modalities, and all subsets of up to three, else the largest alone."""
    found = list(dict.fromkeys(r.features for r in rows))
    most = max((name.count("+") for name in found), default=0)
    return found if most < 3 else [n for n in found if n.count("+") in (0, most)]


def _short_name(features: str) -> str:
    """Return how the largest subset is called where its whole name leaves no room for values."""
    count = features.count("+") + 1
    return f"all {count}" if count > 3 and len(features) > _LONG else features


def _side_by_side(columns: Mapping[str, Sequence[str]], width: int) -> list[list[str]]:
    """Divide the protocols over as few tables of that width as possible."""
    groups: list[list[str]] = []
    room = 0
    for name, cells in columns.items():
        need = max(len(name), len(HEADLINES[name]), *map(len, cells)) + 3
        if not groups or need > room:
            groups.append([])
            room = width
        groups[-1].append(name)
        room -= need
    return groups


def _chances(rows: Sequence[Row], protocol: str) -> str:
    """Return the chance of a protocol, or the range of it over subsets of modalities."""
    found = [r.chance for r in rows if r.protocol == protocol and _is_headline(r)]
    found = [value for value in found if not math.isnan(value)]
    if not found:
        return ""
    low, high = f"{100 * min(found):.1f}", f"{100 * max(found):.1f}"
    return low if low == high else f"{low} to {high}"


def _is_headline(row: Row) -> bool:
    return HEADLINES.get(row.protocol) == row.metric


def _has_matrix(rows: Sequence[Row]) -> bool:
    """Whether there are so many pairs of modalities that the screen shows a matrix of them."""
    return len({r.features for r in rows if r.protocol == _ALIGNED}) > _MOST_PAIRS


def pair_tables(rows: Sequence[Row]) -> list[Table]:
    """Return the tables of retrieval across modalities and sources, one of them a matrix."""
    across = [r for r in rows if r.protocol.startswith("cross-")]
    tables = []
    if _has_matrix(rows):
        tables.append(_matrix([r for r in across if r.protocol == _ALIGNED and r.metric == "R@1"]))
        across = [r for r in across if not r.protocol.startswith("cross-modal")]
    return tables + ([_pair_table(across)] if across else [])


def _matrix(rows: Sequence[Row]) -> Table:
    """Return R@1 from one modality (rows, by backbone) to another (columns)."""
    title = "Retrieval across modalities (aligned), R@1: from the row to the column"
    grid = Table(title=title, title_justify="left", title_style="bold")
    pairs = [r.features.split(" to ") for r in rows]
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    grid.add_column("backbone", overflow="fold")
    grid.add_column("from", no_wrap=True)
    for name in names:
        grid.add_column(name, justify="right", no_wrap=True)
    cell = _cell if len(names) <= _MOST_INTERVALS else _value
    found = {(r.backbone, *pair): r for r, pair in zip(rows, pairs, strict=True)}
    for backbone in dict.fromkeys(r.backbone for r in rows):
        for name in names:
            cells = [cell(found.get((backbone, name, other))) for other in names]
            told = _escaped(backbone) if name == names[0] else ""
            grid.add_row(told, name, *cells, end_section=name == names[-1])
    chances = [r.chance for r in rows if not math.isnan(r.chance)]
    if chances:
        low, high = f"{100 * min(chances):.1f}", f"{100 * max(chances):.1f}"
        grid.caption = f"chance {low}" + ("" if low == high else f" to {high}")
    return grid


def _pair_table(across: Sequence[Row]) -> Table:
    title = "Retrieval across modalities and sources"
    grid = Table(title=title, title_justify="left", title_style="bold")
    metrics = list(dict.fromkeys(r.metric for r in across))
    for name in ("backbone", "from, to", "how"):
        grid.add_column(name)
    for name in (*metrics, "chance R@1"):
        grid.add_column(name, justify="right", no_wrap=True)
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in across:
        how = row.protocol.partition("(")[2].rstrip(")")
        found.setdefault((row.backbone, row.features, how), {})[row.metric] = row
    for (backbone, features, how), own in found.items():
        chance = f"{100 * own['R@1'].chance:.1f}" if "R@1" in own else ""
        cells = [_cell(own.get(name)) for name in metrics]
        grid.add_row(_escaped(backbone), features, how, *cells, chance)
    return grid


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def json_content(
    rows: Sequence[Row], classes: Sequence[str], facts: Mapping[str, Any], notes: Sequence[str]
) -> dict[str, Any]:
    """Return everything as plain data, with recalls and confusion where classes are predicted."""
    entries = []
    for row in rows:
        entry = plain_row(row)
        if row.confusion is not None:
            entry |= {"recalls": row.recalls, "confusion": row.confusion}
        if row.per_class is not None:
            entry["per_class"] = row.per_class
        entries.append(entry)
    return {**facts, "classes": list(classes), "notes": list(notes), "rows": entries}
