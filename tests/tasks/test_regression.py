"""Numbers of items and of pixels: what is minimised, what is measured, and windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_tasks import MODALITIES, backbone
from torch.nn import functional as F

from domainssl import export_task, load_task
from domainssl.errors import ConfigError, DataError
from domainssl.tasks import DenseHead, NumberLoss, RegressionTask, Tiles

PYRAMID = DenseHead(name="pyramid", width=8)


def task(**changes: Any) -> RegressionTask:
    return RegressionTask(backbone(), modalities=MODALITIES, **changes)


def batch(size: int = 4, side: int = 16, maps: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    values = torch.rand(size, 3, side, side, generator=draw) * 255
    target = torch.randn(size, *([maps] if maps else []), side, side, generator=draw)
    return {"he": values, "target": torch.where(target < -1, torch.nan, target)}


@pytest.mark.parametrize(
    ("name", "distance"),
    [("squared", F.mse_loss), ("absolute", F.l1_loss), ("huber", F.smooth_l1_loss)],
)
def test_the_loss_of_maps_is_the_mean_over_known_pixels(name: str, distance: Any) -> None:
    found, given = task(dense=PYRAMID, loss=NumberLoss(name=name, mean=3.0, std=2.0)), batch()
    logits = found.logits(given)
    assert logits.shape == (4, 1, 16, 16) and logits.dtype == torch.float32
    known = given["target"].isfinite()
    wanted = distance(logits[:, 0][known] / 2, given["target"][known] / 2)
    losses = found.losses(logits, given)
    torch.testing.assert_close(losses[name], wanted)
    losses[name].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in found.parameters())


def test_metrics_are_those_of_the_known_pixels() -> None:
    found = task(dense=PYRAMID, targets=("height", "biomass"))
    truth = torch.tensor([[[[1000.0, 1002.0]], [[torch.nan, 1004.0]]]])  # (1, 2, 1, 2)
    said = torch.tensor([[[[1001.0, 1002.0]], [[-9.0, 1002.0]]]])
    watched = found.metrics()
    watched.update(*found.scored(said, {"target": truth}))
    values = {name: float(value) for name, value in watched.compute().items()}
    assert values["mae"] == pytest.approx(1.0)  # of 1, 0 and 2
    assert values["rmse"] == pytest.approx((5 / 3) ** 0.5)
    assert values["r2"] == pytest.approx(1 - 5 / 8)  # of a mean of 1002
    one = found.metrics()
    one.update(*found.scored(said[:, 1:], {"target": truth[:, 1:]}))
    assert one.compute()["r2"].isnan() and float(one.compute()["mae"]) == 2


def test_maps_are_named_and_exported(tmp_path: Any) -> None:
    found = task(dense=PYRAMID, targets=("height", "biomass")).eval()
    with torch.no_grad():
        logits = found.logits(batch(maps=2))
        assert found.rows(logits, batch(maps=2)) == {}
        named = found.predictions(logits)
        assert list(named) == ["height", "biomass"]
        assert torch.equal(named["biomass"], logits[:, 1])
        export_task(found, tmp_path)
        assert torch.equal(load_task(tmp_path).logits(batch()), logits)


def test_held_out_maps_are_judged_in_windows() -> None:
    given = batch(side=32)
    tiled = task(dense=PYRAMID, tiles=Tiles(size=16, overlap=0.0, blending="constant")).eval()
    with torch.no_grad():
        found = tiled(given)
        corner = tiled.logits({"he": given["he"][:, :, 16:, :16]})
    torch.testing.assert_close(found[:, :, 16:, :16], corner, rtol=1e-4, atol=1e-5)
    assert tiled.train()(given).shape == found.shape


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="tiles: windows are those of maps.*dense.name"):
        task(tiles=Tiles(size=16))
    items = task()
    with pytest.raises(DataError, match="target: got shape .4, 16, 16., expected .4, 1..*dense"):
        items.losses(items.logits(batch()), batch())


def test_maps_are_learned() -> None:
    torch.manual_seed(0)
    found = task(dense=PYRAMID, loss=NumberLoss(mean=0.5, std=0.3))
    patches = torch.rand(2, 1, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    given = {"he": 255 * patches.expand(-1, 3, -1, -1), "target": patches[:, 0]}
    optimizer = torch.optim.Adam(found.parameters(), lr=1e-2)
    first = None
    for _ in range(60):
        loss = found.losses(found.logits(given), given)["squared"]
        first = float(loss.detach()) if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * first
