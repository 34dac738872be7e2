"""Say what is at a path, data or results: release, products, bands, chunks, values, problems."""

from __future__ import annotations

from typing import Any

from domainssl.cli.words import Parser

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Print what a data set or a file holds; the exit status is 1 when it has problems."""
    parser = Parser(
        prog="python -m domainssl inspect",
        passes="--data.",
        description="Say what is at a path: a folder, an archive, a cube, a GeoTIFF, a scan, a "
        "DICOM folder, slides, tiles or features, local or behind an fsspec URL; or a result: a "
        "run, a folder of runs, a backbone, a task, a checkpoint, an embedding, predictions; with "
        "the next commands. Values are measured on a part of the data. "
        "Exit status 1 when problems were found, 2 when nothing could be read.",
    )
    parser.add_argument(
        "path",
        nargs="?",
        help="file, folder or URL; `sample` for the embedded sample of SSL4EO-S12, "
        "`sample:cubes`, `sample:terramesh`, `sample:pastis`, `sample:petct` ... for the others",
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE",
                        help="look at the data of a recipe instead; --data.KEY=VALUE "
                        "changes it")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options, more = parser.parse_known_args(argv)
    import json

    from domainssl.arguments import plain
    from domainssl.cli.console import console
    from domainssl.cli.run.looking import data_at
    from domainssl.cli.run.results import render_result
    from domainssl.inspection.following import following
    from domainssl.inspection.recognise import render

    data = data_at(options.path, options.config, more, "inspect")
    if data is not None:
        from domainssl.inspection.data import inspect_data

        report = {"path": str(getattr(data, "root", "")), **inspect_data(data)}
    else:
        report = _at(options.path)
    is_result = "next" in report
    if not is_result and (data is None or options.config):
        words = [*(f"--config={file}" for file in options.config), *more]
        report = {**report, "next": following(report, words)}
    if options.json:
        print(json.dumps(plain(report), indent=2))
    else:
        shown = render_result(report) if is_result else render(report)
        console().print(shown, soft_wrap=False)
    return 1 if report["problems"] else 0


def _at(path: str) -> dict[str, Any]:
    """Describe what lies at a path: results of this library, or data."""
    from domainssl.cli.run.results import is_folder_of_runs, result_at, runs_below
    from domainssl.errors import DataError
    from domainssl.inspection.recognise import inspect_path

    if path == "sample":
        from domainssl.datamodules.samples.ssl4eo import sample_root

        return inspect_path(str(sample_root()))
    found = result_at(path) or (runs_below(path) if is_folder_of_runs(path) else None)
    if found is not None:
        return found
    try:
        return inspect_path(path)
    except DataError:
        found = runs_below(path)
        if found is None:
            raise
        return found
