"""Rasters and exams as items of one vector or answer: windows side by side that cover them.

for weight, batch in item.batches():        # weight: share of the window that was measured
    ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from domainssl.inference.outputs import file_states
from domainssl.inference.predict import PredictOptions, Predictor, sides_for
from domainssl.inference.scenes import Scene
from domainssl.inference.tokens import TokenWindows
from domainssl.inference.volume_maps import VolumeInput
from domainssl.inference.volumes import VolumeItem
from domainssl.io.volume.exam import Exam
from domainssl.modality import Batch, key
from domainssl.sources.preparation import prepare
from domainssl.tasks.maps import window_sizes

__all__ = ["ExamItem", "SceneItem", "windows_of_task"]


def windows_of_task(
    task: Predictor, names: Sequence[str], options: PredictOptions, shape: Sequence[int]
) -> TokenWindows:
    """Return the windows that a task of whole items is shown, as grids of one cell.

    Args:
        task: The task.
        names: Modalities that an item has.
        options: Size asked for.
        shape: Pixels or voxels of the item along each axis.
    """
    known = task.backbone.modalities
    sizes = window_sizes(known, sides_for(task, options, shape))
    chosen = {name: sizes[name] for name in names}
    return TokenWindows(feature="", sizes=chosen, grid=(1,) * len(shape), dim=0)


def _shown(item: Any, windows: TokenWindows, names: Sequence[str]) -> Iterator[tuple[float, Batch]]:
    """Yield weight and batch of the windows of a `dense.GridItem` that show something."""
    for at in product(*(range(count) for count in item.shape(windows))):
        batch = item.read(windows, [slice(i, i + 1) for i in at])
        weight = max(float(batch[key(name, "valid")].float().mean()) for name in names)
        if weight:
            yield weight, batch


@dataclass(frozen=True)
class SceneItem:
    """A raster, or several of one place.

    Attributes:
        scene: What is read.
        windows: As grids of one cell.
    """

    scene: Scene
    windows: TokenWindows
    when_empty: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """Name of the scene."""
        return self.scene.name

    @property
    def facts(self) -> dict[str, Any]:
        """What a result rests on."""
        return self.scene.facts

    def described(self) -> dict[str, Any]:
        """Return the date, where there is one."""
        return {"date": self.scene.date}

    def keep_weights(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Keep nothing: tokens of rasters are no tiles with a name."""

    def batches(self) -> Iterator[tuple[float, Batch]]:
        """Yield weight and batch of every window that shows something.

        Raises:
            DataError: A file is damaged.
        """
        return _shown(self.scene, self.windows, list(self.scene.parts))


@dataclass(frozen=True)
class ExamItem:
    """An exam, prepared as for training when its windows are asked for.

    Attributes:
        name: What its row is called.
        exam: Its scans.
        inputs: How they are read.
        windows: Returns the windows, as grids of one cell, for the contrasts and the shape that
            an exam has.
    """

    name: str
    exam: Exam
    inputs: VolumeInput
    windows: Callable[[Sequence[str], Sequence[int]], TokenWindows]
    when_empty: ClassVar[str] = ""

    @property
    def facts(self) -> dict[str, Any]:
        """What a result rests on."""
        return {"files": file_states(self.exam.scans.values()), **self.inputs.facts}

    def described(self) -> dict[str, Any]:
        """Return nothing more."""
        return {}

    def keep_weights(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Keep nothing: tokens of scans are no tiles with a name."""

    def batches(self) -> Iterator[tuple[float, Batch]]:
        """Yield weight and batch of every window that shows something.

        Raises:
            DataError: A scan cannot be read.
        """
        prepared = prepare(self.exam, self.inputs.contrasts, self.inputs.preparation)
        item = VolumeItem(self.name, prepared, [])
        names = list(prepared.values)
        return _shown(item, self.windows(names, prepared.shape), names)
