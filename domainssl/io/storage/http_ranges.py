"""Parts of files over HTTP, from servers that may send the whole file, or never stop sending.

fsspec reads the answer before anybody sees that it is not the part: a server without Range would
send a file of gigabytes again for every part. Here only the head of such an answer is received.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from domainssl.errors import DataError

__all__ = ["http_ranges", "http_whole"]

_AT_ONCE = 64
_PIECE = 2**16
_ABSENT = (404, 410)


async def http_ranges(
    fs: Any, url: str, ranges: Sequence[tuple[int, int]]
) -> list[bytes | Exception]:
    """Return what a server sends for (offset, size) ranges of a file, or why it did not.

    Args:
        fs: fsspec's file system of HTTP.
        url: The file.
        ranges: Ranges, none of them empty.
    """
    session = await fs.set_session()
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(offset: int, size: int) -> bytes:
        options = dict(fs.kwargs)
        asked = f"bytes={offset}-{offset + size - 1}"
        options["headers"] = {**options.get("headers", {}), "Range": asked}
        async with gate, session.get(fs.encode_url(url), **options) as answer:
            _check(answer, url)
            length = answer.content_length
            if answer.status == 200 and (length is None or length > size):
                said = "the whole file" if length is None else f"all {length} bytes"
                raise DataError(
                    f"{url}: the server sends {said} where {size} are asked for at offset "
                    f"{offset}: it does not support Range requests. Copy the files to a local "
                    "disk, or serve them with a server that does."
                )
            return bytes(await answer.read())

    async def settled(offset: int, size: int) -> bytes | Exception:
        try:
            return await one(offset, size)
        except Exception as error:  # each is judged by itself
            return error

    return list(await asyncio.gather(*(settled(*each) for each in ranges)))


async def http_whole(fs: Any, url: str, limit: int) -> bytes:
    """Return a file, at most `limit` bytes of it as they are received and unfolded.

    Args:
        fs: fsspec's file system of HTTP.
        url: The file.
        limit: Bytes.

    Raises:
        DataError: It has more.
    """
    session = await fs.set_session()
    content = bytearray()
    async with session.get(fs.encode_url(url), **fs.kwargs) as answer:
        _check(answer, url)
        async for piece in answer.content.iter_chunked(_PIECE):
            content += piece
            if len(content) > limit:
                raise DataError(f"{url}: more than {limit} bytes, which is refused.")
    return bytes(content)


def _check(answer: Any, url: str) -> None:
    """Raise what an answer means that holds no file."""
    if answer.status in _ABSENT:
        raise FileNotFoundError(url)
    answer.raise_for_status()
