"""Every objective's step against the list of its own matrix products, run back to back.

As subject `matmul` does for CROMA: the products of one step, with convolutions as the products
they are, are recorded with their very operands and run again with nothing in between. Sizes are
the published ones; windows and batches are what a CPU can hold. Data are made up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from domainssl.backbones.encoders.backbone import EncoderSizes
from domainssl.backbones.galileo.groups import PUBLISHED_MODALITIES
from domainssl.backbones.maestro.inputs import MAESTROInput
from domainssl.bench.matmul import goal, recorded
from domainssl.bench.models import forward_backward, modalities
from domainssl.bench.report import Row, Settings, interleaved, ratio
from domainssl.modality import Batch, Modality, key
from domainssl.objectives.barlow_twins import BarlowTwins
from domainssl.objectives.base import Objective
from domainssl.objectives.clip import CLIP
from domainssl.objectives.csip import CSIP
from domainssl.objectives.data2vec import Data2Vec, Data2VecEncoding
from domainssl.objectives.decur import DeCUR
from domainssl.objectives.dino import DINO, DINOHead
from domainssl.objectives.galileo import Galileo, GalileoEncoding, GalileoMasking
from domainssl.objectives.hyper_mae import HyperMAE, HyperMAEEncoding
from domainssl.objectives.maestro import MAESTRO, MAESTROEncoding
from domainssl.objectives.moco import MoCoV2, MoCoV3
from domainssl.objectives.omnisat import OmniSat, OmniSatEncoding
from domainssl.objectives.simclr import SimCLR
from domainssl.objectives.simdino import SimDINO, SimDINOHead
from domainssl.objectives.student_parts import Crops, StudentEncoding
from domainssl.objectives.vicreg import VICReg

__all__ = ["measure"]

_METRES = 60
_DATES = 16
_FIRST_DAY, _DAYS_BETWEEN = 18000, 20


@dataclass(frozen=True)
class _Case:
    """An objective at a size.

    Attributes:
        build: Returns it.
        batch: Items per step on a CPU.
        size: What it is, in words.
    """

    build: Callable[[], Objective]
    batch: int
    size: str


def measure(settings: Settings) -> Iterator[Row]:
    """Yield the share of its matrix products in the time of each objective's step."""
    rounds = settings.pick(3, 1, settings.rounds)
    is_gpu = settings.device.startswith("cuda")
    for name, case in _cases(settings).items():
        count = settings.pick(8 * case.batch if is_gpu else case.batch, 2, settings.batch)
        torch.manual_seed(0)
        model = case.build().to(settings.device).train()
        step = forward_backward(model, _made_up(model, count, settings.device), settings)
        products = recorded(step)
        pairs = interleaved(step, products.replay, rounds, settings.device)
        yield ratio(
            "objectives",
            f"{name}: matrix products alone / forward and backward, time",
            pairs,
            goal(settings),
            f"{case.size}, batch {count}, {len(products.calls)} products",
            ("step", "products"),
        )
        del model, step, products


def _cases(settings: Settings) -> dict[str, _Case]:
    """Return every objective that `matmul` does not measure, small ones for a quick run."""
    side = 32 if settings.quick else 112
    pair: dict[str, Any] = {n: m.to_dict() for n, m in modalities(side).items()}
    encoder: dict[str, Any] = {"encoding": {"encoder": "resnet50"}, "context_size": side}
    words = f"two ResNet-50, {side} px"
    if settings.quick:
        small = EncoderSizes(width=32, depth=1, heads=2, patch_size=8)
        encoder |= {"encoding": {"encoder": "transformer", "sizes": small}}
        encoder |= {"projector": (32, 32)}
        words = f"two small transformers, {side} px"
    methods: dict[str, type[Objective]] = {
        "DeCUR": DeCUR,
        "SimCLR": SimCLR,
        "CLIP": CLIP,
        "BarlowTwins": BarlowTwins,
        "VICReg": VICReg,
    }
    cases = {
        name: _Case(lambda method=method: method(pair, **encoder), 8, words)  # type: ignore[misc]
        for name, method in methods.items()
    }
    single = {name: value for name, value in encoder.items() if name != "projector"}
    cases["CSIP"] = _Case(lambda: CSIP(pair, **single), 8, words)
    footprint: dict[str, Any] = {n: m.to_dict() for n, m in _footprint().items()}
    size: Any = "tiny" if settings.quick else "base"
    words = f"{size}, aerial {5 * _METRES} px, s2 and s1 of {_DATES} dates"
    cases["OmniSat"] = _Case(lambda: OmniSat(footprint, OmniSatEncoding(size=size)), 8, words)
    inputs = {
        "aerial": MAESTROInput(patch_size=20),
        "s2": MAESTROInput(patch_size=2),
        "s1_asc": MAESTROInput(patch_size=2),
    }
    cases["MAESTRO"] = _Case(
        lambda: MAESTRO(
            footprint, MAESTROEncoding(inputs=inputs, size=size, normalization="zscore")
        ),
        2,
        words,
    )
    bands = HyperMAEEncoding(size=size, patch_size=8 if settings.quick else 16)
    cases["HyperMAE"] = _Case(
        lambda: HyperMAE(pair, bands, context_size=side), 2, f"LESS {size}, {side} px, all bands"
    )
    cases["Galileo"] = _galileo(settings)
    return cases | _students(settings, {"s2": pair["s2"]}, side)


def _galileo(settings: Settings) -> _Case:
    """Return Galileo on both sensors and heights."""
    side = 16 if settings.quick else 64
    sensors = {n: replace(PUBLISHED_MODALITIES[n], size=(side, side)) for n in ("s1", "s2", "dem")}
    size: Any = "nano" if settings.quick else "base"
    # one shape: what a step costs depends on which is drawn
    masking = GalileoMasking(patch_sizes=(4,), shapes=((4, 4),))
    return _Case(
        lambda: Galileo(
            {n: m.to_dict() for n, m in sensors.items()}, GalileoEncoding(size=size),
            masking=masking,
        ),
        2,
        f"{size}, 4 x 4 patches of 4 px and 4 dates of s1, s2 and heights",
    )  # fmt: skip


def _students(settings: Settings, modality: dict[str, Any], side: int) -> dict[str, _Case]:
    """Return DINO and SimDINO, with masked patches, on one modality."""
    size: Any = "tiny" if settings.quick else "small"
    shared: dict[str, Any] = {
        "encoding": StudentEncoding(size=size, patch_size=16 if side > 32 else 8),
        "crops": Crops(local_count=2 if settings.quick else 8, local_size=side // 2 // 16 * 16),
        "loss_weights": {"patch": 1.0},
        "context_size": side,
    }
    dino, simdino = DINOHead(), SimDINOHead()
    if settings.quick:
        dino = DINOHead(prototypes=64, hidden=32, bottleneck=16)
        simdino = SimDINOHead(hidden=32, bottleneck=16)
    words = f"ViT {size}, two crops of {side} px and {shared['crops'].local_count} of half of it"
    return {
        "DINO": _Case(lambda: DINO(modality, head=dino, **shared), 4, words),
        "SimDINO": _Case(lambda: SimDINO(modality, head=simdino, **shared), 4, words),
        **_momentum(modality, shared["encoding"], side),
    }


def _momentum(modality: dict[str, Any], encoding: StudentEncoding, side: int) -> dict[str, _Case]:
    """Return MoCo v2 and v3, and data2vec, on one modality."""
    words = f"ViT {encoding.size}, two views of {side} px"
    shared: dict[str, Any] = {"encoding": encoding, "context_size": side}
    return {
        "MoCoV2": _Case(lambda: MoCoV2(modality, queue=4096, **shared), 4, words),
        "MoCoV3": _Case(lambda: MoCoV3(modality, **shared), 4, words),
        "Data2Vec": _data2vec(modality, encoding, side),
    }


def _data2vec(modality: dict[str, Any], encoding: StudentEncoding, side: int) -> _Case:
    """Return data2vec on one modality."""
    size: Any = encoding.size
    own = Data2VecEncoding(size=size, patch_size=encoding.patch_size)
    words = f"BEiT {size}, one view of {side} px"
    return _Case(lambda: Data2Vec(modality, own, context_size=side), 8, words)


def _footprint() -> dict[str, Modality]:
    """Return an aerial image and two Sentinel series of one footprint."""
    side = _METRES // 10
    found = {
        "aerial": Modality(
            name="aerial",
            kind="image",
            channels=("R", "G", "B", "NIR"),
            value_unit="rgb8",
            size=(5 * _METRES, 5 * _METRES),
            gsd_m=0.2,
        ),
        "s2": Modality(
            name="s2",
            kind="series",
            channels=("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"),
            value_unit="dn",
            size=(side, side),
            gsd_m=10.0,
        ),
        "s1_asc": Modality(
            name="s1_asc",
            kind="series",
            channels=("VV", "VH"),
            value_unit="db",
            size=(side, side),
            gsd_m=10.0,
        ),
    }
    return {
        name: replace(m, mean=(100.0,) * m.num_channels, std=(30.0,) * m.num_channels)
        for name, m in found.items()
    }


def _made_up(model: Objective, count: int, device: str) -> Batch:
    """Return plausible values of every modality of a model, all valid."""
    generator = torch.Generator().manual_seed(0)
    batch: Batch = {"id": [f"item{i}" for i in range(count)]}
    known: Mapping[str, Modality] = model.backbone.modalities
    for name, modality in known.items():
        assert modality.mean is not None and modality.std is not None
        frames = (_DATES,) if modality.kind == "series" else ()
        shape = (count, *frames, modality.num_channels, *modality.size)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (modality.mean, modality.std))
        batch[name] = (torch.randn(shape, generator=generator) * std + mean).to(device)
        if frames:
            days = _FIRST_DAY + _DAYS_BETWEEN * torch.arange(_DATES, dtype=torch.int32)
            batch[key(name, "dates")] = days.expand(count, -1).clone().to(device)
            present = torch.ones(count, _DATES, dtype=torch.bool, device=device)
            batch[key(name, "frames")] = present
        else:
            day = torch.full((count,), _FIRST_DAY, dtype=torch.int32, device=device)
            batch[key(name, "dates")] = day
    return batch
