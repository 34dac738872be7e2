"""Parts of files over HTTP, from servers that may send the whole file instead.

fsspec reads the answer before anybody sees that it is not the part: a server without Range would
send a file of gigabytes again for every part. Here only the head of such an answer is received.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from domainssl.errors import DataError

__all__ = ["http_ranges"]

_AT_ONCE = 64


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
            if answer.status == 404:
                raise FileNotFoundError(url)
            answer.raise_for_status()
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
