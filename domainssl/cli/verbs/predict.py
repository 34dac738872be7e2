"""Write what a saved task says of scans, rasters and slides, or run Lightning's predict loop."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainssl.cli.pieces import add_plan, plan_of, refuse_nothing
from domainssl.cli.reading import add_reading, refuse_unread, scene_of
from domainssl.cli.words import Parser
from domainssl.errors import ConfigError, counted

if TYPE_CHECKING:
    from domainssl.inference.predictions import HowPredicted, Prediction
    from domainssl.pieces import Built

__all__ = ["run"]

_RAW = argparse.RawDescriptionHelpFormatter
_ABOUT = """\
Predict with a saved task, for inputs of any size. What it answers decides what is written:

  maps of classes or numbers (segmentation, change, regression of every pixel), window by window
    CT, MR, PET   NIfTI, DICOM folder, NRRD, MetaImage, MGZ, or a folder of exams
                  -> DIR/NAME.nii.gz on the grid of the scan as it is stored
    rasters       GeoTIFF or Zarr, or a folder with one per modality (s1.tif, s2.zarr, ...)
                  -> DIR/NAME.tif (COG) with CRS, transform, nodata and names of classes
    two dates     BEFORE AFTER, or one cube with two dates -> DIR/NAME.tif
  classes of tiles
    slides        -> DIR/NAME.geojson, regions for QuPath, and DIR/NAME_tiles.parquet
  one answer per item (classification, regression)
    rasters, scans, bags of the features of slides -> DIR/predictions.csv; of bags with attention
                  DIR/attention/NAME.h5, how much every tile counted

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


def _parser() -> Parser:
    parser = Parser(
        prog="python -m domainssl predict", formatter_class=_RAW,
        description=_ABOUT,
    )  # fmt: skip
    add = parser.add_argument
    # fmt: off
    add("task", metavar="TASK",
        help="folder of an exported task, of a run, a checkpoint, or hf://owner/repository")
    add("input", metavar="INPUT", nargs="+",
        help="a scan, raster, slide or bag, a folder with several, or a manifest (CSV or Parquet: "
        "id, path); two for change: BEFORE AFTER")
    add("--output", required=True, type=Path, metavar="DIR",
        help="folder for what is written; a table may be a file (.csv, .parquet)")
    add("--window", nargs="+", type=int, metavar="N",
        help="side of a window, one number or one per axis, no larger than an input needs "
        "(default: that of training)")
    add("--overlap", type=float, default=0.25,
        help="share of a window that the next one covers again, in maps (default: 0.25)")
    add("--blending", choices=("gaussian", "constant", "halo"), default="gaussian",
        help="how windows are joined; halo takes each pixel from one window (default: gaussian)")
    add("--batch_size", type=int, help="windows at once (default: 1; 64 tiles of slides)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--date", nargs="+", default=[], metavar="DATE",
        help="date of a cube with several: 2021-05-02, first or last; two for change")
    add_reading(parser, "in training")
    add("--min_tissue", type=float, default=0.2,
        help="least share of tissue in a tile of a slide; 0 takes all (default: 0.2)")
    add("--tiles", type=int, metavar="N",
        help="tiles of a bag at most, evenly spread (default: all)")
    add("--ids", choices=("plain", "hashed"), default="plain",
        help="what outputs of scans and slides are called: like their inputs, or by keyed hashes "
        "of their paths, where names tell persons (default: plain)")
    # fmt: on
    add_plan(parser, "inputs", without=("jobs", "scheduler"))
    return parser


def _predict(argv: list[str]) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    from domainssl.cli.console import console
    from domainssl.cli.progress import Bar
    from domainssl.inference.domain import domain_of
    from domainssl.inference.outputs import refuse_inputs
    from domainssl.inference.predict import claim_folder
    from domainssl.inference.predictions import NOUNS, prediction
    from domainssl.inference.tables import TablePrediction
    from domainssl.pieces import build

    plan = plan_of(options)
    task = _task(options)
    domain = domain_of(task.backbone)
    refuse_unread(parser, options, domain)
    noun = NOUNS[domain]
    screen = console()
    with Bar("windows", kept=f"in {options.output}") as windows:
        work = prediction(task, options.input, options.output, _how(options, windows))
        _refuse_about_maps(parser, options, work)
        _refuse_repeated(work.keys)
        asked = {n: getattr(options, n) for n in ("min_tissue", "tiles") if noun == "slides"}
        asked |= {"scan": options.scan} if options.scan else {}
        facts = {"input": noun, **work.options.facts(), **asked}
        outputs = [work.path(key) for key in work.keys]
        if isinstance(work, TablePrediction):
            outputs.append(work.target)
        refuse_inputs(work.folder, outputs, options.input)
        claim_folder(work.folder, task, facts, restart=options.restart, outputs=outputs)
        if options.restart:
            for key in work.keys:
                work.path(key).unlink(missing_ok=True)
        items = windows if isinstance(work, TablePrediction) else None
        found = build(work, plan, items, noun=noun)
    if isinstance(work, TablePrediction):
        work.join()
    _remove_rests(work, None if found.missing else outputs[len(work.keys) :])
    if isinstance(work, TablePrediction):
        screen.print(str(work.target), markup=False)
    else:
        for key in plan.shard.mine(work.keys):
            if work.is_ready(key):
                screen.print(f"{work.path(key)}{_empty(work, key)}", markup=False)
    _report(work, task, found)
    refuse_nothing(found.entries, found.skipped, plan.shard, noun.removesuffix("s"))
    return 0


def _report(work: Prediction, task: Any, found: Built) -> None:
    """Print what was left out, what was made and what its values mean."""
    from domainssl.cli.console import console

    screen = console()
    unopened = getattr(work, "left_out", {})
    for reason in (*unopened.values(), *found.skipped.values()):
        screen.print(f"left out: {reason}", markup=False)
    before = f", {found.resumed} of them before" if found.resumed else ""
    kinds = {
        "TablePrediction": ("row", ""),
        "SlidePrediction": ("slide as regions", "slides as regions"),
    }
    made = kinds.get(type(work).__name__, ("map", ""))
    names = ", ".join(task.classes)
    if task.kind != "regression":
        names = ", ".join(f"{value} {name}" for value, name in enumerate(task.classes))
    what = "numbers" if task.kind == "regression" else "classes"
    screen.print(f"{counted(found.entries, *made)}{before}; {what}: {names}", markup=False)
    if made[0] == "map" and found.entries:
        screen.print("a picture with a legend lies beside every map (.png)", markup=False)


def _empty(work: Prediction, key: str) -> str:
    """Return what to do where a slide has no region; nothing for all others."""
    from domainssl.inference.slide_maps import SlidePrediction

    if not isinstance(work, SlidePrediction) or not work.is_empty(key):
        return ""
    return ": no tile holds enough tissue; --min_tissue 0 takes all tiles"


def _refuse_about_maps(parser: Parser, options: argparse.Namespace, work: Prediction) -> None:
    """Refuse how windows of maps are joined where no map is written."""
    from domainssl.inference.raster_maps import RasterPrediction
    from domainssl.inference.volume_maps import VolumePrediction

    for name in ("overlap", "blending"):
        is_given = getattr(options, name) != parser.get_default(name)
        if is_given and not isinstance(work, RasterPrediction | VolumePrediction):
            raise ConfigError(
                f"--{name}: joins the windows of maps, but this task gives one answer per item or "
                "tile. Leave it out."
            )


def _refuse_repeated(names: Sequence[str]) -> None:
    from domainssl.inference.outputs import repeated

    twice = repeated(names)
    if twice:
        raise ConfigError(
            f"predict: several inputs are called {', '.join(twice[:4])}, and so would be their "
            "outputs. Give them other names in a manifest (column id)."
        )


def _task(options: argparse.Namespace) -> Any:
    """Return the task, in evaluation mode, on its device."""
    from domainssl.cli.run.device import chosen_device
    from domainssl.tasks.export import load_task

    if Path(options.task).suffix in (".yaml", ".yml"):
        raise ConfigError(
            f"{options.task}: a configuration; Lightning's loop takes it as "
            f"predict --config {options.task}. To write maps, give a saved task."
        )
    options.device = str(chosen_device(options.device, "predict"))
    task: Any = load_task(options.task)
    return task.to(options.device).eval()


def _how(options: argparse.Namespace, progress: Any) -> HowPredicted:
    from domainssl.inference.predict import PredictOptions
    from domainssl.inference.predictions import HowPredicted
    from domainssl.io.slide.facts import SlideReading
    from domainssl.io.volume.facts import reading_of_words

    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch_size: got {options.batch_size}, expected 1 or more.")
    return HowPredicted(
        windows=PredictOptions(
            window=options.window and tuple(options.window),
            overlap=options.overlap,
            blending=options.blending,
            device=options.device,
            progress=progress,
        ),
        batch_size=options.batch_size,
        modality=options.modality,
        scene=scene_of(options),
        scan=reading_of_words(options.scan),
        dates=tuple(options.date),
        reading=SlideReading(mpp_um=options.mpp_um),
        ids=options.ids,
        min_tissue=options.min_tissue,
        tiles=options.tiles,
        skip_bad=options.skip_bad,
    )


def _remove_rests(work: Any, shared: Sequence[Path] | None) -> None:
    """Remove what killed calls left beside finished outputs.

    Args:
        work: The prediction.
        shared: Outputs of all parts; None while others may be writing them.
    """
    from domainssl.files import remove_rests
    from domainssl.inference.predict import record_of

    finished = [work.path(key) for key in work.keys if work.is_ready(key)]
    remove_rests(finished if shared is None else [*finished, *shared, record_of(work.folder)])
