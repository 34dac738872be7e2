"""LESS ViT and Hyper-MAE: what their definitions promise, beyond the published numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from domainssl import export_backbone, load_backbone
from domainssl.backbones.bands import adapt_bands
from domainssl.backbones.less import LESSBackbone, spectral_codes
from domainssl.errors import ConfigError, WeightsError
from domainssl.losses.spectral import hidden_bands_and_patches
from domainssl.modality import Modality
from domainssl.nn.low_rank import LowRankAttention, LowRankSizes, perception_mask
from domainssl.objectives.base import Generators
from domainssl.objectives.hyper_mae import HyperMAE, HyperMAEOptions

SIZES: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "channel_width": 2}


def bands(name: str, count: int, unit: str = "reflectance", start: float = 400.0) -> Modality:
    return Modality(
        name=name, kind="image", channels=tuple(f"{name}{i}" for i in range(count)),
        value_unit=unit, size=(16, 16), gsd_m=10.0, mean=(0.5,) * count, std=(0.2,) * count,
        wavelengths_nm=tuple(start + 10.0 * i for i in range(count)),
    )  # fmt: skip


def backbone(known: dict[str, Modality], **changes: Any) -> LESSBackbone:
    torch.manual_seed(0)
    return LESSBackbone(known, {**SIZES, **changes}, patch_size=4).eval()


@pytest.mark.parametrize("count", [1, 2, 12, 13, 202])
def test_shapes_of_any_number_of_bands(count: int) -> None:
    model = backbone({"m": bands("m", count)})
    features = model({"m": torch.rand(2, count, 16, 8)})  # sides may differ
    assert features.tokens["m"].shape == (2, 8, 16) and features.grid["m"] == (4, 2)
    assert model.encode_seen(model.normalize({"m": torch.rand(2, count, 16, 8)})).tokens.shape == (
        2, 1 + count, 9, 16,
    )  # fmt: skip


def test_a_size_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple of the patch size"):
        backbone({"m": bands("m", 2)})({"m": torch.rand(1, 2, 16, 18)})


def test_one_rank_is_the_dense_attention_of_kronecker_products() -> None:
    attention = LowRankAttention(12, 1, LowRankSizes(channel_width=3)).double().eval()
    attention.out.weight.data.copy_(torch.eye(12))
    attention.out.bias.data.zero_()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    over_c, v_c = random(5, 5).softmax(-1), random(5, 3)
    over_s, v_s = random(7, 7).softmax(-1), random(7, 4)
    combined = attention.combine((over_c @ v_c)[None, None, None], (over_s @ v_s)[None, None, None])
    dense = torch.kron(over_c, over_s) @ torch.kron(v_c, v_s)
    torch.testing.assert_close(combined[0].flatten(0, 1), dense, rtol=1e-12, atol=1e-12)


def test_ranks_are_added_or_averaged() -> None:
    torch.manual_seed(0)
    added = LowRankAttention(16, 2, LowRankSizes(channel_width=2, ranks=3))
    torch.manual_seed(0)
    mean = LowRankAttention(
        16, 2, LowRankSizes(channel_width=2, ranks=3, rank_reduction="mean", rank_values="shared")
    )
    added.out.bias.data.zero_()
    mean.out.bias.data.zero_()
    x = torch.randn(2, 4, 5, 16)
    torch.testing.assert_close(mean(x) * 3, added(x), rtol=1e-4, atol=1e-5)
    own = LowRankAttention(16, 2, LowRankSizes(channel_width=2, ranks=3, rank_values="per_rank"))
    assert own.channels.v.out_features == 3 * added.channels.v.out_features
    assert own(x).shape == x.shape


def test_the_perception_mask() -> None:
    coords = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    alone = perception_mask(coords, 160.0, 0.0)[0, 0]
    assert torch.equal(alone[1:, 1:], torch.eye(4, dtype=torch.bool))
    assert alone[0].all() and alone[:, 0].all()
    assert perception_mask(coords, 160.0, 227.0).all()
    assert perception_mask(coords, 160.0, 160.0).sum() == 9 + 4 + 8  # the diagonals are too far


def test_a_masked_pair_has_no_influence() -> None:
    attention = LowRankAttention(16, 2, LowRankSizes(channel_width=2)).eval()
    x = torch.randn(1, 5, 3, requires_grad=False)
    values = torch.randn(1, 5, 8, requires_grad=True)
    near = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    near[..., 1, 4] = False
    out = attention.positions(values, near)
    (gradient,) = torch.autograd.grad(out[..., 1, :].sum(), values)
    assert float(gradient[0, 4].abs().max()) == 0 and float(gradient[0, 3].abs().max()) > 0
    assert x.shape == (1, 5, 3)


def test_bands_in_another_order_change_only_the_order() -> None:
    known = bands("m", 6)
    model = backbone({"m": known})
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert known.wavelengths_nm is not None
    shuffled = dataclasses.replace(
        known,
        channels=tuple(known.channels[i] for i in order),
        wavelengths_nm=tuple(known.wavelengths_nm[i] for i in order),
    )
    other = LESSBackbone({"m": shuffled}, {**SIZES}, patch_size=4).eval()
    other.load_state_dict(model.state_dict())
    x = torch.rand(2, 6, 16, 16)
    ours = model.encode_seen(model.normalize({"m": x})).tokens
    theirs = other.encode_seen(other.normalize({"m": x[:, order]})).tokens
    torch.testing.assert_close(theirs[:, 0], ours[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs[:, 1:], ours[:, 1:][:, order], rtol=1e-5, atol=1e-5)


def test_codes_by_hand() -> None:
    codes = spectral_codes(torch.tensor([500.0]), torch.tensor([[0.0, 30.0]]), 4)
    assert float(codes[0, 0].abs().max()) == 0
    waves = torch.tensor([500.0]).double()
    expected = [waves.sin(), (waves / 100).sin(), waves.cos(), (waves / 100).cos()]
    torch.testing.assert_close(codes[1, 0], torch.cat(expected).float() / 2)
    at = torch.tensor(30.0)  # the column first, then the row
    placed = torch.stack([at.sin(), at.cos(), torch.tensor(0.0), torch.tensor(1.0)]) / 2
    torch.testing.assert_close(codes[0, 1], placed)


def test_losses_by_hand() -> None:
    # two bands, four patches; band 1 and the patches 2 and 3 are hidden
    error = torch.tensor([[[1.0, 2, 3, 4], [5, 6, 7, 8]]])
    hidden_bands = torch.tensor([[False, True]])
    hidden_patches = torch.tensor([[False, False, True, True]])
    every = torch.ones(1, 4, dtype=torch.bool)
    patches, channels, count = hidden_bands_and_patches(error, hidden_bands, hidden_patches, every)
    assert (float(patches), float(channels), count.tolist()) == (5.5, 6.5, [2, 1])
    measured = torch.tensor([[True, True, True, False]])
    patches, channels, _ = hidden_bands_and_patches(error, hidden_bands, hidden_patches, measured)
    assert (float(patches), float(channels)) == (5.0, 6.0)


def test_a_model_of_13_bands_runs_on_202(tmp_path: Any) -> None:
    model = backbone({"m": bands("m", 13)})
    export_backbone(model, tmp_path / "export")
    data = {"m": bands("m", 202, start=420.0)}
    data["m"] = dataclasses.replace(data["m"], channels=tuple(f"h{i}" for i in range(202)))
    loaded = load_backbone(tmp_path / "export", modalities=data, bands="wavelengths")
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    assert loaded({"m": torch.rand(1, 202, 16, 16)}).pooled["m"].shape == (1, 16)
    assert "wavelengths" in str(loaded.band_changes[0])
    with pytest.raises(WeightsError, match="202 bands"):
        load_backbone(tmp_path / "export", modalities=data)


def test_bands_of_the_same_names_that_lie_elsewhere_are_told_by_their_wavelengths() -> None:
    model = backbone({"m": bands("m", 4, start=420.0)})
    near, far = (bands("m", 4, start=420.0 + shift) for shift in (20.0, 500.0))
    assert adapt_bands(model, {"m": near}, "strict") is model
    for policy in ("strict", "subset", "average"):
        with pytest.raises(WeightsError, match="band 'm0' lies at 920 nm, .*at 420 nm"):
            adapt_bands(model, {"m": far}, policy)
    assert far.mean is not None
    far = dataclasses.replace(far, mean=(0.9, *far.mean[1:]))
    found = adapt_bands(model, {"m": far}, "wavelengths").modalities["m"]
    assert found.wavelengths_nm == far.wavelengths_nm and found.mean == far.mean
    mixed = dataclasses.replace(
        far, channels=("m1", "m0"), wavelengths_nm=(430.0, 900.0), mean=(0.7, 0.9), std=(0.1, 0.1)
    )
    found = adapt_bands(model, {"m": mixed}, "wavelengths").modalities["m"]
    assert found.wavelengths_nm == (430.0, 900.0) and found.mean == (0.5, 0.9)


def test_pixels_of_another_size_are_refused_or_those_of_the_data_place_patches() -> None:
    model = backbone({"m": bands("m", 4, start=420.0)})
    coarse = dataclasses.replace(bands("m", 4, start=420.0), gsd_m=30.0)
    for policy in ("strict", "subset", "average"):
        with pytest.raises(WeightsError, match="pixels of 30 m, those of the weights are 10 m"):
            adapt_bands(model, {"m": coarse}, policy)
    found = adapt_bands(model, {"m": coarse}, "wavelengths")
    assert found.gsd_m == found.modalities["m"].gsd_m == 30 and model.gsd_m == 10
    assert "pixels of 30 m in place of 10 m" in str(found.band_changes[0])
    near = dataclasses.replace(coarse, gsd_m=10.24)
    assert adapt_bands(model, {"m": near}, "wavelengths") is model


def test_wavelengths_are_for_encoders_that_read_them() -> None:
    from domainssl.backbones.vit import ViTBackbone

    vit = ViTBackbone({"m": bands("m", 3)}, {"width": 16, "depth": 1, "heads": 2}, patch_size=4)
    with pytest.raises(WeightsError, match="weights of its own for every band"):
        adapt_bands(vit, {"m": bands("m", 2)}, "wavelengths")


def test_unknown_wavelengths_and_pixels_are_told() -> None:
    unknown = dataclasses.replace(bands("m", 2), wavelengths_nm=None)
    with pytest.raises(ConfigError, match="no wavelengths_nm"):
        backbone({"m": unknown})
    with pytest.raises(ConfigError, match="one gsd_m"):
        backbone({"m": dataclasses.replace(bands("m", 2), gsd_m=None)})
    radar = dataclasses.replace(unknown, channels=("VV", "VH"), value_unit="db")
    assert backbone({"m": radar}).modalities["m"].wavelengths_nm == (5500.0, 5700.0)


def _model(**options: Any) -> HyperMAE:
    torch.manual_seed(0)
    return HyperMAE(
        {"a": bands("a", 5), "b": bands("b", 2, "db", 5500.0)},
        {"size": "tiny", "patch_size": 4},
        context_size=16,
        options=HyperMAEOptions(**options),
    )


def _draws(model: HyperMAE, batch: dict[str, Tensor]) -> Any:
    one, two = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    return model.draw(batch, Generators(one, two))


def test_each_and_one_drawn() -> None:
    batch = {"a": torch.rand(2, 5, 16, 16), "b": torch.rand(2, 2, 16, 16)}
    each = _model(inputs="each")
    passes = _draws(each, batch).passes
    assert list(passes) == ["a+b", "a", "b"]
    assert all(torch.isfinite(v) for v in each(batch, _draws(each, batch)).losses.values())
    assert passes["a+b"].keep_bands.shape == (2, 3) and passes["b"].keep_bands.shape == (2, 2)
    one = _model(inputs="one_drawn")
    assert len(_draws(one, batch).passes) == 1
    assert list(_draws(_model(), batch).passes) == ["a+b"]


def test_bands_that_an_item_lacks_are_hidden_first_and_count_nowhere() -> None:
    model = _model()
    batch = {
        "a": torch.rand(2, 5, 16, 16),
        "b": torch.rand(2, 2, 16, 16),
        "a.present": torch.tensor([True, False]),
    }
    draws = _draws(model, batch)
    assert not draws.passes["a+b"].hidden_bands[1, 5:].any()
    before = model(batch, draws).losses
    batch["a"][1] = 7.0
    after = model(batch, draws).losses
    assert all(torch.equal(before[name], after[name]) for name in before)
