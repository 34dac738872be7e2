"""Which exams or slides are trained on and which are held out; a patient is in one part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np

from domainssl.errors import ConfigError, nearest
from domainssl.io.subjects import Owned
from domainssl.sources.held_out import HeldOut

__all__ = ["by_patient", "split_by_patient", "tested_split"]

T = TypeVar("T", bound=Owned)


class Slide(Owned, Protocol):
    """A slide of a patient."""

    @property
    def id(self) -> str:
        """Its name."""


def by_patient(rule: HeldOut, slides: Sequence[Slide]) -> HeldOut:
    """Return the rule with slides replaced by their patients.

    Raises:
        ConfigError: A slide is not known, or its patient has further ones.
    """
    known = {each.id: each.patient for each in slides}
    for name in rule.slides:
        if name not in known:
            raise ConfigError(
                f"data.init_args.held_out.slides: no slide {name!r} among {len(known)}."
                f"{nearest(name, known)}"
            )
    patients = {known[name] for name in rule.slides}
    torn = sorted(
        each.id for each in slides if each.patient in patients and each.id not in rule.slides
    )
    if torn:
        raise ConfigError(
            f"data.init_args.held_out.slides: {', '.join(torn[:20])} belong to patients whose "
            "other slides are held out. Hold out all slides of a patient."
        )
    return replace(rule, slides=(), patients=tuple(sorted({*rule.patients, *patients})))


def split_by_patient(exams: Sequence[T], rule: HeldOut, what: str = "exams") -> dict[str, list[T]]:
    """Return the exams of `train`, `val` and `test`, in their order; parts without any are absent.

    Splits that the data state are kept. Where they state no `val`, patients of `train` are held
    out, those named or a fraction.

    Args:
        exams: Dataclasses with a patient and a split.
        rule: What is held out.
        what: What they are, for messages.

    Raises:
        ConfigError: A patient is not known, or nothing is left to train on.
    """
    known = sorted({exam.patient for exam in exams})
    for name in rule.patients:
        if name not in known:
            raise ConfigError(
                f"data.init_args.held_out.patients: no patient {name!r} among {len(known)}."
                f"{nearest(name, known)}"
            )
    found = [_in(exam, exam.split or "train") for exam in exams]
    own = sorted({exam.patient for exam in found if exam.split == "train"})
    held: set[str] = set(rule.patients)
    if not held and not any(exam.split == "val" for exam in found):
        count = round(rule.val_fraction * len(own))
        count = max(count, 1) if rule.val_fraction and len(own) > 1 else count
        order = np.random.default_rng([rule.seed, len(own)]).permutation(len(own))
        held = {own[i] for i in order[:count]}
    found = [_in(e, "val") if e.patient in held else e for e in found]
    parts = {split: [e for e in found if e.split == split] for split in ("train", "val", "test")}
    if not parts["train"]:
        raise ConfigError(
            f"data.init_args.held_out: none of {len(exams)} {what} of {len(known)} patient(s) is "
            "left for training. Lower val_fraction, or correct the splits of the data."
        )
    return {split: part for split, part in parts.items() if part}


def tested_split(parts: Mapping[str, Sequence[Any]]) -> str:
    """Return the split that a test measures.

    Args:
        parts: Items with `label`, `labels` or `mask`, by split.

    Returns:
        `test`; `val` where there is none, or where its items lack the labels that others have.
    """
    labelled = {split for split, items in parts.items() if any(map(_is_labelled, items))}
    is_judged = "test" in labelled or not labelled
    return "test" if "test" in parts and is_judged else "val"


def _is_labelled(item: Any) -> bool:
    values = [getattr(item, name, "") for name in ("label", "mask")]
    return any(values) or any(getattr(item, "labels", ()))


def _in(exam: T, split: str) -> T:
    known: Any = exam
    changed: T = replace(known, split=split)
    return changed
