"""When a run counts as having learned, in one place: probes against baselines, retrieval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from domainssl.errors import DataError

__all__ = ["GAIN", "RANK_SHARE", "RETRIEVAL_FACTOR", "Criterion", "learning_criteria"]

GAIN = 0.05
RETRIEVAL_FACTOR = 10.0
RANK_SHARE = 0.5
_RANKS = ("val/", "val/untrained/")
_ROUNDING = 1e-6  # metrics pass through float32 on their way into a log


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One sentence that a run has to make true.

    Attributes:
        name: What is judged, and against what.
        found: Share between 0 and 1, or an effective rank; NaN fails.
        needed: The bound.
        relation: How `found` has to stand to `needed`.
        is_share: Whether they are shares; ranks otherwise.
    """

    name: str
    found: float
    needed: float
    relation: Literal["at least", "above"] = "at least"
    is_share: bool = True

    @property
    def passed(self) -> bool:
        """Whether the sentence is true."""
        if self.relation == "above":
            return self.found > self.needed
        return self.found >= self.needed - _ROUNDING

    def __str__(self) -> str:
        verdict = "met" if self.passed else "missed"
        return f"{self.name}: {self.found:.3f}, needed {self.relation} {self.needed:.3f}, {verdict}"


def learning_criteria(
    metrics: Mapping[str, float], items: int, contrastive: bool, self_distilling: bool = False
) -> list[Criterion]:
    """Judge the last metrics of a run as `OnlineEvaluation` logs them.

    Every modality alone and all together (`joint`) has to reach the untrained backbone's probe
    plus 0.05 and to beat the one on statistics per band; subsets in between are reported but not
    judged. A contrastive method has to retrieve at 10 times chance in every direction, where there
    are two modalities to retrieve between. One that learns from its own teacher, which could give
    all items one answer, has to keep half of the untrained backbone's effective rank.

    Args:
        metrics: `val/probe/<m>`, `val/untrained/probe/<m>`, `val/raw/probe/<m>` and, for
            contrastive methods, `val/retrieval/<a>-<b>/R@1`, as shares.
        items: Number of held-out items; chance is one over it.
        contrastive: Whether the method compares items across modalities, which is what
            `Objective.contrastive` says.
        self_distilling: Whether it learns from its own teacher (`Objective.self_distilling`).

    Returns:
        Two or three criteria per representation and one per direction of retrieval; never empty.

    Raises:
        DataError: A metric that has to be judged is not there.
    """
    if items < 1:
        raise DataError(f"learning criteria: got {items} held-out items, expected at least one.")
    names = [key.removeprefix("val/probe/") for key in metrics if key.startswith("val/probe/")]
    judged = [name for name in names if "+" not in name]
    if not judged:
        raise DataError(
            "learning criteria: the metrics hold no val/probe/<modality>. They need the callback "
            "OnlineEvaluation, and held-out items with labels of at least two classes."
        )
    found = []
    for name in judged:
        trained = metrics[f"val/probe/{name}"]
        untrained = _metric(metrics, f"val/untrained/probe/{name}")
        raw = _metric(metrics, f"val/raw/probe/{name}")
        found.append(
            Criterion(
                name=f"probe of {name} over untrained + {GAIN:g}",
                found=trained,
                needed=untrained + GAIN,
            )
        )
        found.append(
            Criterion(
                name=f"probe of {name} over raw statistics",
                found=trained,
                needed=raw,
                relation="above",
            )
        )
        if self_distilling:
            rank, before = (_metric(metrics, f"{p}rankme/{name}") for p in _RANKS)
            found.append(
                Criterion(
                    name=f"effective rank of {name} over half",
                    found=rank,
                    needed=before * RANK_SHARE,
                    is_share=False,
                )
            )
    can_retrieve = len(set(judged) - {"joint"}) > 1
    return found + (_retrieval(metrics, items) if contrastive and can_retrieve else [])


def _retrieval(metrics: Mapping[str, float], items: int) -> list[Criterion]:
    prefix, suffix = "val/retrieval/", "/R@1"
    keys = [key for key in metrics if key.startswith(prefix) and key.endswith(suffix)]
    if not keys:
        raise DataError(
            "learning criteria: a contrastive method logs no val/retrieval/<a>-<b>/R@1. Its "
            "`embed` has to return vectors of one width for at least two modalities."
        )
    return [
        Criterion(
            name=f"R@1 of {key.removeprefix(prefix).removesuffix(suffix)} over "
            f"{RETRIEVAL_FACTOR:g} times chance",
            found=metrics[key],
            needed=RETRIEVAL_FACTOR / items,
        )
        for key in keys
    ]


def _metric(metrics: Mapping[str, float], key: str) -> float:
    if key not in metrics:
        raise DataError(
            f"learning criteria: the metrics hold no {key!r}. A run that was resumed from a "
            "checkpoint without OnlineEvaluation has no baseline; train it from its start."
        )
    return metrics[key]
