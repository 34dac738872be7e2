"""Turn normalised tensors of any modality into pictures a person can judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from domainssl.modality import Modality

__all__ = ["bands_line", "colour_bands", "panel", "planes_of", "stretch_limits", "to_rgb"]

Array = NDArray[np.float32]
_SETS = (  # red, green, blue under the names that sensors use
    ("B04", "B03", "B02"),
    ("B4", "B3", "B2"),
    ("R", "G", "B"),
    ("red", "green", "blue"),
)
_GAP = 4  # pixels, as the next two
_LINE = 14
_MIN_WIDTH = 376


def colour_bands(channels: Sequence[str]) -> tuple[int, ...]:
    """Return the channels to show: three for natural colour, two for radar, else one or three."""
    lowered = [c.lower() for c in channels]
    for names in _SETS:
        if all(n.lower() in lowered for n in names):
            return tuple(lowered.index(n.lower()) for n in names)
    if {"vv", "vh"} <= set(lowered):
        return lowered.index("vv"), lowered.index("vh")
    return (0, 1, 2) if len(channels) >= 3 else (0,)


def planes_of(x: Tensor, modality: Modality) -> Array:
    """Return (B, K, H, W) of the bands to show; a middle date or slice where there are many.

    A method may show a single date of a series, (B, C, *S). A slice of a volume, whose axes point
    to the right, to the front and up, is laid out as radiologists do: front at the top, the
    patient's right on the left.

    Two radar bands become three: VV, VH and their difference.
    """
    if modality.kind == "series" and x.ndim == 3 + modality.spatial_dims:
        x = x[:, x.shape[1] // 2]
    bands = [x[:, band] for band in colour_bands(modality.channels)]
    if modality.spatial_dims == 3:
        slices = [b[..., b.shape[-1] // 2] for b in bands]
        bands = [s.transpose(1, 2).flip(1, 2) for s in slices]
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


def bands_line(modality: Modality, limits: tuple[float, float] | None = None) -> str:
    """Return which bands a picture shows and how, for its legend."""
    names = [modality.channels[band] for band in colour_bands(modality.channels)]
    if len(names) == 2:
        names.append(f"{names[0]} - {names[1]}")
    shown = f"{names[0]} in grey" if len(names) == 1 else f"{', '.join(names)} as red, green, blue"
    part = " of the middle slice, front at the top, right on the left"
    part = part if modality.spatial_dims == 3 else ""
    if limits is not None:
        return f"{shown}{part}, from {limits[0]:g} to {limits[1]:g}"
    return f"{shown}{part}, normalised, each stretched between percentiles 2 and 98 of the input"


_LEGEND = "visible: what the model is given, grey is hidden; predicted: what it makes of it"


def panel(
    columns: dict[str, Tensor],
    modality: Modality,
    title: str,
    rows: Sequence[str] = (),
    reference: str = "input",
    limits: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    """Lay pictures out, one row per item and one column per name, with a legend above.

    Args:
        columns: Tensors in the modality's batch layout, (B, C, H, W) and so on.
        modality: What they are.
        title: Written above.
        rows: Text above each row: which item it is.
        reference: Column whose percentiles stretch all of them, so that they compare.
        limits: Values shown black and full in every item and band, instead of percentiles.

    Returns:
        The panel, (H, W, 3) uint8.
    """
    planes = {name: planes_of(x, modality) for name, x in columns.items()}
    ends = stretch_limits(planes[reference])
    if limits is not None:
        low, high = limits
        ends = np.full_like(ends[0], low), np.full_like(ends[1], high)
    pictures = {name: to_rgb(p, ends) for name, p in planes.items()}
    count, height, width = next(iter(pictures.values())).shape[:3]
    zoom = max(1, round(120 / max(height, width)))
    height, width = height * zoom, width * zoom
    across = max(_GAP + len(pictures) * (width + _GAP), _MIN_WIDTH)
    legend = [bands_line(modality, limits), *([_LEGEND] if "visible" in pictures else [])]
    head = [line for text in (title, *legend) for line in _wrapped(text, across - 2 * _GAP)]
    label = _LINE if rows else 0
    heads = _LINE * len(head) + _GAP  # where the names of the columns stand
    top = heads + _LINE + _GAP  # where the first row begins
    canvas = Image.new("RGB", (across, top + count * (label + height + _GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(head):
        draw.text((_GAP, 2 + i * _LINE), line, fill="black")
    for row, text in enumerate(rows):
        line = _wrapped(text, across - 2 * _GAP)[0]
        draw.text((_GAP, top + row * (label + height + _GAP)), line, fill="black")
    for i, (name, picture) in enumerate(pictures.items()):
        left = _GAP + i * (width + _GAP)
        draw.text((left, heads), name, fill="black")
        for row in range(count):
            tile = Image.fromarray(picture[row]).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (left, top + label + row * (label + height + _GAP)))
    return np.asarray(canvas)


def _wrapped(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels, or of one word."""
    font, lines = ImageFont.load_default(), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
