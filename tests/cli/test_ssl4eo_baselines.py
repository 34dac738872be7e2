"""The overlays of the SSL4EO-S12 baselines hold what was published, for 13, 12 and 2 bands."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from domainssl.arguments import class_name
from domainssl.backbones.base import Backbone
from domainssl.cli.run.train import prepare
from domainssl.modality import Modality
from domainssl.nn.views import Views
from domainssl.objectives.data2vec import Data2Vec
from domainssl.objectives.dino import DINO
from domainssl.objectives.mae import MAE
from domainssl.objectives.moco import MoCoV2, MoCoV3
from domainssl.sensors import L1C_BANDS, L2A_BANDS, S1_BANDS

COLOUR: dict[str, Any] = {"color_probability": 0.8, "brightness": 0.4, "contrast": 0.4}
GREY: dict[str, Any] = {**COLOUR, "grey_probability": 0.2, "flip": (0.0, 0.5)}
# Published values by row: Wang et al. 2023 (arXiv 2211.07044) and the released scripts. Keys are
# paths in model.init_args; epochs, batch and window are those of all rows.
ROWS: dict[tuple[str, str], dict[str, Any]] = {
    ("ssl4eo_moco2", "moco2_resnet50"): {
        "encoding.encoder": "resnet50", "momentum": 0.999, "temperature": 0.2, "queue": 65536,
        "head.hidden": 2048, "head.dim": 128, "views.size": 224, "views.seasons": "augment",
        "optimization.optimizer": "sgd", "optimization.lr": 0.03, "optimization.momentum": 0.9,
        "optimization.nesterov": False, "optimization.weight_decay": 1e-4,
        "optimization.warmup_fraction": 0.0, "options.reference": True,
    },
    ("ssl4eo_moco", "moco_vit_small"): {
        "encoding.encoder": "vit", "encoding.size": "small", "encoding.patch_size": 16,
        "encoding.positions": "sincos", "momentum": 0.99, "temperature": 0.2,
        "head.hidden": 4096, "head.dim": 256, "views.size": 224, "views.seasons": "augment",
        "options.trains_patches": False, "optimization.lr": 1.5e-4,
        "optimization.weight_decay": 0.1, "optimization.warmup_fraction": 0.1,
    },
    ("ssl4eo_dino", "dino_resnet50"): {
        "encoding.encoder": "resnet50", "crops.global_size": 224, "crops.local_size": 96,
        "crops.local_count": 8, "teacher.momentum": 0.996, "teacher.temperature.warmup": 0.04,
        "teacher.temperature.final": 0.04, "head.prototypes": 65536, "head.hidden": 2048,
        "head.bottleneck": 256, "head.frozen_epochs": 1, "loss_weights": {"cls": 1.0},
        "optimization.optimizer": "sgd", "optimization.lr": 0.03,
        "optimization.weight_decay": 1e-4, "optimization.final_weight_decay": 1e-4,
        "optimization.warmup_fraction": 0.1, "optimization.clip": 3.0, "options.reference": True,
    },
    ("ssl4eo_dino", "dino_vit_small"): {
        "encoding.size": "small", "encoding.patch_size": 16,
        "encoding.architecture.drop_path": 0.1, "crops.global_size": 224, "crops.local_size": 96,
        "crops.local_count": 8, "teacher.momentum": 0.996, "teacher.temperature.warmup": 0.04,
        "teacher.temperature.final": 0.04, "head.prototypes": 65536, "head.hidden": 2048,
        "head.bottleneck": 256, "head.frozen_epochs": 1, "loss_weights": {"cls": 1.0},
        "optimization.lr": 1.5e-4, "optimization.weight_decay": 0.04,
        "optimization.final_weight_decay": 0.4,
        "optimization.warmup_fraction": 0.1, "optimization.clip": 3.0, "options.reference": True,
    },
    ("ssl4eo_mae", "mae_vit_small"): {
        "encoding.size": "small", "encoding.patch_size": 16, "mask_ratio": 0.7,
        "optimization.lr": 1.5e-4, "optimization.betas": (0.9, 0.95),
        "optimization.weight_decay": 0.05, "optimization.warmup_fraction": 0.1,
    },
    ("ssl4eo_data2vec", "data2vec_vit_small"): {
        "encoding.size": "small", "encoding.patch_size": 16, "view_size": 224,
        "masks.ratio": (0.6125, 0.6125), "masks.least_tokens": 16, "teacher.momentum": 0.9998,
        "targets.layers": tuple(range(6, 12)), "targets.output": "end", "targets.norm": "layer",
        "targets.last_norm": True, "loss.beta": 2.0, "optimization.lr": 1e-3,
        "optimization.weight_decay": 0.05, "optimization.clip": 3.0,
        "optimization.warmup_fraction": 0.1, "options.reference": True,
    },
}  # fmt: skip
BANDS = {13: L1C_BANDS, 12: L2A_BANDS, 2: S1_BANDS}
PRODUCTS = {13: {"s2": "S2L1C"}, 12: {"s2": "S2L2A"}, 2: {"s1": "S1GRD"}}


def configuration(recipe: str, overlay: str, bands: int = 13) -> dict[str, Any]:
    words = ["--config", f"recipes/{recipe}.yaml", "--config", f"configs/model/{overlay}.yaml"]
    if bands != 13:
        words += ["--config", f"configs/data/ssl4eo_{bands}_bands.yaml"]
    found: dict[str, Any] = prepare("fit", words).config
    return found


def at(arguments: Any, path: str) -> Any:
    for part in path.split("."):
        arguments = arguments[part]
    return tuple(arguments) if isinstance(arguments, list) else arguments


def data(bands: int, has_dates: bool) -> dict[str, Modality]:
    name = "s1" if bands == 2 else "s2"
    return {name: Modality(
        name=name, kind="series" if has_dates else "image", channels=BANDS[bands],
        value_unit="db" if bands == 2 else "dn",
        size=(264, 264), gsd_m=10.0, mean=(0.0,) * bands, std=(1.0,) * bands,
    )}  # fmt: skip


@pytest.mark.parametrize(("recipe", "overlay"), ROWS)
def test_an_overlay_holds_the_published_values(folder, recipe, overlay):
    config = configuration(recipe, overlay)
    arguments, given = config["model"]["init_args"], config["data"]["init_args"]
    wanted = ROWS[recipe, overlay]
    found = {path: at(arguments, path) for path in wanted}
    if "loss_weights" in found:  # terms without a weight are none
        found["loss_weights"] = {n: w for n, w in found["loss_weights"].items() if w}
    assert found == wanted
    assert arguments["encoding"]["normalization"] == "window(0,10000)"
    assert config["trainer"]["max_epochs"] == 100 and given["global_batch_size"] == 256
    assert given["window"]["quarter_turns"] is False
    for bands in BANDS:
        config = configuration(recipe, overlay, bands)
        assert config["data"]["init_args"]["modalities"] == PRODUCTS[bands]
        form = config["model"]["init_args"]["encoding"]["normalization"]
        assert form == ("mean2std" if bands == 2 else "window(0,10000)")


def build(kind: type[Any], recipe: str, overlay: str, bands: int = 13, **more: Any) -> Any:
    arguments = {**configuration(recipe, overlay, bands)["model"]["init_args"], **more}
    return kind(data(bands, kind not in (MAE, Data2Vec)), **arguments)


def parameters(backbone: Backbone) -> int:
    return sum(p.numel() for p in backbone.parameters())


STEM, PATCH = 64 * 7 * 7, 384 * 16 * 16  # weights per band
RESNET, VIT = 23_539_392 - 13 * STEM, 22_648_704 - 13 * PATCH  # of the rest, published


@pytest.mark.parametrize("bands", BANDS)
def test_the_rows_build_the_published_networks_for_all_bands(folder, bands):
    small = {"head": {"prototypes": 8, "hidden": 8, "bottleneck": 8}}
    made = build(DINO, "ssl4eo_dino", "dino_resnet50", bands, **small)
    assert parameters(made.backbone) == RESNET + bands * STEM
    made = build(DINO, "ssl4eo_dino", "dino_vit_small", bands, **small)
    rates = [block.drop_path for block in made.backbone.transformer.blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    assert (
        parameters(made.backbone) == VIT + bands * PATCH + made.backbone.date_embed.weight.numel()
    )
    made = build(MoCoV2, "ssl4eo_moco2", "moco2_resnet50", bands, queue=8)
    assert parameters(made.backbone) == RESNET + bands * STEM
    made = build(MoCoV3, "ssl4eo_moco", "moco_vit_small", bands, head={"hidden": 8, "dim": 8})
    assert made.backbone.width == 384 and made.backbone.modality.num_channels == bands
    made = build(MAE, "ssl4eo_mae", "mae_vit_small", bands)
    decoder = made.decoder
    assert (decoder.width, len(decoder.transformer.blocks)) == (512, 8)
    assert made.backbone.modality.num_channels == bands
    made = build(Data2Vec, "ssl4eo_data2vec", "data2vec_vit_small", bands)
    assert [m.num_channels for m in made.backbone.modalities.values()] == [bands]
    assert made.backbone.blocks[-1].drop_path == pytest.approx(0.25)


def test_views_and_crops_are_the_published_ones(folder):
    small = {"head": {"prototypes": 8, "hidden": 8, "bottleneck": 8}}
    for overlay, large, little in (
        ("dino_resnet50", (0.14, 1.0), (0.05, 0.14)),
        ("dino_vit_small", (0.4, 1.0), (0.05, 0.4)),
    ):
        crops = build(DINO, "ssl4eo_dino", overlay, **small).crops
        assert crops.first == Views(crop_area=large, blur_probability=1.0, **GREY)
        assert crops.second == Views(
            crop_area=large, blur_probability=0.1, solarize_probability=0.2, **GREY
        )
        assert crops.local == Views(crop_area=little, blur_probability=0.5, **GREY)
    crops = build(MoCoV2, "ssl4eo_moco2", "moco2_resnet50", queue=8).crops
    assert crops.first == crops.second
    assert crops.first == Views(crop_area=(0.2, 1.0), blur_probability=0.5, **GREY)
    crops = build(MoCoV3, "ssl4eo_moco", "moco_vit_small", head={"hidden": 8, "dim": 8}).crops
    assert crops.first == Views(crop_area=(0.08, 1.0), blur_probability=1.0, **GREY)
    assert crops.second == Views(crop_area=(0.08, 1.0), blur_probability=0.1, **GREY)
    view = build(Data2Vec, "ssl4eo_data2vec", "data2vec_vit_small").crops.views("first")
    assert view == Views(crop_area=(0.2, 1.0), flip=(0.0, 0.5), **COLOUR)
    window = configuration("ssl4eo_mae", "mae_vit_small")["data"]["init_args"]["window"]
    assert (window["min_size"] / window["max_size"]) ** 2 == pytest.approx(0.2, abs=1e-3)
    assert window["flips"] == [False, True]


def test_a_step_drops_branches_of_the_student_alone(folder):
    torch.manual_seed(0)
    tiny = {"width": 24, "depth": 3, "heads": 2, "drop_path": 0.9}
    made = DINO(
        data(2, True), encoding={"architecture": tiny, "normalization": "mean2std"},
        crops={"global_size": 32, "local_count": 0, "first": {}, "second": {}},
        head={"prototypes": 8, "hidden": 8, "bottleneck": 8},
    ).train()  # fmt: skip
    x = {"s1": torch.randn(4, 1, 2, 32, 32), "s1.dates": torch.zeros(4, 1, dtype=torch.int32)}
    student, teacher = made.backbone, made.teacher["backbone"]
    assert not torch.equal(student(x).cls["s1"], student(x).cls["s1"])
    assert torch.equal(teacher(x).cls["s1"], teacher(x).cls["s1"])
    assert class_name(type(student)) == class_name(type(teacher))
