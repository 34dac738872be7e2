"""SwinUNETR SSL: what each option changes, files of the research code, sizes that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import Modality
from domainssl.objectives.base import Generators
from domainssl.objectives.swinunetr_ssl import SwinUNETRSSL, SwinUNETRSSLOptions

CT = Modality(name="ct", kind="volume", channels=("ct",), value_unit="hu")
SMALL = {"feature_size": 12, "depths": (1, 1, 1, 1), "window": 4}


def build(modality: Modality = CT, **options: Any) -> SwinUNETRSSL:
    torch.manual_seed(0)
    encoding = {"architecture": SMALL, **options.pop("encoding", {})}
    arguments: dict[str, Any] = {"context_size": (32, 32, 64), "embedding": 16, **options}
    return SwinUNETRSSL({modality.name: modality}, encoding=encoding, **arguments)  # type: ignore[arg-type]


def batch(items: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"ct": 2000 * torch.rand(items, 1, 32, 32, 64, generator=generator) - 1000}


def draws(model: SwinUNETRSSL, x: dict[str, Any], seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return model.draw(x, Generators(generator, generator))


def test_every_item_is_turned_in_the_chosen_plane() -> None:
    x = torch.arange(2 * 4 * 4 * 3.0).view(2, 1, 4, 4, 3)
    turned = build().rotate(x, torch.tensor([1, 2]))
    assert torch.equal(turned[0], torch.rot90(x[0], 1, (1, 2)))
    assert torch.equal(turned[1], torch.rot90(x[1], 2, (1, 2)))
    sagittal = build(options={"rotation_plane": "yz"}, context_size=(64, 32, 32))
    x = x.permute(0, 1, 4, 2, 3)
    assert torch.equal(sagittal.rotate(x, torch.tensor([0, 3]))[1], torch.rot90(x[1], 3, (2, 3)))


def test_views_are_the_turned_crop_but_for_boxes_of_noise() -> None:
    model, x = build(), batch()
    step = model(x, draws(model, x), outputs=True)
    pictures = step.outputs["reconstruction"]["ct"]
    is_same = pictures["visible"] == pictures["input"]
    assert 0.6 < float(is_same.float().mean()) < 1
    changed = pictures["visible"][~is_same]
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1


def test_boxes_hold_noise_about_the_mean_where_values_are_centred() -> None:
    ct = Modality(**{**vars(CT), "mean": (0.0,), "std": (500.0,)})
    model, x = build(ct, encoding={"normalization": "zscore"}), batch()
    pictures = model(x, draws(model, x), outputs=True).outputs["reconstruction"]["ct"]
    changed = pictures["visible"][pictures["visible"] != pictures["input"]]
    assert -2 <= float(changed.min()) < -1.5 and 1.5 < float(changed.max()) <= 2
    assert abs(float(changed.mean())) < 0.2  # the mean of the values, as of the noise in [0, 1]


def test_a_swap_brings_values_of_another_item() -> None:
    model, x = build(options={"swap": True}), batch()
    x["ct"][0], x["ct"][1] = -1000.0, 1000.0  # 0 and 1 after scaling
    plan = draws(model, x)
    other = tuple((boxes, torch.tensor([0.9, 0.1])) for boxes, _ in plan.swap)
    step = model(x, type(plan)(plan.rotation, plan.noise, other), outputs=True)
    first = step.outputs["reconstruction"]["ct"]["visible"][0]
    assert float((first == 1).float().mean()) > 0.01
    without = build().draw(x, Generators(torch.Generator(), torch.Generator()))
    assert without.swap == ()


def test_invalid_voxels_are_not_reconstructed() -> None:
    model, x = build(), batch()
    x["ct.valid"] = torch.rand(2, 32, 32, 64) > 0.5
    plan = draws(model, x)
    step = model(x, plan, outputs=True)
    clean = torch.cat([model.rotate(model.backbone.normalize(x)["ct"], t) for t in plan.rotation])
    valid = torch.cat([model.rotate(x["ct.valid"], t) for t in plan.rotation])
    views = torch.cat([model._corrupt(clean, plan, view) for view in range(2)])
    _, _, predicted = model.heads(model._deepest({"ct": views, "ct.valid": valid}))
    expected = (predicted - clean).abs()[valid.unsqueeze(1)].mean()
    torch.testing.assert_close(step.losses["reconstruction"], expected)


def test_the_published_heads_read_one_cell_each() -> None:
    published = build(options=SwinUNETRSSLOptions(reference=True), context_size=(64, 32, 32))
    maps = torch.rand(2, 192, 2, 1, 1, requires_grad=True)
    for index, cell in ((0, 0), (1, 1)):
        (gradient,) = torch.autograd.grad(published.heads(maps)[index].sum(), maps)
        assert gradient[:, :, cell].abs().sum() > 0
        assert gradient[:, :, 1 - cell].abs().sum() == 0
    (gradient,) = torch.autograd.grad(build().heads(maps)[0].sum(), maps)
    assert torch.equal(gradient[:, :, 0], gradient[:, :, 1])


def test_files_of_the_research_code_go_both_ways(tmp_path: Path) -> None:
    model = build()
    torch.save(model.to_reference(), path := tmp_path / "ours.pt")
    again = build(encoding={"weights": str(path)}, embedding=16)
    assert_equal(again.state_dict(), model.state_dict())
    state = {f"module.{n}": t for n, t in model.to_reference()["state_dict"].items()}
    torch.save({"state_dict": state, "optimizer": {}}, path := tmp_path / "theirs.pt")
    with pytest.raises(WeightsError, match=r"encoding\.architecture\.merging"):
        build(encoding={"weights": str(path)})
    sizes = {**SMALL, "merging": "standard"}
    again = build(encoding={"weights": str(path), "architecture": sizes})
    assert_equal(again.state_dict(), model.state_dict())


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_the_released_encoder_starts_a_run_with_the_old_merging(tmp_path: Path) -> None:
    backbone = build().backbone
    content = {"state_dict": backbone.to_reference("model_swinvit")["state_dict"]}
    torch.save(content, path := tmp_path / "model_swinvit.pt")
    model = build(encoding={"weights": str(path)})
    assert model.backbone.architecture.merging == "legacy"
    with pytest.raises(WeightsError, match="heads of the file do not fit"):
        model.load_pretraining_parts({"rotation_head.weight": torch.zeros(4, 3)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context_size": 48}, r"\[48, 48, 48\] is not divisible by 32.*to \[64, 64, 64\]"),
        ({"context_size": 32}, "leaves one cell in the deepest map.*Make one side 64"),
        ({"context_size": (64, 32, 32)}, "no square in the plane 'xy'"),
        ({"encoding": {"normalization": "identity"}}, r"values in \[0, 1\].*one of mean2std"),
        ({"temperature": 0}, "expected > 0"),
        ({"loss_weights": {"contrast": 2.0}}, "Did you mean 'contrastive'"),
    ],
)
def test_what_cannot_be_used_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**options)


def test_an_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes one volume"):
        build(Modality(name="s2", kind="image", channels=("a",), value_unit="arbitrary"))
