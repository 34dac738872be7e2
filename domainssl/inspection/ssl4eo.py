"""What an SSL4EO-S12 v1.1 folder holds, product by product, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from domainssl.errors import DataError
from domainssl.inspection.files import band_rows
from domainssl.io.raster.zarr import Cube, open_cube
from domainssl.io.ssl4eo.facts import PRODUCTS
from domainssl.io.ssl4eo.labels import labels, unmatched
from domainssl.io.ssl4eo.layout import Catalogue, scan
from domainssl.io.ssl4eo.read import Block, check_same, read
from domainssl.io.storage.paths import Options, fetch_ranges, is_folder, join, list_folder, size_of
from domainssl.missing import told

__all__ = ["EXPECTED", "inspect_ssl4eo", "product_at", "splits_at", "without_archives"]

_ARCHIVES = (".zarr.zip", ".tar")
EXPECTED = "ssl4eos12_*.zarr.zip (release A) or ssl4eos12_shard_*.tar (release B)"


def product_at(path: str, options: Options | None = None) -> tuple[str, str, str] | None:
    """Return (folder of the split, split, product) of a folder that is named like a product.

    None where the name is another one, or the folder holds nothing in the data set's format.
    """
    parent, _, name = path.rstrip("/").rpartition("/")
    if not parent or name not in PRODUCTS or not _has_archives(path, options):
        return None
    return parent, parent.rpartition("/")[2], name


def without_archives(root: str, options: Options | None = None) -> dict[str, list[str]]:
    """Return folders named like products that hold nothing in the data set's format, and what."""
    found = {}
    for split, products in _named(root, options).items():
        folder = join(root, split) if is_folder(join(root, split), options) else root
        for name in products:
            path = join(folder, name)
            if not _has_archives(path, options):
                found[path] = list_folder(path, options)
    return found


def _has_archives(folder: str, options: Options | None) -> bool:
    return any(name.endswith(_ARCHIVES) for name in list_folder(folder, options))


def splits_at(root: str, options: Options | None = None) -> dict[str, list[str]]:
    """Return the products found per split; {} when this is no SSL4EO-S12 folder.

    A folder of products that is itself a split counts as the split of its own name. Names alone
    do not make the data set: some product has to hold archives.
    """
    named = _named(root, options)
    count = sum(len(products) for products in named.values())
    return {} if len(without_archives(root, options)) == count else named


def _named(root: str, options: Options | None) -> dict[str, list[str]]:
    found = {}
    for split in ("train", "val", "test"):
        names = list_folder(join(root, split), options)
        products = [name for name in PRODUCTS if name in names]
        if products:
            found[split] = products
    names = list_folder(root, options)
    direct = [name for name in PRODUCTS if name in names and is_folder(join(root, name), options)]
    if direct and not found:
        found[root.rstrip("/").rsplit("/", 1)[-1]] = direct
    return found


def inspect_ssl4eo(
    root: str, splits: Mapping[str, list[str]], options: Options | None = None
) -> dict[str, Any]:
    """Describe every split and product; values are those of the first block and first date."""
    report: dict[str, Any] = {"kind": "ssl4eo", "release": None, "splits": {}, "problems": []}
    problems: list[str] = report["problems"]
    releases = set()
    for split, products in splits.items():
        entry: dict[str, Any] = {"products": {}}
        catalogue: Catalogue | None = None
        blocks: dict[str, dict[str, Block]] = {}  # by the group that they are of
        for name in products:
            try:
                catalogue = scan(root, split, {name: name}, options)
                releases.add(catalogue.release)
                problems += [text for text in catalogue.problems if text not in problems]
                facts, block = _product(catalogue, name, problems)
                entry["products"][name] = facts
                if block is not None:
                    blocks.setdefault(catalogue.groups[0].key, {})[name] = block
            except DataError as error:
                if str(error) not in problems:
                    problems.append(str(error))
        entry |= _pairs(root, split, products, options, problems)
        for same in blocks.values():  # first files without a partner are compared with none
            try:
                check_same(same)
            except DataError as error:
                problems.append(str(error))
        entry["labels"] = _labels(catalogue, options, problems)
        report["splits"][split] = entry
    report["release"] = " and ".join(sorted(releases)) or None
    return report


def _pairs(
    root: str, split: str, products: list[str], options: Options | None, problems: list[str]
) -> dict[str, Any]:
    try:
        both = scan(root, split, {name: name for name in products}, options)
    except DataError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return {"locations": None}
    return {
        "locations": both.count,
        "groups": len(both.groups),
        "dates": both.dates,
        "size": list(both.size),
    }


def _labels(
    catalogue: Catalogue | None, options: Options | None, problems: list[str]
) -> dict[str, Any] | None:
    if catalogue is None:
        return None
    try:
        found = labels(catalogue.root, catalogue.split, options)
    except DataError as error:
        problems.append(str(error))
        return None
    if found is None:
        return None
    odd = unmatched(found, catalogue)
    problems += [] if odd is None else [odd[0]]
    counts = Counter(found.label.values())
    return {
        "path": found.path,
        "classes": {name: counts.get(i, 0) for i, name in enumerate(found.names)},
        "factors": list(found.factors),
    }


def _product(
    catalogue: Catalogue, name: str, problems: list[str]
) -> tuple[dict[str, Any], Block | None]:
    group = catalogue.groups[0]
    files = list(dict.fromkeys(g.files[name] for g in catalogue.groups))
    options = group.storage_options
    facts: dict[str, Any] = {
        "release": catalogue.release,
        "files": len(files),
        "bytes": sum(size_of(path, options) for path in files),
        "locations": catalogue.count,
        "value_unit": PRODUCTS[name].value_unit,
        "bands": list(PRODUCTS[name].bands),
    }
    path = files[0]
    try:
        if catalogue.release == "A":
            cube = open_cube(path, options=options)
        else:
            member = next(member for member in group.members[name] if member is not None)
            [raw] = fetch_ranges(path, [(member.offset, member.size)], options)
            cube = open_cube(raw, f"{path}:{member.key}")
        facts |= _storage(cube, problems)
        with told() as numbers:
            block = read(group, name, [0])
        problems += numbers.values()
    except DataError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return facts, None
    return facts | _values(block, name, problems), block


def _storage(cube: Cube, problems: list[str]) -> dict[str, Any]:
    info = cube.info("bands")
    missing = cube.missing_chunks("bands")
    if missing:
        problems.append(f"{cube.name}: array 'bands' lacks {missing} chunks (read as no data)")
    return {
        "shape": list(info.shape),
        "dims": list(info.dims),
        "dtype": info.dtype.str,
        "chunks": list(info.chunks),
        "codec": info.codec,
        "arrays": list(cube.arrays),
    }


def _span(dates: np.ndarray[Any, Any]) -> list[str] | None:
    """Return the first and the last known date."""
    known = dates[dates > 0]
    if not known.size:
        return None
    return [str(np.datetime64(int(day), "D")) for day in (known.min(), known.max())]


def _values(block: Block, name: str, problems: list[str]) -> dict[str, Any]:
    values = np.moveaxis(block.values, 2, 0)
    if (block.dates <= 0).any():
        problems.append(f"{block.file}: {int((block.dates <= 0).sum())} unknown dates")
    if not block.valid.any():
        problems.append(f"{block.file}: no valid pixel in the first block")
    offsets = Counter(int(value) for value in block.offset)
    if len(offsets) > 1:
        problems.append(f"{block.file}: locations with and without the +1000: {dict(offsets)}")
    return {
        "measured_locations": len(block.ids),
        "first_ids": block.ids[:3],
        "dates": _span(block.stored_dates()),
        "measured_dates": _span(block.dates),
        "crs": {str(code): count for code, count in Counter(block.crs.tolist()).items()},
        "valid_share": float(block.valid.mean()),
        "nan_share": float(1 - block.finite_share),
        "offset": {str(value): count for value, count in offsets.items()}
        if PRODUCTS[name].has_offset
        else None,
        "reordered": int(block.reordered.sum()),
        "values": band_rows(values, block.bands, block.valid),
    }
