"""Outputs that were finished once, and the parts of them that are gone since."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from domainssl.errors import counted

__all__ = ["EMPTY", "lost_shards", "plain_request", "shards_without_file", "tell_lost"]

EMPTY = "empty_shards"
"""In the record of a store: shards without a file, because no vector of them is valid."""

_NOTES = ("left_out", EMPTY)
_log = logging.getLogger(__name__)


def plain_request(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an output was made from, without notes about what came out."""
    return {name: value for name, value in record.items() if name not in _NOTES}


def shards_without_file(store: Path, shape: Sequence[int], shard: Sequence[int]) -> list[str]:
    """Return the shards of the vectors of a Zarr store that have no file, as `row.column`."""
    counts = [math.ceil(n / s) for n, s in zip(shape, shard, strict=True)]
    folder = store / "embedding" / "c" / "0"
    places = [list(map(str, at)) for at in product(*(range(count) for count in counts))]
    return [".".join(at) for at in places if not _has_bytes(folder.joinpath(*at))]


def _has_bytes(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def lost_shards(target: Path, record: Mapping[str, Any]) -> list[str]:
    """Return the shards of a finished output whose files are gone.

    Args:
        target: A store; of a file, or where the record does not say which shards were empty,
            nothing is known.
        record: What was written beside it.
    """
    if EMPTY not in record or not target.is_dir():
        return []
    known = {*record[EMPTY], *record.get("left_out", {})}
    found = shards_without_file(target, record["shape"], record["shard"])
    return [at for at in found if at not in known]


def tell_lost(target: Path, lost: Sequence[str]) -> None:
    """Say that something of a finished output is made again."""
    if lost:
        where = f"{', '.join(lost[:6])}{', ...' if len(lost) > 6 else ''}"
        gone = f"{counted(len(lost), 'shard')} of it ({where}) lost their files since"
    else:
        gone = "was finished once, but is not there any more"
    _log.warning("%s: %s; made again", target, gone)
