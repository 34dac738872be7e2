"""Check versions, extras, devices and folders, and say what to do."""

from __future__ import annotations

import json

from domainssl.cli.words import Parser

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Print one row per check; the exit status is 1 when something required is broken."""
    parser = Parser(
        prog="python -m domainssl doctor",
        description="Check the installation: status and remedy per row. Exit status 1 when "
        "something required does not work.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    from domainssl.cli.checkup import checkup

    rows = checkup()
    broken = any(row.status == "broken" for row in rows)
    if options.json:
        print(json.dumps([row.__dict__ for row in rows], indent=2))
        return int(broken)
    from rich.markup import escape
    from rich.table import Table

    from domainssl.cli.console import console

    table = Table(box=None, pad_edge=False)
    for title in ("status", "check", "found", "what to do"):
        table.add_column(title, overflow="fold")
    colours = {"ok": "green", "absent": "yellow", "warning": "yellow", "broken": "bold red"}
    for row in rows:
        status = f"[{colours[row.status]}]{row.status}[/]"
        table.add_row(status, *map(escape, (row.check, row.found, row.remedy)))
    screen = console()
    screen.print(table, soft_wrap=False)
    verdict = "Something required is broken." if broken else "Everything required works."
    screen.print(f"\n{verdict}", style="bold red" if broken else "bold green")
    return int(broken)
