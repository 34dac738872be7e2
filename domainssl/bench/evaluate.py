"""From the start of `evaluate` to its report, in a new interpreter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from domainssl.backbones.card import export_backbone
from domainssl.backbones.croma import CROMABackbone
from domainssl.bench.report import Goal, Row, Settings, timed
from domainssl.datamodules.ssl4eo import SSL4EOS12DataModule

__all__ = ["measure"]

_WORDS = ("--config=recipes/ssl4eo_croma.yaml", "--split=val")
_QUICK = ("--max_items=8", "--protocols", "knn", "--resamples=10", "--no_baselines")


def measure(settings: Settings) -> Iterator[Row]:
    """Yield the seconds until the report is written, and those with kept features."""
    rounds = settings.pick(3, 1, settings.rounds)
    cold, kept = [], []
    with TemporaryDirectory() as place:
        folder = Path(place)
        data = SSL4EOS12DataModule()
        data.prepare_data()  # the sample is made once per machine, and is no part of it
        backbone = CROMABackbone(data.modalities, width=96, depth=4, heads=4)  # of the recipe
        export_backbone(backbone, folder / "backbone")
        for number in range(rounds):
            output = folder / f"out{number}"
            words = ["-m", "domainssl", "evaluate", str(folder / "backbone"), *_WORDS]
            words += [f"--output={output}", f"--device={settings.device}"]
            words += _QUICK if settings.quick else ()
            cold.append(timed(lambda words=words: _run(words)))  # type: ignore[misc]
            if not (output / "report.html").is_file():
                raise RuntimeError(f"evaluate left no report in {output}")
            kept.append(timed(lambda words=words: _run(words)))  # type: ignore[misc]
    note = "CROMA of the recipe, SSL4EO-S12 sample, untrained and raw beside it, all protocols"
    for what, values, goal in (
        ("start of evaluate to its report", cold, Goal("at most", 60.0)),
        ("the same with kept features", kept, None),
    ):
        yield Row(
            subject="evaluate", what=what, values=tuple(values), unit="s", goal=goal, note=note
        )


def _run(words: list[str]) -> None:
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
