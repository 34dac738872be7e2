"""Tables of `inspect` for the terminal; names out of files are texts, never markup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "add_row",
    "as_text",
    "facts_table",
    "new_table",
    "next_lines",
    "note_lines",
    "values_table",
]


_PLACES = (
    "transform",
    "bounds",
    "pixel",
    "left",
    "top",
    "step",
    "spatial:transform",
    "spatial:bbox",
)  # coordinates: four digits are 100 m off


def add_row(table: Table, *cells: str) -> None:
    """Add a row of texts as they are: names out of files are no markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))


def new_table(title: str, *columns: str) -> Table:
    """Return an empty table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def values_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Return a table of minimum, mean, maximum and standard deviation per band."""
    table = new_table(title, "band", "min", "mean", "max", "std")
    for row in rows:
        cells = (row[key] for key in ("min", "mean", "max", "std"))
        add_row(table, row["band"], *("-" if v is None else f"{v:.4f}" for v in cells))
    return table


def facts_table(title: str, facts: Mapping[str, Any]) -> Table:
    """Return a table of names and what was found; what is empty is left out."""
    table = new_table(title, "what", "found")
    for name, value in facts.items():
        if value is not None and value != {} and value != []:
            text = _in_full(value) if name in _PLACES else as_text(value)
            add_row(table, name.replace("_", " "), text)
    return table


def as_text(value: Any) -> str:
    """Return plain data in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {as_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(as_text(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _in_full(value: Any) -> str:
    """Return coordinates with all their digits."""
    if isinstance(value, (list, tuple)):
        return " ".join(_in_full(item) for item in value)
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def note_lines(report: Mapping[str, Any]) -> list[Any]:
    """Return the notes of a report as lines."""
    from rich.text import Text

    return [Text(f"note: {text}") for text in report.get("notes", ())]


def next_lines(report: Mapping[str, Any]) -> list[Any]:
    """Return the next commands of a report as lines."""
    from rich.text import Text

    commands = report.get("next", ())
    title = [Text("next:", style="bold")] if commands else []
    return [*title, *(Text(f"  {command}") for command in commands)]
