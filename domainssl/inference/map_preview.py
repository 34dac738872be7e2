"""Pictures of predicted maps with a legend, for people: written beside every map."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.files import write_whole

__all__ = ["class_colours", "write_class_preview", "write_number_preview"]

Array = np.ndarray[Any, Any]
_SIDE = 1024  # most pixels along a side
_MOST_NAMED = 30  # classes of the legend
_NOTHING = (255, 255, 255)
_FIRST = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75),
    (227, 119, 194), (188, 189, 34), (23, 190, 207), (127, 127, 127),
)  # fmt: skip


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """Return a colour per class: ten that are told apart well, then hues by the golden angle."""
    import colorsys

    def later(number: int) -> tuple[int, int, int]:
        found = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.45 + 0.15 * (number % 4), 0.85)
        red, green, blue = (round(255 * part) for part in found)
        return red, green, blue

    return [_FIRST[n] if n < len(_FIRST) else later(n) for n in range(count)]


def write_class_preview(path: Path, labels: Array, classes: Sequence[str], nodata: int) -> None:
    """Write a PNG of a map in the colours of its classes, with those that are seen in a legend.

    Args:
        path: The picture.
        labels: Number of the class, (H, W); may lie in a file.
        classes: Names by number.
        nodata: What stands for no class, drawn white.
    """
    shown = np.asarray(_reduced(labels))
    colours = class_colours(len(classes))
    table = np.full((max(len(classes), int(nodata) if nodata > 0 else 0) + 1, 3), 255, np.uint8)
    table[: len(classes)] = colours
    if 0 <= nodata < len(table):
        table[nodata] = _NOTHING
    inside = (shown >= 0) & (shown < len(table))
    picture = table[np.where(inside, shown, len(table) - 1)]
    picture[~inside] = _NOTHING
    seen = [int(n) for n in np.unique(shown) if n != nodata and 0 <= n < len(classes)]

    def legend(axes: Any) -> None:
        from matplotlib.patches import Patch

        entries = [
            Patch(facecolor="#{:02x}{:02x}{:02x}".format(*colours[n]), label=f"{n} {classes[n]}")
            for n in seen[:_MOST_NAMED]
        ]
        if len(seen) > _MOST_NAMED:
            entries.append(Patch(facecolor="none", label=f"{len(seen) - _MOST_NAMED} more"))
        if entries:
            axes.legend(handles=entries, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)

    _save(path, picture, legend)


def write_number_preview(path: Path, numbers: Array, name: str) -> None:
    """Write a PNG of predicted numbers, (H, W), NaN where nothing is known, with their scale."""
    shown = np.asarray(_reduced(numbers), np.float32)
    known = shown[np.isfinite(shown)]
    low, high = (float(v) for v in np.percentile(known, [2, 98])) if known.size else (0.0, 1.0)

    def scale(axes: Any) -> None:
        axes.figure.colorbar(axes.images[0], ax=axes, label=name, shrink=0.8)

    _save(path, np.ma.masked_invalid(shown), scale, vmin=low, vmax=high, cmap="viridis")


def _reduced(values: Array) -> Array:
    """Return every so many pixels of a map, so that the longer side is that of a picture."""
    stride = -(-max(values.shape) // _SIDE)
    return values[stride // 2 :: stride, stride // 2 :: stride]


def _save(path: Path, picture: Any, legend: Any, **how: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = picture.shape[:2]
    longest = max(height, width)
    size = (6 * width / longest + 2.4, max(6 * height / longest, 2.4))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(picture, interpolation="nearest", **how)
    axes.set_axis_off()
    legend(axes)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    write_whole(path, content.getbuffer())
