"""MultiContrastMAE on exams that lack contrasts: what is there decides, and nothing else does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from domainssl.backbones.multi_contrast import MultiContrastBackbone
from domainssl.errors import ConfigError, DataError, WeightsError
from domainssl.modality import Batch, Modality
from domainssl.nn.contrast_masking import contrast_masking, drop_contrasts, random_shares
from domainssl.objectives.base import Generators
from domainssl.objectives.multi_contrast_mae import (
    MultiContrastArchitecture,
    MultiContrastDraws,
    MultiContrastEncoding,
    MultiContrastMAE,
    MultiContrastOptions,
)

NAMES, CROP, TOKENS = ("t1", "t1c", "flair"), (8, 12, 16), 24
SIZES = MultiContrastArchitecture(
    width=24, depth=2, heads=4, hidden=40,
    decoder_width=12, decoder_depth=1, decoder_heads=2, decoder_hidden=24,
)  # fmt: skip


def modalities(names: tuple[str, ...] = NAMES, **facts: Any) -> dict[str, Any]:
    facts = {"size": CROP, **facts}
    return {
        n: Modality(name=n, kind="volume", channels=("a",), value_unit="arbitrary", **facts)
        for n in names
    }


def mae(known: dict[str, Any] | None = None, **changes: Any) -> MultiContrastMAE:
    torch.manual_seed(0)
    encoding = MultiContrastEncoding(
        architecture=SIZES, patch_size=4, normalization="identity",
        weights=changes.pop("weights", None),
    )  # fmt: skip
    return MultiContrastMAE(known or modalities(), encoding=encoding, context_size=CROP, **changes)


def exams(items: int = 4) -> Batch:
    """The first exam is complete, the others lack one contrast each."""
    g = torch.Generator().manual_seed(1)
    batch: Batch = {n: torch.randn(items, 1, *CROP, generator=g) for n in NAMES}
    for place, name in enumerate(NAMES):
        batch[f"{name}.present"] = torch.arange(items) != place + 1
    return batch


def generators(seed: int = 1) -> Generators:
    return Generators(*(torch.Generator().manual_seed(seed + i) for i in (0, 1)))


def total(model: MultiContrastMAE, batch: Batch, draws: MultiContrastDraws) -> Tensor:
    return torch.stack(list(model(batch, draws).losses.values())).sum()


def test_the_content_of_a_missing_contrast_changes_nothing() -> None:
    model, batch = mae(), exams()
    draws = model.draw(batch, generators())
    other = dict(batch)
    for name in NAMES:
        gone = ~batch[f"{name}.present"].view(-1, 1, 1, 1, 1)
        other[name] = torch.where(gone, 9.0, batch[name])
    assert torch.equal(total(model, batch, draws), total(model, other, draws))
    a, b = model.backbone(batch), model.backbone(other)
    assert torch.equal(a.pooled["joint"], b.pooled["joint"])
    assert torch.equal(a.tokens["joint"], b.tokens["joint"])


@torch.no_grad()
def test_a_missing_contrast_is_as_if_the_model_had_never_heard_of_it() -> None:
    model, batch = mae().eval(), exams()
    whole = model.backbone(batch)
    item, gone = 2, "t1c"
    alone = {n: batch[n][item : item + 1] for n in NAMES if n != gone}
    found = model.backbone(alone)
    for name in alone:
        torch.testing.assert_close(whole.tokens[name][item], found.tokens[name][0])
    torch.testing.assert_close(whole.pooled["joint"][item], found.pooled["joint"][0])
    torch.testing.assert_close(whole.tokens["joint"][item], found.tokens["joint"][0])
    assert not whole.token_valid[gone][item].any()


@torch.no_grad()
def test_the_order_of_the_contrasts_in_a_batch_changes_nothing() -> None:
    model, batch = mae(), exams()
    draws = model.draw(batch, generators())
    turned = dict(reversed(batch.items()))
    assert torch.equal(total(model, batch, draws), total(model, turned, draws))


def test_a_batch_without_any_contrast_is_refused() -> None:
    with pytest.raises(DataError, match="expected some of the modalities"):
        mae().backbone({"id": ["a"]})
    with pytest.raises(DataError, match="has none of the contrasts"):
        mae().draw({"id": ["a"]}, generators())


@torch.no_grad()
def test_exams_without_any_contrast_count_in_nothing() -> None:
    model, batch = mae().eval(), exams(3)
    draws = model.draw(batch, generators())
    more = {n: torch.cat([v, v[:1]]) for n, v in batch.items()}
    for name in NAMES:
        more[f"{name}.present"][-1] = False
    wider = MultiContrastDraws(
        **{
            f.name: torch.cat([getattr(draws, f.name), getattr(draws, f.name)[:1]])
            for f in dataclasses.fields(draws)
        }
    )
    torch.testing.assert_close(total(model, more, wider), total(model, batch, draws))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_budget_is_a_share_of_the_contrasts_that_are_there(dropout: float) -> None:
    model = mae(options=MultiContrastOptions(contrast_dropout=dropout))
    batch = exams(64)
    draws = model.draw(batch, generators())
    present = model.backbone.present(batch)
    budget = (0.25 * TOKENS * present.sum(1)).long()
    visible = ~draws.removed
    assert torch.equal(visible.sum(1), budget)
    assert torch.equal(draws.seen.sum(1), budget)
    of_contrast = visible.unflatten(1, (3, TOKENS)).sum(2)
    assert not (of_contrast.bool() & ~present).any()
    whole = (of_contrast == 0) & present
    assert (whole.float().mean() > 0.25) == (dropout > 0)
    for item in range(4):  # what is kept is what is not removed
        kept = draws.keep[item][draws.seen[item]]
        assert set(kept.tolist()) == set(visible[item].nonzero().flatten().tolist())


def test_shares_dropping_and_balance() -> None:
    g = torch.Generator().manual_seed(0)
    usable = torch.tensor([[True, True, False]]).expand(4000, -1)
    shares = random_shares(torch.rand(4000, 3, generator=g), usable)
    assert torch.allclose(shares.sum(1), torch.ones(4000)) and not shares[:, 2].any()
    assert float(shares[:, 0].var()) == pytest.approx(1 / 12, rel=0.1)  # uniform for two
    stays = drop_contrasts(torch.rand(4000, 3, generator=g), usable, 0.5)
    assert stays.any(1).all() and not stays[:, 2].any()
    assert float(stays[:, 0].float().mean()) == pytest.approx(0.625, abs=0.03)  # 1/2 + 1/4 · 1/2
    budget = torch.tensor([7])
    masking = contrast_masking(
        torch.tensor([[1.0, 0.0]]), torch.rand(1, 2, 4), torch.rand(1, 8), budget,
        torch.ones(1, 2, dtype=torch.bool), 7,
    )  # fmt: skip
    visible = (~masking.removed).unflatten(1, (2, 4)).sum(2)
    assert visible.tolist() == [[4, 3]]  # cut to the contrast, the rest dealt to the other


@torch.no_grad()
def test_exams_weigh_the_same_whatever_their_number_of_contrasts() -> None:
    model = mae(options=MultiContrastOptions(target_norm="none", contrast_dropout=0.0)).eval()
    batch = exams(2)  # the second lacks t1
    draws = model.draw(batch, generators())
    each = []
    for item in range(2):
        one = {n: v[item : item + 1] for n, v in batch.items()}
        mine = MultiContrastDraws(
            **{f.name: getattr(draws, f.name)[item : item + 1] for f in dataclasses.fields(draws)}
        )
        each.append(float(total(model, one, mine)))
    assert float(total(model, batch, draws)) == pytest.approx(sum(each) / 2, rel=1e-5)


def test_dropout_of_the_decoder_acts_in_training_only() -> None:
    model = mae(options=MultiContrastOptions(reference=True))
    assert {p.p for p in model.decoder.modules() if isinstance(p, torch.nn.Dropout)} == {0.1}
    assert {p.p for p in model.backbone.modules() if isinstance(p, torch.nn.Dropout)} == {0.0}
    batch = exams()
    draws = model.draw(batch, generators())
    assert not torch.equal(total(model, batch, draws), total(model, batch, draws))
    model.eval()
    assert torch.equal(total(model, batch, draws), total(model, batch, draws))


def test_files_that_call_a_contrast_otherwise_are_read(tmp_path: Any) -> None:
    model = mae()
    state = {n.replace("t1c", "t1ce"): t for n, t in model.to_reference().items()}
    torch.save(state, tmp_path / "bmmae.pth")
    again = mae(weights=str(tmp_path / "bmmae.pth"))
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    part = {n: t for n, t in state.items() if "embeddings.bias" not in n}
    torch.save(part, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"missing in the file: 2 \(embed\.t1\.weight"):
        mae(modalities(("t1",)), weights=str(tmp_path / "part.pth"))
    with pytest.raises(WeightsError, match="no contrast 't2'"):
        mae(modalities(("t1", "t2")), weights=str(tmp_path / "bmmae.pth"))
    with pytest.raises(WeightsError, match="no state dict of BM-MAE"):
        MultiContrastBackbone.from_reference({"a": torch.zeros(1)}, {"modalities": modalities()})


def test_what_cannot_be_used_is_refused() -> None:
    known = modalities()
    with pytest.raises(ConfigError, match="share a grid"):
        mae(
            {
                **known,
                "t2": Modality(
                    name="t2",
                    kind="volume",
                    channels=("a",),
                    value_unit="arbitrary",
                    size=(8, 8, 8),
                ),
            }
        )
    with pytest.raises(ConfigError, match="same number of channels"):
        mae(
            {
                **known,
                "t2": Modality(
                    name="t2", kind="volume", channels=("a", "b"), value_unit="arbitrary", size=CROP
                ),
            }
        )
    with pytest.raises(ConfigError, match="volumes, or images, on one grid"):
        mae(
            {
                **known,
                "t2": Modality(name="t2", kind="image", channels=("a",), value_unit="arbitrary"),
            }
        )
    with pytest.raises(ConfigError, match=r"contrast_dropout: got 1.0"):
        mae(options=MultiContrastOptions(contrast_dropout=1.0))
    batch = {"t1": torch.zeros(1, 1, *CROP), "flair": torch.zeros(1, 1, 8, 8, 8)}
    with pytest.raises(DataError, match="share a grid"):
        mae().backbone(batch)


def test_a_contrast_that_some_exams_lack_is_synthesised_from_what_each_has():
    options = MultiContrastOptions(target_norm="none")
    model = mae(options=options).eval()
    generator = torch.Generator().manual_seed(3)
    batch: Batch = {n: torch.randn(2, 1, *CROP, generator=generator) for n in NAMES}
    batch["t1c.present"] = torch.tensor([True, False])
    found = model.synthesise(batch)
    assert found.keys() == {"t1c"} and found["t1c"].shape == (2, 1, *CROP)
    filled = {**batch, "t1c": batch["t1c"].index_fill(0, torch.tensor([1]), 7.0)}
    torch.testing.assert_close(model.synthesise(filled)["t1c"][1], found["t1c"][1])
    changed = {**batch, "t1": batch["t1"] + torch.linspace(-1, 1, CROP[2])}
    assert not torch.allclose(model.synthesise(changed)["t1c"][1], found["t1c"][1])
    alone = {n: batch[n][1:] for n in ("t1", "flair")}  # the key itself is not there
    torch.testing.assert_close(model.synthesise(alone)["t1c"][0], found["t1c"][1])


def test_synthesis_is_refused_where_levels_were_not_learned_or_names_are_wrong():
    batch: Batch = {n: torch.zeros(1, 1, *CROP) for n in NAMES}
    with pytest.raises(ConfigError, match="target_norm: none"):
        mae().synthesise(batch)
    model = mae(options=MultiContrastOptions(target_norm="none"))
    with pytest.raises(ConfigError, match="no contrast 't1x'. Did you mean 't1"):
        model.synthesise(batch, ("t1x",))
