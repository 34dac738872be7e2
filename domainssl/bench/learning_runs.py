"""What a finished run says about learning, read from the folder it left."""

from __future__ import annotations

import csv
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from domainssl.errors import DataError
from domainssl.evaluation.criteria import Criterion, learning_criteria

__all__ = ["Outcome", "read_outcome"]


@dataclass(frozen=True)
class Outcome:
    """What one run measured on held-out items at its end.

    Attributes:
        metrics: Last value of every metric whose name begins with `val/`.
        items: Number of held-out items.
        contrastive: Whether the method compares items across modalities.
    """

    metrics: dict[str, float]
    items: int
    contrastive: bool

    def criteria(self) -> list[Criterion]:
        """Judge the run."""
        return learning_criteria(self.metrics, self.items, self.contrastive)


def read_outcome(folder: str | Path) -> Outcome:
    """Read the folder of a run that `fit` has finished.

    Raises:
        DataError: The folder holds no metrics of `OnlineEvaluation`.
    """
    folder = Path(folder)
    metrics: dict[str, float] = {}
    logs = [folder / "metrics.csv", *folder.glob("resumed_*/metrics.csv")]
    for path in sorted((p for p in logs if p.is_file()), key=lambda p: p.stat().st_mtime_ns):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                metrics.update({k: float(v) for k, v in row.items() if k.startswith("val/") and v})
    if "val/items" not in metrics:
        raise DataError(
            f"{folder}: no metrics of held-out items. Expected the folder of a finished `fit` "
            "whose recipe has the callback OnlineEvaluation and the logger CSVLogger."
        )
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    module, _, name = config["model"]["class_path"].rpartition(".")
    objective = getattr(importlib.import_module(module), name)
    return Outcome(metrics, int(metrics["val/items"]), bool(objective.contrastive))
