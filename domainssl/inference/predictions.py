"""What a saved task makes of a path: which inputs it reads, and in which form it answers.

work = prediction(task, ["scene.tif"], Path("maps"), HowPredicted())
build(work, Plan(jobs=0), noun=NOUNS[domain_of(task.backbone)])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from domainssl.errors import ConfigError
from domainssl.inference.bags import bag_items
from domainssl.inference.domain import domain_of
from domainssl.inference.inputs import RASTERS, find_inputs, is_raster, open_scenes
from domainssl.inference.items import ExamItem, SceneItem, windows_of_task
from domainssl.inference.outputs import file_name, refuse_ending
from domainssl.inference.predict import PredictOptions
from domainssl.inference.raster_maps import RasterPrediction, find_pairs, find_scenes
from domainssl.inference.scenes import SceneOptions
from domainssl.inference.slide_inputs import named_slides
from domainssl.inference.slide_maps import SlidePrediction
from domainssl.inference.tables import Item, TablePrediction
from domainssl.inference.volume_maps import (
    VolumeInput,
    VolumePrediction,
    find_volumes,
    refuse_results_among,
    volume_input,
)
from domainssl.io.ids import ids_of
from domainssl.io.slide.facts import SlideReading
from domainssl.io.slide.grid import MIN_TISSUE
from domainssl.io.volume.exam import Exam

__all__ = ["NOUNS", "HowPredicted", "Prediction", "prediction"]

Prediction = RasterPrediction | VolumePrediction | SlidePrediction | TablePrediction
NOUNS = {"volumes": "exams", "rasters": "scenes", "slides": "slides", "bags": "slides"}
_TILES, _BATCH = 64, 1  # windows at once: tiles of slides, and of all others
_TABLES = (".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class HowPredicted:
    """What a user says about inputs and windows.

    Attributes:
        windows: Sides, overlap, blending and device.
        batch_size: Windows at once; None is 64 tiles of slides, and 1 of all others.
        modality: What a single scan is.
        scene: What is said about rasters.
        scan: What is said about scans: fields of `Reading`.
        dates: Two dates of a cube, for tasks of change.
        reading: What is said about slides.
        ids: What outputs of scans and slides are called: `plain`, like them, or `hashed`.
        min_tissue: Least share of tissue in a tile.
        tiles: Tiles of a bag at most.
        skip_bad: Leave out inputs that cannot be opened.
    """

    windows: PredictOptions = field(default_factory=PredictOptions)
    batch_size: int | None = None
    modality: str | None = None
    scene: SceneOptions = field(default_factory=SceneOptions)
    scan: Mapping[str, Any] = field(default_factory=dict)
    dates: tuple[str, ...] = ()
    reading: SlideReading = field(default_factory=SlideReading)
    ids: Literal["plain", "hashed"] = "plain"
    min_tissue: float = MIN_TISSUE
    tiles: int | None = None
    skip_bad: bool = False


def prediction(task: Any, sources: Sequence[str], output: Path, how: HowPredicted) -> Prediction:
    """Return what is to be made of the inputs; nothing is read but their headers.

    Args:
        task: In evaluation mode, on its device.
        sources: A path; two of them, before and after, for tasks of change.
        output: Folder for maps; for tables also a file (`.csv`, `.parquet`).
        how: What the user says.

    Raises:
        ConfigError: The task does not answer for such inputs, or an option cannot be used.
        DataError: There is no such input.
    """
    domain = domain_of(task.backbone)
    if output.suffix.lower() not in _TABLES:
        refuse_ending(output, "maps and regions go into a folder, tables also to .csv or .parquet")
    batch_size = how.batch_size or (_TILES if domain == "slides" else _BATCH)
    how = replace(how, windows=replace(how.windows, batch_size=batch_size))
    pair = task.kind == "change" and len(sources) == 2
    if len(sources) > 1 and not pair:
        raise ConfigError(
            f"predict: got {len(sources)} inputs. Give a folder or a manifest with several; two "
            "paths, before and after, are for tasks of change between two dates."
        )
    is_dense = task.kind in ("segmentation", "change") or getattr(task, "is_dense", False)
    is_table = output.suffix.lower() in _TABLES
    if is_dense:
        if is_table:
            raise ConfigError(f"--output {output}: a task of maps writes files; give a folder.")
        return _maps(task, domain, sources, output, how)
    if domain == "slides":
        if task.kind != "classification" or is_table:
            raise ConfigError(
                f"predict: a task of {task.kind} over tiles of slides; a folder gets the classes "
                "of tiles as regions, from tasks of classification. For one answer per slide, "
                "embed its tiles and train a task on the bags."
            )
        return SlidePrediction(
            folder=output, slides=named_slides([sources[0]], how.ids), task=task,
            options=how.windows, reading=how.reading, min_tissue=how.min_tissue,
        )  # fmt: skip
    target = output if is_table else output / "predictions.csv"
    left_out = dict[str, str]()
    items = _items(task, domain, sources[0], how, target, left_out)
    return TablePrediction(
        target=target, items=items, task=task, options=how.windows, left_out=left_out
    )


def _maps(
    task: Any, domain: str, sources: Sequence[str], output: Path, how: HowPredicted
) -> Prediction:
    numbers = task.kind == "regression"
    if domain in ("slides", "bags") or (domain == "volumes" and task.kind == "change"):
        raise ConfigError(
            f"predict: a task of {task.kind} that makes maps of {domain}. Maps are made of rasters "
            "and scans, change between two dates of rasters; slides take a task of "
            "classification, tile by tile."
        )
    if domain == "volumes":
        inputs = volume_input(task, getattr(task, "reading", None), how.scan)
        refuse_results_among(sources[0], output)
        return VolumePrediction(
            folder=output, exams=_exams(sources[0], inputs, how), task=task,
            inputs=inputs, options=how.windows, writes_numbers=numbers,
        )  # fmt: skip
    scenes: Sequence[Any]
    left_out = dict[str, str]()
    told = left_out if how.skip_bad else None
    if task.kind == "change":
        scenes = find_pairs(sources, task, how.scene, how.dates, told)
    else:
        scenes = find_scenes(sources[0], task.backbone, _one_date(how), told, output)
    return RasterPrediction(
        folder=output, scenes=scenes, task=task, options=how.windows, writes_numbers=numbers,
        left_out=left_out,
    )  # fmt: skip


def _exams(source: str, inputs: VolumeInput, how: HowPredicted) -> list[Exam]:
    """Return the exams of an input, under the names that outputs have."""
    exams = find_volumes(source, inputs, how.modality)
    names = ids_of([exam.id for exam in exams], how.ids)
    return [replace(exam, id=name) for exam, name in zip(exams, names, strict=True)]


def _one_date(how: HowPredicted) -> SceneOptions:
    if len(how.dates) > 1:
        raise ConfigError(
            f"--date {' '.join(how.dates)}: two dates are for tasks of change; choose one."
        )
    return replace(how.scene, date=how.dates[0] if how.dates else None)


def _items(
    task: Any, domain: str, source: str, how: HowPredicted, target: Path, left_out: dict[str, str]
) -> Sequence[Item]:
    """Return what the rows of a table are about, and why others cannot be opened."""
    if domain == "bags":
        return bag_items(source, task.backbone, how.tiles)
    options = how.windows
    if domain == "volumes":
        inputs = volume_input(task, getattr(task, "reading", None), how.scan)
        return [
            ExamItem(
                file_name(exam.id), exam, inputs,
                lambda names, shape: windows_of_task(task, names, options, shape),
            )
            for exam in _exams(source, inputs, how)
        ]  # fmt: skip
    found = find_inputs(source, list(task.backbone.modalities), is_raster, RASTERS, target)
    told = left_out if how.skip_bad else None
    scenes = open_scenes(found, task.backbone, _one_date(how), told)
    return [SceneItem(s, windows_of_task(task, list(s.parts), options, s.extent)) for s in scenes]
