"""What the metadata of a Zarr array say, and how its chunks become numbers."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from domainssl.errors import require
from domainssl.io.raster.zarr3_chunks import ChunkFormat
from domainssl.io.storage.bounded import TEXT_LIMIT, packed_limit, unpack

__all__ = ["ArrayInfo", "codec_name", "decoded", "fill_of", "sizes_of"]

_FILTERS = (
    "adler32", "astype", "bitround", "categorize", "crc32", "crc32c", "delta", "fixedscaleoffset",
    "fletcher32", "jenkins_lookup3", "json2", "msgpack2", "packbits", "quantize", "shuffle",
    "vlen-array", "vlen-bytes", "vlen-utf8",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ArrayInfo:
    """What a zarr array's metadata say."""

    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    dims: tuple[str, ...]
    attrs: Mapping[str, Any]
    codec: str
    fill: Any
    order: str = "C"
    separator: str = "."
    compressor: Mapping[str, Any] | None = None
    filters: tuple[Mapping[str, Any], ...] = ()
    stored: ChunkFormat | None = None  # of format 3, where chunks are decoded here

    @property
    def chunk_bytes(self) -> int:
        """Size of one decoded chunk."""
        return math.prod(self.chunks) * self.dtype.itemsize


def sizes_of(values: Any, least: int) -> tuple[int, ...]:
    """Return lengths of axes, if they are whole numbers of at least `least`."""
    if not isinstance(values, list) or len(values) > 32:
        raise ValueError(f"expected a list of lengths, got {values!r:.100}")
    for value in values:
        if type(value) is not int or not least <= value < 2**63:
            raise ValueError(f"expected whole lengths of at least {least}, got {values!r:.100}")
    return tuple(values)


def codec_name(compressor: Mapping[str, Any] | None) -> str:
    """Return a compressor in words, such as `blosc(zstd, 5, shuffle 1)`."""
    if compressor is None:
        return "none"
    name = str(compressor["id"])
    if name == "blosc":
        level, shuffle = compressor.get("clevel"), compressor.get("shuffle")
        return f"blosc({compressor.get('cname')}, {level}, shuffle {shuffle})"
    return name


def fill_of(value: Any, dtype: np.dtype[Any]) -> Any:
    """Return the fill value of metadata of format 2 as a number of the array.

    Raises:
        ValueError: It is no single value.
    """
    if value is None:
        return None
    if dtype.kind in "SV":
        padded = base64.standard_b64decode(value).ljust(dtype.itemsize, b"\0")
        return np.frombuffer(padded, dtype)[0]
    if dtype.kind == "U":
        return str(value)
    if isinstance(value, list | dict):
        raise ValueError(f"fill_value {value!r:.100} is no single value")
    if dtype.kind == "O":
        return value
    return np.array(value if not isinstance(value, str) else float(value)).astype(dtype)[()]


def decoded(info: ArrayInfo, raw: bytes | memoryview) -> np.ndarray[Any, Any]:
    """Decode a chunk.

    Raises:
        ValueError: It does not hold what the metadata say, or a codec is not read.
    """
    data: Any = raw
    if info.compressor is not None:
        # filters change the width of numbers, to 16 bytes at most
        wide = math.prod(info.chunks) * 16 if info.filters else info.chunk_bytes
        limit = TEXT_LIMIT if info.dtype.hasobject else packed_limit(wide)
        data = unpack(info.compressor, raw, limit)
    for config in reversed(info.filters):
        if config["id"] not in _FILTERS:
            raise ValueError(f"filter {config['id']!r} is not read")
        data = require("numcodecs", "geo").get_codec(dict(config)).decode(data)
    if isinstance(data, np.ndarray) and info.dtype.kind == "O":
        flat: np.ndarray[Any, Any] = data.reshape(-1)
    else:
        flat = np.frombuffer(data, info.dtype)
    if info.order == "F":
        return flat.reshape(info.chunks[::-1]).T
    return flat.reshape(info.chunks)
