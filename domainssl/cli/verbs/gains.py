"""Measure what pretraining gains at few labels, recipe by recipe, over draws of the labels."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from domainssl.cli.words import Parser
from domainssl.errors import ConfigError

if TYPE_CHECKING:
    from domainssl.matrix.gains import Gain

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Train from random and from pretrained weights, and print a table.

    Returns:
        0 when every recipe gains what is asked for, 1 otherwise.
    """
    from domainssl.cli.console import console
    from domainssl.matrix.gains import FEW, table

    parser = Parser(
        prog="python -m domainssl gains",
        description="Fine-tune recipes on a part of the labels, from pretrained and from random "
        "weights with the same head, schedule and labels, and print a metric of held-out items "
        "for every draw of the labels. The pretrained weights are those of the recipe that each "
        "recipe names, trained first where no run is given.",
    )
    add = parser.add_argument
    add("recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(FEW)} (default: all)")
    add("--backbone", metavar="RUN", help="start of the one recipe; its own recipe is not trained")
    add("--fraction", type=float, default=0.1, metavar="F", help="share of the labels (0.1)")
    add("--draws", type=int, default=3, metavar="N", help="draws of the labels, 0 to N-1 (3)")
    add("--least", type=float, default=0.03, metavar="G", help="gain that exit status 0 says")
    add("--runs", default="runs/gains", metavar="FOLDER", help="keeps the runs (runs/gains)")
    options = parser.parse_args(argv)
    names = options.recipes or list(FEW)
    if options.draws < 1 or (options.backbone and len(names) != 1):
        raise ConfigError(
            f"gains: got {len(names)} recipes, --draws={options.draws}; expected one draw or more, "
            "and with --backbone exactly one recipe."
        )
    found, starts = [], {}
    for name in names:
        found.append(_measure(name, options))
        starts[name] = f"`{FEW[name].start}`" if options.backbone is None else "a run"
    console().print(table(found, starts), markup=False, soft_wrap=True)
    return 0 if all(gain.mean >= options.least for gain in found) else 1


def _measure(name: str, options: argparse.Namespace) -> Gain:
    """Train a recipe from both starts on every draw."""
    from domainssl.cli.run.train import build_data
    from domainssl.cli.verbs import fit
    from domainssl.matrix.gains import FEW, Gain, labelled, last_value, words_of

    folder = Path(options.runs) / name
    words_of(name, "", folder, 0, options.fraction)  # refuses unknown recipes before any training
    few, trained = FEW[name], options.backbone
    if trained is None:
        trained = str(Path(options.runs) / "pretrained" / few.start)
        if not (Path(trained) / "backbone").is_dir():
            _trained(fit.run([f"--config=recipes/{few.start}.yaml", f"--run_dir={trained}"]), name)
    values: dict[str, list[float]] = {"random": [], "trained": []}
    seconds = 0.0
    for draw in range(options.draws):
        for kind, start in (("random", f"recipe:{few.start}"), ("trained", trained)):
            own, before = folder / f"{kind}_{draw}", _processor_seconds()
            _trained(fit.run(words_of(name, start, own, draw, options.fraction)), name)
            seconds = max(seconds, _processor_seconds() - before)
            values[kind].append(last_value(own, few.metric))
    items = labelled(name, options.draws, options.fraction, build_data)
    return Gain(
        recipe=name,
        metric=few.metric,
        random=tuple(values["random"]),
        trained=tuple(values["trained"]),
        items=items,
        seconds=seconds,
    )


def _processor_seconds() -> float:
    """Return the processor time of this process and of the children it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _trained(status: int, name: str) -> None:
    if status:
        raise ConfigError(f"gains: a run of {name} ended with status {status}; see above.")
