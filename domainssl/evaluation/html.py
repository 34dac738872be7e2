"""One HTML file with everything inside: no server, no network, user strings escaped."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domainssl.evaluation.comparison import Row, Sides
from domainssl.evaluation.features import Items
from domainssl.evaluation.gallery import Gallery, principal
from domainssl.evaluation.tables import plain_row

__all__ = ["Page", "html_report", "short_hash", "spectrum"]

Array = NDArray[Any]
_MOST_POINTS = 1000
_MOST_VALUES = 96
_MOST_OPEN = 40  # rows of retrieval across modalities


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a report shows.

    Attributes:
        rows: All rows.
        sides: Features by label, of which the test items are shown.
        classes: Names of the classes of items with one each.
        numbers: Their labels in the data.
        gallery: Pictures, empty where ids are protected.
        facts: Data, backbones and settings; `labels` are the names of those that items have any
            number of.
        notes: What was left out.
        named: How an item is called on the page.
    """

    rows: Sequence[Row]
    sides: Mapping[str, Sides]
    classes: Sequence[str]
    numbers: Sequence[int]
    gallery: Gallery
    facts: Mapping[str, Any]
    notes: Sequence[str]
    named: Callable[[str], str]


def short_hash(name: str) -> str:
    """Return a name that tells items apart and nothing else."""
    return hashlib.sha256(name.encode()).hexdigest()[:10]


def spectrum(x: Array) -> list[float]:
    """Return the singular values of centred features, as shares of the largest."""
    centred = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    values = np.linalg.svd(centred, compute_uv=False)[:_MOST_VALUES]
    largest = float(values[0]) if len(values) and values[0] > 0 else 1.0
    return [round(float(v) / largest, 6) for v in values]


def _embeddings(sides: Mapping[str, Sides], shown: Array) -> dict[str, dict[str, Any]]:
    """Return plane and spectrum of the test items by backbone and representation."""
    found: dict[str, dict[str, Any]] = {}
    for label, side in sides.items():
        for name, values in side.test.pooled.items():
            rows = side.test.rows(name.split("+"))
            if rows.sum() < 3:
                continue
            plane = principal(values[rows], 2)
            plane /= max(float(np.abs(plane).max()), 1e-12)
            places = np.flatnonzero(rows)
            keep = np.isin(places, shown)
            found.setdefault(label, {})[name] = {
                "xy": [[round(float(v), 3) for v in point] for point in plane[keep]],
                "items": places[keep].tolist(),
                "spectrum": spectrum(values[rows]),
            }
    return found


def _payload(page: Page) -> dict[str, Any]:
    test: Items = next(iter(page.sides.values())).test
    gallery = page.gallery
    shown = np.arange(len(test.ids))
    if len(shown) > _MOST_POINTS:
        shown = shown * len(shown) // _MOST_POINTS
        shown = np.unique(shown[:_MOST_POINTS])
    position = {c: i for i, c in enumerate(page.numbers)}
    labels = test.labels if test.labels is not None else np.full(len(test.ids), -1)
    entries = []
    for row in page.rows:
        entry = plain_row(row)
        entry = {k: round(v, 5) if isinstance(v, float) else v for k, v in entry.items()}
        if row.confusion is not None:
            entry["confusion"] = row.confusion
        if row.per_class is not None:
            entry["per_class"] = row.per_class
        entries.append(entry)
    return {
        "facts": dict(page.facts),
        "notes": list(page.notes),
        "classes": list(page.classes),
        "rows": entries,
        "embeddings": _embeddings(page.sides, shown),
        "items": {
            "names": [page.named(name) for name in test.ids],
            "labels": [position.get(int(c), -1) for c in labels],
            "places": [gallery.places.get(name, -1) for name in test.ids],
        },
        "sheet": {"uri": gallery.sheet, "side": gallery.side, "across": gallery.across},
        "examples": [{**e, "id": page.named(e["id"])} for e in gallery.examples],
        "panels": gallery.panels,
    }


def _tables(rows: Sequence[Row]) -> str:
    """Return all rows as tables that read without scripts; many pairs of modalities are folded."""
    pairs = [row for row in rows if row.protocol.startswith("cross-modal")]
    if len(pairs) <= _MOST_OPEN:
        return _table(rows)
    others = [row for row in rows if not row.protocol.startswith("cross-modal")]
    return (
        _table(others) + f"<details><summary>Retrieval across modalities, {len(pairs)} rows"
        f"</summary>{_table(pairs)}</details>"
    )


def _table(rows: Sequence[Row]) -> str:
    heads = ("backbone", "features", "protocol", "metric", "value", "95 % interval", "chance",
             "over untrained")  # fmt: skip
    cells = "".join(
        f'<th scope="col"{" class=number" if place > 3 else ""}>{head}</th>'
        for place, head in enumerate(heads)
    )
    lines = []
    for row in rows:
        numbers = [
            _percent(row.value),
            f"{_percent(row.low)} to {_percent(row.high)}",
            _percent(row.chance),
            "" if row.gain is None else f"{100 * row.gain:+.1f}",
        ]
        texts = (row.backbone, row.features, row.protocol, row.metric)
        line = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
        line += "".join(f'<td class="number">{text}</td>' for text in numbers)
        lines.append(f"<tr>{line}</tr>")
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _percent(value: float) -> str:
    return "" if np.isnan(value) else f"{100 * value:.1f}"


def html_report(page: Page) -> str:
    """Return the file as text."""
    content = _payload(page)
    data = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for sign, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        data = data.replace(sign, code)
    data = data.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    folder = Path(__file__).parent
    parts = {
        "title": html.escape(f"Evaluation on {page.facts['data']['name']}"),
        "style": (folder / "report.css").read_text(encoding="utf-8"),
        "script": (folder / "report.js").read_text(encoding="utf-8"),
        "table": _tables(page.rows),
        "data": data,
    }
    template = (folder / "report.html").read_text(encoding="utf-8")
    head, *rest = template.split("{{")
    pieces = [head]
    for part in rest:
        name, _, text = part.partition("}}")
        pieces += [parts[name], text]
    return "".join(pieces)
