"""Write embeddings of rasters, volumes and slides, georeferenced like their inputs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from domainssl.cli.pieces import add_plan, plan_of, refuse_nothing
from domainssl.cli.reading import add_reading, refuse_unread, scene_of
from domainssl.cli.words import Parser
from domainssl.errors import ConfigError

if TYPE_CHECKING:
    from domainssl.backbones.base import Backbone
    from domainssl.inference.run import Embedded, EmbedOptions
    from domainssl.pieces import Plan

__all__ = ["run"]

_OF_FILES = (
    "format", "ids", "id_table", "window", "halo", "modality", "scan", "bands", "mpp_um",
    "stored_unit", "date", "max_dates", "mask", "crs", "group", "any_gsd", "any_unit",
)  # fmt: skip


def run(argv: list[str]) -> int:
    """Embed a file, a folder, a manifest, or the items of a configuration."""
    parser = _parser()
    options, more = parser.parse_known_args(argv)
    from domainssl.backbones.registry import load_backbone
    from domainssl.cli.console import console
    from domainssl.cli.progress import Bar
    from domainssl.cli.run.looking import data_at
    from domainssl.inference.domain import domain_of
    from domainssl.inference.run import embed, plan_of_rank

    plan = plan_of(options)
    chosen = _options(options)
    data = data_at(options.input, options.config, more, "embed")
    if data is not None:
        _refuse_about_files(parser, options)
    elif options.split is not None:
        raise ConfigError(
            f"embed --split {options.split}: is a part of the data of a recipe. Add --config "
            "RECIPE in place of INPUT, or leave it out."
        )
    backbone = load_backbone(options.backbone, weights=options.weights)
    if data is None:
        refuse_unread(parser, options, domain_of(backbone), pooled=options.pooled)
    if data is None and domain_of(backbone) == "slides" and not options.pooled:
        return _slides(options, chosen, plan, backbone)
    screen, source = console(), options.input if data is None else data
    with Bar("pieces", kept=f"beside {options.output}") as shown:
        done = embed(backbone, source, options.output, chosen, plan=plan, progress=shown)
    _report(done, screen)
    refuse_nothing(done.pieces, done.left_out, plan_of_rank(plan).shard, "input")
    return 0


def _refuse_about_files(parser: Parser, options: argparse.Namespace) -> None:
    """Refuse what is said about files and windows, which a DataModule knows.

    Raises:
        ConfigError: Something of it was given.
    """
    given = [n for n in _OF_FILES if getattr(options, n) != parser.get_default(n)]
    if given:
        raise ConfigError(
            f"embed --{given[0]}: is about files; of the items of a DataModule its own section "
            "says it (--data.KEY=VALUE)."
        )


def _slides(
    options: argparse.Namespace, chosen: EmbedOptions, plan: Plan, backbone: Backbone
) -> int:
    """Tile slides as the card says, and write the features of all tiles as bags."""
    from domainssl.cli.progress import Bar
    from domainssl.cli.verbs.tile import report_features, report_grids
    from domainssl.inference.outputs import encoder_name
    from domainssl.inference.run import plan_of_rank
    from domainssl.inference.slide_bags import embed_slides

    encoder, plan = encoder_name(options.backbone), plan_of_rank(plan)
    with Bar("slides", kept=f"in {options.output}") as shown:
        made = embed_slides(backbone, options.input, options.output, chosen, plan, encoder, shown)
    report_grids(made.work.grids, made.tiled, str(plan.shard))
    refuse_nothing(made.tiled.entries, made.tiled.skipped, plan.shard, "slide")
    report_features(made.work, made.built)
    return 0


def _report(done: Embedded, screen: object) -> None:
    from rich.console import Console

    from domainssl.errors import counted
    from domainssl.inference.outputs import beside

    assert isinstance(screen, Console)
    screen.print(
        f"{counted(done.pieces, 'piece')} done"
        + (f", {done.resumed:,} of them before" if done.resumed else ""),
        markup=False,
    )
    for path in done.outputs[:20]:
        screen.print(f"  {path}", markup=False)
    if len(done.outputs) > 20:
        screen.print(f"  and {len(done.outputs) - 20} more")
    pictures = [beside(path, "png") for path in done.outputs]
    shown = next((picture for picture in pictures if picture.is_file()), None)
    if shown is not None:
        screen.print(f"look first at the picture{'s' * (len(pictures) > 1)} beside: {shown}",
                     markup=False)  # fmt: skip
    for name, reason in done.left_out.items():
        screen.print(f"left out: {name}: {reason}", markup=False)
    if done.missing:
        screen.print(f"parts that are missing: {', '.join(done.missing)}", markup=False)


def _options(given: argparse.Namespace) -> EmbedOptions:
    from domainssl.inference.dense import DenseOptions
    from domainssl.inference.run import EmbedOptions
    from domainssl.io.volume.facts import reading_of_words

    for name in ("batch_size", "window"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise ConfigError(f"--{name}: got {getattr(given, name)}, expected 1 or more.")
    device = given.device
    if device == "cuda" and os.environ.get("LOCAL_RANK", "").isdigit():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if (given.jobs or given.scheduler) and device != "cpu":
        asked = f"--jobs {given.jobs}" if given.jobs else f"--scheduler {given.scheduler}"
        raise ConfigError(
            f"{asked} with --device {device}: processes share no device. Start a process per "
            "device with torchrun."
        )
    dense = DenseOptions(
        halo=given.halo,
        batch_size=given.batch_size,
        device=device,
        autocast=given.autocast,
        dtype=given.dtype,
    )
    return EmbedOptions(
        feature=given.feature,
        window=given.window,
        form=given.format,
        ids=given.ids,
        id_table=given.id_table,
        pooled=given.pooled,
        split=given.split or "val",
        scan=reading_of_words(given.scan),
        mpp_um=given.mpp_um,
        dense=dense,
        scene=scene_of(given, date=given.date, max_dates=given.max_dates),
    )


def _add_ids(parser: Parser) -> None:
    parser.add_argument(
        "--ids", choices=("hashed", "plain"), default="hashed",
        help="of exams, slides and bags: keyed hashes, or their own names (default: hashed)",
    )  # fmt: skip
    parser.add_argument(
        "--id_table", type=Path, metavar="FILE",
        help="write which id is which exam, slide or bag, readable by you alone",
    )  # fmt: skip


def _parser() -> Parser:
    parser = Parser(
        prog="python -m domainssl embed",
        passes="--data.",
        description="Compute one vector per patch of every raster and write them as GeoZarr or COG "
        "on the grid of the patches, or one vector per raster as GeoParquet, with a picture beside "
        "it: look at it first. Windows of the size of the weights overlap by a halo; each vector "
        "is taken from the window in whose middle it lies. Vectors of patches without a valid "
        "pixel are NaN. Finished pieces are kept: the same command goes on after an interrupt. "
        "Under torchrun, ranks share the work. INPUT is what the backbone takes: volumes become "
        "NIfTI with the affine of the patches, slides bags of tiles as `tile --features` writes. "
        "With --config, one vector per item of a split of the DataModule of a recipe.",
    )
    add = parser.add_argument
    add("backbone", metavar="BACKBONE",
        help="an export, a checkpoint of a run, hf://..., or a name with --weights")  # fmt: skip
    add("input", metavar="INPUT", nargs="?",
        help="a GeoTIFF or Zarr store, a folder of some, or a manifest (CSV or Parquet: id, and "
        "path or a column per modality); scans; slides; bags of their features")  # fmt: skip
    add("--config", action="append", default=[], metavar="FILE",
        help="embed the items of a recipe's data instead, one vector each, as a DataModule reads "
        "them; --data.KEY=VALUE changes it")  # fmt: skip
    add("--split", help="part of the data of --config (default: val)")
    add("--output", required=True, type=Path, metavar="PATH",
        help="file to write where its name ends like one, otherwise a folder")  # fmt: skip
    add("--format", choices=("zarr", "cog", "nifti"),
        help="zarr, or cog of rasters or nifti of volumes, which are made from it at the end "
        "(default: zarr of rasters, nifti of volumes)")  # fmt: skip
    _add_ids(parser)
    add("--pooled", action="store_true",
        help="one vector per input in one .parquet table; of rasters GeoParquet")  # fmt: skip
    add("--weights", metavar="FILE", help="weights of a backbone that is named")
    add("--feature", metavar="NAME", help="modality, or joint (default: joint of several)")
    add("--dtype", choices=("float32", "float16", "int8"), default="float32",
        help="of the vectors; int8 has a scale for each beside it (default: float32)")  # fmt: skip
    add("--window", type=int,
        help="side of a window in pixels, no larger than an input needs (default: that of the "
        "weights)")  # fmt: skip
    add("--halo", type=int,
        help="patches left out at the sides of a window (default: an eighth of it)")  # fmt: skip
    add("--batch_size", type=int, default=8, help="windows at once (default: 8)")
    add("--device", default="cpu", help="where to compute, such as cuda (default: cpu)")
    add("--autocast", choices=("bfloat16", "float16"),
        help="type of the matrix products (default: float32)")  # fmt: skip
    add_reading(parser, "that of the weights")
    add("--date", metavar="DATE", help="date of a cube: 2021-05-02, first or last")
    add("--max_dates", type=int, help="dates of a series, evenly spread (default: all)")
    add_plan(parser, "shards", jobs=0, without=("limit",))
    return parser
