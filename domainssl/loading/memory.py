"""Memory for what blocks are turned into: of this process, or shared with it and used again.

Getting fresh pages from the system costs more than writing into them, and most for shared memory.
A worker process therefore keeps its shared buffers: the main process maps each of them once, and
tells by a flag when the piece in it is no longer needed.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from domainssl._torch import shared_bytes

__all__ = ["KeptMemory", "SharedPool", "empty"]

_LARGE = 2**20  # bytes from which on memory is kept
_ALIGNED = 64  # bytes, as torch aligns
_MOST_BUFFERS = 512  # of one worker


class _Serving(threading.local):
    """Where `empty` gets memory from in this thread."""

    pool: KeptMemory | SharedPool | None = None


_serving = _Serving()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate a tensor that leaves a worker process without a copy, (*shape)."""
    size = math.prod(shape) * dtype.itemsize
    if _serving.pool is not None and size >= _LARGE:
        memory = _serving.pool.take(size)
    elif get_worker_info() is not None:
        memory = shared_bytes(size)
    else:
        return torch.empty(tuple(shape), dtype=dtype)
    return memory[:size].view(dtype).view(tuple(shape))


class KeptMemory:
    """Memory of this process that is used again as soon as no tensor lies in it any more.

    Never more is held than was in use at once. New memory comes from NumPy, which asks Linux for
    huge pages.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray[Any, Any]] = []
        self._used: dict[int, tuple[weakref.ref[Any], np.ndarray[Any, Any]]] = {}
        self._in_use = self._most = 0  # bytes

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Give out memory to `empty` in this thread."""
        _serving.pool = self
        try:
            yield
        finally:
            _serving.pool = None

    def pack(self, loaded: Any) -> Any:
        """Return what was loaded as it is."""
        return loaded

    def take(self, size: int) -> Tensor:
        """Return `size` bytes, uint8 (n,)."""
        memory = self._fitting(size)
        start = -memory.ctypes.data % _ALIGNED
        part = memory[start : start + size]
        # A tensor's storage holds on to the array it was made of: the array ends with the last
        # tensor or view that lies in it.
        mark = id(part)
        self._used[mark] = (weakref.ref(part, lambda _: self._give_back(mark)), memory)
        self._in_use += memory.nbytes
        return torch.from_numpy(part)

    def _fitting(self, size: int) -> np.ndarray[Any, Any]:
        need = size + _ALIGNED
        places = [i for i, memory in enumerate(self._free) if need <= memory.nbytes <= 2 * need]
        if places:
            return self._free.pop(min(places, key=lambda i: self._free[i].nbytes))
        self._most = max(self._most, self._in_use + need)
        while self._free and self.num_bytes + need > self._most:
            del self._free[0]  # what nobody took for longest
        return np.empty(need, np.uint8)

    def _give_back(self, mark: int) -> None:
        found = self._used.pop(mark, None)
        if found is not None:
            self._in_use -= found[1].nbytes
            self._free.append(found[1])

    @property
    def num_bytes(self) -> int:
        """Bytes held, in use or not."""
        return self._in_use + sum(memory.nbytes for memory in self._free)

    def clear(self) -> None:
        """Give free memory back to the system; what is in use is not kept afterwards."""
        self._free.clear()
        self._used.clear()
        self._in_use = self._most = 0


class _Place(NamedTuple):
    """Where a tensor lies in a buffer."""

    slot: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class SharedPool:
    """Shared buffers of the worker processes of one stream.

    The main process makes it and sends it to the workers. A worker takes buffers while it loads
    (`serving`) and packs what it loaded (`pack`); unpickling that in the main process gives the
    object back, and as soon as nobody refers to it any more its buffers are free again.

    Args:
        workers: Number of worker processes.
    """

    def __init__(self, workers: int) -> None:
        self.token = next(_tokens)
        # Set by the worker that takes a buffer, cleared by the main process.
        self._taken = torch.zeros(workers, _MOST_BUFFERS, dtype=torch.bool).share_memory_()
        self._clear()
        _pools[self.token] = self

    def _clear(self) -> None:
        self._mapped: dict[tuple[int, int], Tensor] = {}  # in the main process
        self._buffers: list[Tensor | None] = []  # in a worker, as all below
        self._unsent: set[int] = set()
        self._now: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"token": self.token, "_taken": self._taken}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    def close(self) -> None:
        """Forget the buffers; objects that lie in them keep them alive."""
        _pools.pop(self.token, None)
        self._mapped.clear()

    # In a worker ----------------------------------------------------------------------------

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Give out buffers to `empty`; without an exception, `pack` has to follow."""
        _serving.pool, self._now = self, []
        try:
            yield
        except BaseException:
            for slot in self._now:
                self._flags[slot] = False
            raise
        finally:
            _serving.pool = None

    @property
    def _flags(self) -> np.ndarray[Any, Any]:
        info = get_worker_info()
        flags: np.ndarray[Any, Any] = self._taken[0 if info is None else info.id].numpy()
        return flags

    def take(self, size: int) -> Tensor:
        """Return a buffer of at least `size` bytes, uint8 (n,), n a multiple of 64."""
        flags = self._flags
        free = [i for i in range(len(self._buffers)) if not flags[i]]
        fitting = [i for i in free if len(self._known(i)) >= size]
        if fitting:
            slot = min(fitting, key=lambda i: len(self._known(i)))
        elif not free and len(self._buffers) == _MOST_BUFFERS:
            return shared_bytes(size)
        else:
            if free:
                slot = free[0]
                self._buffers[slot] = None  # freed before more is taken
            else:
                slot = len(self._buffers)
                self._buffers.append(None)
            self._buffers[slot] = shared_bytes(-(-size // _ALIGNED) * _ALIGNED)
            self._unsent.add(slot)
        flags[slot] = True
        self._now.append(slot)
        return self._known(slot)

    def _known(self, slot: int) -> Tensor:
        buffer = self._buffers[slot]
        return buffer if buffer is not None else torch.empty(0, dtype=torch.uint8)

    def pack(self, loaded: Any) -> _Parcel:
        """Prepare an object with a dictionary `data` for the way to the main process."""
        slots = {self._known(slot).untyped_storage().data_ptr(): slot for slot in self._now}
        places = {}
        for name, value in loaded.data.items():
            if isinstance(value, Tensor):
                slot = slots.get(value.untyped_storage().data_ptr())
                if slot is not None:
                    places[name] = _Place(
                        slot, value.dtype, tuple(value.shape), value.stride(),
                        int(value.storage_offset()),
                    )  # fmt: skip
        used = {place.slot for place in places.values()}
        for slot in set(self._now) - used:  # whoever refers to them goes on doing so
            self._buffers[slot] = None
            self._unsent.discard(slot)
            self._flags[slot] = False
        fresh = {slot: self._known(slot) for slot in used & self._unsent}
        self._unsent -= used
        info = get_worker_info()
        loaded.data = {n: places.get(n, value) for n, value in loaded.data.items()}
        return _Parcel((self.token, 0 if info is None else info.id, fresh, sorted(used), loaded))

    # In the main process --------------------------------------------------------------------

    def unpack(self, worker: int, fresh: dict[int, Tensor], used: list[int], loaded: Any) -> Any:
        """Put the tensors of a packed object back, and watch the object for its end."""
        self._mapped.update({(worker, slot): buffer for slot, buffer in fresh.items()})
        for name, value in loaded.data.items():
            if isinstance(value, _Place):
                memory = self._mapped[worker, value.slot].view(value.dtype)
                loaded.data[name] = memory.as_strided(value.shape, value.stride, value.offset)
        if used:
            end = weakref.finalize(loaded, _release, self._taken[worker], used)
            end.atexit = False
        return loaded


class _Parcel:
    """Unpickled, it is the loaded object itself."""

    def __init__(self, content: tuple[Any, ...]) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _unpack, self.content


def _unpack(token: int, *content: Any) -> Any:
    pool = _pools.get(token)
    return None if pool is None else pool.unpack(*content)  # None: closed, nobody wants it


def _release(flags: Tensor, slots: list[int]) -> None:
    flags[slots] = False


_tokens = itertools.count()
_pools: dict[int, SharedPool] = {}
