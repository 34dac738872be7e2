"""Turn feature bags of CLAM, TRIDENT or this library into another of these layouts."""

from __future__ import annotations

from domainssl.cli.pieces import add_plan, plan_of
from domainssl.cli.words import Parser

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Convert a folder of bags."""
    options = _parser().parse_args(argv)
    from domainssl.cli.console import console
    from domainssl.cli.progress import Bar
    from domainssl.io.slide.bag_folders import convert_bags, find_bags

    bags = find_bags(options.source, patches=options.patches, encoder=options.encoder)
    screen = console()
    screen.print(f"{len(bags.files)} slides in {bags.folder} ({bags.layout})", markup=False)
    plan = plan_of(options)
    with Bar("slides") as shown:
        count = convert_bags(
            bags, options.output, options.to, plan, dtype=options.dtype, progress=shown
        )
    screen.print(f"{count} slides are in {options.output} ({options.to})", markup=False)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m domainssl bags",
        description="Feature bags: what an encoder said about the tiles of slides.",
    )
    actions = parser.add_subparsers(dest="action", metavar="{convert}", required=True)
    converting = actions.add_parser(
        "convert",
        help="write bags in another layout",
        description="Read every slide of SOURCE and write it in another layout. Coordinates stay "
        "x, y at level 0. Slides that are there already are left alone, so that an interrupted "
        "call goes on. float16, the type of `zarr`, keeps three decimal digits.",
    )
    add = converting.add_argument
    add("source", help="folder of CLAM (h5_files/, patches/), TRIDENT (features_<encoder>/) or of "
        "<slide>.zarr")  # fmt: skip
    add("--to", required=True, choices=("clam", "trident", "zarr"), help="layout to write")
    add("--output", required=True, help="folder to write")
    add("--patches", help="folder of the tiling step, where it is not beside the features")
    add("--encoder", default="", help="which features, where there are several")
    add("--dtype", choices=("float32", "float16", "int8"),
        help="type of features; int8 for zarr alone (default: the layout's)")  # fmt: skip
    add_plan(converting, "slides", jobs=0)
    return parser
