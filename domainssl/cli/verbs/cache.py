"""List or clear what was built once and kept, or prepare exams before a run."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from domainssl.cli.pieces import add_plan, plan_of
from domainssl.cli.words import Parser
from domainssl.errors import ConfigError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from domainssl.cache import CacheEntry

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Print the cache as a table, delete what is in it, or prepare what a run will read."""
    options, more = _parser().parse_known_args(argv)
    if options.action == "build":
        return _build(options, more)
    if more:
        raise ConfigError(f"cache: {more[0]!r} is for `cache build --config RECIPE`.")
    from domainssl.cache import cache_dir, entries
    from domainssl.cli.console import console

    screen = console()
    found = entries()
    if options.action == "clear":
        return _clear(screen, found, options.name, options.yes)
    screen.print(f"cache at {cache_dir()}", markup=False)
    _show(screen, found)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m domainssl cache",
        passes="--data.",
        description="List or clear what was built once and kept, such as the embedded samples and "
        "prepared exams, or prepare the exams of a recipe before a run. "
        "The folder is $DOMAINSSL_CACHE, by default ~/.cache/domainssl. Whatever is cleared is "
        "built again when it is needed.",
    )
    actions = parser.add_subparsers(dest="action", metavar="{list,clear,build}")
    actions.add_parser("list", help="show names, sizes and ages (the default)")
    clearing = actions.add_parser("clear", help="delete all, or one by its name")
    clearing.add_argument("name", nargs="?", help="as `cache list` shows it; all without a name")
    clearing.add_argument("--yes", action="store_true", help="do not ask")
    building = actions.add_parser(
        "build",
        passes="--data.",
        help="prepare the exams of a recipe",
        description="Prepare the exams that a recipe reads, as its data section says, and keep "
        "them for all runs with the same preparation. What is there already is not made again, so "
        "an interrupted call goes on. --data.KEY=VALUE changes the recipe.",
    )
    add = building.add_argument
    add("--config", action="append", default=[], metavar="FILE", help="recipe or overlay")
    add_plan(building, "exams", without=("restart",))
    return parser


def _build(options: argparse.Namespace, more: list[str]) -> int:
    """Prepare what the DataModule of a recipe offers, one after the other."""
    from domainssl.cli.console import console
    from domainssl.cli.progress import Bar
    from domainssl.cli.run.looking import data_at
    from domainssl.pieces import build

    plan = plan_of(options)
    data = data_at(None, options.config, more, "cache build")
    data.prepare_data()
    data.setup("fit")
    screen = console()
    offered = data.preparations()
    if not offered:
        raise ConfigError(
            f"cache build: {type(data).__name__} reads its files as they are, so there is nothing "
            "to prepare. Exams are kept if data.init_args.preparation.cache is memmap or zarr."
        )
    for what in offered:
        with Bar("exams", kept=f"in {what.folder}") as shown:
            found = build(what, plan, shown)
        there = f", {found.resumed} of them before" if found.resumed else ""
        screen.print(f"{found.entries} exams are prepared in {what.folder}{there}", markup=False)
        for reason in found.skipped.values():
            screen.print(f"left out: {reason}", markup=False)
        if found.missing:
            screen.print(
                f"shard {plan.shard} is done; missing: {', '.join(found.missing)}", markup=False
            )
    return 0


def _show(screen: Console, found: list[CacheEntry]) -> None:
    if not found:
        screen.print("empty")
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title, justify in (
        ("name", "left"),
        ("version", "left"),
        ("MB", "right"),
        ("age", "right"),
    ):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for entry in found:
        age = _age(time.time() - entry.built_s)
        table.add_row(escape(entry.name), escape(entry.version), f"{entry.size_mb:.1f}", age)
    total = sum(entry.size_mb for entry in found)
    table.add_row("total", "", f"{total:.1f}", "", style="bold")
    screen.print(table, soft_wrap=False)


def _age(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} seconds"


def _clear(screen: Console, found: list[CacheEntry], name: str | None, sure: bool) -> int:
    from domainssl.cache import cache_dir, clear

    chosen = [entry for entry in found if name in (None, entry.name, entry.path.name)]
    if name is not None and not chosen:
        names = [entry.name for entry in found]
        raise ConfigError(
            f"cache clear {name!r}: nothing of that name in {cache_dir()}.{nearest(name, names)} "
            f"There is: {', '.join(names) or 'nothing'}."
        )
    _show(screen, chosen)
    if chosen and not sure:
        if not sys.stdin.isatty():
            raise ConfigError("cache clear: nobody is there to confirm it; add --yes.")
        if input(f"Delete {len(chosen)} from {cache_dir()}? [y/N] ").strip().lower() != "y":
            screen.print("nothing was deleted")
            return 1
    removed = clear(name)
    screen.print(f"deleted {len(removed)} folders" if removed else "nothing to delete")
    return 0
