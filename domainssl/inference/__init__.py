"""Use of trained backbones: features of the tiles of slides."""

from __future__ import annotations

from domainssl.lazy import exported, lazily


def __getattr__(name: str) -> object:
    return lazily(__name__, name)


def __dir__() -> list[str]:
    return sorted(exported(__name__))
