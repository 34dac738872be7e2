"""Generators of the embedded sample data, in each domain's real on-disk format."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from domainssl.cache import cache_dir, locked_build

__all__ = ["made_once"]

logger = logging.getLogger(__name__)


def made_once(entry: str, version: str, what: str, build: Callable[[Path], None]) -> Path:
    """Return the folder of a sample in the cache; where there is none, say so and make it.

    Args:
        entry: See `cache.locked_build`.
        version: See `cache.locked_build`.
        what: The sample in words, for the log.
        build: See `cache.locked_build`.
    """
    if not (cache_dir() / f"{entry}-{version}").is_dir():
        logger.info("writing the embedded %s", what)
    return locked_build(entry, version, build)
