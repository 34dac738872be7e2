"""Supervised use of backbones: decoders and what trains them."""

from __future__ import annotations

from domainssl.lazy import exported, lazily


def __getattr__(name: str) -> object:
    return lazily(__name__, name)


def __dir__() -> list[str]:
    return sorted(exported(__name__))
