"""DeCUR and its siblings: what they refuse, choose by default, and read and write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from grouped import grouped

from domainssl.backbones.encoders.files import published_modality
from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import Modality
from domainssl.objectives.base import Generators
from domainssl.objectives.decur import DeCUR, DeCUROptions
from domainssl.objectives.simclr import SimCLR


def modalities(*bands: int) -> dict[str, Any]:
    found = [published_modality(count) for count in bands]
    return {m.name: m for m in found if m is not None}


def build(**options: Any) -> DeCUR:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "encoder": "resnet18",
        "projector": [16, 16, 8],
        "context_size": 32,
        **options,
    }
    return DeCUR(modalities(2, 13), **grouped(**arguments))


def test_a_joint_file_that_is_written_and_read_gives_the_same_model(tmp_path: Path) -> None:
    source = build(normalization={"s1": "mean2std8", "s2": "window(0,10000)"})
    path = tmp_path / "joint.pth"
    torch.save({"model": source.to_reference(), "epoch": 3}, path)
    torch.manual_seed(1)
    loaded = DeCUR(
        modalities(2, 13),
        **grouped(
            encoder="resnet18",
            projector=(16, 16, 8),
            context_size=32,
            weights=str(path),
        ),
    )
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_views_have_a_size_per_axis_in_order() -> None:
    model = build(context_size=(32, 48))
    batch = {"id": ["a", "b"]} | {
        name: torch.rand(2, m.num_channels, 32, 48) for name, m in model.backbone.modalities.items()
    }
    draws = model.draw(batch, Generators(*(torch.Generator().manual_seed(i) for i in (0, 1))))
    assert model.view_size == (32, 48)
    assert all(loss.isfinite() for loss in model(batch, draws).losses.values())
    with pytest.raises(
        ConfigError, match=r"view_size: got \[32, 48, 32\], expected one number, or 2"
    ):
        build(context_size=(32, 48, 32))


def test_projectors_that_differ_cannot_be_shared(tmp_path: Path) -> None:
    state = build(options=DeCUROptions(shared_projector=False)).to_reference()
    path = tmp_path / "joint.pth"
    torch.save(state, path)
    with pytest.raises(WeightsError, match="shared_projector: false"):
        build(weights=str(path))
    own = build(weights=str(path), options=DeCUROptions(shared_projector=False))
    assert torch.equal(own.heads["s2"][0].weight, state["module.projector2.0.weight"])


def test_views_of_the_two_modalities_are_drawn_independently() -> None:
    model = build()
    batch = {"s1": torch.zeros(3, 2, 32, 32), "s2": torch.zeros(3, 13, 32, 32)}
    generators = Generators(torch.Generator().manual_seed(0), torch.Generator().manual_seed(1))
    draws = model.draw(batch, generators)
    starts = [view.start for views in draws.values() for view in views]
    assert len(starts) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


def test_the_published_optimiser_follows_the_encoder() -> None:
    assert build().optimization.optimizer == "lars"
    assert build(encoder="vit_tiny_patch16_224").optimization.optimizer == "adamw"
    assert type(build().configure_optimizers()["optimizer"]).__name__ == "LARS"


def test_photometric_changes_need_values_between_zero_and_one() -> None:
    with pytest.raises(ConfigError, match="values in \\[0, 1\\]"):
        build(normalization="zscore")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"common_ratio": 1.5}, "common_ratio"),
        ({"views": {"s3": {}}}, "no modality 's3'"),
        ({"encoder": {"s1": "resnet18", "s2": "resnet50"}}, "shared_projector: false"),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build(**options)


def test_exactly_two_modalities_are_compared() -> None:
    extra = Modality(name="dem", kind="image", channels=("height",), value_unit="arbitrary")
    with pytest.raises(ConfigError, match="SimCLR compares two modalities"):
        SimCLR({**modalities(2, 13), "dem": extra}, **grouped(encoder="resnet18"))


def test_a_projector_has_any_number_of_layers() -> None:
    model = build(projector=[24, 16, 12, 8])
    layers = [m for m in model.heads["shared"] if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in layers] == [24, 16, 12, 8]
    assert model.common == 7
    head = {n.removeprefix("module."): t for n, t in model.to_reference().items()}
    for widths in ([24, 16, 12], [24, 16, 12, 8, 8]):
        with pytest.raises(WeightsError, match=r"model.init_args.projector"):
            build(projector=widths).load_pretraining_parts(head)
    report = build(projector=[24, 16, 12, 8]).load_pretraining_parts(head)
    assert len([n for n in report.matched if n.startswith("heads.shared.9")]) == 1
    with pytest.raises(ConfigError, match=r"model.init_args.projector: got \[\]"):
        build(projector=[])
