"""Sliding windows that hold only the rows under work against MONAI's, which hold the whole output.

Both predict the same windows with the same network, a single convolution, so that reading, blending
and writing weigh more than with any network in use. Results are checked to be equal.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from domainssl.bench.processes import ROLLUP, pss_mb
from domainssl.bench.report import Goal, Row, Settings, interleaved, ratio
from domainssl.errors import require
from domainssl.inference.sliding import Box, Slabs, Windows, class_map, slide_over

__all__ = ["measure"]

_CLASSES, _MANY = 14, 100
_GB = 1024.0
_PAUSE_S = 0.05


def measure(settings: Settings) -> Iterator[Row]:
    """Yield the ratio of times, with logits and with class maps, and the peak of memory."""
    side, window = settings.pick(256, 24), settings.pick(96, 12)
    rounds = settings.pick(3, 1, settings.rounds)
    values = torch.randn(1, 1, side, side, side, generator=torch.Generator().manual_seed(0))
    network = _network(_CLASSES)
    for name in ("logits", "class maps"):
        is_map = name == "class maps"
        ours, theirs = (
            _ours(values, network, window, is_map),
            _theirs(values, network, window, is_map),
        )
        _check_equal(ours(), theirs(), is_map)
        yield ratio(
            "sliding",
            f"MONAI in memory / slide_over, {name}, time",
            interleaved(ours, theirs, rounds),
            Goal("at least", 1 / 1.2),
            f"{side}³, windows of {window}³, overlap 0.25, gaussian, {_CLASSES} classes",
            ("slide_over", "MONAI"),
        )
    if Path(ROLLUP.format("self")).exists():
        yield _memory(settings.pick(384, 24), window)


def _network(classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv3d(1, classes, 3, padding=1).eval()


def _ours(values: Tensor, network: nn.Module, window: int, is_map: bool) -> Callable[[], Tensor]:
    shape = tuple(values.shape[2:])
    windows = Windows(shape, window, 0.25)

    def run() -> Tensor:
        out = torch.empty(shape, dtype=torch.uint8) if is_map else torch.empty(_CLASSES, *shape)

        def sink(box: Box, found: Tensor) -> None:
            place: tuple[Any, ...] = (..., *box)
            out[place] = found

        slide_over(
            lambda box: {"ct": values[:, :, *box]},
            lambda batch: network(batch["ct"]),
            windows,
            sink,
            finish=class_map if is_map else None,
        )
        return out

    return run


def _theirs(values: Tensor, network: nn.Module, window: int, is_map: bool) -> Callable[[], Tensor]:
    slide = require("monai.inferers", "medical").sliding_window_inference

    def run() -> Tensor:
        with torch.inference_mode():
            found = slide(values, window, 1, network, overlap=0.25, mode="gaussian")[0]
            return class_map(found) if is_map else found  # type: ignore[no-any-return]

    return run


def _check_equal(ours: Tensor, theirs: Tensor, is_map: bool) -> None:
    if is_map:
        share = float((ours != theirs).float().mean())  # ties within rounding
        assert share < 1e-5, share
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def _memory(side: int, window: int) -> Row:
    """Predict from one memory map into another; return the peak of the process's memory."""
    network, shape = _network(_MANY), (side,) * 3
    with tempfile.TemporaryDirectory(prefix="domainssl-bench-") as folder:
        source = np.memmap(Path(folder) / "in", np.int16, "w+", shape=shape)
        target = np.memmap(Path(folder) / "out", np.uint8, "w+", shape=shape)
        source[:] = np.random.default_rng(0).integers(-1000, 1000, shape, np.int16)

        def read(box: Box) -> dict[str, Any]:
            return {"ct": torch.from_numpy(np.array(source[box], np.float32))[None, None]}

        def write(row: int, found: np.ndarray[Any, Any]) -> None:
            target[row : row + len(found)] = found

        before = pss_mb()
        peak = _peak_mb(
            lambda: slide_over(
                read,
                lambda batch: network(batch["ct"]),
                Windows(shape, window, 0.25),
                Slabs(shape, write),
                finish=class_map,
            )
        )
    return Row(
        subject="sliding",
        what=f"peak PSS at {side}³ with {_MANY} classes, class maps to a memory map",
        values=(peak / _GB,),
        unit="GiB",
        goal=Goal("at most", 6e9 / 2**30),
        note=f"windows of {window}³, overlap 0.25; {before / _GB:.2f} GiB before; all logits would "
        f"be {4 * _MANY * side**3 / 2**30:.1f} GiB",
    )


def _peak_mb(run: Callable[[], Any]) -> float:
    """Return the most memory that this process had while something ran."""
    done, peaks = threading.Event(), [pss_mb()]

    def watch() -> None:
        while not done.wait(_PAUSE_S):
            peaks.append(pss_mb())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run()
        peaks.append(pss_mb())
    finally:
        done.set()
        watcher.join()
    return max(peaks)
