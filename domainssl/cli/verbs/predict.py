"""Write class maps of scans and rasters with a saved task, or run Lightning's predict loop."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainssl.errors import ConfigError

if TYPE_CHECKING:
    from domainssl.inference.predict import PredictOptions
    from domainssl.pieces import Built

__all__ = ["run"]

_RAW = argparse.RawDescriptionHelpFormatter
_ABOUT = """\
Predict the class of every voxel or pixel of inputs of any size, window by window:

  CT, MR, PET   NIfTI, DICOM folder, NRRD, MetaImage, MGZ, or a folder of exams
                -> DIR/NAME.nii.gz on the grid of the scan as it is stored
  rasters       GeoTIFF or Zarr, or a folder with one per modality (s1.tif, s2.zarr, ...)
                -> DIR/NAME.tif (COG) with CRS, transform, nodata and names of classes

What is complete is not made again: the same command goes on after a kill, within a large input too.
"""


def run(argv: list[str]) -> int:
    """Predict a path with a task, where the first word is no option; else Lightning's loop."""
    if argv and not argv[0].startswith("-"):
        return _predict(argv)
    from domainssl.cli.run.train import run_verb

    if any(word in ("-h", "--help") for word in argv):
        print(_parser().format_help())
        print("-" * 80)
        print("With --config first: features of a backbone over the prediction data of a run.\n")
    return run_verb("predict", argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m domainssl predict", allow_abbrev=False, formatter_class=_RAW,
        description=_ABOUT,
    )  # fmt: skip
    add = parser.add_argument
    # fmt: off
    add("task", metavar="TASK", help="folder of an exported task, of a run, or a checkpoint")
    add("input", metavar="INPUT", help="a scan or raster, or a folder with several")
    add("--output", required=True, type=Path, metavar="DIR", help="folder for the maps")
    add("--window", nargs="+", type=int, metavar="N",
        help="side of a window, one number or one per axis (default: that of training)")
    add("--overlap", type=float, default=0.25,
        help="share of a window that the next one covers again (default: 0.25)")  # fmt: skip
    add("--blending", choices=("gaussian", "constant", "halo"), default="gaussian",
        help="how windows are joined; halo takes each pixel from one window (default: gaussian)")
    add("--batch_size", type=int, default=1, help="windows at once (default: 1)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--modality", metavar="NAME", help="what a single file is, for tasks of several modalities")
    add("--date", help="date of a cube with several: 2021-05-02, first or last")
    add("--stored_unit", default="auto",
        help="what rasters hold: dn, dn+1000, reflectance, db, linear, amplitude (default: auto)")
    add("--any_gsd", action="store_true", help="take pixels of another size than in training")
    add("--shard", default="1/1", metavar="I/N", help="do the I-th of N parts of a folder")
    add("--limit", type=int, help="do so many inputs only, evenly spread")
    add("--skip_bad", action="store_true", help="leave out and list inputs that cannot be read")
    add("--restart", action="store_true", help="make again what is there")
    # fmt: on
    return parser


def _predict(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    from domainssl.cli.console import console
    from domainssl.cli.progress import Bar
    from domainssl.inference.predict import claim_folder
    from domainssl.pieces import Plan, Shard, build

    plan = Plan(
        jobs=0, limit=options.limit, skip_bad=options.skip_bad, shard=Shard.parse(options.shard)
    )
    task = _task(options)
    kinds = {modality.spatial_dims for modality in task.backbone.modalities.values()}
    is_volume = kinds == {3}
    noun = "exams" if is_volume else "scenes"
    screen = console()
    with Bar("windows") as windows:
        work: Any = (_volumes if is_volume else _rasters)(options, task, windows)
        facts = {"input": noun, **work.options.facts()}
        claim_folder(options.output, task, facts, restart=options.restart)
        if options.restart:
            for key in work.keys:
                work.path(key).unlink(missing_ok=True)
        try:
            found: Built = build(work, plan, noun=noun)
        except KeyboardInterrupt:
            screen.print(
                f"Stopped at {windows.done} of {windows.total} windows of an input; what is "
                f"complete is kept in {options.output}. The same command goes on from there.",
                markup=False,
            )
            raise
    for key in plan.shard.mine(work.keys):
        if work.is_ready(key):
            screen.print(str(work.path(key)), markup=False)
    for reason in found.skipped.values():
        screen.print(f"left out: {reason}", markup=False)
    before = f", {found.resumed} of them before" if found.resumed else ""
    names = ", ".join(f"{value} {name}" for value, name in enumerate(task.classes))
    screen.print(f"{found.entries} map(s){before}; classes: {names}", markup=False)
    return 0


def _task(options: argparse.Namespace) -> Any:
    """Return the task, in evaluation mode, on its device.

    Raises:
        ConfigError: It does not predict a class per voxel or pixel.
    """
    import torch

    from domainssl.tasks.export import load_task

    if Path(options.task).suffix in (".yaml", ".yml"):
        raise ConfigError(
            f"{options.task}: a configuration; Lightning's loop takes it as "
            f"predict --config {options.task}. To write maps, give a saved task."
        )
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options.device = device
    task: Any = load_task(options.task)
    if task.kind != "segmentation":
        raise ConfigError(
            f"{options.task}: a task of {task.kind}, expected segmentation: predict writes maps "
            "of classes. For one answer per item, run `test` with its recipe."
        )
    return task.to(device).eval()


def _options(options: argparse.Namespace, progress: Any) -> PredictOptions:
    from domainssl.inference.predict import PredictOptions

    return PredictOptions(
        window=options.window and tuple(options.window),
        overlap=options.overlap,
        blending=options.blending,
        batch_size=options.batch_size,
        device=options.device,
        progress=progress,
    )


def _volumes(options: argparse.Namespace, task: Any, progress: Any) -> Any:
    from domainssl.inference.volume_maps import VolumePrediction, find_volumes, volume_input

    inputs = volume_input(task, getattr(task, "reading", None))
    return VolumePrediction(
        folder=options.output,
        exams=find_volumes(options.input, inputs, options.modality),
        task=task,
        inputs=inputs,
        options=_options(options, progress),
    )


def _rasters(options: argparse.Namespace, task: Any, progress: Any) -> Any:
    from domainssl.inference.raster_maps import RasterPrediction, find_scenes
    from domainssl.inference.scenes import SceneOptions

    how = SceneOptions(
        modality=options.modality,
        stored_unit=options.stored_unit,
        date=options.date,
        any_gsd=options.any_gsd,
    )
    return RasterPrediction(
        folder=options.output,
        scenes=find_scenes(options.input, task.backbone, how),
        task=task,
        options=_options(options, progress),
    )
