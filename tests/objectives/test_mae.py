"""MAE: what is hidden is what is reconstructed, in three axes, with invalid values and dates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from domainssl.errors import ConfigError, DataError
from domainssl.modality import Batch, Modality
from domainssl.objectives.base import Generators
from domainssl.objectives.mae import MAE, MAEArchitecture, MAEEncoding, MAEOptions

CROP = (8, 12, 16)  # no cube: transposed masks would go unnoticed in one


def mae(
    kind: str = "volume", size: tuple[int, ...] = CROP, unit: str = "arbitrary", **changes: Any
) -> MAE:
    torch.manual_seed(0)
    architecture = changes.pop("architecture", MAEArchitecture(width=24, decoder_width=24))
    return MAE(
        {"m": Modality(name="m", kind=kind, channels=("a",), value_unit=unit, size=size)},  # type: ignore[arg-type]
        encoding=MAEEncoding(
            size="tiny", architecture=architecture, patch_size=4, normalization="identity"
        ),
        context_size=size,
        **changes,
    )


def generators(seed: int = 1) -> Generators:
    return Generators(*(torch.Generator().manual_seed(seed + i) for i in (0, 1)))


def loss(model: MAE, batch: Batch, draws: Any) -> float:
    return float(model(batch, draws).losses["reconstruction"])


@torch.no_grad()
def test_the_hidden_set_is_that_of_the_loss_on_a_crop_that_is_no_cube() -> None:
    model = mae(options=MAEOptions(target_norm="none")).eval()
    grid = tuple(n // 4 for n in CROP)
    tokens = grid[0] * grid[1] * grid[2]
    numbers = torch.arange(float(tokens)).view(1, 1, *grid)
    x = numbers.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    draws = model.draw({"m": x}, generators())
    features = model.backbone.encode({"m": x}, keep={"m": draws.keep})
    places = features.coords["m"][0].long()
    kept = (places[:, 0] * grid[1] + places[:, 1]) * grid[2] + places[:, 2]
    assert {*kept.tolist()} | {*draws.removed[0].nonzero().flatten().tolist()} == {*range(tokens)}
    # what the loss compares with: every hidden patch holds its own number
    patches, _ = model._targets({"m": x})
    assert torch.equal(patches[0, :, 0], torch.arange(float(tokens)))
    before = loss(model, {"m": x}, draws)
    prediction = model.predict({"m": x}, features, draws)
    hidden = int(draws.removed[0].nonzero()[0])
    changed = x.clone()
    cell = numbers[0, 0] == hidden
    changed[0, 0][cell.repeat_interleave(4, 0).repeat_interleave(4, 1).repeat_interleave(4, 2)] += 1
    old, new = ((prediction[0, hidden] - hidden - d).square().mean() for d in (0, 1))
    after = loss(model, {"m": changed}, draws)
    count = int(draws.removed.sum())
    assert after - before == pytest.approx(float(new - old) / count, rel=1e-3)
    visible = int(kept[0])
    changed = x.clone()
    cell = (numbers[0, 0] == visible).repeat_interleave(4, 0).repeat_interleave(4, 1)
    changed[0, 0][cell.repeat_interleave(4, 2)] += 1
    assert loss(model, {"m": changed}, draws) != before  # the encoder sees it


@torch.no_grad()
def test_values_that_are_not_valid_are_no_target_and_half_empty_patches_do_not_count() -> None:
    model = mae(mask_ratio=0.5).eval()
    x = torch.randn(2, 1, *CROP, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, *CROP, dtype=torch.bool)
    draws = model.draw({"m": x}, generators())
    grid = [n // 4 for n in CROP]
    first = int(draws.removed[0].nonzero()[0])
    i, j, k = (4 * int(n) for n in torch.unravel_index(torch.tensor(first), grid))
    valid[0, i : i + 4, j : j + 4, k : k + 1] = False  # a quarter of a hidden patch
    counted = model._counted({"m": x, "m.valid": valid})
    assert counted.all()
    valid[0, i : i + 4, j : j + 4, k : k + 3] = False  # three quarters
    counted = model._counted({"m": x, "m.valid": valid})
    assert int((~counted).sum()) == 1 and not counted[0, first]
    batch = {"m": x, "m.valid": valid}
    spoilt = torch.where(valid.unsqueeze(1), x, 1e4)
    assert loss(model, {**batch, "m": spoilt}, draws) == loss(model, batch, draws)
    faithful = mae(mask_ratio=0.5, options=MAEOptions(reference=True))
    assert faithful.options.pixel_validity is False and faithful._counted(batch).all()


def test_patches_are_standardised_except_in_ct() -> None:
    x = {"m": 5 + torch.randn(1, 1, *CROP)}
    for unit, options, expected in (
        ("hu", MAEOptions(), False),
        ("arbitrary", MAEOptions(), True),
        ("hu", MAEOptions(reference=True), True),
        ("arbitrary", MAEOptions(target_norm="none"), False),
    ):
        model = mae(unit=unit, options=options)
        mean, _ = model._statistics(*model._targets(x))
        assert (float(mean.abs().max()) > 4) == expected, (unit, options)


@torch.no_grad()
def test_the_same_share_of_every_series_is_hidden_whatever_its_number_of_dates() -> None:
    model = mae("series", (16, 16), architecture=MAEArchitecture(width=24, decoder_width=24)).eval()
    x = torch.randn(2, 4, 1, 16, 16)
    frames = torch.tensor([[True] * 4, [True, True, False, False]])
    batch = {
        "m": x,
        "m.frames": frames,
        "m.valid": frames.view(2, 4, 1, 1).expand(2, 4, 16, 16),
        "m.dates": torch.tensor([[18000, 18030, 18060, 18090]] * 2, dtype=torch.int32),
    }
    draws = model.draw(batch, generators())
    real = frames.repeat_interleave(16, 1)
    assert (draws.removed & real).sum(1).tolist() == [48, 24]
    assert draws.seen.sum(1).tolist() == [16, 8]
    assert (~draws.removed & ~real).sum() == 0  # nothing of a padded date is encoded
    alone = {n: v[1:, :2] for n, v in batch.items()}
    # the item by itself, without padding and with the same hidden patches
    draws_alone = model.draw(alone, generators())
    removed = draws.removed[1:, :32]
    order = removed.float().argsort(dim=1, stable=True)
    draws_alone = type(draws)(
        keep=order[:, :8], restore=order.argsort(1), seen=draws_alone.seen, removed=removed
    )
    only = {n: v[1:] for n, v in batch.items()}
    of_one = type(draws)(
        **{f: getattr(draws, f)[1:] for f in ("keep", "restore", "seen", "removed")}
    )
    assert loss(model, alone, draws_alone) == pytest.approx(loss(model, only, of_one), rel=1e-4)


def test_outputs_show_hidden_patches_only_where_they_are() -> None:
    model = mae()
    x = torch.randn(2, 1, *CROP)
    draws = model.draw({"m": x}, generators())
    shown = model({"m": x}, draws, outputs=True).outputs["reconstruction"]["m"]
    assert torch.equal(shown["input"], x)
    visible = ~shown["visible"].isnan()
    assert float(visible.float().mean()) == 0.25
    assert torch.equal(shown["predicted"][visible], x[visible])


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(ConfigError, match="mask_ratio: got 1.0"):
        mae(mask_ratio=1.0)
    with pytest.raises(DataError, match=r"context_size: spatial size \(8, 12, 15\)"):
        mae(size=(8, 12, 15))
    with pytest.raises(ConfigError, match="multiple of 6"):
        mae(architecture=MAEArchitecture(width=16))
    with pytest.raises(ConfigError, match="multiple of 6"):
        mae(architecture=MAEArchitecture(width=24, decoder_width=16))
    table = Modality(name="m", kind="table", channels=("a",), value_unit="arbitrary")
    with pytest.raises(ConfigError, match="takes images, series and volumes"):
        MAE({"m": table}, encoding=MAEEncoding(normalization="identity"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "volume"])
def test_one_phantom_is_learned_by_heart(kind: str) -> None:
    size = (32, 32) if kind == "image" else (16, 16, 16)
    model = mae(
        kind, size, architecture=MAEArchitecture(width=48, decoder_width=48),
        options=MAEOptions(target_norm="none"),
    )  # fmt: skip
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
    ball = (sum(a**2 for a in axes) < 0.5).float() + 0.3 * torch.sin(6 * axes[0])
    batch = {"m": ball.view(1, 1, *size).expand(4, -1, *size)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(200):
        value = model(batch, model.draw(batch, generators(step))).losses["reconstruction"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
