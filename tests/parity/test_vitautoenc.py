"""ViTAutoEncSSL against numbers made by running MONAI's network and losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import FOLDER, golden_files
from safetensors.torch import load_file
from torch import Tensor

from domainssl.distributed import row_layout
from domainssl.modality import Modality, sides_of
from domainssl.objectives.vitautoenc import (
    ViTAutoEncArchitecture,
    ViTAutoEncEncoding,
    ViTAutoEncOptions,
    ViTAutoEncSSL,
)
from domainssl.training.module import Step

GOLDEN = ("vitautoenc",)
FILES = golden_files("vitautoenc")


def test_golden_files_exist() -> None:
    assert FILES, f"no vitautoenc_*.safetensors in {FOLDER}"


class Golden:
    """One golden file, and the model it describes."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.tensors = load_file(path)
        self.config: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())["config"]
        weights = folder / "published.pt"
        torch.save(self.below("state/"), weights)
        c, values = self.config["model"], self.tensors["in/clean"]
        assert c.get("out_channels", 1) == c["in_channels"]
        dims = values.ndim - 2
        kind: Any = "volume" if dims == 3 else "image"
        channels = tuple(f"c{i}" for i in range(c["in_channels"]))
        size = sides_of(_sides(c["img_size"]), dims)
        architecture = ViTAutoEncArchitecture(
            width=c["hidden_size"], depth=c["num_layers"], heads=c["num_heads"],
            hidden=c["mlp_dim"], qkv_bias=c.get("qkv_bias", False),
            channels=c.get("deconv_chns", 16),
        )  # fmt: skip
        self.model = ViTAutoEncSSL(
            {
                "m": Modality(
                    name="m", kind=kind, channels=channels, value_unit="arbitrary", size=size
                )
            },
            encoding=ViTAutoEncEncoding(
                architecture=architecture,
                patch_size=_sides(c["patch_size"]),
                normalization="identity",
                weights=str(weights),
            ),
            context_size=size,
            temperature=self.config["temperature"],
            options=ViTAutoEncOptions(reference=True),
        )

    def below(self, prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def copies(self) -> Tensor:
        return torch.stack([self.tensors["in/view1"], self.tensors["in/view2"]], dim=1)

    def step(self) -> Step:
        x = self.model.backbone.normalize({"m": self.tensors["in/clean"]})
        return self.model.compare(x, self.copies(), row_layout(x["m"]))


def _sides(given: int | list[int]) -> int | tuple[int, ...]:
    return given if isinstance(given, int) else tuple(given)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Golden:
    return Golden(request.param, tmp_path)


def assert_output(actual: Tensor, expected: Tensor) -> None:
    tolerance = 2e-5 * max(1.0, float(expected.abs().max()))
    difference = float((actual - expected).abs().max())
    assert difference <= tolerance, f"{difference} > {tolerance}"


@torch.no_grad()
def test_restored_volumes_and_the_last_hidden_state(golden: Golden) -> None:
    model = golden.model.eval()
    hidden: list[Tensor] = []
    last = model.backbone.transformer.blocks[-1]
    last.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    _, restored = model.restore({"m": golden.tensors["in/clean"]}, golden.copies())
    assert_output(restored[:, 0], golden.tensors["out/recon1"])
    assert_output(restored[:, 1], golden.tensors["out/recon2"])
    assert_output(hidden[0].unflatten(0, (-1, 2))[:, 0], golden.tensors["out/hidden_last"])


def test_losses(golden: Golden) -> None:
    losses = golden.step().losses
    recon, expected = losses["reconstruction"], golden.below("loss/")
    assert float(recon.detach()) == pytest.approx(float(expected["recon"]), rel=1e-5)
    contrast = (losses["contrastive"] / recon).detach()
    assert float(contrast) == pytest.approx(float(expected["contrast"]), rel=1e-5)
    total = sum(losses.values(), torch.zeros(())).detach()
    assert float(total) == pytest.approx(float(expected["total"]), rel=1e-5)


def test_gradients(golden: Golden) -> None:
    losses = golden.step().losses
    torch.stack(list(losses.values())).sum().backward()
    with torch.no_grad():
        for parameter in golden.model.parameters():
            found = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if found is None else found)
    own = golden.model.to_reference()
    wanted = golden.below("grad/")
    assert wanted
    for name, expected in wanted.items():
        bound = max(1e-7, 1e-4 * float(expected.abs().max()))
        assert float((own[name] - expected).abs().max()) <= bound, name


def test_weights_are_written_as_they_were_read(golden: Golden) -> None:
    written, expected = golden.model.to_reference(), golden.below("state/")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        if "norm_cross_attn" not in name:
            assert torch.equal(written[name], tensor), name
