"""Embeddings as a picture: the three strongest directions of the vectors as red, green and blue."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from domainssl.files import write_whole

__all__ = ["directions", "paint", "write_items", "write_map_preview",
           "write_tile_preview"]  # fmt: skip

Array = np.ndarray[Any, Any]
_SIDE = 1024  # most pixels along a side
_SAMPLE = 20_000  # vectors that the directions are found from
_FEW = 5  # items, fewer of which are drawn as rows
_PERCENT = 2.0  # cut off at both ends of each colour


def directions(vectors: Array) -> tuple[Array, Array]:
    """Return the mean (E,) and the three strongest directions (E, 3) of vectors, (N, E).

    The sign of a direction is that of its largest entry, so that equal vectors give equal colours.
    """
    exact = vectors.astype(np.float64)
    mean = exact.mean(0) if len(exact) else np.zeros(vectors.shape[1])
    centred = exact - mean
    _, found = np.linalg.eigh(centred.T @ centred)  # ascending
    axes = np.zeros((vectors.shape[1], 3))
    count = min(3, vectors.shape[1])
    axes[:, :count] = found[:, ::-1][:, :count]
    largest = np.abs(axes).argmax(0)
    axes *= np.where(axes[largest, range(3)] < 0, -1.0, 1.0)
    return mean, axes


def paint(projected: Array) -> Array:
    """Return 8-bit colours with opacity, (*S, 4), of projections (*S, 3); NaN is transparent."""
    valid = np.isfinite(projected).all(-1)
    colours = np.zeros((*valid.shape, 4), np.uint8)
    if valid.any():
        low, high = np.percentile(projected[valid], [_PERCENT, 100 - _PERCENT], axis=0)
        room = np.where(high > low, high - low, 1.0)
        scaled = np.clip((projected[valid] - low) / room, 0, 1)
        colours[valid, :3] = np.rint(255 * scaled)
        colours[valid, 3] = 255
    return colours


def write_map_preview(
    path: Path, shape: Sequence[int], rows: int, read: Callable[[slice], Array]
) -> None:
    """Write a PNG of a map of vectors, in two passes over it.

    Args:
        path: The picture.
        shape: Cells (h, w).
        rows: Rows that are read at once.
        read: Returns float32 (E, rows, w), NaN where not valid.
    """
    height, width = shape
    stride = -(-max(height, width) // _SIDE)
    bands = [slice(r, min(r + rows, height)) for r in range(0, height, rows)]
    share = max(1, -(-height * width // _SAMPLE))
    sample = []
    for band in bands:
        vectors = read(band)
        flat = vectors.reshape(len(vectors), -1).T  # (cells, E)
        begin = -(band.start * width) % share  # every share-th cell of the map
        chosen = flat[begin::share]
        sample.append(chosen[np.isfinite(chosen).all(1)])
    mean, axes = directions(np.concatenate(sample))
    shown = np.full((-(-height // stride), -(-width // stride), 3), np.nan)
    for band in bands:
        begin = -band.start % stride
        vectors = read(band)[:, begin::stride, ::stride]
        first = (band.start + begin) // stride
        found = (np.moveaxis(vectors, 0, -1) - mean) @ axes
        shown[first : first + found.shape[0]] = found
    _save(path, Image.fromarray(paint(shown), "RGBA"))


def write_items(path: Path, vectors: Array, names: Sequence[str]) -> None:
    """Write a PNG of one vector per item, (N, E); NaN is left out, and nothing gives no picture.

    From five items on a dot each over the two strongest directions; a few have none that tell
    anything, and are drawn as rows of their features with their names.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kept = np.isfinite(vectors).all(1)
    valid = vectors[kept]
    if not len(valid):
        return
    figure = Figure(figsize=(5, 5) if len(valid) >= _FEW else (8, 2.5), dpi=100)
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    if len(valid) < _FEW:
        most = float(np.abs(valid).max()) or 1.0
        shown = plot.imshow(
            valid, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest"
        )
        shown_names = [names[i] for i in np.flatnonzero(kept).tolist()]
        plot.set_yticks(range(len(valid)), shown_names)
        plot.set_xlabel("feature")
        figure.colorbar(shown, ax=plot, label="value")
    else:
        mean, axes = directions(valid[:: max(1, len(valid) // _SAMPLE)])
        places = (valid - mean) @ axes
        plot.scatter(places[:, 0], places[:, 1], s=12, c=paint(places)[:, :3] / 255)
        plot.set_xlabel("first direction")
        plot.set_ylabel("second direction")
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_whole(path, content.getbuffer())


def write_tile_preview(path: Path, vectors: Array, cells: Array) -> None:
    """Write a PNG of the tiles of a slide, (N, E), at their rows and columns, (N, 2)."""
    first = cells.min(0)
    height, width = (int(n) for n in cells.max(0) - first + 1)
    stride = -(-max(height, width) // _SIDE)
    mean, axes = directions(vectors[:: max(1, len(vectors) // _SAMPLE)])
    shown = np.full((-(-height // stride), -(-width // stride), 3), np.nan)
    rows, columns = ((cells - first) // stride).T
    shown[rows, columns] = (vectors - mean) @ axes
    _save(path, Image.fromarray(paint(shown), "RGBA"))


def _save(path: Path, picture: Image.Image) -> None:
    """Write a picture; a small one with larger pixels."""
    grown = max(1, 256 // max(picture.size))
    if grown > 1:
        size = (picture.width * grown, picture.height * grown)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    content = io.BytesIO()
    picture.save(content, "PNG")
    write_whole(path, content.getbuffer())
