"""ViTAutoEncSSL: what the copies are, what is compared, and MONAI's network both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from domainssl.errors import ConfigError
from domainssl.modality import Modality
from domainssl.objectives.base import Generators
from domainssl.objectives.vitautoenc import (
    Corruption,
    ViTAutoEncArchitecture,
    ViTAutoEncEncoding,
    ViTAutoEncOptions,
    ViTAutoEncSSL,
)

CROP = (8, 12, 16)
SIZES = ViTAutoEncArchitecture(width=24, depth=2, heads=4, hidden=40, channels=4)


def model(corruption: Corruption = Corruption(), patch: int = 4, **changes: Any) -> ViTAutoEncSSL:
    torch.manual_seed(0)
    weights = changes.pop("weights", None)
    encoding = ViTAutoEncEncoding(
        architecture=SIZES, patch_size=patch, normalization="identity", weights=weights
    )
    return ViTAutoEncSSL(
        {
            "m": Modality(
                name="m", kind="volume", channels=("a", "b"), value_unit="arbitrary", size=CROP
            )
        },
        encoding=encoding,
        context_size=CROP,
        corruption=corruption,
        **changes,
    ).eval()


def draws_of(net: ViTAutoEncSSL, x: torch.Tensor) -> Any:
    return net.draw({"m": x}, Generators(*(torch.Generator().manual_seed(i) for i in (1, 2))))


def test_boxes_are_filled_or_all_that_is_left_and_other_voxels_stay() -> None:
    net = model(Corruption(shuffle_probability=0.0, filled_sides=(2, 3), left_sides=(4, 6)))
    x = torch.rand(8, 2, *CROP)
    draws = draws_of(net, x)
    copies = net.corrupt({"m": x}, draws)
    assert copies.shape == (8, 2, 2, *CROP)
    assert 0 < int(draws.is_left.sum()) < 16
    for item in range(8):
        for view in range(2):
            inside = torch.zeros(CROP, dtype=torch.bool)
            for start, stop in zip(draws.start[item, view], draws.stop[item, view], strict=True):
                a, b, c = (slice(int(i), int(j)) for i, j in zip(start, stop, strict=True))
                inside[a, b, c] = True
                sides = set((stop - start).tolist())
                assert sides <= ({4, 5, 6} if draws.is_left[item, view] else {2, 3})
            kept = inside if draws.is_left[item, view] else ~inside
            assert torch.equal(copies[item, view][:, kept], x[item][:, kept])
            filled = copies[item, view][:, ~kept]
            assert float(filled.min()) >= float(x[item].min())
            assert float(filled.max()) <= float(x[item].max())
            assert not torch.isclose(filled, x[item][:, ~kept]).any(0).all()


def test_shuffling_moves_voxels_within_their_channel_and_box() -> None:
    net = model(Corruption(boxes=1, filled_sides=(1, 1), left_sides=(16, 16), shuffled_side=3,
                           shuffled_boxes=1, shuffle_probability=0.999999))  # fmt: skip
    x = torch.rand(4, 2, *CROP)
    draws = draws_of(net, x)
    copies = net.corrupt({"m": x}, draws)
    rows, views = draws.is_left.nonzero(as_tuple=True)  # the box that is left is everything
    assert len(rows)
    for item, view in zip(rows.tolist(), views.tolist(), strict=True):
        moved = (copies[item, view] != x[item]).any(0).nonzero()
        start = draws.shuffle_start[item, view, 0]
        assert len(moved) > 10
        assert ((moved >= start) & (moved < start + 3)).all()
        for channel in range(2):
            assert torch.equal(
                copies[item, view, channel].flatten().sort().values,
                x[item, channel].flatten().sort().values,
            )


def test_invalid_voxels_are_neither_seen_nor_compared() -> None:
    net = model()
    x, valid = torch.rand(4, 2, *CROP), torch.rand(4, *CROP) > 0.2
    draws = draws_of(net, x)
    losses = [
        net({"m": torch.where(valid.unsqueeze(1), x, filler), "m.valid": valid}, draws).losses
        for filler in (0.0, 99.0)
    ]
    for name, loss in losses[0].items():
        assert torch.equal(loss, losses[1][name])


def test_the_contrast_is_of_pooled_tokens_or_of_voxels_and_weighs_by_the_restoration() -> None:
    x = torch.rand(4, 2, *CROP)
    ours, theirs = model(), model(options=ViTAutoEncOptions(reference=True))
    assert ours.options.contrast_of == "pooled" and theirs.options.contrast_of == "voxels"
    draws = draws_of(ours, x)
    a, b = ours({"m": x}, draws).losses, theirs({"m": x}, draws).losses
    assert torch.equal(a["reconstruction"], b["reconstruction"])
    assert not torch.isclose(a["contrastive"], b["contrastive"])
    a["contrastive"].backward()
    assert ours.decoder.second.bias.grad.abs().sum() > 0  # through the weight alone


@torch.no_grad()
def test_monais_network_and_ours_are_one(tmp_path: Any) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(3)
    options = {
        "in_channels": 2, "out_channels": 2, "img_size": CROP, "patch_size": (4, 4, 4),
        "hidden_size": 24, "mlp_dim": 40, "num_layers": 2, "num_heads": 4, "deconv_chns": 4,
    }  # fmt: skip
    net = nets.ViTAutoEnc(**options).eval()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "vit.pt")
    ours = model(weights=str(tmp_path / "vit.pt"))
    x = torch.randn(2, 2, *CROP)
    expected = net(x)[0]
    _, restored = ours.restore({"m": x}, x.unsqueeze(1))
    torch.testing.assert_close(restored[:, 0], expected, atol=1e-5, rtol=1e-5)
    again = nets.ViTAutoEnc(**options).eval()
    again.load_state_dict(ours.to_reference())
    torch.testing.assert_close(again(x)[0], expected, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(ConfigError, match="every side must be a square number"):
        model(patch=2)
    with pytest.raises(ConfigError, match=r"filled_sides: got \[5, 2\]"):
        Corruption(filled_sides=(5, 2))
    with pytest.raises(ConfigError, match="temperature: got 0"):
        model(temperature=0)
