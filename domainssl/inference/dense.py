"""Patch embeddings of whole rasters and volumes, shard by shard, in a form that survives a kill.

    embedding = DenseEmbedding(root=…, items=[…], backbone=…, options=DenseOptions())
    build(embedding, Plan(jobs=0), noun="shards")

An item's vectors lie on the grid of its tokens, beginning at its north-west corner. Windows of the
backbone's size overlap by a halo, and every token is taken from the window in whose middle it
lies. Where windows lie depends on the item, the size of the window and the halo alone, never on
who computes what: parts, ranks and resumed calls write equal numbers.

While it grows, the store lies under a hidden name beside marks of the shards that are done; the
last call to finish a shard draws the preview and gives the store its name.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from filelock import FileLock
from torch import Tensor

from domainssl.backbones.base import Backbone
from domainssl.backbones.card import weights_digest
from domainssl.errors import ConfigError
from domainssl.files import PART, write_json, write_whole
from domainssl.inference.finished import (
    EMPTY,
    lost_shards,
    plain_request,
    shards_without_file,
    tell_lost,
)
from domainssl.inference.outputs import beside, make_folder, read_record, refuse_other, repeated
from domainssl.inference.sliding import Box, Windows, slide_over
from domainssl.inference.tokens import (
    Autocast,
    TokenWindows,
    autocast_context,
)
from domainssl.io.raster.geozarr import Dtype, VectorLayout, VectorStore
from domainssl.modality import Batch

__all__ = ["DenseEmbedding", "DenseOptions", "GridItem", "Writer"]

Array = np.ndarray[Any, Any]
Output = Literal["zarr", "cog", "nifti"]
_SHARD_PIXELS = 1024  # sides of a shard of one date, at most; also where vectors are long
_SHARD_NUMBERS = 2**25  # most numbers of a shard: pixels that go in, and vectors that come out
_CHUNK_CELLS = 64  # sides of a chunk, at most


class GridItem(Protocol):
    """What is embedded: something with cells that can be read box by box; pickled to processes."""

    @property
    def name(self) -> str:
        """What its output is called."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the result rests on: plain data without paths and names of persons."""

    def shape(self, windows: TokenWindows) -> tuple[int, ...]:
        """Return the cells along each axis."""

    def numbers(self, windows: TokenWindows) -> int:
        """Return how many numbers are read for a cell."""

    def place(self, windows: TokenWindows) -> dict[str, Any]:
        """Return the fields of `VectorLayout` that say where the cells lie."""

    def read(self, windows: TokenWindows, box: Sequence[slice]) -> Batch:
        """Return one item over some cells of the grid."""

    def narrowed(self, windows: TokenWindows, batch: Batch, box: Sequence[slice]) -> Batch:
        """Return some cells of what `read` gave, counted from its first ones."""


class Writer(Protocol):
    """Makes the final file of a complete store."""

    ending: str

    def __call__(self, store: VectorStore, layout: VectorLayout, target: Path) -> None:
        """Write `target`, complete or not at all."""


@dataclass(frozen=True, kw_only=True)
class DenseOptions:
    """How items are embedded.

    Attributes:
        halo: Tokens at the sides of a window that are computed and left out, where another window
            sees more around them; None is an eighth of the window, and none of 3 tokens or fewer.
        batch_size: Windows at once.
        device: Where to compute.
        autocast: Type of the matrix products; None computes in float32.
        dtype: Of the numbers as stored.
    """

    halo: int | None = None
    batch_size: int = 8
    device: str = "cpu"
    autocast: Autocast | None = None
    dtype: Dtype = "float32"


@dataclass(kw_only=True)
class DenseEmbedding:
    """Patch embeddings of some items: shards that are made one by one (`pieces.Buildable`).

    Attributes:
        root: Where outputs go.
        items: What is embedded.
        windows: The window of each item.
        backbone: What computes.
        options: How.
        facts: Written into every output: which backbone it was, say.
        targets: Files by item; None is `<root>/<name>.zarr`.
        writer: Makes the final file; None leaves the Zarr store.
        preview: Draws the picture of a complete store.
        order: Keys in the order of this process, to read ahead; empty reads nothing ahead.
    """

    root: Path
    items: Sequence[GridItem]
    windows: Sequence[TokenWindows]
    backbone: Backbone
    options: DenseOptions
    facts: Mapping[str, Any] = field(default_factory=dict)
    targets: Sequence[Path] | None = None
    writer: Writer | None = None
    preview: Callable[[VectorStore, VectorLayout, Path], None] | None = None
    order: Sequence[str] = ()
    _state: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        names = [item.name for item in self.items]
        twice = repeated(names)
        if twice:
            raise ConfigError(
                f"embed: several inputs are called {', '.join(twice[:4])}, and so would be their "
                "outputs. Give them other names in a manifest (column id)."
            )
        self.digest = weights_digest(self.backbone)
        self.layouts = [self._layout(i) for i in range(len(self.items))]
        self.keys: Sequence[str] = [
            f"{number}/{'.'.join(map(str, at))}"
            for number, layout in enumerate(self.layouts)
            for at in np.ndindex(*_counts(layout))
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": {}, "order": ()}

    def _halo(self, number: int) -> int:
        side, asked = min(self.windows[number].grid), self.options.halo
        if asked is None:
            return max(1, side // 8) if side > 3 else 0
        if not 0 <= 2 * asked < side:
            raise ConfigError(
                f"--halo {asked}: a window has {side} tokens along a side. Choose 0 or more, and "
                "less than half of that."
            )
        return asked

    def _layout(self, number: int) -> VectorLayout:
        item, windows, halo = self.items[number], self.windows[number], self._halo(number)
        shape = item.shape(windows)
        core = [g - 2 * halo for g in windows.grid]
        numbers = max(item.numbers(windows), windows.dim)
        first = next(iter(windows.sizes))
        side = _SHARD_NUMBERS / numbers  # cells of a shard
        cells = side ** (1 / len(shape))
        shard, chunk = [], []
        for axis, (count, step) in enumerate(zip(shape, core, strict=True)):
            pixels = _SHARD_PIXELS // windows.cells(first)[axis]
            times = max(1, int(min(cells, pixels)) // step)
            times = min(times, max(1, math.ceil(count / step)))
            small = max(n for n in range(1, times + 1) if times % n == 0 and (
                n == 1 or n * step <= _CHUNK_CELLS))  # fmt: skip
            shard.append(times * step)
            chunk.append(small * step)
        facts = {
            **self.facts,
            "item": item.name,
            "source": item.facts,
            "weights_sha256": self.digest,
            "feature": windows.feature,
            "window": {n: list(sizes) for n, sizes in windows.sizes.items()},
            "tokens": list(windows.grid),
            "halo": halo,
            "computed_in": self.options.autocast or "float32",
        }
        return VectorLayout(
            shape=shape,
            shard=tuple(shard),
            chunk=tuple(chunk),
            dim=windows.dim,
            dtype=self.options.dtype,
            facts=facts,
            **item.place(windows),
        )

    @property
    def folder(self) -> Path:
        """Where processes claim their part."""
        if self.targets is None:
            return self.root / ".embed"
        return self.root / f".{self.targets[0].name}.claims"

    # What is done ------------------------------------------------------------------------------

    def target(self, number: int) -> Path:
        """Return the final file or folder of an item."""
        if self.targets is not None:
            return self.targets[number]
        ending = ".zarr" if self.writer is None else self.writer.ending
        return self.root / f"{self.items[number].name}{ending}"

    def _working(self, number: int) -> Path:
        target = self.target(number)
        return target.with_name(f".{target.name}{PART}embed")

    def claim(self, *, restart: bool = False) -> None:
        """Check that nothing else lies where outputs go, or remove it.

        Raises:
            ConfigError: An output of something else lies there, complete or not.
            DataError: Nothing can be written there.
        """
        make_folder(self.folder, self.root)
        try:
            self._claim_each(restart)
        except ConfigError:
            self.release()
            raise

    def _claim_each(self, restart: bool) -> None:
        for number, layout in enumerate(self.layouts):
            target, working = self.target(number), self._working(number)
            for record in (_record(target), working / "request.json"):
                if restart or not record.is_file():
                    continue
                refuse_other(target, plain_request(read_record(record)), _plain(layout))
            if restart:
                shutil.rmtree(working, ignore_errors=True)
                if _record(target).is_file():
                    _record(target).unlink()
                    _remove(target)
            elif _record(target).is_file():
                self._reopen(number)
            is_own = _record(target).is_file() or (working / "request.json").is_file()
            if target.exists() and not is_own:
                raise ConfigError(
                    f"{target}: lies there and was not written by embed. Choose another --output."
                )

    def _reopen(self, number: int) -> None:
        """Take a finished output for unfinished where it, or shards of it, are gone."""
        target, working = self.target(number), self._working(number)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not _record(target).is_file():
                return
            record = read_record(_record(target))
            lost = lost_shards(target, record)
            if target.exists() and not lost:
                return
            tell_lost(target, lost)
            if target.exists():
                working.mkdir(exist_ok=True)
                (working / "done").mkdir(exist_ok=True)
                for at in {*np.ndindex(*_counts(self.layouts[number]))}:
                    name = ".".join(map(str, at))
                    if name not in lost:
                        why = record.get("left_out", {}).get(name, "")
                        write_whole(working / "done" / name, why.encode())
                os.rename(target, working / "store")
            if (working / "store").is_dir():  # or a call was killed before this step
                write_json(working / "request.json", _plain(self.layouts[number]))
            _record(target).unlink()

    @property
    def outputs(self) -> list[Path]:
        """Final files and folders of all items."""
        return [self.target(number) for number in range(len(self.items))]

    def release(self) -> None:
        """Remove the folder of claims, unless other parts are at work."""
        with suppress(OSError):
            self.folder.rmdir()

    def is_ready(self, key: str) -> bool:
        """Tell whether a shard is done; of a store that lacks its name, the last one is not."""
        number = int(key.partition("/")[0])
        if _record(self.target(number)).is_file():
            return True
        if not self._mark(key).is_file():
            return False
        return key != self._last(number) or not self._is_complete(number)

    def _mark(self, key: str) -> Path:
        number, _, at = key.partition("/")
        return self._working(int(number)) / "done" / at

    def _last(self, number: int) -> str:
        return f"{number}/{'.'.join(str(n - 1) for n in _counts(self.layouts[number]))}"

    def _is_complete(self, number: int) -> bool:
        folder = self._working(number) / "done"
        wanted = math.prod(_counts(self.layouts[number]))
        return folder.is_dir() and sum(not n.startswith(".") for n in os.listdir(folder)) == wanted

    # Work --------------------------------------------------------------------------------------

    def make(self, key: str) -> None:
        """Compute and write a shard; the last one of an item completes it.

        Raises:
            DataError: The item cannot be read, or the shard not written.
        """
        number = int(key.partition("/")[0])
        if not self._mark(key).is_file():
            self._prepare(number)
            values = self._compute(key)
            VectorStore(self._working(number) / "store").write(self._box(key), values)
            write_whole(self._mark(key), b"")
        if self._is_complete(number):
            self._complete(number)

    def left_out(self) -> dict[str, str]:
        """Return why shards of complete outputs are missing, by item and shard."""
        return {
            f"{item.name}, shard {at}": f"{why} (an earlier call; --restart tries it again)"
            for number, item in enumerate(self.items)
            if (record := _record(self.target(number))).is_file()
            for at, why in read_record(record).get("left_out", {}).items()
        }

    def leave_out(self, reasons: Mapping[str, str]) -> dict[str, str]:
        """Take shards that cannot be made for done: their vectors are missing.

        Args:
            reasons: Why, by key.

        Returns:
            Why, by item and shard.

        Raises:
            DataError: Nothing can be written.
        """
        for key, reason in reasons.items():
            number = int(key.partition("/")[0])
            self._prepare(number)
            write_whole(self._mark(key), reason.encode())
        for number in sorted({int(key.partition("/")[0]) for key in reasons}):
            if self._is_complete(number):
                self._complete(number)
        named = ((key.partition("/"), reason) for key, reason in reasons.items())
        return {f"{self.items[int(n)].name}, shard {at}": why for (n, _, at), why in named}

    def _prepare(self, number: int) -> None:
        """Write the empty store, once."""
        working = self._working(number)
        if (working / "request.json").is_file():
            return
        make_folder(working, working.parent)
        with FileLock(working / "lock"):
            if (working / "request.json").is_file():
                return
            VectorStore(working / "store").create(self.layouts[number])
            (working / "done").mkdir(exist_ok=True)
            write_json(working / "request.json", _plain(self.layouts[number]))

    def _complete(self, number: int) -> None:
        """Draw the preview and give the store its name."""
        working, target = self._working(number), self.target(number)
        layout = self.layouts[number]
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        with lock:
            if _record(target).is_file() or not working.is_dir():
                return
            store = VectorStore(working / "store")
            if self.preview is not None and not target.exists():
                self.preview(store, layout, beside(target, "png"))
            if target.exists():
                pass  # a call was killed after it gave the name, which is its last step but one
            elif self.writer is None:
                os.rename(working / "store", target)
            else:
                self.writer(store, layout, target)
            marks = sorted(p for p in (working / "done").iterdir() if p.name[0] != ".")
            left_out = {p.name: p.read_text() for p in marks if p.stat().st_size}
            notes: dict[str, Any] = {"left_out": left_out} if left_out else {}
            if self.writer is None:
                notes[EMPTY] = shards_without_file(target, layout.shape, layout.shard)
            write_json(_record(target), _plain(layout) | notes)
            shutil.rmtree(working, ignore_errors=True)
        with suppress(OSError):
            Path(lock.lock_file).unlink()

    def _box(self, key: str) -> Box:
        """Return the cells of a shard."""
        number, _, at = key.partition("/")
        layout = self.layouts[int(number)]
        return tuple(
            slice(int(i) * side, min((int(i) + 1) * side, count))
            for i, side, count in zip(at.split("."), layout.shard, layout.shape, strict=True)
        )

    def _around(self, key: str) -> Box:
        """Return the cells of a shard with its halo."""
        number = int(key.partition("/")[0])
        layout, halo = self.layouts[number], self._halo(number)
        return tuple(
            slice(max(0, s.start - halo), min(count, s.stop + halo))
            for s, count in zip(self._box(key), layout.shape, strict=True)
        )

    def _read(self, key: str) -> Batch:
        number = int(key.partition("/")[0])
        return self.items[number].read(self.windows[number], self._around(key))

    def _region(self, key: str) -> Batch:
        """Return the pixels of a shard, and begin to read those of the next one."""
        if not self.order:
            return self._read(key)
        pool = self._state.setdefault("pool", ThreadPoolExecutor(1, "embed-reads"))
        coming: tuple[str, Future[Batch]] | None = self._state.pop("coming", None)
        future = coming[1] if coming is not None and coming[0] == key else None
        region = self._read(key) if future is None else future.result()
        at = self._state.setdefault("places", {k: i for i, k in enumerate(self.order)})[key]
        following = (self.order[i] for i in range(at + 1, len(self.order)))
        later = next((k for k in following if not self.is_ready(k)), None)
        if later is not None:
            self._state["coming"] = (later, pool.submit(self._read, later))
        return region

    def _compute(self, key: str) -> Array:
        """Return the vectors of a shard, float32 (E, *cells)."""
        number = int(key.partition("/")[0])
        item, windows = self.items[number], self.windows[number]
        region, box, around = self._region(key), self._box(key), self._around(key)
        shape = [s.stop - s.start for s in around]
        halo, grid = self._halo(number), windows.grid
        # half a token less, so that rounding never moves a window by one
        overlap = [max(0.0, (2 * halo - 0.5) / g) for g in grid]
        places = Windows(shape, grid, overlap)
        inner = tuple(
            slice(b.start - a.start, b.stop - a.start) for a, b in zip(around, box, strict=True)
        )
        out = np.full((windows.dim, *(s.stop - s.start for s in box)), np.nan, np.float32)

        def keep(cell: Box, values: Tensor) -> None:
            shared = [
                slice(max(c.start, i.start), min(c.stop, i.stop))
                for c, i in zip(cell, inner, strict=True)
            ]
            if any(s.start >= s.stop for s in shared):
                return
            taken = [slice(s.start - c.start, s.stop - c.start) for s, c in zip(shared, cell)]
            to = [slice(s.start - i.start, s.stop - i.start) for s, i in zip(shared, inner)]
            out[(slice(None), *to)] = values[(slice(None), *taken)].cpu().numpy()

        def predict(batch: Batch) -> Tensor:
            with autocast_context(self.options.device, self.options.autocast):
                return windows.predict(self.backbone, batch)

        self.backbone.to(self.options.device).eval()
        slide_over(
            lambda cells: item.narrowed(windows, region, cells),
            predict,
            places,
            keep,
            mode="halo",
            batch_size=self.options.batch_size,
            device=None if self.options.device == "cpu" else self.options.device,
        )
        return out


def _counts(layout: VectorLayout) -> tuple[int, ...]:
    """Return the shards along each axis."""
    return tuple(math.ceil(n / s) for n, s in zip(layout.shape, layout.shard, strict=True))


def _record(target: Path) -> Path:
    """Return the file that says what a complete output was made from."""
    return beside(target, "json")


def _plain(layout: VectorLayout) -> dict[str, Any]:
    """Return a layout as JSON gives it back."""
    import json

    plain: dict[str, Any] = json.loads(json.dumps(vars(layout) | {"facts": dict(layout.facts)}))
    return {**plain.pop("facts"), **plain}


def _remove(target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    elif target.exists():
        target.unlink()
