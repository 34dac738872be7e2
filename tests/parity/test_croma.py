"""CROMA against numbers made by running the published code."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from golden_files import FOLDER, golden_files
from golden_files import Golden as GoldenFile
from grouped import grouped
from torch import Tensor

from domainssl.backbones.croma import CROMABackbone, reference_name
from domainssl.modality import Modality
from domainssl.nn.alibi import DistanceBias, alibi_slopes
from domainssl.nn.masking import mask_from_noise
from domainssl.nn.normalization import batch_mean2std
from domainssl.nn.patching import grid_coordinates
from domainssl.nn.positions import sincos_positions
from domainssl.objectives.croma import (
    CROMA,
    CROMAArchitecture,
    CROMADraws,
    CROMAOptions,
    pretraining_name,
)

FILES = golden_files("croma")


def test_golden_files_exist() -> None:
    assert FILES, f"no croma_*.safetensors in {FOLDER}"


class Golden(GoldenFile):
    """One golden file, and the models it describes."""

    def step_of_predictions(self, tokens: int) -> int:
        """Return every how-manieth patch the file holds predictions of."""
        said = re.search(r"patches 0, ?(\d+)", self.facts["outputs"]["output/pred_patches"])
        return int(said[1]) if said else -(-tokens // self["output/pred_patches"].shape[1])

    def state(self) -> dict[str, Tensor]:
        prefix = "state_dict/"
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def modalities(self) -> dict[str, Modality]:
        def some(name: str, bands: int) -> Modality:
            channels = tuple(f"{name}_{i}" for i in range(bands))
            return Modality(name=name, kind="image", channels=channels, value_unit="arbitrary")

        c = self.config
        return {"s1": some("s1", c["radar_channels"]), "s2": some("s2", c["optical_channels"])}

    def build(self, reference: bool = True, **options: Any) -> CROMA:
        c = self.config
        assert (c["radar_layers"], c["joint_layers"]) == (c["encoder_layers"] // 2,) * 2
        model = CROMA(
            dict(self.modalities()),
            **grouped(
                size="tiny",
                architecture=CROMAArchitecture(
                    width=c["encoder_dim"],
                    depth=c["encoder_layers"],
                    heads=c["attention_heads"],
                    ffn_ratio=c["ffn_ratio"],
                    decoder_width=c["decoder_dim"],
                    decoder_depth=c["decoder_layers"],
                    decoder_heads=c["decoder_heads"],
                ),
                context_size=c["image_size"],
                patch_size=c["patch_size"],
                mask_ratio=c["mask_ratio"],
                normalization="identity",
                reference=reference,
                options=CROMAOptions(**options),
            ),
        )
        variant = {k: v for k, v in model.backbone.arguments.items() if k != "normalization"}
        loaded, report = CROMABackbone.from_reference(
            self.state(), {**variant, "normalization": "identity"}
        )
        assert not report.missing
        model.backbone = loaded
        model.load_pretraining_parts(self.state())
        return model

    def batch(self, name: str = "input/imgs_u8") -> dict[str, Tensor]:
        x = self[name].float() / 255
        bands = self.config["optical_channels"]
        return {"s1": x[:, bands:], "s2": x[:, :bands]}

    def draws(self) -> CROMADraws:
        kept = self.config["tokens_kept"]
        return CROMADraws(
            radar=mask_from_noise(self["mask/radar/noise"], kept),
            optical=mask_from_noise(self["mask/optical/noise"], kept),
        )


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def assert_output(actual: Tensor, expected: Tensor) -> None:
    tolerance = 2e-5 * max(1.0, float(expected.abs().max()))
    difference = float((actual - expected).abs().max())
    assert difference <= tolerance, f"{difference} > {tolerance}"


def assert_loss(actual: Tensor, expected: Tensor) -> None:
    assert float(actual.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_slopes(golden: Golden) -> None:
    names = [n for n in golden.tensors if n.startswith("output/slopes_")]
    golden.need(bool(names), "output/slopes_*")
    for name in names:
        torch.testing.assert_close(alibi_slopes(int(name.rsplit("_", 1)[1])), golden[name])


def test_bias_of_a_small_grid(golden: Golden) -> None:
    names = [n for n in golden.tensors if n.startswith("output/alibi_")]
    golden.need(bool(names), "output/alibi_*")
    for name in names:
        rows, columns = (int(n) for n in name.removeprefix("output/alibi_").split("x"))
        coords = grid_coordinates((rows, columns)).unsqueeze(0)
        bias = DistanceBias(coords, coords, alibi_slopes(golden.config["attention_heads"]))
        assert_output(bias.full(torch.float32)[0], golden[name])


def test_masks_are_exact(golden: Golden) -> None:
    draws = golden.draws()
    for name, masking in (("radar", draws.radar), ("optical", draws.optical)):
        assert torch.equal(masking.keep.int(), golden[f"mask/{name}/ids_keep"])
        assert torch.equal(masking.restore.int(), golden[f"mask/{name}/ids_restore"])
        assert torch.equal(masking.removed.byte(), golden[f"mask/{name}/mask_for_mae"])


def test_masked_biases_of_the_reference(golden: Golden) -> None:
    model, draws = golden.build(), golden.draws()
    grid = (golden.config["grid"][0], golden.config["grid"][1])
    radar, optical = (
        model.backbone.coordinates(grid, m.keep[:1]) for m in (draws.radar, draws.optical)
    )
    for name, keys in (("radar", radar), ("cross", optical)):
        bias = DistanceBias(radar, keys, model.backbone.slopes).full(torch.float32)
        assert_output(bias[0][[0, -1]], golden[f"output/{name}_bias_item0"])


def test_position_codes_are_those_of_the_checkpoint(golden: Golden) -> None:
    codes = sincos_positions(grid_coordinates(golden.config["grid"]), golden.config["decoder_dim"])
    torch.testing.assert_close(codes, golden.state()["decoder.decoder_pos_embed"][0])


def test_encodings_and_predictions(golden: Golden) -> None:
    model, draws = golden.build().eval(), golden.draws()
    with torch.no_grad():
        x = model.backbone.normalize(golden.batch())
        keep = {"s1": draws.radar.keep, "s2": draws.optical.keep}
        features = model.backbone.encode_sensors(x, keep)
        features = model.backbone.join(features, self_bias="cross")
        prediction = model.decoder(
            features.tokens["joint"], draws.radar.restore, features.grid["s1"]
        )
    assert_output(features.tokens["s1"], golden["output/radar_encodings"])
    assert_output(features.tokens["s2"], golden["output/optical_encodings"])
    assert_output(features.pooled["s1"], golden["output/radar_GAP"])
    assert_output(features.pooled["s2"], golden["output/optical_GAP"])
    assert_output(features.tokens["joint"], golden["output/joint_encodings"])
    step = golden.step_of_predictions(prediction.shape[1])
    assert_output(prediction[:, ::step], golden["output/pred_patches"])


@pytest.mark.parametrize("path", ["fused", "math"])
def test_losses_with_reference_true(golden: Golden, path: str) -> None:
    model = golden.build()
    for module in model.modules():
        if hasattr(module, "path"):
            module.path = path
    losses = model(golden.batch(), golden.draws()).losses
    assert_loss(losses["contrastive"], golden["loss/contrastive"])
    assert_loss(losses["reconstruction_s2"], golden["loss/mae_optical"])
    assert_loss(losses["reconstruction_s1"], golden["loss/mae_radar"])
    assert_loss(sum(losses.values(), torch.zeros(())), golden["loss/total"])


@pytest.mark.parametrize(("gather", "prefix"), [(None, "grad"), ("grad", "grad_full_gather")])
def test_gradients(golden: Golden, gather: str | None, prefix: str) -> None:
    model = golden.build(**({"contrast_gather": gather} if gather else {}))
    step = model(golden.batch(), golden.draws())
    torch.stack(list(step.losses.values())).sum().backward()
    own = reference_gradients(model)
    wanted = [n for n in golden.tensors if n.startswith(f"{prefix}/")]
    golden.need(bool(wanted), f"{prefix}/*")
    for name in wanted:
        actual, expected = own[name.split("/", 1)[1]], golden[name]
        bound = max(1e-5, 1e-4 * float(expected.abs().max()))
        assert float((actual - expected).abs().max()) <= bound, name


def reference_gradients(model: CROMA) -> dict[str, Tensor]:
    """Return the gradients under the names of the published pretraining class."""
    named = {}
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):
            name = reference_name(name.removeprefix("backbone."), "pretraining")
        else:
            name = pretraining_name(name)
        if parameter.grad is not None:
            named[name] = parameter.grad
    return named


def test_self_bias_2d_overrides_the_reference(golden: Golden) -> None:
    model = golden.build(joint_self_bias="2d")
    step = model(golden.batch(), golden.draws())
    total = step.losses["reconstruction_s1"] + step.losses["reconstruction_s2"]
    assert_loss(total, golden["alt/self_bias_2d/mae"])
    x = model.backbone.normalize(golden.batch())
    draws = golden.draws()
    features = model.backbone.encode_sensors(x, {"s1": draws.radar.keep, "s2": draws.optical.keep})
    features = model.backbone.join(features)
    assert_output(features.tokens["joint"], golden["alt/self_bias_2d/joint_encodings"])


def test_per_sensor_norm_overrides_the_reference(golden: Golden) -> None:
    losses = golden.build(target_norm="per_sensor")(golden.batch(), golden.draws()).losses
    total = losses["reconstruction_s1"] + losses["reconstruction_s2"]
    assert_loss(total, golden["alt/per_sensor_norm/mae"])


def test_pixel_validity_changes_nothing_where_all_is_valid(golden: Golden) -> None:
    plain = golden.build()(golden.batch(), golden.draws()).losses
    masked = golden.build(pixel_validity=True)(golden.batch(), golden.draws()).losses
    for name, loss in plain.items():
        assert_loss(masked[name], loss)


def test_inference_without_masks(golden: Golden) -> None:
    backbone = golden.build().backbone.eval()
    sizes = {golden.config["image_size"]: "input/imgs_u8"}
    sizes[golden.config["inference_size_other"]] = "input/extrap_u8"
    for size, source in sizes.items():
        with torch.no_grad():
            features = backbone(golden.batch(source))
        names = {"s1": "SAR", "s2": "optical", "joint": "joint"}
        for ours, theirs in names.items():
            tokens = golden[f"output/full{size}/{theirs}_encodings"]
            assert_output(features.tokens[ours][: len(tokens)], tokens)
            assert_output(features.pooled[ours], golden[f"output/full{size}/{theirs}_GAP"])


def test_batch_statistics_of_the_usage_example(golden: Golden) -> None:
    x = golden["norm/x"]
    torch.testing.assert_close(batch_mean2std(x), golden["norm/f"])
    eight = batch_mean2std(x, eight_bit=True) * 255
    assert torch.equal(eight.round().byte(), golden["norm/u8"])
