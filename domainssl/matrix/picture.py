"""The matrix as one picture: a heat map of the gain over the untrained backbone."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from domainssl.files import write_whole
from domainssl.matrix.record import Entry

__all__ = ["gain", "write_picture"]

_SCALE = 60  # points of gain at the strongest colour
_GREY, _EMPTY = "#d9d9d9", "#ffffff"


def gain(entry: Entry) -> float | None:
    """Return the mean gain of the probe on all modalities over the untrained backbone, a share.

    Returns:
        None where no run has ended.
    """
    values = []
    for outcome in entry.outcomes:
        name = outcome.joint
        metrics = outcome.metrics
        values.append(metrics[f"val/probe/{name}"] - metrics[f"val/untrained/probe/{name}"])
    return statistics.fmean(values) if values else None


def write_picture(path: Path, entries: Sequence[Entry]) -> None:
    """Draw methods as rows and kinds of data as columns, and write a PNG.

    A square holds the gain in points, the mean where a kind of data has several cells, and in how
    many runs every criterion was met. Grey squares cannot exist; white ones were not trained.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = sorted({entry.objective for entry in entries}, key=str.lower)
    columns = list(dict.fromkeys(entry.column for entry in entries))
    squares: Mapping[tuple[str, str], list[Entry]] = {
        (row, column): [e for e in entries if (e.objective, e.column) == (row, column)]
        for row in rows
        for column in columns
    }
    figure = Figure(figsize=(2.2 + 1.5 * len(columns), 1.7 + 0.42 * len(rows)), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            colour, text = _square(squares[row, column])
            axes.add_patch(
                Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="#bbbbbb", linewidth=0.8)
            )
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8)
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.set_xticks([x + 0.5 for x in range(len(columns))], columns, fontsize=8)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows, fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel(
        "Gain of the linear probe (10 labels per class) over the untrained backbone, in points;\n"
        "below it the runs that met every criterion. Grey: the method cannot use these data; "
        "–: not trained.",
        fontsize=8,
    )
    figure.tight_layout()
    held = io.BytesIO()
    figure.savefig(held, format="png", metadata={"Software": None})
    write_whole(path, held.getvalue())


def _square(entries: Sequence[Entry]) -> tuple[object, str]:
    """Return colour and text of a square."""
    from matplotlib import colormaps

    gains = [found for entry in entries if (found := gain(entry)) is not None]
    if not gains:
        failed = any(entry.runs for entry in entries)
        if failed:
            return "#f4a582", "failed"
        is_possible = any(not entry.reason for entry in entries)
        return (_EMPTY, "–") if is_possible else (_GREY, "")
    points = 100 * statistics.fmean(gains)
    share = (max(-_SCALE, min(_SCALE, points)) / _SCALE + 1) / 2
    runs = [run for entry in entries for run in entry.runs]
    met = sum(run.has_learned for run in runs)
    # the middle of the palette, pale at 0
    return colormaps["PRGn"](0.15 + 0.7 * share), f"{points:+.0f}\n{met} of {len(runs)}"
