"""Decompression that cannot grow beyond what the metadata of a chunk say.

A few kilobytes can unfold to gigabytes. Formats that announce their size are compared with the
limit before anything is allocated, the others are decoded up to the limit.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from domainssl.errors import require

__all__ = ["CHUNK_LIMIT", "CODECS", "METADATA_LIMIT", "TEXT_LIMIT", "check_blosc", "packed_limit",
           "unpack"]  # fmt: skip

METADATA_LIMIT = 2**24  # bytes of one metadata file
CHUNK_LIMIT = 2**31 - 1  # decoded bytes of one chunk, as Blosc has it
TEXT_LIMIT = 2**26  # decoded bytes of one chunk of texts, whose length no metadata say
CODECS = ("blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd")
_LZMA_MEMORY = 2**28
_ZSTD_BLOCK = 2**17  # decoded bytes of one block at most


def packed_limit(decoded: int) -> int:
    """Return how many bytes a chunk may take up when compression gained nothing."""
    return decoded + decoded // 8 + 2**16


def unpack(config: Mapping[str, Any], raw: Any, limit: int) -> Any:
    """Decompress a chunk that holds at most `limit` bytes.

    Args:
        config: The codec as zarr's metadata name it, with `id` and its parameters.
        raw: Compressed bytes.
        limit: Most bytes that the result may have.

    Raises:
        ValueError: The codec is none of `CODECS`, or the result is larger.
    """
    name = config["id"]
    if name not in CODECS:
        raise ValueError(f"codec {name!r} is not read; known are {', '.join(CODECS)}")
    if name in ("bz2", "gzip", "lzma", "zlib"):
        return _stream(name, config, raw, limit)
    announced = {"blosc": _blosc, "lz4": _lz4, "zstd": _zstd}[name](memoryview(raw).cast("B"))
    if announced > limit:
        raise ValueError(f"{name} announces {announced} bytes, the chunk has at most {limit}")
    return require("numcodecs", "geo").get_codec(dict(config)).decode(raw)


def _stream(name: str, config: Mapping[str, Any], raw: Any, limit: int) -> bytes:
    rest, out = bytes(raw), bytearray()
    while rest:  # bz2, gzip and lzma may hold several streams
        decoder: Any
        if name == "bz2":
            decoder = bz2.BZ2Decompressor()
        elif name == "lzma":
            kind = int(config.get("format", lzma.FORMAT_XZ))
            is_raw = kind == lzma.FORMAT_RAW
            decoder = lzma.LZMADecompressor(
                kind, None if is_raw else _LZMA_MEMORY, config.get("filters") if is_raw else None
            )
        else:
            decoder = zlib.decompressobj(31 if name == "gzip" else 15)
        try:
            out += decoder.decompress(rest, limit + 1 - len(out))
        except lzma.LZMAError as error:
            raise ValueError(str(error)) from error
        if len(out) > limit:
            raise ValueError(f"{name} unfolds to more than the {limit} bytes of the chunk")
        if not decoder.eof:
            raise EOFError(f"{name} stream is cut off after {len(out)} bytes")
        rest = b"" if name == "zlib" else decoder.unused_data.lstrip(b"\0")
    return bytes(out)


def _blosc(raw: memoryview) -> int:
    if len(raw) < 16:
        raise ValueError("shorter than a Blosc header")
    size, _, packed = struct.unpack("<III", raw[4:16])
    if packed != len(raw):
        raise ValueError(f"Blosc header says {packed} bytes, there are {len(raw)}")
    return int(size)


def check_blosc(raw: Any, expected: int) -> None:
    """Compare a Blosc header with its length and with the chunk.

    Raises:
        ValueError: They disagree.
    """
    size = _blosc(memoryview(raw).cast("B"))
    if size != expected:
        raise ValueError(f"Blosc header says {size} decoded bytes, the chunk needs {expected}")


def _lz4(raw: memoryview) -> int:
    return int(struct.unpack("<I", raw[:4])[0])


def _zstd(raw: memoryview) -> int:
    """Return how many bytes all frames hold at most, from their headers and those of blocks."""
    total, at = 0, 0
    while at < len(raw):
        magic = int.from_bytes(raw[at : at + 4], "little")
        if magic & 0xFFFFFFF0 == 0x184D2A50:  # skippable
            at += 8 + int.from_bytes(raw[at + 4 : at + 8], "little")
            continue
        if magic != 0xFD2FB528:
            raise ValueError("no Zstandard frame")
        flags = raw[at + 4]
        is_single = bool(flags & 32)
        skipped = at + 5 + (not is_single) + (0, 1, 2, 4)[flags & 3]
        width = (int(is_single), 2, 4, 8)[flags >> 6]
        size = int.from_bytes(raw[skipped : skipped + width], "little") + 256 * (width == 2)
        at, blocks = _zstd_blocks(raw, skipped + width)
        at += 4 * bool(flags & 4)
        # a stream without its size that was flushed often has many blocks that are not full
        total += size if width else max(0, blocks - 2**20) // 4
    return total


def _zstd_blocks(raw: memoryview, at: int) -> tuple[int, int]:
    """Return where a frame's blocks end, and how many bytes they hold at most."""
    most, is_last = 0, False
    while not is_last:
        if at + 3 > len(raw):
            raise EOFError("Zstandard frame is cut off")
        head = int.from_bytes(raw[at : at + 3], "little")
        is_last, kind, size = bool(head & 1), head >> 1 & 3, head >> 3
        most += min(size, _ZSTD_BLOCK) if kind < 2 else _ZSTD_BLOCK
        at += 3 + (1 if kind == 1 else size)
    return at, most
