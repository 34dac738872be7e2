"""Which exams are trained on and which are held out; a patient is in one part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from domainssl.errors import ConfigError, nearest
from domainssl.io.volume.exams import Exam
from domainssl.sources.held_out import HeldOut

__all__ = ["split_exams"]


def split_exams(exams: Sequence[Exam], rule: HeldOut) -> dict[str, list[Exam]]:
    """Return the exams of `train`, `val` and `test`, in their order; parts without any are absent.

    Splits that the data state are kept. Where they state no `val`, patients of `train` are held
    out, those named or a fraction.

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
    found = [replace(exam, split=exam.split or "train") for exam in exams]
    own = sorted({exam.patient for exam in found if exam.split == "train"})
    held: set[str] = set(rule.patients)
    if not held and not any(exam.split == "val" for exam in found):
        count = round(rule.val_fraction * len(own))
        count = max(count, 1) if rule.val_fraction and len(own) > 1 else count
        order = np.random.default_rng([rule.seed, len(own)]).permutation(len(own))
        held = {own[i] for i in order[:count]}
    found = [replace(e, split="val") if e.patient in held else e for e in found]
    parts = {split: [e for e in found if e.split == split] for split in ("train", "val", "test")}
    if not parts["train"]:
        raise ConfigError(
            f"data.init_args.held_out: none of {len(exams)} exams of {len(known)} patient(s) is "
            "left for training. Lower val_fraction, or correct the splits of the data."
        )
    return {split: part for split, part in parts.items() if part}
