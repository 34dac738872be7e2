"""What pretraining gains at few labels: a recipe of fine-tuning from trained and random weights.

Both starts have the same head, schedule and labels. A gain is the mean, over draws of the labels,
of the difference of a metric on held-out items.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from domainssl.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from domainssl.datamodules.base import DomainDataModule

__all__ = ["FEW", "Few", "Gain", "labelled", "last_value", "table", "words_of"]


@dataclass(frozen=True, kw_only=True)
class Few:
    """How a recipe is trained on a tenth of the labels.

    Attributes:
        start: Recipe of pretraining.
        metric: What is compared.
        epochs: Passes over the few items.
        changes: Values of the recipe that differ.
    """

    start: str
    metric: str
    epochs: int
    changes: tuple[str, ...] = ()


_HEAD = "--model.tuning.mode=frozen"
FEW: dict[str, Few] = {
    "finetune_tiles": Few(
        start="tiles_mae",
        metric="val/accuracy",
        epochs=60,
        changes=(_HEAD, "--model.optimization.lr=0.1"),
    ),
    "finetune_slides": Few(
        start="slides_titan",
        metric="val/accuracy",
        epochs=60,
        changes=(
            _HEAD,
            "--model.head.kind=linear",  # of nine slides, attention gained nothing
            "--model.optimization.lr=0.1",
            "--data.global_batch_size=12",
        ),
    ),
    "finetune_ssl4eo_landcover": Few(
        start="ssl4eo_croma",
        metric="val/iou",
        epochs=75,
        changes=(_HEAD, "--data.global_batch_size=5"),
    ),
    "finetune_pastis_crops": Few(start="pastis_maestro", metric="val/iou", epochs=30),
    "finetune_change": Few(start="cube_croma", metric="val/iou", epochs=50),
    "finetune_ct_organs": Few(
        start="ct_conv_mae", metric="val/dice", epochs=12, changes=("--data.global_batch_size=5",)
    ),
    "finetune_mri_lesions": Few(
        start="mri_multicontrast_mae",
        metric="val/dice",
        epochs=50,
        changes=("--data.global_batch_size=5",),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What was found for a recipe.

    Attributes:
        recipe: Its name.
        metric: What was compared.
        random: Of random weights, a value per draw.
        trained: Of the pretrained ones.
        items: Labelled exams, slides or patches of the rarest class, in the draw with the fewest.
        seconds: Processor time of the run that took longest.
    """

    recipe: str
    metric: str
    random: tuple[float, ...]
    trained: tuple[float, ...]
    items: int
    seconds: float

    @property
    def mean(self) -> float:
        """Mean of the differences."""
        return statistics.fmean(b - a for a, b in zip(self.random, self.trained, strict=True))


def words_of(name: str, backbone: str, folder: Path, draw: int, fraction: float) -> list[str]:
    """Return the words after `fit` for one start and draw.

    Args:
        name: Recipe, of `FEW`.
        backbone: Where it starts.
        folder: Of the run.
        draw: Which part of the labels.
        fraction: How large a part.

    Raises:
        ConfigError: There is no such recipe.
    """
    if name not in FEW:
        raise ConfigError(f"gains: no recipe {name!r}.{nearest(name, FEW)} Known: {', '.join(FEW)}")
    few = FEW[name]
    return [
        f"--config=recipes/{name}.yaml",
        f"--run_dir={folder}",
        f"--model.backbone={backbone}",
        f"--data.loading.train_fraction={fraction}",
        f"--data.loading.train_draw={draw}",
        f"--trainer.max_epochs={few.epochs}",
        f"--trainer.check_val_every_n_epoch={few.epochs}",
        "--trainer.log_every_n_steps=1",
        "--callbacks.checkpoint=null",
        "--callbacks.export=null",
        *few.changes,
    ]


def labelled(
    name: str, draws: int, fraction: float, build: Callable[[list[str]], DomainDataModule]
) -> int:
    """Return how many drawn exams, slides or patches show the rarest class, in the worst draw.

    Args:
        name: Recipe, of `FEW`.
        draws: Number of draws, from 0.
        fraction: How large a part of the labels each is.
        build: Makes the DataModule of the words of a run.
    """
    from domainssl.loading.counts import unit_counts  # imports torch, which the help does without

    def counts(draw: int, part: float) -> list[int]:
        words = words_of(name, f"recipe:{FEW[name].start}", Path(), draw, part)
        data = build([word for word in words if word.startswith(("--config", "--data"))])
        data.prepare_data()
        data.setup("fit")
        whole = FEW[name].metric == "val/accuracy"
        kind, classes = ("label", data.classes) if whole else ("mask", data.mask_classes)
        return unit_counts(data.source("train"), kind, len(classes or ()))

    found = [counts(draw, fraction) for draw in range(draws)]
    occurs = counts(0, 1.0)
    return min(few for own in found for few, all_ in zip(own, occurs, strict=True) if all_)


def last_value(folder: Path, metric: str) -> float:
    """Return the last value of a metric in the log of a run.

    Raises:
        DataError: The run has none.
    """
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        found = [row[metric] for row in csv.DictReader(file) if row.get(metric)]
    if not found:
        raise DataError(f"{folder}: no {metric} in metrics.csv. Run `fit` to its end.")
    return float(found[-1])


def table(gains: Sequence[Gain], starts: Mapping[str, str]) -> str:
    """Return a Markdown table, a row per recipe.

    Args:
        gains: What was found.
        starts: What each recipe started from, by its name.
    """
    lines = [
        "| recipe | pretrained by | metric | labels per class | random, per draw "
        "| pretrained, per draw | gain | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gain in gains:
        random, trained = (
            " ".join(f"{value:.3f}" for value in values) for values in (gain.random, gain.trained)
        )
        lines.append(
            f"| `{gain.recipe}` | {starts[gain.recipe]} | {gain.metric.removeprefix('val/')} "
            f"| {gain.items} | {random} | {trained} | {gain.mean:+.3f} | {gain.seconds:.0f} |"
        )
    return "\n".join(lines)
