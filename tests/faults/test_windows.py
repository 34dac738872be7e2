"""Windows full of NaN, infinities or no data go through a training step of the real method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grouped import grouped
from ssl4eo_files import DATES, SIDE, pattern, tile_table

from domainssl.datamodules import SSL4EOS12DataModule
from domainssl.errors import DataError
from domainssl.io.ssl4eo.write import write_release_a
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading
from domainssl.objectives.base import Generators
from domainssl.objectives.croma import CROMA
from domainssl.sources.windows import Window

IDS = [0, 1, 2, 3]


def write(root: Path, spoil_s1: Any, spoil_s2: Any, which: list[int]) -> None:
    """Write four locations, of which `which` are spoilt."""
    field = pattern(IDS)
    s1 = (field / 4).astype(np.float16)[:, :, None].repeat(2, 2)
    s2 = field.astype(np.int16)[:, :, None].repeat(12, 2) + np.int16(1000)
    cloud = np.zeros((len(IDS), DATES, SIDE, SIDE), np.uint8)
    for i in which:
        s1[i] = s1[i] if spoil_s1 is None else spoil_s1
        s2[i] = s2[i] if spoil_s2 is None else spoil_s2
    for product, values, mask in (("S1GRD", s1, None), ("S2L2A", s2, cloud)):
        folder = root / "train" / product
        folder.mkdir(parents=True)
        tiles = tile_table(IDS, s1=product == "S1GRD")
        write_release_a(folder / "ssl4eos12_train_seasonal_data_000001.zarr.zip", product, values,
                        tiles, mask)  # fmt: skip


def step(root: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], CROMA]:
    """Return losses, batch and model after a backward pass over all four locations."""
    data = SSL4EOS12DataModule(
        root=str(root), global_batch_size=4, window=Window(size=24), loading=Loading(workers=0)
    )
    data.setup("fit")
    # from the source: the stream ends a run in which no pixel of a modality is ever valid
    rows = data.source("train").load(Piece(0, 0, len(IDS)), 0).data
    found = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in rows.items()}
    batch = data.on_after_batch_transfer(found, 0)
    torch.manual_seed(0)
    model = CROMA(
        data.modalities,
        **grouped(
            size="tiny",
            context_size=24,
            architecture={"width": 16, "depth": 2, "heads": 2, "decoder_width": 16},
        ),
    )
    generators = Generators(torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))
    losses = model(batch, model.draw(batch, generators)).losses
    torch.stack(list(losses.values())).sum().backward()
    return losses, batch, model


CASES = {
    "nan": (np.nan, None),
    "inf": (np.inf, None),
    "minus inf": (-np.inf, None),
    "no data": (None, 0),
    "nan and no data": (np.nan, 0),
}


@pytest.mark.parametrize("which", [[2], IDS], ids=["one location", "the whole batch"])
@pytest.mark.parametrize("case", CASES)
def test_spoilt_windows_give_finite_losses_and_gradients(tmp_path, case, which):
    write(tmp_path, *CASES[case], which)
    losses, batch, model = step(tmp_path)
    for name in ("s1", "s2"):
        assert batch[name].isfinite().all()
    spoilt = [name for name, value in zip(("s1", "s2"), CASES[case]) if value is not None]
    for name in spoilt:
        rows = [i for i, text in enumerate(batch["id"]) if int(text.split("_")[0]) in which]
        assert len(rows) == len(which)
        assert not batch[f"{name}.valid"][rows].any()
        others = [i for i in range(4) if i not in rows]
        assert batch[f"{name}.valid"][others].all()
    assert all(loss.isfinite() for loss in losses.values())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


def test_a_batch_without_any_valid_pixel_has_no_reconstruction_to_learn_from(tmp_path):
    write(tmp_path, np.nan, 0, IDS)
    losses, _, _ = step(tmp_path)
    reconstructions = [loss for name, loss in losses.items() if "contrast" not in name]
    assert reconstructions and all(float(loss.detach()) == 0.0 for loss in reconstructions)


def test_a_run_without_any_valid_pixel_of_a_modality_is_ended(tmp_path):
    write(tmp_path, np.nan, None, IDS)
    data = SSL4EOS12DataModule(
        root=str(tmp_path), global_batch_size=4, window=Window(size=24), loading=Loading(workers=0)
    )
    data.setup("fit")
    with pytest.raises(DataError, match="s1: not one pixel is valid in 1 train batches"):
        list(data.train_dataloader())


def test_what_fills_an_invalid_window_does_not_matter(tmp_path):
    results = []
    for number, value in enumerate((np.nan, np.inf)):
        root = tmp_path / str(number)
        write(root, value, None, [1])
        losses, _, model = step(root)
        results.append((losses, [p.grad for p in model.parameters()]))
    (first, grads), (second, others) = results
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(grads, others, strict=True)
    )
