"""How rows are dealt to ranks is asked once per step, outside the losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from domainssl.distributed import RowLayout
from domainssl.losses import contrastive, decorrelation, discrimination, tokens

ROWS = RowLayout((6,))
LOSSES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "info_nce": lambda a, b: contrastive.info_nce(a, b, torch.tensor(2.0), layout=ROWS),
    "nt_xent": lambda a, b: contrastive.nt_xent(a, b, 0.5, layout=ROWS),
    "redundancy": lambda a, b: decorrelation.redundancy(a, b, layout=ROWS),
    "decur_cross": lambda a, b: decorrelation.decur_cross(a, b, 4, layout=ROWS),
    "vicreg": lambda a, b: decorrelation.vicreg(a, b, layout=ROWS),
    "token_nce": lambda a, b: tokens.token_nce(
        torch.stack([a, b], 1).unflatten(-1, (2, -1)), layout=ROWS
    ),
    "token_discrimination": lambda a, b: discrimination.token_discrimination(
        a.unsqueeze(0), b.unsqueeze(0), torch.ones(1, 6, dtype=torch.bool),
        candidates="batch", layout=ROWS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_knows_the_layout_waits_for_no_rank(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    modules = (contrastive, decorrelation, discrimination, tokens)
    asked: list[Tensor] = []

    def ask(rows: Tensor) -> RowLayout:
        asked.append(rows)
        return ROWS

    for module in modules:
        monkeypatch.setattr(module, "row_layout", ask)
    LOSSES[name](a, b)
    assert not asked
