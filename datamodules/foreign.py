"""Data sets that others wrote: built by import path, given numbers, asked for what they hold."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule

from domainssl.errors import ConfigError, DataError, nearest, parsing
from domainssl.modality import Modality

__all__ = [
    "ADVICE",
    "called",
    "class_names",
    "constructed",
    "datasets_of",
    "imported",
    "indexed",
    "transforms_of",
]

_log = logging.getLogger(__name__)
_WHERE = "data.init_args"
_HOLDERS = ("transforms", "transform", "aug", "augmentation")  # where data sets keep transforms
ADVICE = f"Check {_WHERE}.root and {_WHERE}.dataset.arguments; nothing is downloaded unasked."


def imported(path: str) -> Callable[..., Any]:
    """Return a class or function by its import path."""
    module_name, _, name = path.rpartition(".")
    setting = f"{_WHERE}.dataset"
    if not module_name:
        raise ConfigError(
            f"{setting}: {path!r} is no import path, such as torchgeo.datasets.EuroSAT."
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{setting}: the module {module_name!r} of {path!r} cannot be imported ({error}). "
            "Install it, or start Python in the folder of your own module."
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(
            f"{setting}: {module_name!r} has no class or function {name!r}."
            f"{nearest(name, [n for n in dir(module) if callable(getattr(module, n))])}"
        )
    return found  # type: ignore[no-any-return]


def constructed(value: Any) -> Any:
    """Return a value in which every mapping with `class_path` is the object it describes."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            path = str(value["class_path"])
            return called(imported(path), constructed(value.get("init_args") or {}), path)
        return {key: constructed(item) for key, item in value.items()}
    return [constructed(item) for item in value] if isinstance(value, list) else value


def called(make: Callable[..., Any], arguments: Mapping[str, Any], path: str) -> Any:
    """Call what makes a data set; unknown arguments are told by name."""
    try:
        inspect.signature(make).bind(**arguments)
    except TypeError as error:
        known = [n for n in inspect.signature(make).parameters if n not in ("args", "kwargs")]
        wrong = next((name for name in arguments if name not in known), "")
        raise ConfigError(
            f"{_WHERE}.dataset: {path} does not take these arguments: {error}."
            f"{nearest(wrong, known)} It takes {', '.join(known)}. Set dataset.arguments, and "
            "dataset.splits and dataset.root to what it calls them, or null."
        ) from error
    with parsing(f"{path}({', '.join(arguments)})", advice=ADVICE):
        return make(**arguments)


def datasets_of(module: LightningDataModule) -> dict[str, Any]:
    """Return the data sets of a `LightningDataModule`, without what it does to batches."""
    name = type(module).__name__
    _log.info("%s: its data sets are read; its normalisation and augmentations are not run", name)
    found = {}
    with parsing(f"{name}.setup('fit')", advice=ADVICE):
        module.setup("fit")
    for split in ("train", "val"):
        dataset = getattr(module, f"{split}_dataset", None)
        if dataset is None:
            with parsing(f"{name}.{split}_dataloader()", advice=ADVICE):
                dataset = getattr(getattr(module, f"{split}_dataloader")(), "dataset", None)
        if dataset is not None:
            found[split] = dataset
    if "train" not in found:
        raise DataError(f"{_WHERE}.dataset: {name} has no training data set after setup('fit').")
    return found


def tested_dataset_of(module: LightningDataModule) -> Any:
    """Return the data set that a `LightningDataModule` is tested on; None without one."""
    name = type(module).__name__
    if type(module).test_dataloader is LightningDataModule.test_dataloader:
        return None
    with parsing(f"{name}.setup('test')", advice=ADVICE):
        module.setup("test")
        dataset = getattr(module, "test_dataset", None)
        return dataset or getattr(module.test_dataloader(), "dataset", None)


def indexed(dataset: Any, modalities: Mapping[str, Modality]) -> Any:
    """Return a data set whose items have numbers: boxes of a torchgeo `GeoDataset` on a grid."""
    if not any(c.__name__ == "GeoDataset" for c in type(dataset).__mro__):
        return dataset
    size: Any = max(modality.size for modality in modalities.values())
    with parsing(f"a grid on {type(dataset).__name__}", advice=ADVICE):
        boxes = list(_grid(dataset, size))
    return _Boxes(dataset, boxes)


def _grid(dataset: Any, size: tuple[int, int]) -> Iterator[tuple[slice, slice, slice]]:
    """Yield boxes [x, y, t] of `size` pixels (rows, columns), scene by scene.

    Those at the right and at the top that would leave the scene are moved into it. Scenes that are
    smaller are left out. (The grids of torchgeo's samplers differ between its versions.)
    """
    height, width = size[0] * dataset.res[1], size[1] * dataset.res[0]
    index = dataset.index
    for span, shape in zip(index.index, index.geometry, strict=True):
        left, bottom, right, top = shape.bounds
        rows, columns = (
            math.ceil(round(side / step, 6))
            for side, step in ((top - bottom, height), (right - left, width))
        )
        if round((top - bottom) / height, 6) < 1 or round((right - left) / width, 6) < 1:
            continue
        for row in range(rows):
            y = min(bottom + row * height, top - height)
            for column in range(columns):
                x = min(left + column * width, right - width)
                yield slice(x, x + width), slice(y, y + height), slice(span.left, span.right)


@dataclass(frozen=True)
class _Boxes:
    """Items of a data set that is indexed by boxes of coordinates."""

    dataset: Any
    boxes: Sequence[Any]

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, number: int) -> Any:
        return self.dataset[self.boxes[number]]


def transforms_of(dataset: Any, depth: int = 0) -> Iterator[str]:
    """Yield the class names of the transforms that a data set holds, also inside others."""
    if depth > 6 or dataset is None or isinstance(dataset, str | bytes | int | float):
        return
    inner: list[Any] = []
    if isinstance(dataset, list | tuple):
        inner = list(dataset)
    else:
        yield type(dataset).__name__
        inner = [getattr(dataset, name, None) for name in (*_HOLDERS, "dataset", "datasets")]
        if type(dataset).__module__.split(".")[0] in ("torch", "kornia"):
            inner += list(getattr(dataset, "children", list)())
    for part in inner:
        yield from transforms_of(part, depth + 1)


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """Return the class names that a data set, or the one inside it, states."""
    for _ in range(4):
        names = getattr(dataset, "classes", None)
        if isinstance(names, list | tuple) and names and all(isinstance(n, str) for n in names):
            return tuple(names)
        dataset = getattr(dataset, "dataset", None)
    return None
