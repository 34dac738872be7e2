"""MAE against numbers made by running the published 2D code, and MONAI's 3D model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import FOLDER, IS_OURS, golden_files, mask_from_keep
from safetensors.torch import load_file
from torch import Tensor

from domainssl.backbones.vit import position_codes
from domainssl.backbones.vit_files import patch_weight
from domainssl.modality import Modality, sides_of
from domainssl.nn.masking import mask_from_noise
from domainssl.objectives.mae import MAE, MAEArchitecture, MAEDraws, MAEEncoding, MAEOptions

GOLDEN = ("mae2d", "mae3d")
FILES = [path for name in GOLDEN for path in golden_files(name)]
# json key of the 2D and of the 3D model -> ours
SIZES = {
    "embed_dim": "width", "depth": "depth", "num_heads": "heads",
    "decoder_embed_dim": "decoder_width", "decoder_depth": "decoder_depth",
    "decoder_num_heads": "decoder_heads", "hidden_size": "width", "mlp_dim": "hidden",
    "num_layers": "depth", "decoder_hidden_size": "decoder_width",
    "decoder_mlp_dim": "decoder_hidden", "decoder_num_layers": "decoder_depth",
    "qkv_bias": "qkv_bias",
}  # fmt: skip


def test_golden_files_exist() -> None:
    for name in GOLDEN:
        assert any(path.name.startswith(name) for path in FILES), f"no {name}_* in {FOLDER}"


class Golden:
    """One golden file, and the model it describes."""

    def __init__(self, path: Path) -> None:
        self.tensors = load_file(path)
        self.config: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())["config"]
        self.sizes: dict[str, Any] = self.config["model"]
        self.is_monai = "hidden_size" in self.sizes

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            assert not IS_OURS, f"{name} is missing in the golden file"
            pytest.skip(f"this golden file has no {name}")
        return self.tensors[name]

    def below(self, prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    @property
    def values(self) -> Tensor:
        return self["in/volume" if "in/volume" in self.tensors else "in/image"]

    @property
    def modality(self) -> Modality:
        size = tuple(self.values.shape[2:])
        kind = "volume" if len(size) == 3 else "image"
        channels = tuple(f"c{i}" for i in range(self.values.shape[1]))
        return Modality(name="m", kind=kind, channels=channels, value_unit="arbitrary", size=size)

    @property
    def patch(self) -> tuple[int, ...]:
        given = self.sizes["patch_size"]
        return sides_of(given if isinstance(given, int) else tuple(given), self.values.ndim - 2)

    def architecture(self) -> MAEArchitecture:
        found = {SIZES[n]: v for n, v in self.sizes.items() if n in SIZES}
        if "mlp_ratio" in self.sizes:
            ratio = self.sizes["mlp_ratio"]
            found["hidden"] = int(found["width"] * ratio)
            found["decoder_hidden"] = int(found["decoder_width"] * ratio)
        return MAEArchitecture(**found, layout="monai" if self.is_monai else "timm")

    def build(self, tmp_path: Path, target_norm: str) -> MAE:
        weights = tmp_path / "published.pt"
        torch.save({"model": self.below("state/")}, weights)
        ratio = self.config.get("mask_ratio", self.sizes.get("masking_ratio"))
        return MAE(
            {"m": self.modality},
            encoding=MAEEncoding(
                size="tiny",
                architecture=self.architecture(),
                patch_size=self.patch,
                normalization="identity",
                weights=str(weights),
            ),
            context_size=tuple(self.values.shape[2:]),
            mask_ratio=ratio,
            options=MAEOptions(reference=True, target_norm=target_norm),
        )

    def draws(self, model: MAE) -> MAEDraws:
        tokens = self["out/mask"].shape[1]
        if "in/noise" in self.tensors:
            noise = self["in/noise"]
            masking = mask_from_noise(noise, int(tokens * (1 - model.mask_ratio)))
        else:
            masking = mask_from_keep(self["in/ids_keep"], tokens)
        seen = torch.ones_like(masking.keep, dtype=torch.bool)
        return MAEDraws(
            keep=masking.keep, restore=masking.restore, seen=seen, removed=masking.removed
        )


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def assert_output(actual: Tensor, expected: Tensor) -> None:
    tolerance = 2e-5 * max(1.0, float(expected.abs().max()))
    difference = float((actual - expected).abs().max())
    assert difference <= tolerance, f"{difference} > {tolerance}"


def test_masks_are_exact(golden: Golden, tmp_path: Path) -> None:
    draws = golden.draws(golden.build(tmp_path, "none"))
    assert torch.equal(draws.removed.float(), golden["out/mask"].float())
    if "out/ids_restore" in golden.tensors:
        assert torch.equal(draws.restore, golden["out/ids_restore"])


def test_position_tables_are_those_of_the_file(golden: Golden) -> None:
    grid = tuple(n // p for n, p in zip(golden.modality.size, golden.patch, strict=True))
    names = ("pos_embed", "decoder_pos_embed") if not golden.is_monai else (
        "patch_embedding.position_embeddings", "decoder_pos_embedding")  # fmt: skip
    for name in names:
        table = golden[f"state/{name}"][0]
        codes = position_codes(grid, table.shape[1])
        assert_output(codes, table[len(table) - len(codes) :])


def test_tokens_predictions_and_targets(golden: Golden, tmp_path: Path) -> None:
    model = golden.build(tmp_path, "none").eval()
    draws = golden.draws(model)
    with torch.no_grad():
        x = model.backbone.normalize({"m": golden.values})
        features = model.backbone.encode(x, keep={"m": draws.keep})
        prediction = model.predict(x, features, draws)
        patches, _ = model._targets(x)
    tokens = torch.cat([features.cls["m"].unsqueeze(1), features.tokens["m"]], dim=1)
    assert_output(tokens, golden["out/encoder_tokens"])
    assert_output(prediction, golden["out/pred"])
    assert torch.equal(patches, golden["out/target"])


def test_embedded_patches_of_all_tokens(golden: Golden, tmp_path: Path) -> None:
    model = golden.build(tmp_path, "none").eval()
    expected = golden.tensors.get("out/patch_embedding")
    if expected is None:
        pytest.skip("the 2D code stores tokens after the encoder only")
    backbone = model.backbone
    x = backbone.normalize({"m": golden.values})
    with torch.no_grad():
        embedded = backbone.embed(backbone.patches(x["m"], channels_first=True)) + backbone._codes(
            x
        )
    assert_output(embedded, expected)


@pytest.mark.parametrize(("norm", "group"), [("none", "plain"), ("patch", "norm")])
def test_losses_and_gradients(golden: Golden, tmp_path: Path, norm: str, group: str) -> None:
    model = golden.build(tmp_path, norm)
    loss = model({"m": golden.values}, golden.draws(model)).losses["reconstruction"]
    assert float(loss.detach()) == pytest.approx(float(golden[f"loss/{group}"]), rel=1e-5)
    loss.backward()
    own = reference_gradients(model)
    wanted = golden.below(f"grad/{group}/")
    assert wanted or not IS_OURS
    for name, expected in wanted.items():
        bound = max(1e-7, 1e-4 * float(expected.abs().max()))
        assert float((own[name] - expected).abs().max()) <= bound, name


def reference_gradients(model: MAE) -> dict[str, Tensor]:
    """Return the gradients under the published names: written as if they were the weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
    return model.to_reference()


def test_weights_are_written_as_they_were_read(golden: Golden, tmp_path: Path) -> None:
    written = golden.build(tmp_path, "none").to_reference()
    expected = golden.below("state/")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        if "norm_cross_attn" not in name:
            torch.testing.assert_close(written[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_a_perceptron_embeds_like_a_convolution(golden: Golden) -> None:
    stem = "patch_embedding.patch_embeddings" if golden.is_monai else "patch_embed.proj"
    weight = golden[f"state/{stem}.weight"]
    channels_last = weight.movedim(1, -1).flatten(1)
    expected = patch_weight(weight, weight.shape[1], golden.patch)
    assert torch.equal(patch_weight(channels_last, weight.shape[1], golden.patch), expected)
