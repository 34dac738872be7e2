"""The domains: one DataModule per family of data, imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from domainssl.datamodules.base import DomainDataModule
    from domainssl.datamodules.cubes import SentinelCubeDataModule
    from domainssl.datamodules.pastis import PastisDataModule
    from domainssl.datamodules.ssl4eo import SSL4EOS12DataModule
    from domainssl.datamodules.treesatai import TreeSatAIDataModule

__all__ = [
    "DomainDataModule",
    "SSL4EOS12DataModule",
    "SentinelCubeDataModule",
    "PastisDataModule",
    "TreeSatAIDataModule",
]

_HOMES = {
    "DomainDataModule": "domainssl.datamodules.base",
    "PastisDataModule": "domainssl.datamodules.pastis",
    "SSL4EOS12DataModule": "domainssl.datamodules.ssl4eo",
    "SentinelCubeDataModule": "domainssl.datamodules.cubes",
    "TreeSatAIDataModule": "domainssl.datamodules.treesatai",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'domainssl.datamodules' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
