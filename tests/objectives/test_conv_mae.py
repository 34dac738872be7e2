"""MAE of convolutional encoders: which voxels are hidden, and which of them the loss counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from domainssl.errors import ConfigError
from domainssl.modality import Modality
from domainssl.objectives.base import Generators
from domainssl.objectives.conv_mae import ConvMAE, ConvMAEOptions

SIZE = (32, 48, 64)
SIZES = {"features": (4, 8), "blocks": (1, 1), "widen": 0.0625}


def volume(channels: int = 1) -> Modality:
    return Modality(
        name="ct",
        kind="volume",
        channels=tuple(f"c{i}" for i in range(channels)),
        value_unit="arbitrary",
    )


def build(modality: Modality | None = None, encoder: str = "resenc", **options: Any) -> ConvMAE:
    torch.manual_seed(0)
    modality = modality or volume()
    encoding = {"encoder": encoder, "sizes": SIZES, "normalization": "identity"}
    size = {"mask_size": 16, "context_size": SIZE if modality.kind == "volume" else SIZE[1:]}
    arguments: dict[str, Any] = {"encoding": encoding, **size, **options}
    return ConvMAE({modality.name: modality}, **arguments)


def draws(model: ConvMAE, batch: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return model.draw(batch, Generators(generator, generator))


def batch_of(*channels: Tensor) -> dict[str, Any]:
    return {"ct": torch.stack(channels, 1)}


def loss(model: ConvMAE, batch: dict[str, Any], hidden: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(batch, hidden).losses["reconstruction_ct"]


def test_the_published_share_of_cubes_is_hidden() -> None:
    model = build()
    hidden = draws(model, batch_of(torch.rand(3, *SIZE)))["ct"]
    assert hidden.shape == (3, 2 * 3 * 4)
    assert (hidden.sum(1) == 18).all()  # 0.75 of 24


@pytest.mark.parametrize("cube", [0, 5, 11, 22])
def test_hidden_cubes_lie_where_the_loss_looks_in_a_crop_of_three_sides(cube: int) -> None:
    """nnssl's ViT MAE exchanges the first two axes between tokens and loss mask."""
    model = build()
    numbers = torch.arange(24).view(2, 3, 4)
    voxels = numbers.repeat_interleave(16, 0).repeat_interleave(16, 1).repeat_interleave(16, 2)
    hidden = torch.zeros(1, 24, dtype=torch.bool)
    hidden[0, cube] = True
    x = voxels.unsqueeze(0).float()
    assert torch.equal(model.voxels(hidden, x.unsqueeze(1)), (x == cube))


def test_only_hidden_voxels_count_and_their_values_are_not_seen() -> None:
    model = build()
    batch = batch_of(torch.rand(1, *SIZE))
    hidden = draws(model, batch)
    mask = model.voxels(hidden["ct"], batch["ct"])
    with torch.no_grad():
        step = model(batch, hidden, outputs=True)
    pictures = step.outputs["reconstruction"]["ct"]
    error = (pictures["predicted"] - batch["ct"]).square().squeeze(1)
    torch.testing.assert_close(step.losses["reconstruction_ct"], error[mask].mean())
    assert torch.equal(pictures["visible"].isnan().squeeze(1), mask)
    other = {"ct": torch.where(mask.unsqueeze(1), batch["ct"] + 1, batch["ct"])}
    with torch.no_grad():
        again = model(other, hidden, outputs=True).outputs["reconstruction"]["ct"]["predicted"]
    assert torch.equal(again, pictures["predicted"])  # nothing hidden reaches the prediction
    shown = {"ct": torch.where(mask.unsqueeze(1), batch["ct"], 0.0)}
    assert not torch.equal(loss(model, shown, hidden), step.losses["reconstruction_ct"])


def test_one_perturbed_cube_changes_only_its_part_of_the_loss() -> None:
    model = build()
    batch = batch_of(torch.zeros(1, *SIZE))
    hidden = torch.ones(1, 24, dtype=torch.bool)
    hidden[0, 7] = False
    before = loss(model, batch, {"ct": hidden})
    batch["ct"][0, 0, :16, 32:48, 16:32] += 3  # cube (0, 2, 1), number 9
    prediction = model(batch, {"ct": hidden}, outputs=True).outputs["reconstruction"]["ct"]
    part = prediction["predicted"][0, 0, :16, 32:48, 16:32]
    expected = ((part - 3).square() - part.square()).sum() / (23 * 16**3)
    after = loss(model, batch, {"ct": hidden})
    torch.testing.assert_close(after - before, expected, rtol=1e-4, atol=1e-5)


def test_invalid_voxels_do_not_count() -> None:
    model = build()
    batch = batch_of(torch.rand(2, *SIZE))
    batch["ct.valid"] = torch.rand(2, *SIZE) > 0.5
    hidden = draws(model, batch)
    mask = model.voxels(hidden["ct"], batch["ct"]) & batch["ct.valid"]
    step = model(batch, hidden, outputs=True)
    predicted = step.outputs["reconstruction"]["ct"]["predicted"]
    error = (predicted - batch["ct"]).square().squeeze(1)
    torch.testing.assert_close(step.losses["reconstruction_ct"].detach(), error[mask].mean())


def test_channels_are_averaged_and_the_published_sum_is_an_option() -> None:
    batch = batch_of(torch.rand(1, *SIZE), torch.rand(1, *SIZE))
    ours = build(volume(2))
    published = build(volume(2), options=ConvMAEOptions(reference=True))
    hidden = draws(ours, batch)
    torch.testing.assert_close(loss(published, batch, hidden), 2 * loss(ours, batch, hidden))


def test_the_whole_crop_can_count() -> None:
    model = build(options=ConvMAEOptions(region="all"))
    batch = batch_of(torch.rand(1, *SIZE))
    hidden = draws(model, batch)
    step = model(batch, hidden, outputs=True)
    predicted = step.outputs["reconstruction"]["ct"]["predicted"]
    expected = (predicted - batch["ct"]).square().mean()
    torch.testing.assert_close(step.losses["reconstruction_ct"].detach(), expected)


@pytest.mark.parametrize("encoder", ["monai:resnet10", "resenc"])
def test_encoders_of_volumes_are_decoded_to_the_full_grid(encoder: str) -> None:
    model = build(encoder=encoder, context_size=(32, 64, 32))
    batch = batch_of(torch.rand(2, 32, 64, 32))
    step = model(batch, draws(model, batch), outputs=True)
    assert step.outputs["reconstruction"]["ct"]["predicted"].shape == batch["ct"].shape


def test_a_timm_resnet_learns_from_images() -> None:
    image = Modality(name="s2", kind="image", channels=("a", "b", "c"), value_unit="arbitrary")
    model = build(image, "resnet18", context_size=(64, 32))
    batch = {"s2": torch.rand(2, 3, 64, 32)}
    step = model(batch, draws(model, batch))
    step.losses["reconstruction_s2"].backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"encoder": "transformer"}, "maps of one size only.*Choose resenc"),
        ({"context_size": (32, 40, 64)}, "not a multiple of the patch size 16"),
        ({"mask_size": 8, "encoder": "monai:resnet10", "context_size": (32, 40, 64)}, "deepest"),
        ({"mask_ratio": 1.0}, r"expected a share in \(0, 1\)"),
    ],
)
def test_what_cannot_be_used_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(**options)


def test_a_series_is_refused() -> None:
    series = Modality(name="s2", kind="series", channels=("a",), value_unit="arbitrary")
    with pytest.raises(ConfigError, match="takes images and volumes"):
        build(series, "resnet18")


@pytest.mark.slow
def test_one_phantom_is_learned_by_heart() -> None:
    model = build(mask_size=8, context_size=(16, 24, 32))
    axes = [torch.linspace(-1, 1, side) for side in (16, 24, 32)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    batch = batch_of(((x**2 + y**2 + z**2) < 0.5).float().unsqueeze(0))
    hidden = draws(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        value = model(batch, hidden).losses["reconstruction_ct"]
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.5 * losses[0]
