"""Measure mean, spread, percentiles and validity of every band of a data set."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from domainssl.cli.pieces import add_plan, plan_of
from domainssl.cli.words import Parser
from domainssl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from domainssl.inspection.subjects import Subject

__all__ = ["run"]

_OF_FILES = ("products", "mask_clouds", "dn_offset")
_NAMED = 3  # items that a line names
_KEYS = {"S1GRD": "s1", "S2L2A": "s2", "S2L1C": "s2_l1c", "S2RGB": "rgb"}


def run(argv: list[str]) -> int:
    """Measure a data set and write the file that `data.statistics` takes."""
    parser = _parser()
    options, more = parser.parse_known_args(argv)
    from domainssl.cli.console import console
    from domainssl.cli.progress import Bar
    from domainssl.inspection.statistics import measure

    plan = plan_of(options)
    screen = console()
    subject, found_there = _subject(parser, options, more)
    screen.print(found_there, markup=False)
    with Bar("blocks", kept=f"in {options.output}.partial") as shown:
        found = measure(subject, options.output, plan, shown)
    if found.resumed:
        screen.print(f"{found.resumed} blocks were measured by an earlier call")
    if found.missing:
        screen.print(
            f"shard {plan.shard} is done; missing: {', '.join(found.missing)}", markup=False
        )
        return 0
    _show(screen, found.report)
    screen.print(
        f"written to {options.output}; use it with  --data.statistics={options.output}",
        markup=False,
    )
    return 0


def _subject(parser: Parser, options: argparse.Namespace, more: list[str]) -> tuple[Subject, str]:
    """Return what is measured, and a line about it."""
    from domainssl.cli.run.looking import data_at
    from domainssl.inspection.recognise import recognise

    path = options.path
    data = data_at(path, options.config, more, "stats")
    if data is None:
        form = None if path == "sample" else recognise(path)[0]
        if form is None or form.name == "ssl4eo":
            return _of_files(options)
        if form.open is None:
            raise ConfigError(
                f"{path}: a path alone does not say which bands of it are trained on, in which "
                "unit. Say so in the data section of a configuration, and call "
                "stats --config FILE."
            )
        data = form.open(recognise(path)[1])
    given = [n for n in _OF_FILES if getattr(options, n) != parser.get_default(n)]
    if given:
        raise ConfigError(
            f"stats --{given[0]}: is about files of SSL4EO-S12; of the items of a DataModule its "
            "own section says it (--config RECIPE --data.KEY=VALUE)."
        )
    from domainssl.inspection.data import subject_of

    data.prepare_data()
    data.setup("fit")
    source = data.source(options.split)
    what = f"{sum(source.sizes)} items in {len(source.sizes)} blocks"
    return subject_of(data, options.split), f"{what} of {options.split}, as {type(data).__name__}"


def _of_files(options: argparse.Namespace) -> tuple[Subject, str]:
    """Return all locations and dates of SSL4EO-S12, whatever a recipe would draw from them."""
    from domainssl.inspection.subjects import OfCatalogue
    from domainssl.io.ssl4eo.layout import scan

    products = _products(options.products)
    optical = [name for name in products.values() if name.startswith("S2")]
    if not optical and (options.mask_clouds or options.dn_offset != "auto"):
        unread = "mask_clouds" if options.mask_clouds else "dn_offset"
        raise ConfigError(
            f"stats --{unread}: is about products of Sentinel-2, but --products are "
            f"{', '.join(products.values())}. Leave it out."
        )
    root = options.path
    if root == "sample":
        from domainssl.datamodules.samples.ssl4eo import sample_root

        root = str(sample_root(products.values()))
    catalogue = scan(root, options.split, products)
    offset = options.dn_offset if options.dn_offset == "auto" else int(options.dn_offset)
    return OfCatalogue(catalogue, options.mask_clouds, offset), (  # type: ignore[arg-type]
        f"{catalogue.count} locations, {catalogue.dates} dates, in {len(catalogue.groups)} blocks "
        f"at {root}"
    )


def _parser() -> Parser:
    parser = Parser(
        prog="python -m domainssl stats",
        passes="--data.",
        description="Measure mean, standard deviation, percentiles and share of valid pixels of "
        "every band, over all locations and dates, in one pass and in float64. The figures do not "
        "depend on the number of processes. An interrupted call leaves OUTPUT.partial, and the "
        "same command goes on from there; with --shard, the last call to finish writes OUTPUT. "
        "Train with --data.statistics=OUTPUT.",
    )
    add = parser.add_argument
    add("path", nargs="?", help="a folder or URL of SSL4EO-S12, of which all places and dates "
        "are measured, or of TerraMesh, TreeSatAI, PASTIS or cubes; `sample`, "
        "`sample:pastis`...")  # fmt: skip
    add("--config", action="append", default=[], metavar="FILE",
        help="measure the items of a recipe's data instead, once as training would read them; "
        "--data.KEY=VALUE changes it")  # fmt: skip
    add("--products", nargs="+", default=["s1=S1GRD", "s2=S2L2A"], metavar="KEY=PRODUCT",
        help="products by modality key (default s1=S1GRD s2=S2L2A)")  # fmt: skip
    add("--split", default="train", help="part of the data (default train)")
    add("--output", default="stats.yaml", help="file to write (default stats.yaml)")
    add("--mask_clouds", action="store_true", help="leave out clouds and their shadow too")
    add("--dn_offset", choices=["auto", "0", "1000"], default="auto",
        help="what stored Sentinel-2 values carry (default auto)")  # fmt: skip
    add_plan(
        parser, "blocks", again="forget what an interrupted call has measured", also=("--workers",)
    )
    return parser


def _products(words: list[str]) -> dict[str, str]:
    products: dict[str, str] = {}
    for word in words:
        key, sign, name = word.rpartition("=")
        key = key if sign else _KEYS.get(name, name.lower())
        if not key or not name or key in products:
            raise ConfigError(
                f"--products {word!r}: expected KEY=PRODUCT with a key of its own, such as "
                "s2=S2L2A."
            )
        products[key] = name
    return products


def _show(screen: Console, report: dict[str, Any]) -> None:
    from rich.table import Table

    shown = ("1", "50", "99")
    for name, entry in report["modalities"].items():
        unit = entry["value_unit"]
        table = Table(
            title=f"{name}: {entry.get('product', 'items')} ({unit}), "
            f"{100 * entry['valid_share']:.2f} % of "
            f"{entry['pixels']:,} pixels valid",
            title_justify="left",
            box=None,
        )
        number: Callable[[float], str] = "{:.3f}".format
        titles = ("band", "mean", "std", "min", *(f"{p} %" for p in shown), "max")
        for title in titles:
            table.add_column(title, justify="left" if title == "band" else "right")
        columns = [entry["mean"], entry["std"], entry["min"]]
        columns += [entry["percentiles"][p] for p in shown] + [entry["max"]]
        for band, *values in zip(entry["channels"], *columns, strict=True):
            table.add_row(band, *map(number, values))
        screen.print(table, soft_wrap=False)
    skipped = report["data"]["skipped"]
    if skipped:
        screen.print(f"{len(skipped)} blocks could not be read; the file lists them")
    for name, items in report["data"].get("blank", {}).items():
        screen.print(
            f"{len(items)} items of {name} hold one value or nothing valid, such as "
            f"{'; '.join(items[:_NAMED])}; the file lists them",
            markup=False,
        )
