"""Train recipes over several seeds and write what they have learned as a table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from domainssl.errors import ConfigError, nearest

if TYPE_CHECKING:
    from domainssl.matrix.runs import Finished

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Train, print a line per run, and write or print the tables.

    Returns:
        0 when every criterion of every run is met, 1 otherwise.
    """
    options = _parser().parse_args(argv)
    recipes = _recipes(options.recipes)
    seeds = _seeds(options.seeds)
    if options.jobs < 1:
        raise ConfigError(f"learning --jobs: got {options.jobs}, expected at least 1.")
    from domainssl.cli.console import console
    from domainssl.matrix.runs import Run, train_all
    from domainssl.matrix.tables import check_page, markdown, write_page

    page = Path(options.write) if options.write else None
    if page is not None:
        check_page(page)
    wanted = [Run(recipe, seed) for recipe in recipes for seed in seeds]
    screen = console()
    screen.print(f"{len(wanted)} runs, kept in {options.runs}", markup=False)
    count = 0

    def report(finished: Finished) -> None:
        nonlocal count
        count += 1
        screen.print(f"[{count}/{len(wanted)}] {_line(finished)}", markup=False)

    found = train_all(
        wanted, Path(options.runs), jobs=options.jobs, restart=options.restart, report=report
    )
    text = markdown(found, _command(options.recipes, options.seeds))
    if page is None:
        screen.print(text, markup=False)
    else:
        write_page(page, text)
        screen.print(f"written to {page}", markup=False)
    return 0 if all(_has_learned(each) for each in found) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m domainssl learning",
        description="Train recipes on the CPU over several seeds, each run in a process of its "
        "own with one thread, and write what they have learned on held-out items: every modality, "
        "every subset that the evaluation reports, and joint, beside the untrained backbone and "
        "raw statistics. A call that was stopped goes on where it was: runs whose recipe, package "
        "version and seed are equal are not repeated. Exit status 1 when a criterion is missed.",
    )
    add = parser.add_argument
    add("recipes", nargs="*", metavar="RECIPE",
        help="name or file of a recipe (default: all that come with the package)")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    add("--write", metavar="FILE", help="page whose tables are replaced (default: print them)")
    add("--runs", default="runs/learning", metavar="FOLDER",
        help="keeps the runs (default runs/learning)")  # fmt: skip
    add("--jobs", type=int, default=1, help="runs at the same time (default 1)")
    add("--restart", action="store_true", help="repeat runs that an earlier call has finished")
    return parser


def _recipes(names: list[str]) -> list[Path]:
    from domainssl.cli.config import catalog

    own = catalog.package_folder() / "recipes"
    if not names:
        return sorted(own.glob("*.yaml"))
    found = [_recipe(name) for name in names]
    stems = [path.stem for path in found]
    for stem in stems:
        if stems.count(stem) > 1:
            raise ConfigError(
                f"learning: {stem!r} is named {stems.count(stem)} times. Runs are kept by the "
                "name of the recipe; name each once."
            )
    return found


def _recipe(name: str) -> Path:
    from domainssl.cli.config import catalog
    from domainssl.cli.config.compose import locate

    path = locate(name) or locate(f"recipes/{name}.yaml")
    if path is None or not path.is_file():
        known = sorted({Path(each).stem for each in catalog.recipes()})
        raise ConfigError(
            f"learning: unknown recipe {name!r}.{nearest(Path(name).stem, known)} "
            f"Recipes: {', '.join(known)}"
        )
    return path


def _seeds(seeds: list[int]) -> list[int]:
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"learning --seeds: got {' '.join(map(str, seeds))}, expected different numbers, "
            "zero or more."
        )
    return seeds


def _command(recipes: list[str], seeds: list[int]) -> str:
    words = ["python -m domainssl learning", *recipes]
    return " ".join(words if seeds == [0, 1, 2] else [*words, "--seeds", *map(str, seeds)])


def _has_learned(finished: Finished) -> bool:
    outcome = finished.outcome
    return outcome is not None and all(c.passed for c in outcome.criteria())


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
