"""How many directions vectors use."""

from __future__ import annotations

import torch

from domainssl.nn.spread import effective_rank


def test_the_rank_of_vectors_that_are_not_finite_is_not_known_and_no_error() -> None:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    assert 3 < float(effective_rank(x)) <= 4
    x[3, 1] = torch.nan
    assert torch.isnan(effective_rank(x))
    assert 3 < float(effective_rank(x, torch.arange(16) != 3)) <= 4  # it does not count
