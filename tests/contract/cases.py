"""Every objective and DataModule, built from the recipe that uses it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from domainssl.cli.config.catalog import find_classes
from domainssl.datamodules.base import DomainDataModule
from domainssl.modality import Batch, Modality
from domainssl.nn.patching import grid_coordinates
from domainssl.objectives.base import Objective

__all__ = [
    "DATAMODULES", "OBJECTIVES", "build", "build_data", "every_recipe", "rows", "synthetic_batch",
    "to_device",
]  # fmt: skip

RECIPES = Path(__file__).parents[2] / "recipes"


@cache
def _recipes() -> dict[str, dict[str, Any]]:
    """Return the recipes of pretraining; those of tasks are in `task_cases`."""
    found = [path for path in sorted(RECIPES.glob("*.yaml")) if "finetune" not in path.stem]
    return {path.stem: yaml.safe_load(path.read_text()) for path in found}


def _uses(section: str) -> dict[str, str]:
    """Return the first recipe that uses each class, by class name; some objectives' come last.

    MAESTRO and OmniSat are thus tried on series, whose dates contrasts and stains have not; scans
    feed a transformer, which trains ten times as fast as the convolutions of ConvMAE.
    """
    found: dict[str, str] = {}
    last = ("mri_", "stains_") if section == "model" else ("mri_", "ct_conv_")
    for name, recipe in sorted(_recipes().items(), key=lambda item: item[0].startswith(last)):
        found.setdefault(recipe[section]["class_path"].rsplit(".", 1)[-1], name)
    return found


def _cases(kind: str, section: str) -> list[str]:
    """Return the recipe of every class; a class without one is a failure of the contract."""
    uses = _uses(section)
    classes = {n: c for n, c in find_classes(kind).items() if not c.startswith("domainssl.tasks.")}
    missing = [name for name in classes if name not in uses]
    assert not missing, f"no recipe uses {missing}; every {kind} needs one"
    return sorted(set(uses.values()))


OBJECTIVES = _cases("model", "model")
DATAMODULES = _cases("data", "data")


def every_recipe() -> list[str]:
    """Return the names of all pretraining recipes."""
    return list(_recipes())


_parsed: dict[str, tuple[ArgumentParser, Namespace]] = {}  # parsing costs ten times building


def _instantiate(base: type, section: dict[str, Any], kind: str, **changes: Any) -> Any:
    path = find_classes(kind)[section["class_path"].rsplit(".", 1)[-1]]
    arguments = {**section.get("init_args", {}), **changes}
    key = repr((base, path, arguments))
    if key not in _parsed:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(base, "it")
        given = {"it": {"class_path": path, "init_args": copy.deepcopy(arguments)}}
        _parsed[key] = parser, parser.parse_object(given)
    parser, found = _parsed[key]
    return parser.instantiate(copy.deepcopy(found)).it


def build_data(recipe: str, **changes: Any) -> DomainDataModule:
    """Build the DataModule of a recipe; `changes` are laid over its arguments."""
    data: DomainDataModule = _instantiate(
        DomainDataModule, _recipes()[recipe]["data"], "data", **changes
    )
    return data


def build(recipe: str, **changes: Any) -> Objective:
    """Build the objective of a recipe for the modalities of its DataModule."""
    data = build_data(recipe)
    linked: dict[str, Any] = {"modalities": {n: m.to_dict() for n, m in data.modalities.items()}}
    if "context_size" not in _recipes()[recipe]["model"]["init_args"]:
        linked["context_size"] = data.context_size
    torch.manual_seed(0)
    model: Objective = _instantiate(
        Objective, _recipes()[recipe]["model"], "model", **{**linked, **changes}
    )
    return model


def _values(modality: Modality, shape: list[int], generator: torch.Generator) -> Tensor:
    axis = [1] * len(shape)
    axis[modality.channel_axis] = modality.num_channels
    mean = torch.tensor(modality.mean or [0.0] * modality.num_channels).view(axis)
    std = torch.tensor(modality.std or [1.0] * modality.num_channels).view(axis)
    # items differ in level and contrast, as real ones do: a batch norm over four items that are
    # all alike would amplify rounding
    per_item = [1] * len(shape)
    per_item[0], per_item[modality.channel_axis] = shape[0], modality.num_channels
    level = torch.randn(per_item, generator=generator)
    spread = torch.rand(per_item, generator=generator) + 0.5
    return (torch.randn(shape, generator=generator) * spread + level) * std + mean


def synthetic_batch(model: Objective, size: int = 4, seed: int = 0) -> Batch:
    """Return plausible random values of every modality, with invalid pixels and all companions."""
    generator = torch.Generator().manual_seed(seed)
    batch: Batch = {"id": [f"item{i}" for i in range(size)], "index": torch.arange(size)}
    for name, modality in model.backbone.modalities.items():
        spatial = list(modality.size)
        if modality.kind == "features":  # the cells of a grid, row by row, with their places
            places = grid_coordinates(modality.size)
            batch[f"{name}.coords"] = places.expand(size, -1, -1).clone()
            spatial = [len(places)]
        frames = [3] if modality.kind == "series" else []
        shape = [size, *frames, *spatial]
        shape.insert(modality.channel_axis, modality.num_channels)
        batch[name] = _values(modality, shape, generator)
        batch[f"{name}.valid"] = torch.rand([size, *frames, *spatial], generator=generator) > 0.05
        batch[f"{name}.present"] = torch.ones(size, dtype=torch.bool)
        if modality.kind == "volume":  # limits of the form `item`
            ends = torch.tensor([-2.0, 2.0]).expand(size, modality.num_channels, 2)
            batch[f"{name}.window"] = ends
        dates = torch.arange(18000, 18000 + 90 * max(1, len(frames) * 3), 90, dtype=torch.int32)
        batch[f"{name}.dates"] = (
            dates.expand(size, -1).clone() if frames else dates[:1].expand(size)
        )
    return batch


def rows(value: Any, start: int, stop: int, size: int) -> Any:
    """Cut items out of a batch or of draws: every tensor and list whose length is `size`."""
    if isinstance(value, Tensor):
        return value[start:stop] if value.ndim and len(value) == size else value
    if isinstance(value, dict):
        return {k: rows(v, start, stop, size) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        return type(value)(**{n: rows(getattr(value, n), start, stop, size) for n in names})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(rows(v, start, stop, size) for v in value))
    if isinstance(value, list | tuple):
        if len(value) == size and next(tensors(value), None) is None:  # not as many views
            return value[start:stop]
        return type(value)(rows(v, start, stop, size) for v in value)
    return value


def to_device(value: Any, device: str) -> Any:
    """Move all tensors of nested containers, named tuples and dataclasses."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    if hasattr(value, "_asdict"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return type(value)(**{name: to_device(getattr(value, name), device) for name in names})
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor inside nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
