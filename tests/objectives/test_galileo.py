"""What Galileo draws, and what it makes of data that lack dates, places, groups or items."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domainssl.backbones.galileo.groups import PUBLISHED_GROUPS, PUBLISHED_MODALITIES
from domainssl.errors import ConfigError, DataError, WeightsError
from domainssl.losses.discrimination import token_discrimination
from domainssl.modality import Batch
from domainssl.objectives.base import Generators
from domainssl.objectives.galileo import Galileo, GalileoEncoding, GalileoMasking, GalileoSizes
from domainssl.objectives.galileo_parts import Cut, cut_batch, group_choice

SIZES = GalileoSizes(
    width=32, depth=2, heads=4, max_patch_size=4, drop_path=0.0, predictor_depth=1,
    predictor_heads=4,
)  # fmt: skip
SIDE, STEPS, ITEMS = 8, 3, 4


def made(*names: str, **more: Any) -> Galileo:
    torch.manual_seed(0)
    masking = {"patch_sizes": (2, 4), "shapes": ((4, 3), (2, 3)), **more.pop("masking", {})}
    known: dict[str, Any] = {}
    for name in names:
        found = PUBLISHED_MODALITIES[name]
        size = (SIDE, SIDE) if found.gsd_m else (1, 1) if found.kind == "series" else ()
        known[name] = dataclasses.replace(found, size=size)
    encoding = GalileoEncoding(architecture=more.pop("sizes", SIZES))
    return Galileo(known, encoding=encoding, masking=GalileoMasking(**masking), **more)


def batch(model: Galileo, steps: int = STEPS, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    found: Batch = {}
    for name, modality in model.backbone.modalities.items():
        frames = (steps,) if modality.kind == "series" else ()
        shape = (ITEMS, *frames, modality.num_channels, *modality.size)
        mean = torch.tensor(modality.mean or (0.0,) * modality.num_channels)
        std = torch.tensor(modality.std or (1.0,) * modality.num_channels)
        bands = [-1, *[1] * len(modality.size)]
        noise = torch.randn(shape, generator=generator)
        found[name] = noise * std.view(bands) + mean.view(bands)
        found[f"{name}.present"] = torch.ones(ITEMS, dtype=torch.bool)
        if frames:
            days = 18000 + 31 * torch.arange(steps, dtype=torch.int32)
            found[f"{name}.dates"] = days.expand(ITEMS, -1).clone()
    return found


def generators(seed: int = 1) -> Generators:
    return Generators(
        torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)
    )


def total(model: Galileo, data: Batch, seed: int = 1) -> Tensor:
    step = model(data, model.draw(data, generators(seed)))
    return torch.stack(list(step.losses.values())).sum()


def test_all_subsets_of_the_other_groups_are_equally_probable():
    available = torch.ones(1, 4, dtype=torch.bool)
    noise = torch.tensor([0.1, 0.4, 0.2, 0.3])
    counts: Counter[tuple[bool, ...]] = Counter()
    for number in range(700):
        shown, asked = group_choice(available, noise, (number + 0.5) / 700, 1)
        assert shown.tolist() == [[True, False, False, False]]
        counts[tuple(asked[0].tolist())] += 1
    assert len(counts) == 7 and set(counts.values()) == {100}
    assert all(any(subset) and not subset[0] for subset in counts)


def test_an_item_that_lacks_groups_chooses_among_its_own():
    available = torch.tensor([[True] * 4, [False, True, True, False], [False, False, False, True]])
    noise = torch.tensor([0.1, 0.4, 0.2, 0.3])
    shown, asked = group_choice(available, noise, 0.99, 3)
    assert shown.tolist() == [
        [True, False, True, True], [False, False, True, False], [False, False, False, True],
    ]  # fmt: skip
    assert asked.tolist() == [
        [False, True, False, False], [False, True, False, False], [False, False, False, True],
    ]  # fmt: skip


def test_structured_passes_show_and_ask_at_different_places_and_dates():
    model = made("s1", "s2", "dem", "era5", "latlon", masking={"encode_ratio": 0.3})
    data = batch(model)
    arrays = {group.name: group.array for group in PUBLISHED_GROUPS}
    for seed in range(8):
        time, space, *_ = model.draw(data, generators(seed)).passes
        assert {time.kind, space.kind} == {"time", "space"}
        for found in (time, space):
            for name, visible in found.visible.items():
                hidden = found.hidden[name]
                assert not (visible & hidden).any()
                assert not (visible.any() and hidden.any())  # a group is shown or asked for
                marked = visible | hidden
                if arrays[name] == "space_time":
                    over = marked.any(-1) if found is space else marked.flatten(1, 2).any(1)
                    assert (
                        marked == (over[..., None] if found is space else over[:, None, None])
                    ).all()
                if arrays[name] == "static":
                    assert marked.unique().numel() == 1  # the same of all items
        shown = torch.stack([m.any() for m in space.visible.values()]).sum()
        assert 2 <= shown <= 6
        assert any(mask.any() for mask in space.hidden.values())


def test_random_passes_show_and_ask_for_shares_of_the_tokens_that_hold_data():
    model = made("s1", "s2", "era5")
    data = batch(model)
    data["s2.present"][0] = False
    data["s1.valid"] = torch.ones(ITEMS, STEPS, SIDE, SIDE, dtype=torch.bool)
    data["s1.valid"][1, 0] = False
    for found in model.draw(data, generators()).passes[2:]:
        places = (found.cut.side // found.cut.patch_size) ** 2
        s1, s2, era5 = (n * found.cut.steps for n in (places, 6 * places, 1))
        whole = torch.tensor([s1 + era5, s1 - places + s2 + era5, *[s1 + s2 + era5] * 2])
        counts = [
            torch.stack([mask.reshape(ITEMS, -1).sum(1) for mask in masks.values()]).sum(0)
            for masks in (found.visible, found.hidden)
        ]
        assert counts[0].tolist() == (whole * 0.1).long().clamp(min=1).tolist()
        assert counts[1].tolist() == (whole * 0.5).long().tolist()


@pytest.mark.parametrize(
    "names", [("era5",), ("s1",), ("dem",), ("era5", "latlon"), ("s1", "s2", "dem", "viirs")]
)
def test_any_subset_of_sensors_trains(names):
    model = made(*names)
    loss = total(model, batch(model))
    loss.backward()
    assert loss.isfinite() and loss > 0
    for name in names:
        own = [p.grad for p in model.modality_parameters(name)]
        assert all(grad is None or grad.isfinite().all() for grad in own)


def test_one_date_has_space_instead_of_time():
    model = made("s1", "s2", "era5")
    data = batch(model, steps=1)
    found = model.draw(data, generators()).passes[0]
    assert found.kind == "time" and found.cut.steps == 1
    hidden = [m for n, m in found.hidden.items() if n != "ERA5" and m.any()]
    assert all(not m.flatten(1).all() for m in hidden)  # some of the places
    assert total(model, data).isfinite()


def test_what_an_item_lacks_changes_nothing():
    model = made("s1", "s2", "latlon")
    data = batch(model)
    data["s2.present"][1] = False
    draws = model.draw(data, generators())
    other = {**data, "s2": data["s2"].clone()}
    other["s2"][1] = 777.0
    first, second = (list(model(x, draws).losses.values()) for x in (data, other))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_cut_turns_all_modalities_alike():
    model = made("s1", "dem")
    x = {
        "s1": torch.arange(2 * 3 * 2 * 64.0).view(2, 3, 2, 8, 8),
        "s1.valid": torch.rand(2, 3, 8, 8) > 0.5,
        "s1.dates": torch.arange(6).view(2, 3),
        "dem": torch.arange(2 * 2 * 64.0).view(2, 2, 8, 8),
        "id": ["a", "b"],
    }
    cut = Cut(patch_size=2, side=4, corner=(1, 3), first=1, steps=2, turn=5)
    found = cut_batch(x, model.backbone.modalities, ["s1", "dem"], cut)
    assert found.keys() == {"s1", "s1.valid", "s1.dates", "dem"}
    part = x["dem"][..., 1:5, 3:7].rot90(1, (-2, -1)).flip(-1)
    assert torch.equal(found["dem"], part)
    assert torch.equal(found["s1"], x["s1"][:, 1:3, :, 1:5, 3:7].rot90(1, (-2, -1)).flip(-1))
    assert torch.equal(found["s1.dates"], x["s1.dates"][:, 1:3])


def test_the_order_of_items_does_not_matter_among_all():
    generator = torch.Generator().manual_seed(0)
    p, t = torch.randn(2, 3, 4, 8, generator=generator)
    counted = torch.rand(3, 4, generator=generator) > 0.3
    order = torch.tensor([2, 0, 1])
    first = token_discrimination(p, t, counted, candidates="batch")
    second = token_discrimination(p[order], t[order], counted[order], candidates="batch")
    torch.testing.assert_close(first, second)
    alone = token_discrimination(p, t, counted)
    assert alone < first  # fewer candidates


def test_the_teacher_follows_what_is_trained_and_leaves_tables_alone():
    model = made("s1", momentum=0.75)
    encoder: Any = model.teacher["backbone"]
    before = {n: p.clone() for n, p in encoder.named_parameters()}
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(1)
    data = batch(model)
    model.after_step(model(data, model.draw(data, generators())))
    for name, parameter in encoder.named_parameters():
        moved = 0.0 if name.endswith(("pos_embed", "month_embed.weight")) else 0.25
        torch.testing.assert_close(parameter, before[name] + moved)


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match=r"masking.passes: 'tim' is not one of.*'time'"):
        made("s1", masking={"passes": ("tim",)})
    with pytest.raises(ConfigError, match="max_patch_size is 4"):
        made("s1", masking={"patch_sizes": (8,)})
    with pytest.raises(ConfigError, match="no group 'S3'"):
        made("s1", masking={"ignored": ("S3",)})
    model = made("s1", "era5")
    data = batch(model)
    data["era5"] = data["era5"][:, :2]
    with pytest.raises(DataError, match="series of one length"):
        model.draw(data, generators())


@pytest.mark.slow
def test_it_fits_a_few_items():
    model = made("s1", "s2", masking={"passes": ("random",), "patch_sizes": (4,)})
    data, draws = batch(model), None
    draws = model.draw(data, generators())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    for _ in range(200):
        step = model(data, draws)
        loss = step.losses["local"]
        first = loss.detach() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step(step)
    assert first is not None
    assert loss < first / 2


def test_a_released_training_goes_on_with_predictors_and_teacher(tmp_path: Path) -> None:
    trained = made(*PUBLISHED_MODALITIES)
    for parameter in trained.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    files = {
        "encoder": trained.backbone.encoder, "decoder": trained.predictors["global"],
        "second_decoder": trained.predictors["local"],
        "target_encoder": trained.teacher["backbone"].encoder,
    }  # fmt: skip
    for name, part in files.items():
        state = part.state_dict()
        state = {n.replace("blocks.", "blocks.backbone.", 1): t for n, t in state.items()}
        torch.save(state, tmp_path / f"{name}.pt")
    encoding: dict[str, Any] = {"architecture": SIZES, "weights": str(tmp_path / "encoder.pt")}
    known: Any = {n: PUBLISHED_MODALITIES[n] for n in ("s2", "era5")}
    anew = Galileo(
        known, encoding=GalileoEncoding(**encoding), masking=GalileoMasking(patch_sizes=(2, 4))
    )
    encoding["predictors"] = str(tmp_path)
    found = Galileo(
        known, encoding=GalileoEncoding(**encoding), masking=GalileoMasking(patch_sizes=(2, 4))
    )
    own, other = trained.state_dict(), anew.state_dict()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    assert any(not torch.equal(other[n], own[n]) for n in own if n.startswith("predictors."))
    (tmp_path / "second_decoder.pt").unlink()
    with pytest.raises(WeightsError, match="second_decoder.pt does not exist"):
        Galileo(
            known, encoding=GalileoEncoding(**encoding), masking=GalileoMasking(patch_sizes=(2, 4))
        )
    torch.save({"mask_token": torch.zeros(3)}, tmp_path / "decoder.pt")
    with pytest.raises(WeightsError, match=r"decoder.pt does not fit: \d+ tensors are missing"):
        Galileo(
            known, encoding=GalileoEncoding(**encoding), masking=GalileoMasking(patch_sizes=(2, 4))
        )
    with pytest.raises(ConfigError, match="belong to an encoder; set encoding.weights"):
        GalileoEncoding(predictors=str(tmp_path))


def test_a_gain_widens_what_pixels_say_around_the_middle_of_their_range_and_no_codes():
    plain = made("s2", "era5").backbone.encoder
    sizes = dataclasses.replace(SIZES, projection_gain=8.0)
    scaled = made("s2", "era5", sizes=sizes).backbone.encoder
    changed = set()
    for (name, before), after in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        changed |= set() if torch.equal(after, before) else {name.split(".")[0]}
    assert changed == {"space_time_embed", "time_embed"}
    d = torch.rand(2, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) - 0.5
    for group, middle in (("S2_SWIR", 0.5), ("NDVI", 0.0)):  # differences lie around 0
        before, after = (e.space_time_embed[group] for e in (plain, scaled))  # type: ignore[index]
        x = d[:, : before.proj.in_channels]
        expected = before.proj.bias + 8 * (before(middle + x, 4) - before(middle + 0 * x, 4))
        torch.testing.assert_close(after(middle + x, 4), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"projection_gain: got 0\.0, expected more than 0"):
        GalileoSizes(projection_gain=0.0)
