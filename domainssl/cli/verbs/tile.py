"""Lay a grid of tiles over slides, and draw what is kept."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from domainssl.cli.pieces import add_plan, plan_of, refuse_nothing
from domainssl.cli.words import Parser
from domainssl.errors import ConfigError
from domainssl.screen import COMMAND

if TYPE_CHECKING:
    from domainssl.backbones.base import Backbone
    from domainssl.inference.embed import SlideEmbedding
    from domainssl.io.slide.tiling import GridOptions, SlideTiling
    from domainssl.pieces import Built, Plan

__all__ = ["report_features", "report_grids", "run"]

_ONLY_WITH = {
    "features": ("weights", "any_mpp", "batch_size", "device", "autocast", "layout", "dtype"),
    "regions": ("min_region",),
}
_MPP_TOLERANCE = 0.1  # as of published encoders


def run(argv: list[str]) -> int:
    """Write grid, coordinates and picture of every slide that has none yet."""
    parser = _parser()
    options = parser.parse_args(argv)
    for needed, names in _ONLY_WITH.items():
        given = [n for n in names if getattr(options, n) != parser.get_default(n)]
        if given and getattr(options, needed) is None:
            raise ConfigError(f"tile --{given[0]}: counts with --{needed} only. Add it, or not.")
    from domainssl.cli.progress import Bar
    from domainssl.pieces import build

    plan = plan_of(options)
    backbone = None if options.features is None else _backbone(options)
    made = _tiling(options)
    made.claim(restart=options.restart)
    with Bar("slides", kept=f"in {made.folder}") as shown:
        found = build(made, plan, shown, noun="slides")
    report_grids(made, found, str(plan.shard))
    refuse_nothing(found.entries, found.skipped, plan.shard, "slide")
    if backbone is not None:
        _embed(options, made, plan, backbone)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m domainssl tile",
        description="Lay one grid of tiles over every slide, keep the tiles that hold tissue, and "
        "write for each slide a table of tiles (Parquet), their coordinates in TRIDENT's layout "
        "(HDF5) and a picture with the outline of tissue and the kept tiles: look at it before you "
        "train. Slides that are done are not done again, so an interrupted call goes on.",
    )
    add = parser.add_argument
    add("slides", nargs="+", metavar="SLIDES",
        help="slides, folders with slides, or tables of slides (CSV, Parquet: path or wsi, and "
        "mpp_um where a file does not state it)")  # fmt: skip
    add("--output", required=True, type=Path, metavar="DIR", help="folder for the grids")
    add("--mpp", type=float, default=0.5, help="um per pixel of the tiles (default: 0.5)")
    add("--size", type=int, default=256, help="side of a tile in pixels (default: 256)")
    add("--overlap", type=int, default=0, help="pixels that neighbours share (default: 0)")
    add("--min_tissue", "--min-tissue", type=float, default=0.2,
        help="least share of tissue in a tile; 0 keeps all (default: 0.2)")  # fmt: skip
    add("--partial", action="store_true", help="keep tiles that reach beyond the slide")
    add("--regions", metavar="PATH",
        help="QuPath's GeoJSON or a mask picture (0 outside, 1, 2, ... classes), or a folder with "
        "one per slide, named like it: they restrict the grid and label tiles")  # fmt: skip
    add("--min_region", "--min-region", type=float, default=0.5,
        help="least share of a tile that lies in regions (default: 0.5)")  # fmt: skip
    add("--tissue", choices=("otsu", "fixed"), default="otsu",
        help="thresholds from each slide's histogram, or fixed saturation 8")  # fmt: skip
    add("--keep_pen", "--keep-pen", action="store_true",
        help="green, strongly blue and black marks count as tissue, as for trichrome")  # fmt: skip
    add("--mpp_um", type=float, metavar="UM",
        help="um per pixel of level 0, for slides that state none or a wrong one, as does the "
        "column mpp_um of a table of slides for each")  # fmt: skip
    add("--mpp_from", choices=("file", "objective_power"), default="file",
        help="objective_power: 10 um / power where the file states one")  # fmt: skip
    add("--allow_upsample", action="store_true", help="tiles may be finer than level 0")
    add("--ids", choices=("hashed", "plain"), default="hashed",
        help="names of the output: a keyed hash of each slide's path below the folder that is "
        "given (default), or the slides' own names")  # fmt: skip
    add("--id_table", type=Path, metavar="FILE",
        help="write which id is which slide, readable by you alone")  # fmt: skip
    add("--features", metavar="BACKBONE",
        help="write the features of every tile as bags: an export, a checkpoint, or a name such as "
        "uni with --weights")  # fmt: skip
    add("--weights", metavar="FILE", help="weights of a backbone that is named")
    add("--any_mpp", action="store_true", help="accept tiles that an encoder was not trained on")
    add("--batch_size", type=int, default=64, help="tiles at once for --features (default: 64)")
    add("--device", default="cpu", help="where --features computes, such as cuda (default: cpu)")
    add("--autocast", choices=("bfloat16", "float16"),
        help="type of the matrix products of --features (default: float32)")  # fmt: skip
    add("--layout", choices=("trident", "zarr"), default="trident",
        help="layout of the bags (default: trident)")  # fmt: skip
    add("--dtype", choices=("float32", "float16", "int8"),
        help="of the features; int8, with a scale per tile, for --layout zarr (default: float32, "
        "of zarr float16 where that holds them)")  # fmt: skip
    add_plan(parser, "slides", again="do again what is there")
    return parser


def _tiling(options: argparse.Namespace) -> SlideTiling:
    from domainssl.inference.slide_inputs import named_slides
    from domainssl.io.ids import write_ids
    from domainssl.io.slide.regions import check_regions
    from domainssl.io.slide.tiling import SlideTiling

    slides = named_slides(options.slides, options.ids)
    check_regions(options.regions, len(slides))
    if options.id_table is not None:
        write_ids(options.id_table, [s.name for s in slides], [s.path for s in slides], "slide")
    return SlideTiling(
        folder=options.output,
        slides=slides,
        options=_grid_options(options),
    )


def _grid_options(options: argparse.Namespace) -> GridOptions:
    from domainssl.io.slide.pyramid import SlideReading
    from domainssl.io.slide.tiling import GridOptions
    from domainssl.io.slide.tissue import TissueOptions

    return GridOptions(
        size_px=options.size,
        mpp_um=options.mpp,
        overlap_px=options.overlap,
        min_tissue=options.min_tissue,
        min_region=options.min_region,
        partial=options.partial,
        regions=options.regions,
        reading=SlideReading(
            mpp_um=options.mpp_um,
            mpp_from=options.mpp_from,
            allow_upsample=options.allow_upsample,
        ),
        tissue=TissueOptions(method=options.tissue, remove_pen=not options.keep_pen),
    )


def _backbone(options: argparse.Namespace) -> Backbone:
    """Return the backbone of `--features`, before slides are read.

    Raises:
        ConfigError: It takes something else than tiles of this resolution.
        WeightsError: It cannot be loaded.
    """
    from domainssl.backbones.registry import load_backbone
    from domainssl.inference.slide_bags import stain_of

    if options.batch_size < 1:
        raise ConfigError(f"--batch_size: got {options.batch_size}, expected 1 or more.")
    arguments = {"any_mpp": True} if options.any_mpp else None
    backbone = load_backbone(options.features, weights=options.weights, arguments=arguments)
    modality = stain_of(backbone)
    backbone.check({modality.name: {**modality.to_dict(), "mpp_um": options.mpp}})
    trained = modality.mpp_um
    if trained and not options.any_mpp and abs(options.mpp / trained - 1) > _MPP_TOLERANCE:
        raise ConfigError(
            f"--mpp {options.mpp:g}: {options.features} was trained on tiles of {trained:g} um per "
            f"pixel. Cut tiles with --mpp {trained:g}, or accept others with --any_mpp."
        )
    return backbone


def _embed(options: argparse.Namespace, made: SlideTiling, plan: Plan, backbone: Backbone) -> None:
    """Write the features of the tiles of all slides of this part."""
    from domainssl.cli.progress import Bar
    from domainssl.inference.embed import SlideEmbedding
    from domainssl.inference.outputs import encoder_name
    from domainssl.inference.slide_bags import embed_tiles

    work = SlideEmbedding(
        grids=made,
        backbone=backbone,
        encoder=encoder_name(options.features),
        batch_size=options.batch_size,
        device=options.device,
        autocast=options.autocast,
        layout=options.layout,
        dtype=options.dtype,
    )
    with Bar("slides") as shown:
        found = embed_tiles(work, plan, shown)
    report_features(work, found)


def report_features(work: SlideEmbedding, found: Built) -> None:
    """Print how many slides have features, and where."""
    from domainssl.cli.console import console
    from domainssl.errors import counted

    screen = console()
    before = f", {found.resumed} of them before" if found.resumed else ""
    outputs = work.outputs
    if not outputs:
        screen.print(f"no slide has features{before}", markup=False)
        return
    folder = outputs[0].parent
    screen.print(f"features of {counted(found.entries, 'slide')} in {folder}{before}", markup=False)
    root = folder if work.layout == "zarr" else folder.parent
    screen.print(f"next: {COMMAND} inspect {shlex.quote(str(root))}", markup=False)


def report_grids(made: SlideTiling, found: Built, shard: str) -> None:
    """Print what was written, slides without tiles and odd ones by id."""
    from domainssl.cli.console import console
    from domainssl.errors import counted

    screen = console()
    done = [made.described(key) for key in made.keys if made.is_ready(key)]
    tiles = [entry["tiles"] for entry in done]
    screen.print(
        f"{counted(len(done), 'slide')} with {counted(sum(tiles), 'tile')} in {made.folder}"
        + (f", {found.resumed} of them before" if found.resumed else ""),
        markup=False,
    )
    if len(done) > 1:
        middle = sorted(tiles)[len(tiles) // 2]
        screen.print(f"tiles per slide: {min(tiles)} to {max(tiles)}, middle {middle}")
    empty = [entry["id"] for entry in done if not entry["tiles"]]
    if empty:
        screen.print(
            f"{counted(len(empty), 'slide')} without a tile, look at the pictures: "
            f"{', '.join(empty[:8])}",
            markup=False,
        )
    small = [entry["id"] for entry in done if not all(entry["grid"])]
    if small:
        screen.print(
            f"smaller than one tile: {', '.join(small[:8])}; --partial keeps tiles that reach "
            "beyond a slide",
            markup=False,
        )
    for entry in done:
        for text in entry["warnings"][:2]:
            screen.print(f"{entry['id']}: {text}", markup=False)
        if entry["damaged"]:
            screen.print(
                f"{entry['id']}: {len(entry['damaged'])} stored tiles cannot be read, the first "
                f"at {entry['damaged'][0][1:]} of level {entry['damaged'][0][0]}",
                markup=False,
            )
        if entry["pen"] and entry["pen"] > 0.5:
            screen.print(
                f"{entry['id']}: {entry['pen']:.0%} is black, green or strongly blue, as pen marks "
                "are, and left out. Is the slide dark all over, because its file uses fewer bits "
                "than it states? --keep_pen counts it as tissue",
                markup=False,
            )
        elif entry["pen"] and entry["pen"] > 0.01:
            screen.print(
                f"{entry['id']}: {entry['pen']:.1%} left out as pen; --keep_pen counts it as "
                "tissue",
                markup=False,
            )
    for reason in found.skipped.values():
        screen.print(f"left out: {reason}", markup=False)
    if found.missing:
        screen.print(f"shard {shard} is done; missing: {', '.join(found.missing)}", markup=False)
    if done:
        screen.print(f"look at {made.folder / 'thumbnails'} before you train", markup=False)
