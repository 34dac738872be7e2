"""What feature files hold: tiles, width, places, encoder, values."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.errors import DataError, DomainSSLError, parsing, require
from domainssl.files import read_json
from domainssl.inspection.tables import add_row, facts_table, new_table, note_lines
from domainssl.io.slide.bag import spacing_of, unlike_features
from domainssl.io.slide.bag_folders import Bags, find_bags
from domainssl.io.slide.bag_slides import slides_of_table
from domainssl.io.slide.features import Bag, describe_bag, read_bag
from domainssl.io.storage.hdf5 import open_hdf5

__all__ = ["bag_tables", "inspect_bags", "is_bags"]

_MEASURED = 64  # files that are read
_TRIED = 4  # files of a folder that are looked at for what it is
_FEW, _UNUSUAL = 3, 10  # slides to compare, and by what factor they may differ
_NOMINAL = 10.0  # microns per pixel times magnification
_ROUNDED = 0.02  # relative difference that whole pixels make
_HDF5 = (".h5", ".hdf5")
_JOBS = ("h5_files", "pt_files", "features_")


def is_bags(path: str, names: Sequence[str] | None) -> bool:
    """Whether a local file holds the features of a slide, or a folder those of several.

    Args:
        path: File or folder.
        names: What a folder holds, None for a file.
    """
    if names is None:
        return _is_features(path)
    if "zarr.json" in names:
        return _is_zarr_bag(path)
    if any(name.startswith(_JOBS) for name in names):
        return True
    if any(name.endswith("_overlap") for name in names):
        return any(
            inner.startswith(_JOBS)
            for name in names
            if name.endswith("_overlap") and os.path.isdir(os.path.join(path, name))
            for inner in os.listdir(os.path.join(path, name))
        )
    inside = [os.path.join(path, n) for n in names if n.lower().endswith((*_HDF5, ".zarr"))]
    # the first ones may be damaged, which those who read them say
    return any(
        _is_zarr_bag(one) if one.endswith(".zarr") else _is_features(one) for one in inside[:_TRIED]
    )


def _is_features(path: str) -> bool:
    if not path.lower().endswith(_HDF5) or not os.path.isfile(path):
        return False
    try:
        h5py = require("h5py", "pathology")
        with open_hdf5(Path(path), "pathology") as file, parsing(path):
            is_own = isinstance(file.get("features", getlink=True), h5py.HardLink)
            return is_own and getattr(file["features"], "ndim", 0) in (1, 2)
    except DomainSSLError:
        return False


def _is_zarr_bag(path: str) -> bool:
    try:
        found = read_json(os.path.join(path, "zarr.json"))
    except DomainSSLError:
        return False
    is_group = isinstance(found, dict) and found.get("node_type") == "group"
    return is_group and os.path.isfile(os.path.join(path, "features", "zarr.json"))


def inspect_bags(path: str) -> dict[str, Any]:
    """Describe the features of a slide, or of the slides of a folder.

    Returns:
        Plain data: `layout`; `bags` with counts, places and values; `notes`; `problems`.
    """
    problems: list[str] = []
    layout, paths = "file", [path]
    table: dict[str, Any] | None = None
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "zarr.json")):
        found = find_bags(path)
        layout, paths = found.layout, [file.path for file in found.files]
        try:
            table = _table(path, found, problems)
        except DataError as error:
            problems.append(str(error))
    bags = []
    for name in paths[:_MEASURED]:
        try:
            bags.append(_described(name, read_bag(name), problems))
        except DataError as error:
            problems.append(str(error))
    notes = []
    for key in ("dim", "encoder", "patch_size_level0", "mpp_um"):
        counts = Counter(str(bag[key]) for bag in bags)
        if len(counts) > 1:
            shown = ", ".join(f"{value} ({count})" for value, count in counts.most_common(4))
            notes.append(f"{len(counts)} values of {key.replace('_', ' ')}: {shown}")
    problems += _other_scales(bags)
    return {
        "kind": "bags",
        "count": len(paths),
        "measured": len(bags),
        "layout": layout,
        "table": table,
        "bags": bags,
        "notes": notes,
        "problems": problems,
    }


def _other_scales(bags: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say whose features vary many times as much, or as little, as those of most slides."""
    spreads = {bag["path"]: bag["std"] for bag in bags if bag["std"]}
    if len(spreads) < _FEW:
        return []
    usual = float(np.median(list(spreads.values())))
    return [
        f"{path}: features vary by {std:.3g}, those of most slides by {usual:.3g}: are they of "
        "another encoder, or is their scale lost?"
        for path, std in spreads.items()
        if not 1 / _UNUSUAL < std / usual < _UNUSUAL
    ]


def _table(path: str, found: Bags, problems: list[str]) -> dict[str, Any] | None:
    """Return what the table beside the bags says: patients, splits and classes with counts."""
    known = slides_of_table(path, found)
    if known is None:
        return None
    file, slides, odd = known
    problems += odd
    return {
        "file": file,
        "slides": len(slides),
        "patients": len({each.patient for each in slides}),
        "splits": dict(Counter(each.split or "none" for each in slides)),
        "classes": dict(Counter(each.label or "none" for each in slides)),
    }


def _contradictions(bag: Bag) -> Iterator[str]:
    """Yield what a bag says of its tiles that does not fit together."""
    size, stored = bag.patch_size_level0, bag.patch_size
    if size and stored and bag.mpp_um and bag.level0_mpp_um:
        wanted = stored * bag.mpp_um / bag.level0_mpp_um
        if abs(size / wanted - 1) > _ROUNDED:
            yield (
                f"patch_size_level0 is {size}, but {stored} pixels at {_NOMINAL / bag.mpp_um:g}x "
                f"of a slide of {_NOMINAL / bag.level0_mpp_um:g}x are {wanted:g}: correct the "
                "magnifications, which state the resolution, or the size"
            )
    if bag.coords is None or len(bag) < 2:
        return
    again = len(bag) - len(np.unique(bag.coords, axis=0))
    if again:
        yield f"{again} tiles lie at the place of another; a grid averages their features"
    apart = spacing_of(bag.coords)
    if apart and bag.aspect == 1 and size and apart != bag.step:
        yield (
            f"tiles of {size} pixels of level 0 that overlap by {bag.overlap_level0}, but "
            f"neighbours lie {apart} apart: is the size that of another level? Where tiles have "
            "gaps it is right"
        )


def _described(path: str, bag: Bag, problems: list[str]) -> dict[str, Any]:
    values = bag.features
    finite = np.isfinite(values)
    problems += [f"{path}: {text}" for text in unlike_features(values)]
    if not len(bag):
        problems.append(f"{path}: no tile")
    problems += [f"{path}: {text}" for text in _contradictions(bag)]
    kept = values[finite].astype(np.float64)
    try:
        lines = describe_bag(bag)
    except DataError as error:
        problems.append(str(error))
        lines = []
    return {
        "path": path,
        "slide": bag.slide,
        "layout": bag.layout,
        "tiles": len(bag),
        "dim": bag.dim,
        "dtype": bag.dtype,
        "encoder": bag.encoder,
        "has_places": bag.coords is not None,
        "patch_size_level0": bag.patch_size_level0,
        "overlap_level0": bag.overlap_level0,
        "mpp_um": bag.mpp_um,
        "min": float(kept.min()) if kept.size else None,
        "mean": float(kept.mean()) if kept.size else None,
        "max": float(kept.max()) if kept.size else None,
        "std": float(kept.std()) if kept.size else None,
        "said": lines,
    }


def bag_tables(report: Mapping[str, Any]) -> list[Any]:
    """Return a report of `inspect_bags` as tables."""
    from rich.text import Text

    parts: list[Any] = note_lines(report)
    if report["table"] is not None:
        parts.append(facts_table("table of slides", report["table"]))
    if len(report["bags"]) == 1:
        return [*parts, *(Text(line) for line in report["bags"][0]["said"])]
    columns = ("slide", "tiles", "dim", "dtype", "encoder", "tile at level 0", "mean", "std")
    table = new_table(f"layout {report['layout']}", *columns)
    for bag in report["bags"]:
        numbers = ("-" if bag[k] is None else f"{bag[k]:.4g}" for k in ("mean", "std"))
        size = "-" if bag["patch_size_level0"] is None else str(bag["patch_size_level0"])
        cells = (str(bag["tiles"]), str(bag["dim"]), bag["dtype"], bag["encoder"] or "-", size)
        add_row(table, bag["slide"], *cells, *numbers)
    return [*parts, table]
