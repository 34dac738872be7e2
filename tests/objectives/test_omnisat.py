"""What OmniSat keeps beyond the contract: order, padding, selection, distances and contrast."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

import pytest
import torch
from grouped import grouped
from ranks import run_ranks
from torch import Tensor

from domainssl.backbones.omnisat import OmniSatBackbone
from domainssl.distributed import rank
from domainssl.errors import ConfigError, DataError
from domainssl.losses import tokens as token_losses
from domainssl.losses.tokens import token_nce
from domainssl.modality import Modality
from domainssl.nn.blocks import set_attention_path
from domainssl.nn.calendar import day_of_year
from domainssl.nn.filtering import filter_dates
from domainssl.nn.relative import aligned_buckets, bucket_table, legacy_buckets
from domainssl.objectives.base import Generators
from domainssl.objectives.omnisat import OmniSat, OmniSatArchitecture
from domainssl.training.execution import Execution

SERIES = {"heads": 4, "widths_in": [16, 32], "widths_out": [32, 32]}
SIZES = {"width": 32, "fusion": {"depth": 1, "heads": 4}, "series": SERIES}


def modalities(order: tuple[str, ...] = ("aerial", "s2", "s1")) -> dict[str, Modality]:
    every = {
        "aerial": Modality(
            name="aerial",
            kind="image",
            channels=("r", "g"),
            value_unit="rgb8",
            size=(24, 24),
            gsd_m=1.25,
        ),
        "s2": Modality(
            name="s2",
            kind="series",
            channels=("a", "b", "c"),
            value_unit="dn",
            size=(3, 3),
            gsd_m=10,
        ),
        "s1": Modality(
            name="s1", kind="series", channels=("vv",), value_unit="db", size=(6, 6), gsd_m=5
        ),
    }
    return {name: every[name] for name in order}


def backbone(order: tuple[str, ...] = ("aerial", "s2", "s1"), **changes: Any) -> OmniSatBackbone:
    torch.manual_seed(0)
    sides = {"aerial": 8, "s2": 1, "s1": 2}
    arguments = {"patch_size": sides, "grid": (3, 3), **SIZES, "normalization": "identity"}
    model = OmniSatBackbone(modalities(order), **{**arguments, **changes})
    for parameter in model.parameters():
        if parameter.ndim > 1:  # relative tables and queries begin at zero
            parameter.data = torch.randn(parameter.shape) * 0.2
    return model.eval()


def batch(items: int = 2, dates: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def some(*shape: int) -> Tensor:
        return torch.randn(items, *shape, generator=generator)

    days = 18000 + 30 * torch.arange(dates, dtype=torch.int32).expand(items, -1)
    return {
        "aerial": some(2, 24, 24),
        "s2": some(dates, 3, 3, 3),
        "s2.dates": days,
        "s1": some(dates, 1, 6, 6),
        "s1.dates": days + 7,
    }


def padded(given: dict[str, Any], name: str, more: int) -> dict[str, Any]:
    """Lengthen a series by frames of nonsense that are no frames."""
    x, days = given[name], given[f"{name}.dates"]
    filler = torch.full((len(x), more, *x.shape[2:]), 77.0)
    real = torch.ones(days.shape, dtype=torch.bool)
    return {
        **given,
        name: torch.cat([x, filler], 1),
        f"{name}.dates": torch.cat([days, days[:, :1].expand(-1, more)], 1),
        f"{name}.frames": torch.cat([real, real[:, :1].expand(-1, more) & False], 1),
    }


def test_padding_changes_nothing() -> None:
    model, given = backbone(), batch()
    with torch.no_grad():
        short, long = model(given), model(padded(given, "s2", 3))
    for name, tokens in short.tokens.items():
        torch.testing.assert_close(long.tokens[name], tokens, rtol=1e-5, atol=1e-5)


def test_padding_changes_tokens_where_the_published_code_is_followed() -> None:
    model, given = backbone(attend_to_padding=True), batch()
    with torch.no_grad():
        short, long = model(given), model(padded(given, "s2", 3))
    assert float((short.tokens["s2"] - long.tokens["s2"]).abs().max()) > 1e-2


def test_the_order_of_modalities_does_not_matter_to_the_fusion() -> None:
    given = batch()
    noise = torch.rand(3, 2, 9, generator=torch.Generator().manual_seed(2))
    hidden = dict(zip(modalities(), noise > 0.5, strict=True))
    with torch.no_grad():
        one = backbone()
        other = backbone(("s1", "aerial", "s2"))
        other.load_state_dict(one.state_dict())
        a = one.encode(one.normalize(given), replace=hidden)
        b = other.encode(other.normalize(given), replace=hidden)
    torch.testing.assert_close(a.tokens["joint"], b.tokens["joint"], rtol=1e-5, atol=1e-5)


def test_an_absent_modality_gives_the_tokens_of_a_batch_without_it() -> None:
    model, given = backbone(), batch()
    given["s1.present"] = torch.tensor([False, False])
    without = {k: v for k, v in given.items() if not k.startswith("s1")}
    with torch.no_grad():
        a, b = model(given), model(without)
    torch.testing.assert_close(a.tokens["joint"], b.tokens["joint"], rtol=1e-5, atol=1e-5)


def test_one_item_is_encoded_as_in_a_larger_batch() -> None:
    model, given = backbone(), batch()
    with torch.no_grad():
        both, one = model(given), model({k: v[:1] for k, v in given.items()})
    torch.testing.assert_close(one.tokens["joint"], both.tokens["joint"][:1], rtol=1e-5, atol=1e-5)


def test_layouts_agree_for_one_modality_and_differ_for_two() -> None:
    table = bucket_table((4, 4))
    assert torch.equal(aligned_buckets(table, 1), legacy_buckets(table, 1))
    assert not torch.equal(aligned_buckets(table, 2), legacy_buckets(table, 2))


def test_distances_between_patches_fall_into_the_published_buckets() -> None:
    row = bucket_table((1, 7))[1, 1:]
    assert row.tolist() == [3, 4, 5, 5, 6, 6, 6]
    assert set(bucket_table((2, 2))[0].tolist()) == {7}


def test_a_sequence_whose_length_is_a_square_works_in_both_layouts() -> None:
    given = {k: v for k, v in batch().items() if k.startswith("s2")}
    for layout in ("aligned", "legacy"):
        model = backbone(
            ("s2",), fusion={"depth": 1, "heads": 4, "rpe_layout": layout}, grid=(3, 1)
        )  # 1 + 3 tokens
        x = {**given, "s2": given["s2"][..., :1]}
        assert model(x).tokens["joint"].shape == (2, 3, 32)


def test_days_of_the_year_over_four_centuries() -> None:
    first = date(1900, 2, 27)
    every = [first + timedelta(days=97 * i) for i in range(1500)]
    since = torch.tensor([(d - date(1970, 1, 1)).days for d in every])
    assert day_of_year(since).tolist() == [d.timetuple().tm_yday for d in every]


def test_an_item_with_one_date_keeps_it_and_one_with_none_keeps_none() -> None:
    attention = torch.tensor([[0.1, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    candidates = torch.tensor([[True, False, False, False], [False] * 4])
    chosen = filter_dates(attention, candidates, 0.25)
    assert chosen.kept.tolist() == [[True], [False]]
    assert int(chosen.positions[0, 0]) == 0


def test_the_dates_kept_are_those_above_the_quantile() -> None:
    attention = torch.rand(6, 21, generator=torch.Generator().manual_seed(3))
    candidates = torch.rand(6, 21, generator=torch.Generator().manual_seed(4)) > 0.3
    chosen = filter_dates(attention, candidates, 0.25)
    for b in range(6):
        bound = attention[b][candidates[b]].quantile(0.75)
        expected = [t for t in range(21) if candidates[b, t] and attention[b, t] > bound]
        assert chosen.positions[b][chosen.kept[b]].tolist() == expected


def direct_contrast(tokens: Tensor, valid: Tensor) -> Tensor:
    """Write the loss out, anchor by anchor."""
    z = torch.nn.functional.normalize(tokens, dim=-1)
    place: list[tuple[int, int, int]] = [tuple(at) for at in valid.nonzero().tolist()]
    terms = []
    for b, m, p in place:
        scores = {at: z[b, m, p] @ z[at] / 0.1 for at in place}
        positives = [s for at, s in scores.items() if (at[0], at[2]) == (b, p) and at[1] != m]
        every = [s for at, s in scores.items() if at[:2] != (b, m)]
        if positives:
            terms.append(torch.stack(every).logsumexp(0) - torch.stack(positives).logsumexp(0))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("limit", [2**24, 1])
def test_contrast_is_the_written_formula_whole_and_in_parts(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(token_losses, "_MAX_ELEMENTS", limit)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(3, 3, 4, 6, generator=generator).requires_grad_()
    valid = torch.rand(3, 3, 4, generator=generator) > 0.3
    (grad,) = torch.autograd.grad(token_nce(tokens, valid=valid), tokens)
    expected = direct_contrast(tokens, valid)
    torch.testing.assert_close(token_nce(tokens, valid=valid), expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, tokens)[0])


def test_contrast_without_any_pair_is_a_connected_zero() -> None:
    tokens = torch.randn(2, 2, 3, 4).requires_grad_()
    valid = torch.zeros(2, 2, 3, dtype=torch.bool)
    valid[:, 0] = True
    loss = token_nce(tokens, valid=valid)
    loss.backward()
    assert float(loss.detach()) == 0
    assert tokens.grad is not None
    assert float(tokens.grad.abs().max()) == 0


def _tokens() -> Tensor:
    return torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(6))


def contrast_of_a_rank() -> tuple[Tensor, Tensor]:
    """Contrast 3 items on one rank and 1 on the other."""
    part = _tokens()[:3] if rank() == 0 else _tokens()[3:]
    part.requires_grad_()
    loss = token_nce(part)
    loss.backward()
    assert part.grad is not None
    return loss.detach(), part.grad


def test_contrast_on_two_ranks_is_that_of_one() -> None:
    whole = _tokens().requires_grad_()
    loss = token_nce(whole)
    loss.backward()
    assert whole.grad is not None
    found = run_ranks(contrast_of_a_rank)
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, loss.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad in found]) / 2, whole.grad)


def test_long_series_are_cut_to_max_frames_and_padding_is_never_taken() -> None:
    model = OmniSat(
        dict(modalities()),
        **grouped(
            size="tiny",
            architecture=OmniSatArchitecture(depth=1),
            normalization="identity",
            max_frames=4,
        ),
    )
    given = padded(batch(dates=5), "s2", 6)
    generator = torch.Generator().manual_seed(0)
    draws = model.draw(given, Generators(generator, generator))
    assert draws.frames["s2"].shape == (2, 4)
    assert int(draws.frames["s2"].max()) < 5
    assert (draws.frames["s2"].diff() > 0).all()
    assert all(loss.isfinite() for loss in model(given, draws).losses.values())


def _objective(**changes: Any) -> OmniSat:
    torch.manual_seed(0)
    sizes = OmniSatArchitecture(depth=1)
    return OmniSat(
        dict(modalities()),
        **grouped(size="tiny", architecture=sizes, normalization="identity", **changes),
    )


def test_pictures_have_the_layout_of_the_batch() -> None:
    model, given = _objective(), batch()
    generator = torch.Generator().manual_seed(0)
    step = model(given, model.draw(given, Generators(generator, generator)), outputs=True)
    for name, modality in model.backbone.modalities.items():
        whole = list(given[name].shape)
        if modality.kind == "series":
            whole[1] = 1  # one of the dates
        for picture in step.outputs["reconstruction"][name].values():
            assert list(picture.shape) == whole


def test_retrieval_compares_items_by_the_mean_cosine_of_their_patches() -> None:
    model, given = _objective().eval(), batch()
    given["s2.valid"] = torch.ones(2, 5, 3, 3, dtype=torch.bool)
    given["s2.valid"][0, :, 0, 0] = False  # a patch without a measurement
    with torch.no_grad():
        features = model.backbone(given)
        vectors = model.embed(features)
    tokens = features.tokens
    cosines = torch.nn.functional.cosine_similarity(tokens["s2"][0], tokens["s1"][1], dim=-1)
    torch.testing.assert_close(vectors["s2"][0] @ vectors["s1"][1], cosines[1:].sum())


def test_attention_inside_a_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"execution\.attention: got 'flex'.*'fused' or 'math'"):
        _objective(execution=Execution(attention="flex"))
    model = backbone()
    set_attention_path(model, "flex")
    with pytest.raises(ConfigError, match="got 'flex'"):
        model(batch())


def test_modalities_that_do_not_share_a_grid_are_refused() -> None:
    with pytest.raises(ConfigError, match="one patch grid"):
        OmniSat(
            dict(modalities()),
            **grouped(size="tiny", patch_size={"s1": 1}, normalization="identity"),
        )
    with pytest.raises(ConfigError, match=r"patch_m: 12 m are 9\.6 pixels of 'aerial'"):
        OmniSat(dict(modalities()), **grouped(size="tiny", patch_m=12.0, normalization="identity"))


def test_another_footprint_and_missing_dates_are_refused() -> None:
    model, given = backbone(), batch()
    with pytest.raises(DataError, match="same footprint"):
        model({"aerial": given["aerial"][..., :16, :16]})
    with pytest.raises(DataError, match=r"s2\.dates is missing"):
        model({"s2": given["s2"]})
    with pytest.raises(ConfigError, match="pass `replace`"):
        model.encode(given, keep={"s2": torch.zeros(2, 1, dtype=torch.long)})


def test_cards_with_the_sizes_of_the_fusion_laid_flat_still_build_the_backbone() -> None:
    model = backbone()
    flat = {k: v for k, v in model.arguments.items() if k != "fusion"} | model.arguments["fusion"]
    again = OmniSatBackbone(**OmniSatBackbone.current_arguments(flat))
    again.load_state_dict(model.state_dict(), strict=True)
    assert again.arguments == model.arguments
    assert OmniSatBackbone.current_arguments(model.arguments) == model.arguments
