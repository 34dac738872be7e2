"""Train every method on every kind of data and write what each has learned, with a picture."""

from __future__ import annotations

import argparse
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainssl.cli.words import Parser
from domainssl.errors import ConfigError, DomainSSLError, nearest

if TYPE_CHECKING:
    from domainssl.matrix.cells import Cell
    from domainssl.matrix.runs import Finished

__all__ = ["find_all", "run"]

_PLACE = re.compile(r" \([^()]*\.yaml, line \d+\)")


def run(argv: list[str]) -> int:
    """Train, print a line per run, and write or print the tables.

    Returns:
        0 when every run met every criterion, 1 otherwise.
    """
    options = _parser().parse_args(argv)
    if options.jobs < 1 or options.seeds < (0 if options.write else 1):
        raise ConfigError(
            f"matrix: got --seeds={options.seeds} --jobs={options.jobs}, expected at least 1 (with "
            "--write also --seeds=0, which trains nothing and writes the page anew)."
        )
    from domainssl.cli.console import console
    from domainssl.matrix.page import check_page, markdown, write_page
    from domainssl.matrix.picture import write_picture
    from domainssl.matrix.record import merged, read_record, write_record
    from domainssl.matrix.runs import train_all

    page = Path(options.write) if options.write else None
    if page is not None:
        check_page(page)
    before = read_record(page.with_suffix(".json")) if page is not None else []
    # composing a cell takes a second, and the record of a page holds all of them
    cells = find_all(options.cells if page is None else ("*",))
    named = _chosen(cells, options.cells)
    chosen = [cell for cell in named if not cell.reason]
    screen = console()
    if options.list:
        for cell in named:
            told = cell.reason or ("recipe" if cell.is_recipe else " + ".join(cell.recipes))
            screen.print(f"{cell.name}  {cell.objective}, {cell.column}: {told}", markup=False)
        return 0
    found = _train(chosen, options, screen, train_all)
    entries = merged(cells, before, found)
    if page is None:
        names = {cell.name for cell in chosen}
        screen.print(markdown([e for e in entries if e.name in names]), markup=False)
    else:
        picture = page.with_suffix(".png")
        write_record(page.with_suffix(".json"), entries)
        write_picture(picture, entries)
        write_page(page, markdown(entries, picture.name))
        screen.print(f"written to {page}", markup=False)
    return 0 if all(each.outcome is not None and each.outcome.has_learned for each in found) else 1


def _parser() -> Parser:
    parser = Parser(
        prog="python -m domainssl matrix",
        description="Train every method on every kind of data that it can use, on the embedded "
        "samples and on the CPU, each run in a process of its own with one thread, and write what "
        "it has learned on held-out items: linear probes of the untrained and the trained "
        "backbone and of raw statistics, retrieval, per modality and per subset of modalities, "
        "with time and memory. A recipe is a cell; other cells join the model of a recipe and the "
        "data of another. A call that was stopped goes on where it was: runs whose configuration, "
        "code and seed are equal are not repeated. Exit status 1 when a criterion is missed.",
    )
    add = parser.add_argument
    add("--cells", nargs="+", metavar="PATTERN", default=["*"],
        help="names of cells, methods or kinds of data: ssl4eo_croma, CROMA, 'mri_*'")  # fmt: skip
    add("--seeds", type=int, default=3, metavar="N",
        help="runs per cell, seeds 0 to N-1 (3); 0 with --write writes the page anew")  # fmt: skip
    add("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default 1)")
    add("--write", metavar="FILE.md",
        help="page whose tables are replaced; FILE.json keeps the figures of cells that this call "
        "does not train, FILE.png the picture (default: print the tables)")  # fmt: skip
    add("--runs", default="runs/matrix", metavar="FOLDER",
        help="keeps the runs (default runs/matrix)")  # fmt: skip
    add("--restart", action="store_true", help="repeat runs that an earlier call has finished")
    add("--list", action="store_true", help="list the cells that --cells names, with reasons")
    return parser


def find_all(patterns: Sequence[str] = ("*",)) -> tuple[Cell, ...]:
    """Return all cells of the recipes that come with the package; composed once per process.

    Args:
        patterns: Which cells are composed; of others only names are known.
    """
    return _found(tuple(patterns))


@cache
def _found(patterns: tuple[str, ...]) -> tuple[Cell, ...]:
    import yaml

    from domainssl.cli.config import catalog
    from domainssl.matrix.cells import find_cells

    folder = catalog.package_folder() / "recipes"
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.yaml"))}
    recipes = {n: yaml.safe_load(text) for n, text in texts.items() if not n.startswith("finetune")}
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what Lightning says of every Trainer that is built
    try:
        with tempfile.TemporaryDirectory() as scratch:
            told = partial(_refusal, scratch=Path(scratch))
            return tuple(find_cells(recipes, told, patterns))
    finally:
        logging.disable(before)


def _refusal(config: Mapping[str, Any], scratch: Path) -> str:
    """Say in one line why a configuration cannot be built, if so."""
    import yaml

    from domainssl.cli.run.train import build_model

    path = scratch / "cell.yaml"
    parts = {section: config[section] for section in ("data", "model")}
    path.write_text(yaml.safe_dump(parts), encoding="utf-8")
    try:
        build_model([f"--config={path}"])
    except DomainSSLError as error:
        lines = [line.removeprefix("- ") for line in str(error).splitlines() if line.strip()]
        first = lines[1] if "nothing was run" in lines[0] and len(lines) > 1 else lines[0]
        return _PLACE.sub("", first).strip()
    return ""


def _chosen(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Return the cells that any of the patterns names.

    Raises:
        ConfigError: A pattern names none.
    """
    found = []
    for pattern in patterns:
        some = [cell for cell in cells if cell.is_named(pattern)]
        if not some:
            names = sorted({cell.name for cell in cells} | {cell.objective for cell in cells})
            raise ConfigError(
                f"matrix --cells: no cell, method or kind of data is named {pattern!r}."
                f"{nearest(pattern, names)} `python -m domainssl matrix --list` lists them."
            )
        found += [cell for cell in some if cell not in found]
    return found


def _train(
    chosen: Sequence[Cell], options: argparse.Namespace, screen: Any, train_all: Any
) -> list[Finished]:
    import yaml

    from domainssl.cli.config import catalog
    from domainssl.matrix.runs import Run

    folder = Path(options.runs)
    wanted = []
    for cell in chosen:
        path = catalog.package_folder() / "recipes" / f"{cell.name}.yaml"
        if not cell.is_recipe:
            path = folder / "composed" / f"{cell.name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(dict(cell.config), sort_keys=False), encoding="utf-8")
        wanted += [Run(path, seed) for seed in range(options.seeds)]
    screen.print(f"{len(wanted)} runs, kept in {folder}", markup=False)
    count = 0

    def report(finished: Finished) -> None:
        nonlocal count
        count += 1
        screen.print(f"[{count}/{len(wanted)}] {_line(finished)}", markup=False)

    found: list[Finished] = train_all(
        wanted, folder, jobs=options.jobs, restart=options.restart, report=report
    )
    return found


def _line(finished: Finished) -> str:
    """Say in a line, or with a reason in more, how a run has ended."""
    start = f"{finished.run.name}, seed {finished.run.seed}: "
    if finished.outcome is None:
        return f"{start}failed. {finished.error}"
    criteria = finished.outcome.criteria()
    met = sum(c.passed for c in criteria)
    seconds = f"{finished.cost['cpu_seconds']:.0f} CPU seconds"
    known = ", known from an earlier call" if finished.is_known else ""
    return f"{start}{met} of {len(criteria)} criteria met, {seconds}{known}"
