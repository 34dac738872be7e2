"""`inspect`: say what lies at a path, as plain data and as a table.

report = inspect_path("/data/ssl4eo")     # JSON-able
print(report["problems"])
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from domainssl.errors import DataError
from domainssl.inspection.bags import bag_tables, inspect_bags, is_bags
from domainssl.inspection.earth import (
    benchmark_at,
    open_benchmark,
    open_first,
    open_safe,
    open_terramesh,
    safe_products,
)
from domainssl.inspection.files import find_geotiffs, inspect_cube, inspect_geotiffs, inspect_tar
from domainssl.inspection.layers import inspect_layers
from domainssl.inspection.scans import inspect_scans, is_scans, scan_tables
from domainssl.inspection.slides import (
    are_colours,
    inspect_pictures,
    inspect_slides,
    is_pictures,
    is_slides,
    picture_tables,
    slide_tables,
)
from domainssl.inspection.ssl4eo import (
    EXPECTED,
    inspect_ssl4eo,
    product_at,
    splits_at,
    without_archives,
)
from domainssl.inspection.tables import (
    add_row,
    as_text,
    facts_table,
    new_table,
    next_lines,
    note_lines,
    values_table,
)
from domainssl.io.raster.bands import open_store
from domainssl.io.raster.geotiff import GEOTIFF_ENDINGS
from domainssl.io.ssl4eo.first import is_first
from domainssl.io.ssl4eo.terramesh import is_terramesh
from domainssl.io.storage.paths import is_file, is_folder, is_url, join, list_folder
from domainssl.sensors import L1C_BANDS, L2A_BANDS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from domainssl.datamodules.base import DomainDataModule

__all__ = ["FORMATS", "Format", "Place", "inspect_path", "recognise", "render"]

_ARCHIVES = (".zarr.zip", ".zarr", ".tar")

_NOUNS = {"scans": "scan", "slides": "slide", "pictures": "picture", "bags": "feature file"}
_CUBE_MARKS = (".zgroup", ".zmetadata", ".zattrs", "zarr.json")


@dataclass(frozen=True)
class Place:
    """A path that is looked at.

    Attributes:
        path: File, folder or URL.
        options: fsspec options.
        names: What a folder holds; None for a file.
    """

    path: str
    options: dict[str, Any]
    names: tuple[str, ...] | None

    def ends(self, *endings: str) -> bool:
        """Whether it is a file of that name, or a folder that holds such names."""
        names = (self.path,) if self.names is None else self.names
        return any(name.lower().endswith(endings) for name in names)


@dataclass(frozen=True)
class Format:
    """A kind of data: how it is recognised, described, and opened for statistics.

    Attributes:
        name: What it is called.
        recognise: Whether a place holds it.
        describe: Returns a report.
        open: Returns the DataModule that trains on it, None where its choices have to be made in
            a configuration.
    """

    name: str
    recognise: Callable[[Place], bool]
    describe: Callable[[Place], dict[str, Any]]
    open: Callable[[Place], DomainDataModule] | None = None


def recognise(
    path: str, *, storage_options: Mapping[str, Any] | None = None
) -> tuple[Format, Place]:
    """Return the format of what lies at a path: the first of `FORMATS` that recognises it.

    Raises:
        DataError: Nothing lies there, or nothing that is understood.
    """
    path, options = str(path), dict(storage_options or {})
    if (path.lower().endswith(GEOTIFF_ENDINGS) and is_url(path)) or is_file(
        path, options
    ):  # GDAL opens it, not fsspec
        place = Place(path, options, None)
    elif is_folder(path, options):
        place = Place(path, options, tuple(list_folder(path, options)))
    else:
        raise DataError(
            f"{path}: nothing lies there. Give a folder, a file or a URL, or 'sample' for the "
            "embedded sample."
        )
    for form in FORMATS:
        if form.recognise(place):
            return form, place
    if place.names is None:
        raise DataError(
            f"{path}: this kind of file is not understood, expected .zarr.zip, .tar, .tif, a "
            "scan (NIfTI, NRRD, MetaImage, MGH or DICOM), a slide, a tile picture or features (.h5)"
        )
    raise DataError(
        f"{path}: neither SSL4EO-S12 products (train/S2L2A/…), TerraMesh, TreeSatAI or PASTIS, nor "
        f"zarr cubes, nor GeoTIFF, nor scans, nor slides, tiles or features. It "
        f"holds: {', '.join(place.names[:12]) or 'nothing'}."
        + "".join(f" {text}" for text in _other_format(path, options))
    )


def inspect_path(path: str, *, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Describe what lies at a path.

    Args:
        path: An SSL4EO-S12 folder (root, split or product), the root of TerraMesh, TreeSatAI,
            PASTIS or of cubes with a folder per sensor, a zarr cube (`.zarr.zip` or folder; EOPF
            products and GeoZarr too) or a folder of them, a tar of cubes, a GeoTIFF or a folder of
            them, a scan
            (NIfTI, NRRD, MetaImage, MGH, DICOM), a slide, a tile picture or a feature file (HDF5,
            Zarr) or a folder of them; fsspec URLs except for GeoTIFF, scans, slides, tiles,
            features, TreeSatAI and PASTIS.
        storage_options: fsspec options for a URL.

    Returns:
        Plain data: `path`, `kind` (`ssl4eo`, `data`, `layers`, `cube`, `tar`, `geotiff`, `scans`,
        `slides`, `pictures`, `bags`),
        `problems` (texts), and what the kind has: `release` and `splits`, `arrays` and `values`,
        `files` or `scans`.

    Raises:
        DataError: Nothing lies there, or nothing that is understood.
    """
    form, place = recognise(path, storage_options=storage_options)
    return {"path": str(path), **form.describe(place)}


def _split_product(place: Place) -> tuple[str, dict[str, list[str]]] | None:
    """Return folder and products per split of SSL4EO-S12, None where it is something else."""
    if place.names is None:
        return None
    splits = splits_at(place.path, place.options)
    if splits:
        return place.path, splits
    product = product_at(place.path, place.options)
    return None if product is None else (product[0], {product[1]: [product[2]]})


def _describe_ssl4eo(place: Place) -> dict[str, Any]:
    found = _split_product(place)
    assert found is not None
    return inspect_ssl4eo(*found, place.options)


def _open_ssl4eo(place: Place) -> DomainDataModule:
    from domainssl.datamodules.ssl4eo import SSL4EOS12DataModule

    return SSL4EOS12DataModule(root=place.path, storage_options=place.options)


def _open_safe(place: Place) -> DomainDataModule:
    return open_safe(place.path, safe_products(place.path, place.names), place.options)


def _open_treesat(place: Place) -> DomainDataModule:
    from domainssl.datamodules.treesatai import TreeSatAIDataModule

    return TreeSatAIDataModule(root=place.path)


def _open_pastis(place: Place) -> DomainDataModule:
    from domainssl.datamodules.pastis import PastisDataModule

    return PastisDataModule(root=place.path)


def _open_cubes(place: Place) -> DomainDataModule:
    from domainssl.datamodules.cubes import SentinelCubeDataModule

    return SentinelCubeDataModule(root=place.path, storage_options=place.options)


def _by_datamodule(open_it: Callable[[Place], DomainDataModule]) -> Callable[[Place], Any]:
    def describe(place: Place) -> dict[str, Any]:
        from domainssl.inspection.data import inspect_data

        return inspect_data(open_it(place))

    return describe


def _is_treesat(place: Place) -> bool:
    tables = {f"{s}{end}" for s in ("train", "val", "test") for end in (".csv", "_filenames.lst")}
    names = set(place.names or ())
    return bool(tables & names) and bool({"aerial", "sentinel-ts", "sentinel"} & names)


def _is_pastis(place: Place) -> bool:
    names = place.names or ()
    return "metadata.geojson" in names and any(name.startswith("DATA_") for name in names)


def _layers_at(place: Place) -> dict[str, list[str]]:
    """Return the stores or GeoTIFF in each folder of a root, {} where it is something else."""
    if place.names is None or any(name in _CUBE_MARKS for name in place.names):
        return {}
    if place.ends(*_ARCHIVES, *GEOTIFF_ENDINGS):
        return {}
    found = {}
    tiffs = 0
    for name in place.names:
        folder = join(place.path, name)
        if is_folder(folder, place.options):
            inside = list_folder(folder, place.options)
            files = [n for n in inside if n.lower().endswith((".zarr", ".zarr.zip"))]
            if not files:
                files = [n for n in inside if n.lower().endswith(GEOTIFF_ENDINGS)]
                tiffs += bool(files)
            if files:
                found[name] = sorted(files)
    if len(found) < 2 or (tiffs == len(found) and _are_stains(place, found)):
        return {}
    return found


def _are_stains(place: Place, found: Mapping[str, Any]) -> bool:
    """Whether folders of TIFF hold slides or tiles and no maps."""
    return not is_url(place.path) and are_colours(join(place.path, name) for name in found)


def _is_default_cubes(place: Place) -> bool:
    return {"s1", "s2"} <= set(_layers_at(place))


def _describe_layers(place: Place) -> dict[str, Any]:
    """Describe a folder per sensor: the sites of each, those without a partner, the first file."""
    layers = {n: files for n, files in _layers_at(place).items() if n != "labels"}
    sites = {n: {_site(file) for file in files} for n, files in layers.items()}
    shared = set.intersection(*sites.values())
    report: dict[str, Any] = {"kind": "layers", "layers": {}, "notes": [], "problems": []}
    for name, files in layers.items():
        first = inspect_path(join(place.path, name, files[0]), storage_options=place.options)
        report["layers"][name] = {"sites": len(files), "first": first}
        report["problems"] += [f"{name}: {text}" for text in first["problems"]]
        lonely = sorted(sites[name] - shared)
        if shared and lonely:
            report["problems"].append(
                f"{name}: {len(lonely)} sites without a partner in every other folder, such as "
                + ", ".join(lonely[:5])
            )
    if not shared:
        report["notes"].append(
            "no file has the same name in all folders: give each layer a pattern such as "
            "path: 's2/{site}_s2.tif'"
        )
    return report


def _site(name: str) -> str:
    return re.sub(r"\.(zarr\.zip|zarr|tiff?)$", "", name, flags=re.IGNORECASE)


def _describe_archives(place: Place) -> dict[str, Any]:
    """Describe the folder of one product or sensor: its first file speaks for the others."""
    archives = [name for name in place.names or () if name.endswith(_ARCHIVES)]
    first = inspect_path(join(place.path, archives[0]), storage_options=place.options)
    return {**first, "count": len(archives)}


def _is_geotiff(place: Place) -> bool:
    if place.names is None:
        return place.ends(*GEOTIFF_ENDINGS)
    return not is_url(place.path) and bool(find_geotiffs(place.path))


def _describe_geotiffs(place: Place) -> dict[str, Any]:
    if place.names is None:
        return inspect_geotiffs([place.path])
    report = inspect_geotiffs(find_geotiffs(place.path))
    return {**report, "notes": _other_format(place.path, place.options)}


FORMATS = (
    Format(
        "terramesh",
        lambda p: p.names is not None and is_terramesh(p.path, p.options),
        _by_datamodule(lambda p: open_terramesh(p.path, p.options)),
        lambda p: open_terramesh(p.path, p.options),
    ),
    Format(
        "safe",
        lambda p: bool(safe_products(p.path, p.names)),
        _by_datamodule(_open_safe),
        _open_safe,
    ),
    Format(
        "ssl4eo_v1",
        lambda p: not is_url(p.path) and is_first(p.path),
        _by_datamodule(lambda p: open_first(p.path)),
        lambda p: open_first(p.path),
    ),
    Format("ssl4eo", lambda p: _split_product(p) is not None, _describe_ssl4eo, _open_ssl4eo),
    Format(
        "benchmark",
        lambda p: not is_url(p.path) and benchmark_at(p.names) is not None,
        _by_datamodule(lambda p: open_benchmark(p.path, p.names)),
        lambda p: open_benchmark(p.path, p.names),
    ),
    Format("treesatai", _is_treesat, _by_datamodule(_open_treesat), _open_treesat),
    Format("pastis", _is_pastis, _by_datamodule(_open_pastis), _open_pastis),
    Format("cubes", _is_default_cubes, _by_datamodule(_open_cubes), _open_cubes),
    Format("layers", lambda p: bool(_layers_at(p)), _describe_layers),
    Format(
        "scans",
        lambda p: not is_url(p.path) and is_scans(p.path, p.names),
        lambda p: inspect_scans(p.path),
    ),
    Format(
        "bags",
        lambda p: not is_url(p.path) and is_bags(p.path, p.names),
        lambda p: inspect_bags(p.path),
    ),
    Format(
        "slides",
        lambda p: not is_url(p.path) and is_slides(p.path, p.names),
        lambda p: inspect_slides(p.path),
    ),
    Format(
        "pictures",
        lambda p: not is_url(p.path) and is_pictures(p.path, p.names),
        lambda p: inspect_pictures(p.path),
    ),
    Format(
        "tar",
        lambda p: p.names is None and p.ends(".tar"),
        lambda p: inspect_tar(p.path, p.options),
    ),
    Format(
        "cube",
        lambda p: p.ends(".zip") if p.names is None else any(n in _CUBE_MARKS for n in p.names),
        lambda p: _cube_report(p.path, p.options),
    ),
    Format("archives", lambda p: bool(p.names) and p.ends(*_ARCHIVES), _describe_archives),
    Format("geotiff", _is_geotiff, _describe_geotiffs),
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
    return {**report, **found, "problems": [*report["problems"], *found["problems"]]}


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
    parts += _tables(report)
    problems = report["problems"]
    if problems:
        parts.append(Text(f"{len(problems)} problem{'s' * (len(problems) > 1)}", style="bold red"))
        parts += [Text(f"  {text}") for text in problems]
    else:
        parts.append(Text("no problems found", style="green"))
    return Lines(*parts, *next_lines(report))


def _tables(report: Mapping[str, Any]) -> list[Any]:
    """Return the tables of a report by its kind."""
    tables = {"ssl4eo": _ssl4eo, "geotiff": _geotiff, "data": _data, "layers": _layers,
              "scans": scan_tables, "slides": slide_tables, "pictures": picture_tables,
              "bags": bag_tables}  # fmt: skip
    return list(tables.get(report["kind"], _cube)(report))


def _headline(report: Mapping[str, Any]) -> str:
    if report["kind"] == "ssl4eo":
        release = report["release"]
        found = f"release {release}" if release else "whose release cannot be told, see below"
        return f"SSL4EO-S12 v1.1, {found}"
    if report["kind"] == "data":
        return f"as {report['data']} reads it"
    if report["kind"] == "layers":
        return f"{len(report['layers'])} folders, the first file of each shown"
    if report["kind"] in _NOUNS:
        noun = _NOUNS[report["kind"]]
        return (
            f"{report['count']} {noun}{'s' * (report['count'] != 1)}, {report['measured']} measured"
        )
    if report["kind"] == "geotiff":
        found = report["crs"]
        systems = ", ".join(found) if len(found) == 1 else as_text(found)
        return f"{report['count']} GeoTIFF, {report['measured']} measured, CRS {systems}"
    count = f", {report['count']} files or members, first shown" if "count" in report else ""
    return f"zarr format {report['format']}{count}"


def _ssl4eo(report: Mapping[str, Any]) -> list[Any]:
    parts: list[Any] = []
    for split, entry in report["splits"].items():
        titles = {"dates": "dates per location", "size": "pixels"}
        facts = {titles.get(k, k): v for k, v in entry.items() if k != "products"}
        parts.append(facts_table(split, facts))
        for name, found in entry["products"].items():
            rows = found.get("values", [])
            parts.append(facts_table(f"{split} {name}", _titled(found)))
            if rows:
                unit = found["value_unit"]
                where = f"{found['measured_locations']} locations, first date of each, valid pixels"
                if any(int(value) for value in found["offset"] or {}):
                    where += ", after the offset was taken away"
                parts.append(values_table(f"{split} {name}, {unit}, {where}", rows))
    return parts


def _titled(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts of a modality under titles that tell counts, spans and what they are of."""
    titles = {
        "offset": "offset in the file: locations",
        "dates": "dates, first to last" if "measured_dates" in facts else "dates looked at",
        "measured_dates": "dates of the measured values",
        "measured_locations": "locations looked at",
    }
    shown = {k: v for k, v in facts.items() if k != "values"}
    shown |= {k: " to ".join(shown[k]) for k in ("dates", "measured_dates") if shown.get(k)}
    return {titles.get(k, k): v for k, v in shown.items()}


def _geotiff(report: Mapping[str, Any]) -> list[Any]:
    parts: list[Any] = []
    for file in report["files"]:
        facts = {key: value for key, value in file.items() if key not in ("values", "path")}
        parts += [facts_table(file["path"], facts), values_table("values", file["values"])]
    return [*parts, *note_lines(report)]


def _data(report: Mapping[str, Any]) -> list[Any]:
    parts: list[Any] = note_lines(report)
    for split, entry in report["splits"].items():
        parts.append(facts_table(split, {k: v for k, v in entry.items() if k != "modalities"}))
        for name, found in entry["modalities"].items():
            parts.append(facts_table(f"{split} {name}", _titled(found)))
            if found.get("values"):
                what = {"features": "tiles", "volume": "voxels"}.get(found["kind"], "pixels")
                title = f"{split} {name}, {found['value_unit']}, valid {what} looked at"
                parts.append(values_table(title, found["values"]))
    return parts


def _layers(report: Mapping[str, Any]) -> list[Any]:
    parts: list[Any] = note_lines(report)
    for name, layer in report["layers"].items():
        first = layer["first"]
        parts.append(facts_table(name, {"sites": layer["sites"], "first": first["path"]}))
        parts += _tables(first)
    return parts


def _cube(report: Mapping[str, Any]) -> list[Any]:
    table = new_table("arrays", "name", "dims", "shape", "dtype", "chunks", "codec")
    for array in report["arrays"]:
        add_row(table,
            array["name"], *(as_text(array[key]) for key in ("dims", "shape")), array["dtype"],
            as_text(array["chunks"]), array["codec"],
        )  # fmt: skip
    parts: list[Any] = [table]
    for layer in report.get("layers", ()):
        parts.append(facts_table(f"on a map grid: {layer['folder']}", layer))
    if report["values"]:
        decoded = "decoded, middle" if "layers" in report else "as stored"
        parts.append(values_table(f"bands, first date, {decoded}", report["values"]))
    return [*parts, *note_lines(report)]
