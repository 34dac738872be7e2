"""`inspect`: say what lies at a path, as plain data and as a table.

report = inspect_path("/data/ssl4eo")     # JSON-able
print(report["problems"])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from domainssl.errors import DataError
from domainssl.inspection.files import find_geotiffs, inspect_cube, inspect_geotiffs, inspect_tar
from domainssl.inspection.layers import inspect_layers
from domainssl.inspection.ssl4eo import (
    EXPECTED,
    inspect_ssl4eo,
    product_at,
    splits_at,
    without_archives,
)
from domainssl.io.raster.bands import open_store
from domainssl.io.raster.geotiff import GEOTIFF_ENDINGS
from domainssl.io.ssl4eo.facts import L1C_BANDS, L2A_BANDS
from domainssl.io.storage.paths import is_file, is_folder, is_url, join, list_folder

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["inspect_path", "render"]

_CUBE_MARKS = (".zgroup", ".zmetadata", ".zattrs", "zarr.json")


def inspect_path(path: str, *, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Describe what lies at a path.

    Args:
        path: An SSL4EO-S12 folder (root, split or product), a zarr cube (`.zarr.zip` or folder;
            EOPF products and GeoZarr too) or a folder of them,
            a tar of cubes, a GeoTIFF or a folder of them; fsspec URLs except for GeoTIFF.
        storage_options: fsspec options for a URL.

    Returns:
        Plain data: `path`, `kind` (`ssl4eo`, `cube`, `tar` or `geotiff`), `problems` (texts), and
        what the kind has: `release` and `splits`, `arrays` and `values`, or `files`.

    Raises:
        DataError: Nothing lies there, or nothing that is understood.
    """
    path, options = str(path), dict(storage_options or {})
    return {"path": path, **_dispatch(path, options)}


def _dispatch(path: str, options: dict[str, Any]) -> dict[str, Any]:
    lowered = path.lower()
    if lowered.endswith(GEOTIFF_ENDINGS) and (is_url(path) or is_file(path)):
        return inspect_geotiffs([path])
    if is_file(path, options):
        if lowered.endswith(".tar"):
            return inspect_tar(path, options)
        if lowered.endswith(".zip"):
            return _cube_report(path, options)
        raise DataError(
            f"{path}: this kind of file is not understood, expected .zarr.zip, .tar or .tif"
        )
    if not is_folder(path, options):
        raise DataError(
            f"{path}: nothing lies there. Give a folder, a file or a URL, or 'sample' for the "
            "embedded sample."
        )
    splits = splits_at(path, options)
    if splits:
        return inspect_ssl4eo(path, splits, options)
    product = product_at(path, options)
    if product is not None:
        folder, split, name = product
        return inspect_ssl4eo(folder, {split: [name]}, options)
    names = list_folder(path, options)
    if any(name in _CUBE_MARKS for name in names):
        return _cube_report(path, options)
    archives = [name for name in names if name.endswith((".zarr.zip", ".zarr", ".tar"))]
    if archives:  # one product's folder: its first file speaks for the others
        return {**_dispatch(join(path, archives[0]), options), "count": len(archives)}
    if not is_url(path):
        rasters = find_geotiffs(path)
        if rasters:
            report = inspect_geotiffs(rasters)
            return {**report, "notes": _other_format(path, options)}
    raise DataError(
        f"{path}: neither SSL4EO-S12 products (train/S2L2A/…), nor a zarr cube, nor GeoTIFF. It "
        f"holds: {', '.join(names[:12]) or 'nothing'}."
        + "".join(f" {text}" for text in _other_format(path, options))
    )


def _other_format(path: str, options: dict[str, Any]) -> list[str]:
    """Say what lies in folders that are named like products of SSL4EO-S12 without being such."""
    found = without_archives(path, options)
    if not found:
        return []
    holding = "; ".join(
        f"{folder} holds {', '.join(names[:4]) or 'nothing'}{', …' if len(names) > 4 else ''}"
        for folder, names in found.items()
    )
    return [
        "Some folders are named like products of SSL4EO-S12 v1.1, but hold no file of its "
        f"format: {holding}. Expected there: {EXPECTED}."
    ]


def _cube_report(path: str, options: dict[str, Any]) -> dict[str, Any]:
    """Describe a store: arrays, and the bands that lie on a map grid."""
    report = inspect_cube(path, options)
    if report["values"]:  # an SSL4EO-S12 file, whose bands are measured already
        return {**report, "notes": _as_stored(report)}
    try:
        found = inspect_layers(open_store(path, options))
    except DataError as error:
        return {**report, "problems": [*report["problems"], str(error)]}
    return {**report, **found}


def _as_stored(report: Mapping[str, Any]) -> list[str]:
    """Explain Sentinel-2 numbers of a single file, of which the offset was not judged."""
    if tuple(row["band"] for row in report["values"]) not in (L1C_BANDS, L2A_BANDS):
        return []
    return [
        "values are those in the file, no data (0) included; release A of SSL4EO-S12 keeps the "
        "offset of +1000 in its Sentinel-2 numbers, which reading takes away. Inspect the folder "
        "of the product for the verdict and for values without it."
    ]


def render(report: Mapping[str, Any]) -> RenderableType:
    """Return a report of `inspect_path` as tables for `rich`."""
    from rich.console import Group as Lines
    from rich.text import Text

    parts: list[Any] = [Text(f"{report['path']}: {_headline(report)}", style="bold")]
    parts += {"ssl4eo": _ssl4eo, "geotiff": _geotiff}.get(report["kind"], _cube)(report)
    problems = report["problems"]
    if problems:
        parts.append(Text(f"{len(problems)} problem{'s' * (len(problems) > 1)}", style="bold red"))
        parts += [Text(f"  {text}") for text in problems]
    else:
        parts.append(Text("no problems found", style="green"))
    return Lines(*parts)


def _headline(report: Mapping[str, Any]) -> str:
    if report["kind"] == "ssl4eo":
        release = report["release"]
        found = f"release {release}" if release else "whose release cannot be told, see below"
        return f"SSL4EO-S12 v1.1, {found}"
    if report["kind"] == "geotiff":
        return f"{report['count']} GeoTIFF, {report['measured']} measured, CRS {report['crs']}"
    count = f", {report['count']} files or members, first shown" if "count" in report else ""
    return f"zarr format {report['format']}{count}"


def _row(table: Table, *cells: str) -> None:
    """Add a row of texts as they are: names out of files are no markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _values(title: str, rows: list[dict[str, Any]]) -> Table:
    table = _table(title, "band", "min", "mean", "max", "std")
    for row in rows:
        cells = (row[key] for key in ("min", "mean", "max", "std"))
        _row(table, row["band"], *("-" if v is None else f"{v:.4f}" for v in cells))
    return table


def _facts(title: str, facts: Mapping[str, Any]) -> Table:
    table = _table(title, "what", "found")
    for name, value in facts.items():
        if value is not None and value != {} and value != []:
            _row(table, name.replace("_", " "), _text(value))
    return table


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(_text(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ssl4eo(report: Mapping[str, Any]) -> list[Any]:
    parts: list[Any] = []
    for split, entry in report["splits"].items():
        facts = {k: v for k, v in entry.items() if k != "products"}
        parts.append(_facts(split, facts))
        for name, found in entry["products"].items():
            rows = found.get("values", [])
            labels = {"offset": "offset in the file: locations"}
            facts = {labels.get(k, k): v for k, v in found.items() if k != "values"}
            parts.append(_facts(f"{split} {name}", facts))
            if rows:
                unit = found["value_unit"]
                where = f"{found['measured_locations']} locations, first date, valid pixels"
                if any(int(value) for value in found["offset"] or {}):
                    where += ", after the offset was taken away"
                parts.append(_values(f"{split} {name}, {unit}, {where}", rows))
    return parts


def _geotiff(report: Mapping[str, Any]) -> list[Any]:
    parts: list[Any] = []
    for file in report["files"]:
        facts = {key: value for key, value in file.items() if key not in ("values", "path")}
        parts += [_facts(file["path"], facts), _values("values", file["values"])]
    return [*parts, *_notes(report)]


def _notes(report: Mapping[str, Any]) -> list[Any]:
    from rich.text import Text

    return [Text(f"note: {text}") for text in report.get("notes", ())]


def _cube(report: Mapping[str, Any]) -> list[Any]:
    table = _table("arrays", "name", "dims", "shape", "dtype", "chunks", "codec")
    for array in report["arrays"]:
        _row(table,
            array["name"], *(_text(array[key]) for key in ("dims", "shape")), array["dtype"],
            _text(array["chunks"]), array["codec"],
        )  # fmt: skip
    parts: list[Any] = [table]
    for layer in report.get("layers", ()):
        parts.append(_facts(f"on a map grid: {layer['folder']}", layer))
    if report["values"]:
        decoded = "decoded, middle" if "layers" in report else "as stored"
        parts.append(_values(f"bands, first date, {decoded}", report["values"]))
    return [*parts, *_notes(report)]
