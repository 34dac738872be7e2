"""Measure speed and memory as ratios of interleaved runs, with their spread."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from domainssl.cli.words import Parser

if TYPE_CHECKING:
    from domainssl.bench.report import Settings

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Print one row per figure, as they are found."""
    from domainssl.bench.report import SUBJECTS, Settings

    parser = Parser(
        prog="python -m domainssl bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure speed and memory. Two sides run in turn (A B A B ...); printed are "
        "the median\nratio of the pairs and its range.\n\nsubjects (default: all):\n"
        + "\n".join(f"  {name:<10} {text}" for name, text in SUBJECTS.items()),
    )
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help="what to measure")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=int, help="interleaved repetitions")
    parser.add_argument("--batch", type=int, help="items per step")
    parser.add_argument("--precision", choices=("32", "bf16"), help="default: bf16 on CUDA only")
    parser.add_argument("--attention", choices=("fused", "flex"), default="fused")
    parser.add_argument("--compile", action="store_true", help="compile our side of `step`")
    parser.add_argument("--workers", type=int, help="loading processes of `stream` and `volumes`")
    parser.add_argument(
        "--volume", nargs=3, type=int, metavar=("X", "Y", "Z"), help="voxels of `volumes`"
    )
    parser.add_argument("--sites", type=int, help="most sites of `scan`, such as 100000")
    given = vars(parser.parse_args(argv))
    given["volume"] = given["volume"] and tuple(given["volume"])
    names, path = given.pop("subjects") or list(SUBJECTS), given.pop("json")
    return _measure(names, path, Settings(**given), ["bench", *argv])


def _measure(names: list[str], path: str | None, settings: Settings, words: list[str]) -> int:
    import json
    from pathlib import Path

    from domainssl.bench.report import environment, run_subjects
    from domainssl.cli.console import console

    screen = console()
    chosen, settings = settings, settings.resolved()
    chosen.refuse_unread(names)
    around = environment(settings)
    screen.print(f"python -m domainssl {' '.join(words)}")
    screen.print("  ".join(f"{name} {value}" for name, value in around.items()), soft_wrap=False)
    rows = []
    for row in run_subjects(names, settings):
        rows.append(row)
        goal = f"goal {row.goal.direction} {row.goal.bound:g}: {row.verdict}" if row.goal else ""
        spread = f"{min(row.values):.3g} .. {max(row.values):.3g}, {len(row.values)} rounds"
        unit = f" {row.unit}" if row.unit else ""
        screen.print(f"{row.subject:<10} {row.what}")
        screen.print(f"{'':<10} {row.median:.3g}{unit} ({spread})  {goal}")
        screen.print(f"{'':<10} {row.note}")
    if path is not None:
        content = {"command": words, "environment": around, "rows": [row.plain() for row in rows]}
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0
