"""Compare frozen features of backbones on labelled data: table, CSV, JSON and one HTML report."""

from __future__ import annotations

from pathlib import Path

from domainssl.cli.words import Parser

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Evaluate, print the tables and say where the report is."""
    options, more = _parser().parse_known_args(argv)
    from domainssl.cli.console import console, error_console
    from domainssl.cli.run.evaluating import Request, evaluate_backbones
    from domainssl.errors import ConfigError
    from domainssl.evaluation.comparison import PROTOCOLS, Protocol
    from domainssl.evaluation.tables import left_off, overviews, pair_tables

    for name, least in (("seeds", 1), ("max_items", 2)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"evaluate --{name}: got {value}, expected {least} or more.")
    request = Request(
        backbones=tuple(options.backbones),
        config=tuple(options.config),
        more=tuple(more),
        output=Path(options.output).expanduser(),
        split=options.split,
        protocol=Protocol(
            names=tuple(options.protocols or PROTOCOLS),
            seeds=tuple(range(options.seeds)),
            resamples=options.resamples,
        ),
        max_items=options.max_items,
        baselines=not options.no_baselines,
        device=options.device,
        thumbnails=options.thumbnails,
    )
    with error_console().status("reading") as status:
        found = evaluate_backbones(request, lambda text: status.update(text))
    screen = console()
    data = found.facts["data"]
    title = (
        f"{data['name']}: {data['test_items']} items of {data['test_split']}, probes fitted on "
        f"{data['train_items']}"
    )
    tables = overviews(found.rows, title, screen.width)
    if not tables:
        screen.print(title, markup=False)
    for table in (*tables, *pair_tables(found.rows)):
        screen.print(table)
    for text in filter(None, (*found.notes, left_off(found.rows))):
        screen.print(f"note: {text}", markup=False)
    screen.print(f"written: {', '.join(str(path) for path in found.files)}", markup=False)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m domainssl evaluate",
        passes="--data.",
        description="Measure what frozen features of backbones tell about the labels of data: "
        "nearest neighbours, linear and MLP probes, k-means, few-shot, retrieval of items and "
        "across modalities, and a linear probe of patches where the data deliver maps; for every "
        "subset of modalities, beside the untrained backbone and raw statistics. Probes are "
        "fitted on the train split and measured on another one. Features are kept in "
        "OUTPUT/features; the same command takes them from there.",
    )
    add = parser.add_argument
    add("backbones", nargs="+", metavar="BACKBONE", help="folder of a run, export, checkpoint or "
        "hf://owner/repository, perhaps as LABEL=BACKBONE")  # fmt: skip
    add("--config", action="append", default=[], metavar="FILE",
        help="recipe, or YAML with a data section (default: that of the first run folder); "
        "--data.KEY=VALUE changes it")  # fmt: skip
    add("--output", default="evaluation", help="folder to write (default: evaluation)")
    add("--split", help="where is measured (default: test, else val)")
    add("--protocols", nargs="+", metavar="NAME", help="some of knn linear mlp kmeans few_shot "
        "retrieval cross_modal cross_source dense (default: all)")  # fmt: skip
    add("--seeds", type=int, default=3, help="runs of what is random (default 3)")
    add("--resamples", type=int, default=1000, help="draws of the bootstrap (default 1000)")
    add("--max_items", type=int, help="items of a split at most")
    add("--no_baselines", action="store_true", help="leave out untrained backbones and raw values")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--thumbnails", action="store_true", help="show pictures of items whose ids are protected")
    return parser
