"""CSIP: one place for both modalities, one direction or two, a bounded factor, released files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from domainssl import load_backbone
from domainssl.backbones.encoders.backbone import EncoderSizes
from domainssl.errors import ConfigError
from domainssl.modality import Batch, Modality
from domainssl.nn.views import Views
from domainssl.objectives.base import Generators
from domainssl.objectives.csip import CSIP, CSIPOptions
from domainssl.objectives.joint_embedding import PairEncoding
from domainssl.objectives.view_steps import unit_values, view_of

SIZE = 16


def made(**changes: Any) -> CSIP:
    torch.manual_seed(0)
    image = {"kind": "image", "size": (SIZE, SIZE)}
    modalities: dict[str, Modality | dict[str, Any]] = {
        "rgb": Modality(
            name="rgb", channels=("red", "green", "blue"), value_unit="rgb8", **image
        ).to_dict(),
        "dem": Modality(name="dem", channels=("height",), value_unit="m", **image).to_dict(),
    }
    encoding = PairEncoding(
        encoder="transformer", sizes=EncoderSizes(width=24, depth=1, heads=2, patch_size=8),
        normalization={"rgb": "scale(255)", "dem": "window(0,200)"},
    )  # fmt: skip
    return CSIP(modalities, encoding, dim=8, context_size=SIZE, **changes)


def batch_of(items: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return {
        "rgb": 255 * torch.rand(items, 3, SIZE, SIZE, generator=generator),
        "dem": 200 * torch.rand(items, 1, SIZE, SIZE, generator=generator),
    }


def draws_of(model: CSIP, batch: Batch) -> Any:
    return model.draw(batch, Generators(*(torch.Generator().manual_seed(n) for n in (1, 2))))


def test_both_modalities_show_one_place_and_change_each_for_itself() -> None:
    rows = torch.arange(SIZE * SIZE, dtype=torch.float32).view(1, 1, SIZE, SIZE) / SIZE**2
    batch = {"rgb": 255 * rows.repeat(4, 3, 1, 1), "dem": 200 * rows.repeat(4, 1, 1, 1)}
    still = {name: Views(crop_area=(0.3, 0.6)) for name in ("rgb", "dem")}
    model = made(views=still)
    draws = draws_of(model, batch)
    found = [
        view_of(
            model.backbone, batch, name, *unit_values(model.backbone, batch, name),
            draws[name][0], still[name], model.view_size,
        )[name][:, 0]
        for name in ("rgb", "dem")
    ]  # fmt: skip
    torch.testing.assert_close(found[0], found[1])
    assert not torch.equal(found[0][0], found[0][1])  # each item has a place of its own
    changed = draws_of(made(), batch_of(64))
    first, second = (changed[name][0] for name in ("rgb", "dem"))
    assert torch.equal(first.start, second.start) and torch.equal(first.flip, second.flip)
    assert 0 < int((first.sigma > 0).sum()) < 64 and not torch.equal(first.sigma, second.sigma)


def cosines(model: CSIP, batch: Batch, draws: Any) -> Tensor:
    outputs = model(batch, draws, outputs=True).outputs["embeddings"]
    x, y = (F.normalize(outputs[name], dim=-1) for name in ("rgb", "dem"))
    return x @ y.T


def test_one_direction_and_both() -> None:
    batch, same = batch_of(), torch.arange(4)
    model = made(temperature=0.5)
    draws = draws_of(model, batch)
    logits = 2.0 * cosines(model, batch, draws)
    there, back = F.cross_entropy(logits, same), F.cross_entropy(logits.T, same)
    loss = model(batch, draws).losses["contrastive"].detach()
    torch.testing.assert_close(loss, (there + back) / 2)
    released = made(temperature=0.5, options=CSIPOptions(reference=True))
    torch.testing.assert_close(released(batch, draws).losses["contrastive"].detach(), there)


def test_the_factor_is_learned_and_bounded() -> None:
    for reference, largest in ((False, 100.0), (True, 1000.0)):
        model = made(options=CSIPOptions(reference=reference))
        assert float(model.scale().detach()) == pytest.approx(1 / 0.07)
        batch = batch_of()
        step = model(batch, draws_of(model, batch))
        step.losses["contrastive"].backward()
        assert model.inverse_temperature.grad is not None
        with torch.no_grad():
            model.inverse_temperature.fill_(math.log(1000.0))
            model.after_step(step)
        assert float(model.scale().detach()) == pytest.approx(largest)
    with pytest.raises(ConfigError, match="temperature"):
        made(temperature=0.0)


def test_a_released_checkpoint_loads_by_its_exact_prefixes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = {
        letter: timm.create_model("resnet18", in_chans=bands, num_classes=0).eval()
        for letter, bands in (("a", 3), ("b", 1))
    }
    state: dict[str, Tensor] = {"logit_scale": torch.zeros(())}
    for letter, net in nets.items():
        state |= {f"encoder_{letter}.0.{n}": t for n, t in net.state_dict().items()}
        state[f"encoder_{letter}.1.weight"] = torch.zeros(128, 512)
    torch.save({"state_dict": state, "epoch": 99}, tmp_path / "csip.ckpt")
    kinds: dict[str, Any] = {
        "rgb": {"channels": ["red", "green", "blue"], "value_unit": "rgb8"},
        "dem": {"channels": ["height"], "value_unit": "m"},
    }
    for names, form in ((["rgb"], "scale(255)"), (["rgb", "dem"], "window(0,200)")):
        data = {name: {"kind": "image", "size": [32, 32], **kinds[name]} for name in names}
        loaded = load_backbone(
            "csip_resnet18", weights=tmp_path / "csip.ckpt", modalities=data,
            arguments={"normalization": form},
        )  # fmt: skip
        unit = {"rgb": torch.rand(1, 3, 32, 32), "dem": torch.rand(1, 1, 32, 32)}
        raw = {"rgb": 255 * unit["rgb"], "dem": 200 * unit["dem"]}
        with torch.no_grad():
            found = loaded({name: raw[name] for name in names}).pooled
            for name, letter in zip(names, "ab", strict=False):
                torch.testing.assert_close(
                    found[name], nets[letter](unit[name]), rtol=1e-4, atol=1e-4
                )


def test_a_series_is_refused_with_what_to_choose() -> None:
    image = {"size": (SIZE, SIZE)}
    series = Modality(
        name="rgb", kind="series", channels=("red",), value_unit="rgb8", **image
    ).to_dict()
    heights = Modality(
        name="dem", kind="image", channels=("height",), value_unit="m", **image
    ).to_dict()
    with pytest.raises(ConfigError, match=r"'rgb' is a series\. Choose one date"):
        CSIP({"rgb": series, "dem": heights})
