"""Galileo against numbers made by running the published code."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from golden_files import FOLDER, golden_files
from golden_files import Golden as GoldenFile
from torch import Tensor

from domainssl._torch import follow
from domainssl.backbones.galileo.backbone import GalileoBackbone
from domainssl.backbones.galileo.encoder import (
    GalileoEncoder,
    GalileoTokens,
    resized_kernel,
)
from domainssl.backbones.galileo.encodings import plane_positions
from domainssl.backbones.galileo.groups import (
    ARRAYS,
    PUBLISHED_GROUPS,
    PUBLISHED_MODALITIES,
    Array,
    location_xyz,
)
from domainssl.backbones.galileo.predictor import GalileoPredictor, Predicted, PredictorSizes
from domainssl.losses.discrimination import standardized, token_discrimination
from domainssl.losses.latent import masked_regression
from domainssl.modality import Modality
from domainssl.nn.masking import take_tokens
from domainssl.nn.patching import grid_of

FILES = golden_files("galileo")
SHORT: dict[Array, str] = {"space_time": "s_t", "space": "sp", "time": "t", "static": "st"}
GROUPS = {array: [g for g in PUBLISHED_GROUPS if g.array == array] for array in ARRAYS}
TOKENS = "tokens, predictions, targets (float32)"
CASES = ["global_space", "global_time", "local_random", "ragged"]


def test_golden_files_exist() -> None:
    assert FILES, f"no galileo_*.safetensors in {FOLDER}"


class Golden(GoldenFile):
    """One golden file, and the models it describes."""

    @property
    def patch(self) -> int:
        return int(self.config["patch_size_of_main_passes"])

    @property
    def gsd_m(self) -> float:
        return float(self.config["input_resolution_m"])

    def tolerance(self, name: str) -> float:
        return float(self.facts["tolerances"][name])

    def variant(self) -> dict[str, Any]:
        c = self.config["encoder"]
        sizes = {
            "width": c["embedding_size"],
            "depth": c["depth"],
            "heads": c["num_heads"],
            "ffn_ratio": c["mlp_ratio"],
            "max_patch_size": c["max_patch_size"],
            "max_steps": c["max_sequence_length"],
        }
        return {"architecture": sizes, "patch_size": self.patch}

    def backbone(self, part: str = "encoder", **more: Any) -> GalileoBackbone:
        loaded, report = GalileoBackbone.from_reference(
            self.below(f"state_dict/{part}/"), {**self.variant(), **more}
        )
        assert not report.missing and not report.unexpected
        return loaded.eval()

    def encoder(self, part: str = "encoder") -> GalileoEncoder:
        return self.backbone(part).encoder

    def inputs(self) -> dict[str, Tensor]:
        """Inputs by group, channels where the encoder wants them."""
        found = {}
        for array, groups in GROUPS.items():
            whole = self[f"input/{SHORT[array]}_x"]
            if array == "space_time":
                whole = whole.permute(0, 3, 4, 1, 2)  # (B, H, W, T, C) -> (B, T, C, H, W)
            elif array == "space":
                whole = whole.permute(0, 3, 1, 2)
            axis = {"space_time": 2, "space": 1}.get(array, -1)
            parts = whole.split([g.width for g in groups], dim=axis)
            found |= {g.name: part for g, part in zip(groups, parts, strict=True)}
        return found

    def masks(self, case: str) -> dict[Array, Tensor]:
        """Masks by array, one value per token."""
        found = {array: self[f"mask/{case}/{short}_m"] for array, short in SHORT.items()}
        for array in ("space_time", "space"):
            found[array] = found[array][:, :: self.patch, :: self.patch]  # type: ignore[index]
        return found

    def visible(self, case: str) -> dict[str, Tensor]:
        return {
            group.name: mask[..., number] == 0
            for array, mask in self.masks(case).items()
            for number, group in enumerate(GROUPS[array])
        }

    def predictor(self) -> GalileoPredictor:
        c = self.config["decoder"]
        made = GalileoPredictor(
            PUBLISHED_GROUPS,
            c["output_size"],
            PredictorSizes(
                width=c["decoder_embedding_size"],
                depth=c["depth"],
                heads=c["num_heads"],
                ffn_ratio=c["mlp_ratio"],
                learned_groups=c["learnable_channel_embeddings"],
            ),
            c["max_sequence_length"],
        )
        made.load_state_dict(self.below("state_dict/decoder/"))
        return made.eval()

    def predict(self, case: str, encoder: GalileoEncoder, predictor: GalileoPredictor) -> Predicted:
        months = self["input/months"]
        by_array: dict[Array, Tensor] = {"space_time": months, "time": months}
        how: dict[str, Any] = {"patch_size": self.patch, "gsd_m": self.gsd_m}
        seen = encoder(self.inputs(), by_array, self.visible(case), **how)
        hidden = {array: mask == 2 for array, mask in self.masks(case).items()}
        found: Predicted = predictor(seen, hidden, by_array, **how)
        return found

    def tokens(self, prefix: str, order: Tensor) -> Tensor:
        """Tokens of a result in a row, those of an order."""
        row = torch.cat([self[f"{prefix}/{SHORT[array]}"].flatten(1, -2) for array in ARRAYS], 1)
        return take_tokens(row, order)

    @torch.no_grad()
    def encode(self, part: str = "encoder", case: str | None = None, **how: Any) -> GalileoTokens:
        months = self["input/months"]
        result: GalileoTokens = self.encoder(part)(
            self.inputs(),
            {"space_time": months, "time": months},
            self.visible(case) if case else {},
            **{"patch_size": self.patch, "gsd_m": self.gsd_m, **how},
        )
        return result

    def compare(self, ours: Tensor, name: str, kind: str = TOKENS) -> None:
        golden = self[name]
        assert ours.shape == golden.shape
        assert float((ours.double() - golden.double()).abs().max()) <= self.tolerance(kind), name

    def compare_tokens(self, ours: GalileoTokens, prefix: str) -> None:
        for array, short in SHORT.items():
            self.compare(ours.tokens[array], f"{prefix}/{short}")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def test_weights_come_back_and_fixed_tables_are_ours(golden: Golden) -> None:
    state = golden.below("state_dict/encoder/")
    loaded = golden.backbone()
    back = loaded.to_reference()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    fresh = GalileoEncoder(PUBLISHED_GROUPS, loaded.encoder.sizes).state_dict()
    for name in ("pos_embed", "month_embed.weight"):
        torch.testing.assert_close(fresh[name], state[name], rtol=0, atol=1e-6)
    frozen = [n for n, p in loaded.encoder.named_parameters() if not p.requires_grad]
    assert sorted(frozen) == ["month_embed.weight", "pos_embed"]


def test_kernels_of_other_patch_sizes(golden: Golden) -> None:
    found = golden.below("output/flexi_kernel/")
    golden.need(bool(found), "output/flexi_kernel/*")
    for name in found:
        group, side = name.rsplit("_p", 1)
        kernel = golden[f"state_dict/encoder/space_time_embed.{group}.proj.weight"]
        ours = resized_kernel(kernel, int(side))
        golden.compare(ours, f"output/flexi_kernel/{name}", "kernels")


def test_positions_in_the_plane(golden: Golden) -> None:
    found = golden.below("output/pos2d/")
    golden.need(bool(found), "output/pos2d/*")
    side = golden.config["height_width"]
    for name, expected in found.items():
        match = re.fullmatch(r"p(\d+)_res(\d+)", name)
        assert match
        patch, metres = map(int, match.groups())
        grid = (side // patch, side // patch)
        ours = plane_positions(grid, expected.shape[1], patch * metres / 10).flatten(0, 1)
        golden.compare(ours, f"output/pos2d/{name}")


def test_nothing_masked(golden: Golden) -> None:
    names = [n for n in golden.names("output/") if n.startswith("unmasked_")]
    golden.need(bool(names), "output/unmasked_*")
    for name in names:
        match = re.fullmatch(r"unmasked_p(\d+)(?:_res(\d+))?(_nonorm)?", name)
        assert match, name
        metres = float(match[2] or golden.gsd_m)
        found = golden.encode(patch_size=int(match[1]), gsd_m=metres, last_norm=not match[3])
        golden.compare(found.mean(), f"output/{name}/average_tokens")
        if golden.has(f"output/{name}/average_per_patch"):
            golden.compare(found.per_patch()[0], f"output/{name}/average_per_patch")
        if golden.below(f"output/{name}/tokens/"):
            golden.compare_tokens(found, f"output/{name}/tokens")


def test_absent_groups(golden: Golden) -> None:
    found = golden.encode(case="missing")
    prefix = f"output/missing_p{golden.patch}"
    golden.compare_tokens(found, f"{prefix}/tokens")
    golden.compare(found.mean(), f"{prefix}/average_tokens")
    golden.compare(found.per_patch()[0], f"{prefix}/average_per_patch")


@pytest.mark.parametrize("case", CASES)
def test_what_the_encoder_sees_in_training(golden: Golden, case: str) -> None:
    golden.compare_tokens(golden.encode(case=case), f"output/{case}/encoder")
    counts = golden.facts["cases"][case]
    visible = golden.encode(case=case, depths=0).flat()[1]
    assert visible.sum(1).tolist() == counts["visible_tokens_per_sample"]


@pytest.mark.parametrize("case", CASES)
def test_targets(golden: Golden, case: str) -> None:
    said = golden.facts["keys"]["output/<case>/target/*"]
    fixed = re.search(rf"exit_after (\d+) for {case}", said)
    depths = int(fixed[1]) if fixed else golden.config["token_exit_cfg"]
    found = golden.encode("target_encoder", depths=depths)
    golden.compare_tokens(found, f"output/{case}/target")


@pytest.mark.parametrize("case", CASES)
def test_predictions(golden: Golden, case: str) -> None:
    with torch.no_grad():
        found = golden.predict(case, golden.encoder(), golden.predictor())
    counts = golden.facts["cases"][case]
    assert found.counted.sum(1).tolist() == counts["predicted_tokens_per_sample"]
    expected = golden.tokens(f"output/{case}/prediction", found.order)
    off = (found.tokens - expected).abs().amax(-1)[found.counted]
    assert float(off.max()) <= golden.tolerance(TOKENS)


def _loss(golden: Golden, name: str, p: Tensor, t: Tensor, counted: Tensor) -> Tensor:
    if name == "mse":
        return masked_regression(p, t, counted)
    kind, _, unit = name.partition("_")
    return token_discrimination(
        standardized(p, counted) if unit == "pred2unit" else p,
        t,
        counted,
        golden.config["tau"],
        candidates="batch" if kind == "alldisc" else "item",
        counts_empty=True,
    )


@pytest.mark.parametrize("case", CASES)
def test_losses_and_their_gradients(golden: Golden, case: str) -> None:
    with torch.no_grad():
        order = golden.predict(case, golden.encoder(), golden.predictor())
    found = [n for n in golden.names(f"loss/{case}/") if "grad" not in n]
    golden.need(bool(found), f"loss/{case}/*")
    p, t = (golden.tokens(f"output/{case}/{n}", order.order) for n in ("prediction", "target"))
    for name in found:
        p = p.detach().requires_grad_()
        loss = _loss(golden, name, p, t, order.counted)
        expected = golden[f"loss/{case}/{name}"]
        golden.compare(loss.detach().view(expected.shape), f"loss/{case}/{name}", "losses")
        if golden.has(f"loss/{case}/{name}_grad_pred"):
            (grad,) = torch.autograd.grad(loss, p)
            golden.compare(grad[order.counted], f"loss/{case}/{name}_grad_pred", "gradients")
            assert not grad[~order.counted].any()


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_weights(golden: Golden, case: str) -> None:
    names = golden.names(f"loss/{case}/")
    for name in [n.removesuffix("_grad_param") for n in names if n.endswith("_grad_param")]:
        parts = {"encoder": golden.encoder(), "decoder": golden.predictor()}
        found = golden.predict(case, parts["encoder"], parts["decoder"])  # type: ignore[arg-type]
        target = golden.tokens(f"output/{case}/target", found.order)
        _loss(golden, name, found.tokens, target, found.counted).backward()
        for part, network in parts.items():
            prefix = f"loss/{case}/{name}_grad_param/{part}"
            for weight in golden.below(f"{prefix}/"):
                grad = network.get_parameter(weight).grad
                assert grad is not None
                golden.compare(grad, f"{prefix}/{weight}", "gradients")


def test_one_step_of_the_teacher(golden: Golden) -> None:
    found = golden.below("output/ema/")
    golden.need(bool(found), "output/ema/*")
    for name, expected in found.items():
        ours = golden[f"state_dict/target_encoder/{name}"].clone()
        student = golden[f"state_dict/encoder/{name}"]
        follow([ours], [student], golden.config["ema_momentum"])
        assert float((ours - expected).abs().max()) <= golden.tolerance("ema")


def test_exit_depths(golden: Golden) -> None:
    names = [n for n in golden.names("output/") if n.startswith("target_")]
    golden.need(bool(names), "output/target_*")
    for name in names:
        match = re.fullmatch(r"target_(?:exit(\d+)|token_exit)_p(\d+)", name)
        assert match, name
        depths = golden.config["token_exit_cfg"] if match[1] is None else int(match[1])
        found = golden.encode("target_encoder", depths=depths, patch_size=int(match[2]))
        if golden.has(f"output/{name}/average_tokens"):
            golden.compare(found.mean(), f"output/{name}/average_tokens")
        if golden.below(f"output/{name}/tokens/"):
            golden.compare_tokens(found, f"output/{name}/tokens")


def test_depths_of_the_published_groups() -> None:
    """Half of the blocks for NDVI, weather and heights, none for maps, all for other sensors."""
    depths = {group.name: group.target_depth for group in PUBLISHED_GROUPS}
    assert {n for n, share in depths.items() if share == 0.5} == {"NDVI", "ERA5", "TC", "SRTM"}
    bare = {"DW", "WC", "LS", "DW_static", "WC_static"}
    assert {n for n, share in depths.items() if share == 0} == bare
    assert set(depths.values()) == {0, 0.5, 1}


def test_normalisation_of_the_released_weights(golden: Golden) -> None:
    kinds: dict[str, Array] = {"13": "space_time", "16": "space", "6": "time", "18": "static"}
    forms = golden.backbone().normalizer.forms
    for kind, array in kinds.items():
        shift, div = [], []
        for group in GROUPS[array]:
            modality, form = PUBLISHED_MODALITIES[group.modality], forms[group.modality]
            places = [modality.channels.index(band) for band in group.bands]
            if form.name == "zscore" and not group.derived:
                assert modality.mean and modality.std
                shift += [modality.mean[i] - 2 * modality.std[i] for i in places]
                div += [4 * modality.std[i] for i in places]
            else:
                shift += [0.0] * group.width
                scale = form.numbers[0] if form.name == "scale" else 1.0
                div += [scale] * group.width
        tolerance = "normalizer and location (float64)"
        golden.compare(
            torch.tensor(shift, dtype=torch.float64), f"output/normalizer/std/shift_{kind}",
            tolerance,
        )  # fmt: skip
        golden.compare(
            torch.tensor(div, dtype=torch.float64), f"output/normalizer/std/div_{kind}", tolerance
        )


def test_places_on_the_globe(golden: Golden) -> None:
    ours = location_xyz(golden["input/latlon_degrees"])
    golden.compare(ours, "output/location_xyz", "normalizer and location (float64)")


def test_a_batch_of_modalities_has_the_same_features(golden: Golden) -> None:
    """The arrays as one modality per group, under the dates of their months."""
    kinds = {"space_time": "series", "space": "image", "time": "series", "static": "table"}
    modalities, groups, x = {}, [], {}
    days = torch.tensor([31 * m for m in range(12)], dtype=torch.int32)[golden["input/months"]]
    for group in PUBLISHED_GROUPS:
        name, values = group.name.lower(), golden.inputs()[group.name]
        bands = tuple(f"b{i}" for i in range(group.width))
        modalities[name] = Modality(
            name=name, kind=kinds[group.array], channels=bands, value_unit="arbitrary",  # type: ignore[arg-type]
            gsd_m=golden.gsd_m if group.array in ("space_time", "space") else None,
        )  # fmt: skip
        groups.append(dataclasses.replace(group, modality=name, bands=bands, derived=""))
        x[name] = values[..., None, None] if group.array == "time" else values
        if kinds[group.array] == "series":
            x[f"{name}.dates"] = days
    backbone = golden.backbone(modalities=modalities, groups=groups, normalization="identity")
    with torch.no_grad():
        features = backbone(x)
    prefix = f"output/unmasked_p{golden.patch}"
    golden.compare(features.pooled["joint"], f"{prefix}/average_tokens")
    golden.compare(features.tokens["joint"], f"{prefix}/average_per_patch")
    side = golden.config["height_width"]
    assert features.grid["joint"] == grid_of((side, side), golden.patch)
    s1 = golden[f"{prefix}/tokens/s_t"][..., 0, :].mean(3).flatten(1, 2)
    torch.testing.assert_close(features.tokens["s1"], s1, rtol=0, atol=golden.tolerance(TOKENS))
