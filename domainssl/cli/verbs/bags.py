"""Turn feature bags of CLAM, TRIDENT or this library into another of these layouts."""

from __future__ import annotations

from domainssl.cli.words import Parser

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Convert a folder of bags."""
    options = _parser().parse_args(argv)
    from domainssl.cli.console import console
    from domainssl.cli.progress import Bar
    from domainssl.io.slide.bag_folders import convert_bags, find_bags
    from domainssl.pieces import Plan, Shard

    bags = find_bags(options.source, patches=options.patches, encoder=options.encoder)
    screen = console()
    screen.print(f"{len(bags.files)} slides in {bags.folder} ({bags.layout})", markup=False)
    plan = Plan(
        jobs=options.jobs,
        limit=options.limit,
        skip_bad=options.skip_bad,
        restart=options.restart,
        shard=Shard.parse(options.shard),
        scheduler=options.scheduler,
    )
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
    add("--jobs", type=int, default=0, help="processes (default 0: this one alone)")
    add("--shard", default="1/1", metavar="I/N", help="do the I-th of N parts")
    add("--scheduler", metavar="ADDRESS",
        help="a dask cluster that does it: tcp://HOST:PORT, or local to start one")  # fmt: skip
    add("--limit", type=int, help="do so many slides only, evenly spread")
    add("--skip_bad", action="store_true", help="leave out and list slides that cannot be read")
    add("--restart", action="store_true", help="write again what is there")
    return parser
