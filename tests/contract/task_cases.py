"""Every task, built from the recipes that fine-tune with it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import yaml
from cases import RECIPES, _instantiate, synthetic_batch

from domainssl.cli.config.catalog import find_classes
from domainssl.datamodules.base import DomainDataModule
from domainssl.modality import Batch
from domainssl.tasks.base import Task

__all__ = ["TASKS", "build_task", "labelled_batch"]

# cases that are no recipe: class, recipe whose backbone and data it is tried on, arguments
_OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "regression": ("RegressionTask", "finetune_tiles", {}),
    "regression_dense": (
        "RegressionTask", "finetune_tiles",
        {"dense": {"name": "pyramid", "width": 8}, "targets": ["height", "biomass"]},
    ),
}  # fmt: skip


@cache
def _recipes() -> dict[str, dict[str, Any]]:
    found = sorted(RECIPES.glob("finetune_*.yaml"))
    return {path.stem: yaml.safe_load(path.read_text()) for path in found}


def _cases() -> list[str]:
    """Return all recipes of tasks, and the other cases; every task is tried."""
    recipes = _recipes()
    used = {recipe["model"]["class_path"].rsplit(".", 1)[-1] for recipe in recipes.values()}
    tasks = {n for n, path in find_classes("model").items() if path.startswith("domainssl.tasks.")}
    tried = used | {name for name, *_ in _OTHERS.values()}
    assert tasks <= tried, f"no recipe uses {tasks - tried}"
    return [*recipes, *_OTHERS]


TASKS = _cases()


def build_task(case: str, **changes: Any) -> Task:
    """Build the task of a recipe for the modalities of its DataModule, classes made up."""
    name, stem, arguments = _OTHERS.get(case, ("", case, {}))
    recipe = _recipes()[stem]
    section = recipe["model"]
    if name:
        backbone = section["init_args"]["backbone"]
        section = {"class_path": name, "init_args": {"backbone": backbone, **arguments}}
    data: DomainDataModule = _instantiate(DomainDataModule, recipe["data"], "data")
    linked: dict[str, Any] = {"modalities": {n: m.to_dict() for n, m in data.modalities.items()}}
    linked["context_size"] = data.context_size
    if case not in _OTHERS:
        linked["classes"] = list(data.classes or ("a", "b", "c"))
    given = {**linked, **section["init_args"], **changes}
    torch.manual_seed(0)
    task: Task = _instantiate(Task, {**section, "init_args": given}, "model")
    return task


def labelled_batch(task: Task, size: int = 4) -> Batch:
    """Return random values of the data's modalities with what the task learns from.

    Some of the labels are not known.
    """
    batch = synthetic_batch(task, size)
    known = set(task.modalities)
    batch = {n: v for n, v in batch.items() if n in ("id", "index") or n.split(".")[0] in known}
    if task.kind == "change":  # two dates
        for name in task.modalities:
            for key in (name, f"{name}.valid"):
                batch[key] = torch.stack([batch[key], batch[key].roll(1, 0)], dim=1)
            batch[f"{name}.dates"] = torch.tensor([[18000, 18030]] * size, dtype=torch.int32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        shape = list(task.eval().logits(batch).shape)
    task.train()
    if task.kind == "regression":
        target = torch.randn(shape, generator=generator)
        target[1] = torch.nan
        batch["target"] = target
        return batch
    labels = torch.randint(0, len(task.classes), [size, *shape[2:]], generator=generator)
    labels[1, ...] = torch.where(
        torch.rand(labels[1].shape, generator=generator) < 0.5, -1, labels[1]
    )
    if labels.ndim == 1:
        labels[1] = -1
    batch["mask" if labels.ndim > 1 else "label"] = labels
    return batch
