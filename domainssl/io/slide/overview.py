"""A picture of a slide for people: tissue outlined, kept tiles drawn, regions coloured."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from domainssl.io.slide.grid import TileGrid
from domainssl.io.slide.pyramid import Slide
from domainssl.io.slide.tissue import TissueMask

__all__ = ["draw_overview", "region_color"]

Array = np.ndarray[Any, Any]
_LONGEST = 1400  # pixels
_SHORTEST = 420  # room for the caption
_OUTLINE = (10, 150, 70)
_TILE = (20, 90, 220)
_COLORS = (
    _TILE, (214, 94, 0), (150, 40, 160), (0, 140, 140), (190, 30, 60), (120, 110, 0),
    (90, 60, 30), (230, 80, 170),
)  # fmt: skip
_INK, _PALE = (30, 30, 30), (110, 110, 110)
_FILL = 26  # of 255
_BARS_UM = (50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)


def draw_overview(slide: Slide, grid: TileGrid, tissue: TissueMask | None, title: str) -> bytes:
    """Return a PNG: the slide without label, what counts as tissue, and the tiles that are kept.

    Args:
        slide: The slide.
        grid: Kept tiles.
        tissue: Where tissue was found; None where none was looked for.
        title: First words of the caption.
    """
    from PIL import Image, ImageDraw, ImageFont

    rgb, _, down = slide.overview(_LONGEST)
    zoom = max(1, math.ceil(_SHORTEST / max(rgb.shape[:2])))
    picture = Image.fromarray(np.ascontiguousarray(rgb))
    picture = picture.resize((picture.width * zoom, picture.height * zoom))
    scale = zoom / down[0], zoom / down[1]
    names = sorted(set(grid.labels.tolist())) if grid.labels is not None else []
    picture = _with_tiles(picture, grid, scale, names)
    if tissue is not None:
        picture = _with_outline(picture, tissue, scale)
    font, small = ImageFont.load_default(18), ImageFont.load_default(15)
    lines = _caption(grid, tissue, names)
    height, width = picture.height, max(picture.width, _SHORTEST)
    sheet = Image.new("RGB", (width + 24, height + 24 + 34 + 22 * len(lines)), "white")
    sheet.paste(picture, (12, 12))
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((11, 11, 12 + picture.width, 12 + height), outline=(200, 200, 200))
    draw.text((12, height + 20), f"{title}  ·  {len(grid)} tiles", fill=_INK, font=font)
    for n, (color, text) in enumerate(lines):
        y = height + 48 + 22 * n
        draw.rectangle((12, y + 3, 24, y + 15), outline=color, width=2)
        draw.text((32, y), text, fill=_PALE, font=small)
    _scale_bar(draw, slide, picture.size, down[0] / zoom, small)
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()


def _caption(
    grid: TileGrid, tissue: TissueMask | None, names: list[str]
) -> list[tuple[tuple[int, int, int], str]]:
    shared = f", {grid.overlap_px} px shared" if grid.overlap_px else ""
    size = f"{grid.size_px} px at {grid.mpp_um:g} um per pixel{shared}"
    labels = [] if grid.labels is None else grid.labels.tolist()
    lines = [
        (region_color(n), f"{name or 'no class'}: {labels.count(name)} tiles")
        for n, name in enumerate(names[: len(_COLORS)])
    ]
    lines = lines or [(_TILE, f"kept tiles, {size}")]
    if names:
        lines[0] = (lines[0][0], f"{lines[0][1]}; {size}")
    if tissue is not None:
        pen = f", {tissue.pen_fraction:.1%} left out as pen" if tissue.pen_fraction > 0.001 else ""
        lines.append((_OUTLINE, f"tissue, {tissue.mask.mean():.0%} of the slide{pen}"))
    return lines


def region_color(number: int) -> tuple[int, int, int]:
    """Return the colour of a class by its number, in pictures and annotations."""
    return _COLORS[number % len(_COLORS)]


def _with_tiles(picture: Any, grid: TileGrid, scale: tuple[float, float], names: list[str]) -> Any:
    from PIL import Image, ImageDraw

    layer = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    width, height = grid.size_level0[0] * scale[0], grid.size_level0[1] * scale[1]
    is_visible = min(width, height) >= 5  # else outlines would hide the tissue
    for n, (x, y) in enumerate(grid.coords.tolist()):
        color = region_color(names.index(grid.labels[n])) if grid.labels is not None else _TILE
        left, upper = x * scale[0], y * scale[1]
        box = (left, upper, max(left, left + width - 1), max(upper, upper + height - 1))
        draw.rectangle(box, fill=(*color, _FILL), outline=(*color, 190) if is_visible else None)
    return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")


def _with_outline(picture: Any, tissue: TissueMask, scale: tuple[float, float]) -> Any:
    """Draw the border of tissue, two pixels wide at the size of the picture."""
    from PIL import Image

    height, width = tissue.mask.shape
    size = (
        max(1, round(width * tissue.downsample[0] * scale[0])),
        max(1, round(height * tissue.downsample[1] * scale[1])),
    )
    mask = np.asarray(Image.fromarray(tissue.mask).resize(size, Image.Resampling.NEAREST))
    canvas = np.zeros((picture.height, picture.width), bool)
    canvas[: size[1], : size[0]] = mask[: picture.height, : picture.width]
    inner = np.pad(canvas, 2)
    shrunk = np.ones_like(canvas)
    for y, x in ((0, 2), (4, 2), (2, 0), (2, 4), (1, 1), (1, 3), (3, 1), (3, 3)):
        shrunk &= inner[y : y + canvas.shape[0], x : x + canvas.shape[1]]
    pixels = np.array(picture)
    pixels[canvas & ~shrunk] = _OUTLINE
    return Image.fromarray(pixels)


def _scale_bar(draw: Any, slide: Slide, size: tuple[int, int], down: float, font: Any) -> None:
    mpp = slide.facts.mpp
    if mpp is None:
        return
    um_per_px = mpp[0] * down
    length = next((u for u in reversed(_BARS_UM) if u / um_per_px <= size[0] / 4), None)
    if length is None:
        return
    right, y = size[0] + 12, size[1] + 32
    left = right - round(length / um_per_px)
    draw.line((left, y, right, y), fill=_INK, width=3)
    text = f"{length // 1000} mm" if length >= 1000 else f"{length} um"
    draw.text((right, y + 6), text, fill=_INK, font=font, anchor="ra")
