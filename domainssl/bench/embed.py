"""Embedding a scene against a plain loop over the same windows, and the memory that it takes.

The scene is written for the occasion: 12 bands of smooth fields and noise, LZW in blocks. The plain
side reads each window with rasterio and keeps what the backbone says about it: no validity, no
conversion, no store on disk, no marks, no preview.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from domainssl.backbones.vit import ViTArchitecture, ViTBackbone
from domainssl.bench.processes import Side
from domainssl.bench.report import Goal, Row, Settings, interleaved, ratio
from domainssl.errors import require
from domainssl.inference.run import embed

__all__ = ["BANDS", "measure", "tiny_backbone", "write_scene"]

BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
_WINDOW, _PATCH = 224, 16
_STEP = 12 * _PATCH  # windows of 14 patches, of which one at each side is left out
_BATCH = 8


def measure(settings: Settings) -> Iterator[Row]:
    """Yield the ratio of both sides, and the memory of ours."""
    side = settings.pick(2196, 416)
    with tempfile.TemporaryDirectory(prefix="domainssl-bench-") as name:
        path = write_scene(Path(name) / "scene.tif", side)
        ours, theirs = Side(partial(_ours, path)), Side(partial(_plain, path))
        try:
            row = ratio(
                "embed",
                "plain loop over the same windows / embed",
                interleaved(ours, theirs, settings.pick(5, 1, settings.rounds)),
                Goal("at least", 0.9),
                f"{side} x {side} x {len(BANDS)}, windows of {_WINDOW} px, one thread",
                ("embed", "plain loop"),
            )
            yield row
            yield Row(
                subject="embed",
                what="memory of the process, MB",
                values=(ours.memory_mb,),
                unit="MB",
                goal=Goal("at most", 4000.0),
                note=f"PSS after a scene of {side} x {side} x {len(BANDS)}",
            )
        finally:
            ours.close()
            theirs.close()


def tiny_backbone() -> ViTBackbone:
    """Return a small ViT of 12 bands with random weights."""
    torch.manual_seed(0)
    s2 = {
        "kind": "image", "channels": BANDS, "value_unit": "dn", "size": (_WINDOW, _WINDOW),
        "gsd_m": 10.0, "mean": (2000.0,) * 12, "std": (1500.0,) * 12,
    }  # fmt: skip
    sizes = ViTArchitecture(width=96, depth=4, heads=3)
    return ViTBackbone({"s2": s2}, sizes, patch_size=_PATCH).eval()


def write_scene(path: Path, side: int) -> Path:
    """Write a GeoTIFF of 12 bands, 512 rows at a time."""
    rasterio = require("rasterio", "geo")
    rng = np.random.default_rng(0)
    shape = {"count": len(BANDS), "height": side, "width": side}
    place = rasterio.Affine(10.0, 0.0, 4e5, 0.0, -10.0, 5e6)
    with rasterio.open(
        path, "w", driver="GTiff", dtype="uint16", nodata=0, crs="EPSG:32632", transform=place,
        tiled=True, blockxsize=512, blockysize=512, compress="lzw", predictor=2, **shape,
    ) as file:  # fmt: skip
        file.descriptions = BANDS
        for top in range(0, side, 512):
            rows = min(512, side - top)
            cells = rng.integers(300, 4000, (len(BANDS), rows // 32 + 1, side // 32 + 1))
            smooth = cells.repeat(32, 1).repeat(32, 2)[:, :rows, :side]
            noise = rng.integers(0, 64, smooth.shape)
            window = rasterio.windows.Window(0, top, side, rows)
            file.write((smooth + noise).astype(np.uint16), window=window)
    return path


def _ours(path: Path) -> Callable[[], Any]:
    torch.set_num_threads(1)
    backbone, target = tiny_backbone(), path.parent / "ours"

    def run() -> None:
        shutil.rmtree(target, ignore_errors=True)
        embed(backbone, path, target, batch_size=_BATCH, dtype="float16")

    return run


def _plain(path: Path) -> Callable[[], Any]:
    torch.set_num_threads(1)
    rasterio, backbone = require("rasterio", "geo"), tiny_backbone()

    def run() -> None:
        with rasterio.open(path) as file, torch.inference_mode():
            last = file.height - _WINDOW
            begins = [min(i, last) for i in range(0, last + _STEP, _STEP)]
            places = [(row, column) for row in begins for column in begins]
            kept = []
            for first in range(0, len(places), _BATCH):
                windows = [
                    file.read(window=rasterio.windows.Window(column, row, _WINDOW, _WINDOW))
                    for row, column in places[first : first + _BATCH]
                ]
                values = torch.from_numpy(np.stack(windows).astype(np.float32))
                kept.append(backbone({"s2": values}).tokens["s2"])

    return run
