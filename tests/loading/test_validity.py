"""A modality that never shows a valid pixel ends the run instead of training on nothing."""

from __future__ import annotations

import pytest
import torch

from domainssl.errors import DataError
from domainssl.loading.validity import ValidityCheck


def _batch(s2: bool, present: bool = True) -> dict[str, torch.Tensor]:
    return {
        "s1.valid": torch.ones(2, 4, 4, dtype=torch.bool),
        "s2.valid": torch.full((2, 4, 4), s2),
        "s2.present": torch.full((2,), present),
    }


@pytest.mark.parametrize(("s2", "present"), [(False, True), (True, False)])
def test_a_modality_without_a_valid_pixel_ends_the_epoch(s2: bool, present: bool) -> None:
    check = ValidityCheck("train")
    check.look(_batch(s2, present))
    with pytest.raises(DataError, match=r"^s2: not one pixel is valid in 1 train batches"):
        check.end()


def test_a_hundred_batches_are_enough_to_know() -> None:
    check = ValidityCheck("val")
    for _ in range(99):
        check.look(_batch(False))
    with pytest.raises(DataError, match=r"^s2: not one pixel is valid in 100 val batches"):
        check.look(_batch(False))


def test_one_valid_pixel_is_enough() -> None:
    check = ValidityCheck("train")
    for is_valid in (False, True, *[False] * 200):
        check.look(_batch(is_valid))
    check.end()
