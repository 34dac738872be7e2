"""Published weights that `load_backbone` reads: who publishes them, what goes in, which licence.

Nothing is downloaded unasked: get the file from its publisher and pass it as `weights`, or its
address on the hub. What is not known of a file is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from domainssl.sensors import L1C_BANDS, L2A_BANDS

__all__ = ["PRETRAINED", "Pretrained"]

_PAIR = {"s1": ("VV", "VH"), "s2": L2A_BANDS}
_PAIR_L1C = {"s1": ("VV", "VH"), "s2": L1C_BANDS}
_UNITS = {"s1": "db", "s2": "dn", "ct": "hu"}


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """One published set of weights.

    Attributes:
        tag: Name of the backbone, a dot, and which weights: `croma_base.ssl4eo`.
        method: How they were trained.
        repository: Where the publisher keeps them.
        file: Name of the publisher's file, or of the entry of a catalogue.
        revision: Revision of the repository.
        sha256: Of the file.
        licence: Of the weights, or of the code they come with where they have none of their own.
        bands: Bands or channels by modality, in order; empty where the file tells.
        units: Unit by modality.
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

    @property
    def backbone(self) -> str:
        """Name for `load_backbone`, together with the file."""
        return self.tag.partition(".")[0]


def _of(
    tag: str,
    method: str,
    file: str | None,
    bands: Mapping[str, tuple[str, ...]],
    *,
    repository: str | None = None,
    licence: str | None = None,
) -> Pretrained:
    units = {name: _UNITS[name] for name in bands}
    return Pretrained(
        tag=tag, method=method, file=file, bands=bands, units=units,
        repository=repository, licence=licence,
    )  # fmt: skip


def _decur() -> list[Pretrained]:
    """Return DeCUR on SSL4EO-S12: joint files, and one backbone each."""
    found = []
    for backbone, stem in (
        ("decur_resnet50", "rn50"),
        ("decur_resnet50_rda", "rn50_rda"),
        ("decur_vit_small", "vits16"),
    ):
        for part, bands in (
            ("joint", _PAIR_L1C),
            ("sar", {"s1": ("VV", "VH")}),
            ("ms", {"s2": L1C_BANDS}),
        ):
            tag = "ssl4eo" if part == "joint" else f"ssl4eo_{part}"
            file = f"{stem}_ssl4eo-s12_{part}_decur_ep100.pth"
            found.append(_of(f"{backbone}.{tag}", "DeCUR", file, bands, licence="Apache-2.0"))
    return found


def _ssl4eo() -> list[Pretrained]:
    """Return the baselines of SSL4EO-S12, as torchgeo's catalogue names them."""
    s1, s2 = {"s1": ("VV", "VH")}, {"s2": L1C_BANDS}
    rows: list[tuple[str, str, str, str, Mapping[str, tuple[str, ...]]]] = [
        ("ssl4eo_resnet18", "ResNet18_Weights", "SENTINEL2_ALL", "MoCo", s2),
        ("ssl4eo_resnet50", "ResNet50_Weights", "SENTINEL1_ALL", "MoCo", s1),
        ("ssl4eo_resnet50", "ResNet50_Weights", "SENTINEL2_ALL", "MoCo", s2),
        ("ssl4eo_resnet50", "ResNet50_Weights", "SENTINEL2_ALL", "DINO", s2),
        ("ssl4eo_vit_small", "ViTSmall16_Weights", "SENTINEL2_ALL", "MoCo", s2),
        ("ssl4eo_vit_small", "ViTSmall16_Weights", "SENTINEL2_ALL", "DINO", s2),
        ("ssl4eo_vit_small", "ViTSmall16_Weights", "SENTINEL2_ALL", "MAE", s2),
    ]
    return [
        _of(
            f"{backbone}.{next(iter(bands))}_{method.lower()}", method,
            f"torchgeo {catalogue}.{entry}_{method.upper()}", bands,
            repository="zhu-xlab/SSL4EO-S12", licence="CC-BY-4.0",
        )
        for backbone, catalogue, entry, method, bands in rows
    ]  # fmt: skip


def _rows() -> list[Pretrained]:
    croma = [
        _of(f"croma_{size}.ssl4eo", "CROMA", f"CROMA_{size}.pt", _PAIR, licence="MIT")
        for size in ("base", "large")
    ]
    ct = {"ct": ("ct",)}
    return [
        *croma,
        *_decur(),
        *_ssl4eo(),
        Pretrained(
            tag="maestro_base.flair_hub",
            method="MAESTRO",
            repository="IGNF/MAESTRO_FLAIR-HUB_base",
            licence="Apache-2.0",
        ),
        Pretrained(
            tag="maestro_base.s2_naip",
            method="MAESTRO",
            repository="IGNF/MAESTRO_S2-NAIP-urban_base",
            licence="Apache-2.0",
        ),
        Pretrained(tag="omnisat_base.published", method="OmniSat", licence="MIT"),
        _of("swin_unetr.ssl", "SwinUNETR SSL", "model_swinvit.pt", ct, licence="Apache-2.0"),
        _of(
            "swin_unetr.denoising", "disruptive autoencoders", "ssl_pretrained_weights.pth", ct
        ),
        Pretrained(tag="titan.published", method="TITAN", licence="CC-BY-NC-ND-4.0"),
        Pretrained(tag="bmmae_base.published", method="BM-MAE", licence="CC-BY-NC-4.0"),
    ]  # fmt: skip


PRETRAINED: dict[str, Pretrained] = {row.tag: row for row in sorted(_rows(), key=lambda r: r.tag)}
