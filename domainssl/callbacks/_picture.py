"""Turn normalised tensors of any modality into pictures a person can judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from domainssl.modality import Modality

__all__ = ["colour_bands", "panel", "stretch_limits", "to_rgb"]

Array = NDArray[np.float32]
_SETS = (  # red, green, blue under the names that sensors use
    ("B04", "B03", "B02"),
    ("B4", "B3", "B2"),
    ("R", "G", "B"),
    ("red", "green", "blue"),
)
_GAP = 4
_HEAD = 16


def colour_bands(channels: Sequence[str]) -> tuple[int, ...]:
    """Return the channels to show: three for natural colour, two for radar, else one or three."""
    lowered = [c.lower() for c in channels]
    for names in _SETS:
        if all(n.lower() in lowered for n in names):
            return tuple(lowered.index(n.lower()) for n in names)
    if {"vv", "vh"} <= set(lowered):
        return lowered.index("vv"), lowered.index("vh")
    return (0, 1, 2) if len(channels) >= 3 else (0,)


def _planes(x: Tensor, modality: Modality) -> Array:
    """Return (B, K, H, W) of the bands to show; a middle date or slice where there are many.

    Two radar bands become three: VV, VH and their difference.
    """
    if modality.kind == "series":
        x = x[:, x.shape[1] // 2]
    bands = [x[:, band] for band in colour_bands(modality.channels)]
    if modality.spatial_dims == 3:
        bands = [b[..., b.shape[-1] // 2] for b in bands]
    if len(bands) == 2:
        bands.append(bands[0] - bands[1])
    return np.stack([b.detach().float().cpu().numpy() for b in bands], axis=1)


def stretch_limits(planes: Array, percent: float = 2.0) -> tuple[Array, Array]:
    """Return the low and high percentile per item and band, (B, K, 1, 1) each."""
    low, high = np.nanpercentile(planes, [percent, 100 - percent], axis=(2, 3), keepdims=True)
    return low.astype(np.float32), np.maximum(high, low + 1e-6).astype(np.float32)


def to_rgb(planes: Array, limits: tuple[Array, Array]) -> NDArray[np.uint8]:
    """Stretch (B, K, H, W) between limits and return (B, H, W, 3) uint8; NaN becomes grey."""
    low, high = limits
    scaled = np.clip((planes - low) / (high - low), 0, 1)
    scaled = np.nan_to_num(scaled, nan=0.5)
    pixels = np.rint(scaled * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels[..., :3]


def panel(
    columns: dict[str, Tensor], modality: Modality, title: str, reference: str = "input"
) -> NDArray[np.uint8]:
    """Lay pictures out, one row per item and one column per name.

    Args:
        columns: Tensors in the modality's batch layout, (B, C, H, W) and so on.
        modality: What they are.
        title: Written above.
        reference: Column whose percentiles stretch all of them, so that they compare.

    Returns:
        The panel, (H, W, 3) uint8.
    """
    planes = {name: _planes(x, modality) for name, x in columns.items()}
    limits = stretch_limits(planes[reference])
    pictures = {name: to_rgb(p, limits) for name, p in planes.items()}
    rows, height, width = next(iter(pictures.values())).shape[:3]
    zoom = max(1, round(120 / max(height, width)))
    height, width = height * zoom, width * zoom
    size = (_GAP + len(pictures) * (width + _GAP), 2 * _HEAD + rows * (height + _GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP, 2), title, fill="black")
    for i, (name, picture) in enumerate(pictures.items()):
        left = _GAP + i * (width + _GAP)
        draw.text((left, _HEAD + 2), name, fill="black")
        for row in range(rows):
            tile = Image.fromarray(picture[row]).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (left, 2 * _HEAD + row * (height + _GAP)))
    return np.asarray(canvas)
