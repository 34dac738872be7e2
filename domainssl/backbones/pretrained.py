"""Published weights that `load_backbone` reads: who publishes them, what goes in, which licence.

Nothing is downloaded unasked: get the file from its publisher and pass it as `weights`, or its
address on the hub. What is not known of a file is None.

Source: the publishers' pages, and torchgeo's catalogue of weights with its files and revisions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from domainssl.sensors import L1C_BANDS, L2A_BANDS, S1_BANDS

__all__ = ["PRETRAINED", "Pretrained"]

_S1, _S2 = {"s1": ("VV", "VH")}, {"s2": L1C_BANDS}
_S2_RGB = {"s2": ("B04", "B03", "B02")}
_S2_GALILEO = tuple(band for band in L2A_BANDS if band not in ("B01", "B09"))
_PAIR = {**_S1, "s2": L2A_BANDS}
_PAIR_L1C = {**_S1, **_S2}
_RGB = {"rgb": ("red", "green", "blue")}
_AERIAL = {"aerial": ("red", "green", "blue")}
_STAIN = {"he": ("red", "green", "blue")}
_CT = {"ct": ("ct",)}
_UNITS = {"s1": "db", "s2": "dn", "ct": "hu", "rgb": "rgb8", "he": "rgb8", "aerial": "rgb8"}


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """One published set of weights.

    Attributes:
        tag: Name of the backbone, a dot, and which weights: `croma_base.ssl4eo`.
        method: How they were trained.
        repository: Where the publisher keeps them: `owner/name` on the Hugging Face Hub, or an
            address of the web.
        file: Name of the publisher's file.
        revision: Commit of the repository on the hub.
        sha256: Of the file.
        licence: Of the weights, or of the code they come with where they have none of their own.
        bands: Bands or channels by modality, in order; empty where the file tells.
        units: Unit by modality.
        arguments: Constructor arguments that the weights need and their file does not tell;
            `load_backbone` takes them with the tag, and yours win.
    """

    tag: str
    method: str
    repository: str | None = None
    file: str | None = None
    revision: str | None = None
    sha256: str | None = None
    licence: str | None = None
    bands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def backbone(self) -> str:
        """Name for `load_backbone`, together with the file."""
        return self.tag.partition(".")[0]

    @property
    def address(self) -> str | None:
        """What `weights=…` takes, `hf://owner/name/file@revision`; None where it is not known."""
        if self.file is None or self.repository is None or "://" in self.repository:
            return None
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repository}/{self.file}{revision}"


def _of(
    tag: str,
    method: str,
    place: str | None,
    bands: Mapping[str, tuple[str, ...]],
    licence: str | None,
    **more: Any,
) -> Pretrained:
    """Return a record; `place` is `repository/file[@revision]` on the hub, None if unknown."""
    if place is not None:
        path, _, revision = place.partition("@")
        owner, name, *file = path.split("/")
        more |= {"repository": f"{owner}/{name}", "file": "/".join(file) or None}
        more |= {"revision": revision or None}
    units = {name: _UNITS[name] for name in bands if name in _UNITS}
    given = {"units": units, **more}
    return Pretrained(tag=tag, method=method, bands=bands, licence=licence, **given)


def _croma() -> list[Pretrained]:
    """Return CROMA: the authors' files, and torchgeo's version of them."""
    authors = "0dd28e3d633bd6715856ae9890e8c49360040598"
    # found in public code; its first digits are those that torchgeo gave its copy
    base = "0238d814b53108f3574bf1ea240e38a0a6edd46173816d9a6962070561893b63"
    mirrors = {
        "base": "CROMA_base-0238d814.pt@387883f08af79d777167519c57cd826eda89a16f",
        "large": "CROMA_large-921e69ad.pt@92cb1a0f4e34c6c01558baf070197c01255382f6",
    }
    rows = []
    for size, mirror in mirrors.items():
        place = f"antofuller/CROMA/CROMA_{size}.pt@{authors}"
        known = {"sha256": base} if size == "base" else {}
        rows.append(_of(f"croma_{size}.ssl4eo", "CROMA", place, _PAIR, "MIT", **known))
        tag, place = f"croma_{size}.ssl4eo_torchgeo", f"torchgeo/croma/{mirror}"
        rows.append(_of(tag, "CROMA", place, _PAIR, "CC-BY-4.0"))
    return rows


def _decur() -> list[Pretrained]:
    """Return DeCUR on SSL4EO-S12: joint files, and one backbone each."""
    found = []
    for backbone, stem in (
        ("decur_resnet50", "rn50"),
        ("decur_resnet50_rda", "rn50_rda"),
        ("decur_vit_small", "vits16"),
    ):
        for part, bands in (("joint", _PAIR_L1C), ("sar", _S1), ("ms", _S2)):
            tag = "ssl4eo" if part == "joint" else f"ssl4eo_{part}"
            place = f"wangyi111/DeCUR/{stem}_ssl4eo-s12_{part}_decur_ep100.pth"
            found.append(_of(f"{backbone}.{tag}", "DeCUR", place, bands, "Apache-2.0"))
    return found


# Backbone, method, repository, file, revision; the modality is told by the tag.
_SSL4EO = """
resnet18.s2_moco MoCo torchgeo/resnet18_sentinel2_all_moco/resnet18_sentinel2_all_moco-59bfdff9.pth@5b8cddc9a14f3844350b7f40b85bcd32aed75918
resnet50.s1_moco MoCo torchgeo/resnet50_sentinel1_all_moco/resnet50_sentinel1_all_moco-906e4356.pth@e79862c667853c10a709bdd77ea8ffbad0e0f1cf
resnet50.s2_moco MoCo torchgeo/resnet50_sentinel2_all_moco/resnet50_sentinel2_all_moco-df8b932e.pth@da4f3c9dbe09272eb902f3b37f46635fa4726879
resnet50.s2_dino DINO torchgeo/resnet50_sentinel2_all_dino/resnet50_sentinel2_all_dino-d6c330e9.pth@d7f14bf5530d70ac69d763e58e77e44dbecfec7c
vit_small.s2_moco MoCo torchgeo/vit_small_patch16_224_sentinel2_all_moco/vit_small_patch16_224_sentinel2_all_moco-67c9032d.pth@1cb683f6c14739634cdfaaceb076529adf898c74
vit_small.s2_dino DINO torchgeo/vit_small_patch16_224_sentinel2_all_dino/vit_small_patch16_224_sentinel2_all_dino-36bcc127.pth@5b41dd418a79de47ac9f5be3e035405a83818a62
vit_small.s2_mae MAE wangyi111/SSL4EO-S12/B13_vits16_mae_ep99_enc.pth@75c72195d35201dc1fb210818993518c25da566b
vit_small.s1_mae MAE wangyi111/SSL4EO-S12/B2_vits16_mae_ep99_enc.pth@75c72195d35201dc1fb210818993518c25da566b
vit_base.s2_mae MAE wangyi111/SSL4EO-S12/B13_vitb16_mae_ep99_enc.pth@75c72195d35201dc1fb210818993518c25da566b
vit_base.s1_mae MAE wangyi111/SSL4EO-S12/B2_vitb16_mae_ep99_enc.pth@75c72195d35201dc1fb210818993518c25da566b
vit_large.s2_mae MAE wangyi111/SSL4EO-S12/B13_vitl16_mae_ep99_enc.pth@75c72195d35201dc1fb210818993518c25da566b
vit_large.s1_mae MAE wangyi111/SSL4EO-S12/B2_vitl16_mae_ep99_enc.pth@75c72195d35201dc1fb210818993518c25da566b
vit_huge.s2_mae MAE wangyi111/SSL4EO-S12/B13_vith14_mae_ep199_enc.pth@75c72195d35201dc1fb210818993518c25da566b
vit_huge.s1_mae MAE wangyi111/SSL4EO-S12/B2_vith14_mae_ep199_enc.pth@75c72195d35201dc1fb210818993518c25da566b
vit_small.s2_fgmae FG-MAE wangyi111/FGMAE/B13_vits16_fgmae_ep99_enc.pth@24dd3077d7a99ecd454eaec7adb83d045d7fa122
vit_small.s1_fgmae FG-MAE wangyi111/FGMAE/B2_vits16_fgmae_ep99_enc.pth@24dd3077d7a99ecd454eaec7adb83d045d7fa122
vit_base.s2_fgmae FG-MAE wangyi111/FGMAE/B13_vitb16_fgmae_ep99_enc.pth@24dd3077d7a99ecd454eaec7adb83d045d7fa122
vit_base.s1_fgmae FG-MAE wangyi111/FGMAE/B2_vitb16_fgmae_ep99_enc.pth@24dd3077d7a99ecd454eaec7adb83d045d7fa122
vit_large.s2_fgmae FG-MAE wangyi111/FGMAE/B13_vitl16_fgmae_ep99_enc.pth@24dd3077d7a99ecd454eaec7adb83d045d7fa122
vit_large.s1_fgmae FG-MAE wangyi111/FGMAE/B2_vitl16_fgmae_ep99_enc.pth@24dd3077d7a99ecd454eaec7adb83d045d7fa122
vit_huge.s2_fgmae FG-MAE wangyi111/FGMAE/B13_vith14_fgmae_ep399_enc.pth@24dd3077d7a99ecd454eaec7adb83d045d7fa122
vit_huge.s1_fgmae FG-MAE wangyi111/FGMAE/B2_vith14_fgmae_ep399_enc.pth@24dd3077d7a99ecd454eaec7adb83d045d7fa122
"""  # noqa: E501
# SoftCon's ResNets, and CLOSP and GeoCLOSP, whose inputs torchgeo's catalogue states
_SOFTCON = "wangyi111/softcon/{}_rn50_softcon.pth@62ff465b2e7467dbfc70758ec1e9d08ab87fc46b"
_SOFTCON_STATISTICS = {  # of SSL4EO-S12 v1.0, torchgeo's estimate
    "s1": ((-12.59, -20.26), (5.26, 5.91)),
    "s2": (
        (1612.9, 1397.6, 1322.3, 1373.1, 1561.0, 2108.4, 2390.7, 2318.7, 2581.0, 837.7, 22.0,
         2195.2, 1537.4),
        (791.0, 854.3, 878.7, 1144.9, 1127.5, 1164.2, 1276.0, 1249.5, 1345.9, 577.5, 47.5, 1340.0,
         1142.9),
    ),
}  # fmt: skip
_CLOSP_PLACE = "DarthReca/CLOSP-Visual/{}.pth@3bb8677c21dac56bea2dd7baa08d7871272db440"
_CLOSP = {
    "resnet50.s1_closp": "closp-rn_s1_encoder-cacc90bc",
    "resnet50.s2_closp": "closp-rn_s2_encoder-183922a5",
    "resnet50.s1_geoclosp": "geoclosp-rn_s1_encoder-e63ae1af",
    "resnet50.s2_geoclosp": "geoclosp-rn_s2_encoder-94c37f4a",
    "vit_small.s1_closp": "closp-vs_s1_encoder-180f1e6e",
    "vit_small.s2_closp": "closp-vs_s2_encoder-1a3ee5a5",
    "vit_large.s1_closp": "closp-vl_s1_encoder-6f88d037",
    "vit_large.s2_closp": "closp-vl_s2_encoder-4a4f026a",
}
_RGB_MOCO = {
    "resnet18": "e3a335e3.pth@e1c032e7785fd0625224cdb6699aa138bb304eec",
    "resnet50": "2b57ba8b.pth@efd9723b59a88e9dc1420dc1e96afb25b0630a3c",
}
# SSL4EO-L by product: bands, and the ends of the file names of both methods (MoCo, SimCLR) for
# ResNet-18, ResNet-50 and ViT-S/16. Values were scaled to 8 bit; the files do not say how.
_LANDSAT = {
    "tm_toa": ("B1 B2 B3 B4 B5 B6 B7", "1c691b4f d2d38ace ba1ce753 a1c93432 a1c967d8 7c2d9799"),
    "etm_toa": (
        "B1 B2 B3 B4 B5 B6_VCID_1 B6_VCID_2 B7 B8",
        "bb88689c 4d813f79 e9a84d5a 70b5575f 26d19bcf 34fb12cb",
    ),
    "etm_sr": (
        "SR_B1 SR_B2 SR_B3 SR_B4 SR_B5 SR_B7",
        "4f078acd 8e8543b4 1266cde3 e5d185d7 eaa4674e a14c466a",
    ),
    "oli_tirs_toa": (
        "B1 B2 B3 B4 B5 B6 B7 B8 B9 B10 B11",
        "a3002f51 b0635cc6 de7f5e0f 030cebfe c7c2cceb ad43e9a4",
    ),
    "oli_sr": (
        "SR_B1 SR_B2 SR_B3 SR_B4 SR_B5 SR_B6 SR_B7",
        "660e82ed 7bced5be ff580dad 94f78913 c9b8898d 4e8f6102",
    ),
}
_LANDSAT_REVISION = "1c88bb51b6e17a21dde5230738fa38b74bd74f76"


def _ssl4eo() -> list[Pretrained]:
    """Return the baselines of SSL4EO-S12 and SSL4EO-L, and FG-MAE."""
    rows = []
    for line in _SSL4EO.split("\n"):
        if line:
            tag, method, place = line.split()
            bands = _S1 if ".s1" in tag else _S2
            rows.append(_of(f"ssl4eo_{tag}", method, place, bands, "CC-BY-4.0"))
    for key, bands, stem in (("s1", _S1, "B2"), ("s2", _S2, "B13")):
        mean, std = _SOFTCON_STATISTICS[key]
        known = {
            "kind": "image", "channels": bands[key], "value_unit": _UNITS[key], "gsd_m": 10.0,
            "mean": mean, "std": std,
        }  # fmt: skip
        given: dict[str, Any] = {"normalization": "zscore", "modalities": {key: known}}
        tag, place = f"ssl4eo_resnet50.{key}_softcon", _SOFTCON.format(stem)
        rows.append(_of(tag, "SoftCon", place, bands, None, arguments=given))
    for tag, file in _CLOSP.items():
        bands, scaling = (_S1, "identity") if ".s1" in tag else (_S2, "scale(10000)")
        method = "GeoCLOSP" if "geo" in tag else "CLOSP"
        place, given = _CLOSP_PLACE.format(file), {"normalization": scaling}
        rows.append(_of(f"ssl4eo_{tag}", method, place, bands, None, arguments=given))
    for net, end in _RGB_MOCO.items():
        place = f"torchgeo/{net}_sentinel2_rgb_moco/{net}_sentinel2_rgb_moco-{end}"
        form = {"normalization": "window(0,10000)"}
        tag = f"ssl4eo_{net}.s2_rgb_moco"
        rows.append(_of(tag, "MoCo", place, _S2_RGB, "CC-BY-4.0", arguments=form))
    known = {
        "kind": "image", "channels": _S2["s2"], "value_unit": "dn", "size": (224, 224),
        "gsd_m": 10.0,
    }  # fmt: skip
    rows.append(_of(
        "beit_small.ssl4eo_s2_data2vec", "data2vec", None, _S2, "CC-BY-4.0",
        repository="https://github.com/zhu-xlab/SSL4EO-S12",
        file="B13_vits16_data2vec_0099_ckpt.pth",
        arguments={"normalization": "window(0,10000)", "modalities": {"s2": known}},
    ))  # fmt: skip
    for product, (names, ends) in _LANDSAT.items():
        nets = (("resnet18", "resnet18"), ("resnet50", "resnet50"), ("vit_small", "vits16"))
        kinds = itertools.product(nets, ("MoCo", "SimCLR"))
        for ((net, stem), method), end in zip(kinds, ends.split(), strict=True):
            file = f"{stem}_landsat_{product}_{method.lower()}-{end}.pth@{_LANDSAT_REVISION}"
            rows.append(_of(
                f"ssl4eo_{net}.landsat_{product}_{method.lower()}", method,
                f"torchgeo/ssl4eo_landsat/{file}", {"landsat": tuple(names.split())}, "CC0-1.0",
                arguments={"normalization": "scale(255)"},
            ))  # fmt: skip
    return rows


def _sensors() -> list[Pretrained]:
    """Return weights of several sensors; where no bands stand, the files tell them."""
    # besides Sentinel: heights, land cover, weather, night lights, population and location
    revision, bands = "0bbc53293a37dea7d563566f015c5527bdaf3793", {**_S1, "s2": _S2_GALILEO}
    galileo = [
        _of(
            f"galileo_{size}.published", "Galileo",
            f"nasaharvest/galileo/models/{size}/encoder.pt@{revision}", bands, "MIT",
        )
        for size in ("nano", "tiny", "base")
    ]  # fmt: skip
    # besides these: SPOT, NAIP, Landsat 7 and 8, ALOS-2 and MODIS, see AnySat's SENSORS
    anysat_bands = {"aerial": ("NIR", "G", "B", "R"), "s1_asc": S1_BANDS, "s2": _S2_GALILEO}
    anysat = _of(
        "anysat_base.geoplex", "AnySat", "g-astruc/AnySat/models/AnySat.pth", anysat_bands, "MIT",
        units={"aerial": "rgb8", "s1_asc": "db", "s2": "dn"},
    )  # fmt: skip
    satellite = {"large": "vit_large", "large_qkvb": "vit_large", "7b": "vit_7b"}
    dinov3 = [
        _of(
            f"dinov3_sat_{size}.sat493m", "DINOv3",
            f"timm/{stem}_patch16_dinov3{'_qkvb' if 'qkvb' in size else ''}.sat493m",
            _AERIAL, "DINOv3 licence",
        )
        for size, stem in satellite.items()
    ]  # fmt: skip
    return [
        anysat,
        *galileo,
        *dinov3,
        _of("maestro_base.flair_hub", "MAESTRO", "IGNF/MAESTRO_FLAIR-HUB_base", {}, "Apache-2.0"),
        _of("maestro_base.s2_naip", "MAESTRO", "IGNF/MAESTRO_S2-NAIP-urban_base", {}, "Apache-2.0"),
        _of("omnisat_base.published", "OmniSat", None, {}, "MIT"),
    ]


def _photographs() -> list[Pretrained]:
    """Return ViTs of MAE and DINO on ImageNet."""
    mae, dino = ("https://github.com/facebookresearch/" + name for name in ("mae", "dino"))
    rows = [
        _of(
            f"vit_{size}.mae_imagenet", "MAE", None, _RGB, "CC-BY-NC-4.0", repository=mae,
            file=f"mae_pretrain_vit_{size}.pth",
            arguments={"patch_size": 14} if size == "huge" else {},
        )
        for size in ("base", "large", "huge")
    ]  # fmt: skip
    for size, stem in (("small", "deitsmall16"), ("base", "vitbase16")):
        known = {"repository": dino, "file": f"dino_{stem}_pretrain.pth"}
        rows.append(_of(f"vit_{size}.dino_imagenet", "DINO", None, _RGB, "Apache-2.0", **known))
    return rows


def _volumes() -> list[Pretrained]:
    """Return Swin transformers of CT, 3D ResNets, and BM-MAE."""
    monai = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/tag/0.8.1"
    found = [
        _of(
            "swin_unetr.ssl", "SwinUNETR SSL", None, _CT, "Apache-2.0",
            repository=monai, file="model_swinvit.pt",
        ),
        _of(
            "swin_unetr.denoising", "disruptive autoencoders", None, _CT, None,
            repository=monai, file="ssl_pretrained_weights.pth",
            sha256="c3564f40a6a051d3753a6d8fae5cc8eaf21ce8d82a9a3baf80748d15664055e8",
        ),
        _of(
            "swin_unetr_legacy.voco_10k", "VoCo", None, _CT, "Apache-2.0",
            repository="https://github.com/Luffy03/VoCo", file="VoCo_10k.pt",
            arguments={"normalization": "window(-175,250)"},
        ),
        _of(
            "swin_unetr_legacy.suprem", "SuPreM", None, _CT, "CC-BY-NC-ND-4.0",
            repository="https://github.com/MrGiovanni/SuPreM",
            file="supervised_suprem_swinunetr_2100.pth",
            arguments={"normalization": "window(-250,250)"},
        ),
    ]  # fmt: skip
    for depth in (10, 18, 34, 50):
        place = f"TencentMedicalNet/MedicalNet-Resnet{depth}/resnet_{depth}_23dataset.pth"
        tag = f"monai_resnet{depth}.medicalnet"
        found.append(_of(tag, "supervised (Med3D)", place, {"scan": ("scan",)}, "MIT"))
    contrasts = {name: (name,) for name in ("t1", "t1c", "t2", "flair")}
    for tag, file in (("published", "bmmae.pth"), ("without_tcga", "bmmae_tcga.pth")):
        place = f"luklebigbosse/BM-MAE/{file}"
        found.append(_of(f"bmmae_base.{tag}", "BM-MAE", place, contrasts, "CC-BY-NC-4.0"))
    return found


def _pathology() -> list[Pretrained]:
    """Return encoders of tiles, and TITAN, whose input are features of CONCH v1.5."""
    closed = "CC-BY-NC-ND-4.0"
    owkin = "Owkin non-commercial"
    rows = [
        ("uni", "DINOv2", "MahmoodLab/UNI/pytorch_model.bin", closed),
        ("uni2_h", "DINOv2", "MahmoodLab/UNI2-h", closed),
        ("virchow", "DINOv2", "paige-ai/Virchow", "Apache-2.0"),
        ("virchow2", "DINOv2", "paige-ai/Virchow2", closed),
        ("phikon", "iBOT", "owkin/phikon", owkin),
        ("phikon_v2", "DINOv2", "owkin/phikon-v2", owkin),
        ("prov_gigapath", "DINOv2", "prov-gigapath/prov-gigapath", "Apache-2.0"),
        ("h_optimus_0", "DINOv2", "bioptimus/H-optimus-0", "Apache-2.0"),
        ("h_optimus_1", "DINOv2", "bioptimus/H-optimus-1", closed),
        ("resnet50_truncated", "supervised (ImageNet)", "timm/resnet50.tv_in1k", "BSD-3-Clause"),
    ]
    found = [_of(f"{n}.published", how, place, _STAIN, law) for n, how, place, law in rows]
    return [*found, _of("titan.published", "TITAN", "MahmoodLab/TITAN", {}, closed)]


def _rows() -> list[Pretrained]:
    groups = (_croma, _decur, _ssl4eo, _sensors, _photographs, _volumes, _pathology)
    return [row for group in groups for row in group()]


PRETRAINED: dict[str, Pretrained] = {row.tag: row for row in sorted(_rows(), key=lambda r: r.tag)}
