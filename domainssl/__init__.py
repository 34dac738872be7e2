"""Self-supervised pretraining for co-registered scientific imagery.

The names below are imported on first use, so that `import domainssl` stays instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from domainssl.api import build, evaluate, list_datamodules, list_objectives, list_tasks
    from domainssl.backbones.card import export_backbone
    from domainssl.backbones.graph import export_graph
    from domainssl.backbones.registry import list_backbones, load_backbone
    from domainssl.backbones.timm_models import export_timm, register_timm
    from domainssl.inference.run import embed
    from domainssl.modality import Modality
    from domainssl.tasks.export import export_task, load_task

__all__ = [
    "Modality",
    "__version__",
    "build",
    "embed",
    "evaluate",
    "export_backbone",
    "export_graph",
    "export_task",
    "export_timm",
    "list_backbones",
    "list_datamodules",
    "list_objectives",
    "list_tasks",
    "load_backbone",
    "load_task",
    "register_timm",
]

__version__ = "0.1.0"

_HOMES = {
    "Modality": "domainssl.modality",
    "build": "domainssl.api",
    "embed": "domainssl.inference.run",
    "evaluate": "domainssl.api",
    "list_datamodules": "domainssl.api",
    "list_objectives": "domainssl.api",
    "list_tasks": "domainssl.api",
    "export_backbone": "domainssl.backbones.card",
    "export_graph": "domainssl.backbones.graph",
    "export_task": "domainssl.tasks.export",
    "list_backbones": "domainssl.backbones.registry",
    "load_backbone": "domainssl.backbones.registry",
    "load_task": "domainssl.tasks.export",
    "export_timm": "domainssl.backbones.timm_models",
    "register_timm": "domainssl.backbones.timm_models",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'domainssl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
