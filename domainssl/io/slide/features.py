"""Feature bags in every layout: CLAM, TRIDENT, and our own Zarr.

    bag = read_bag("features_uni_v1/slide.h5")      # coordinates are x, y at level 0, always
    grid = to_grid(bag)                             # (D, R, C), and where a tile is
    write_bag("bags", bag, "zarr")                  # bags/slide.zarr

Source: the layouts as written by CLAM (Lu et al. 2021) and TRIDENT; nothing of their code is here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from domainssl.errors import ConfigError, DataError, nearest
from domainssl.io.slide.bag import Bag, FeatureGrid, spacing_of, to_grid
from domainssl.io.slide.bag_hdf5 import (
    read_hdf5,
    read_hdf5_header,
    read_places,
    read_tensor,
    write_clam,
    write_trident,
)
from domainssl.io.slide.bag_zarr import read_zarr, write_zarr

__all__ = [
    "Bag",
    "FeatureGrid",
    "Layout",
    "bag_header",
    "describe_bag",
    "read_bag",
    "read_places",
    "to_grid",
    "write_bag",
]

Layout = Literal["clam", "trident", "zarr"]
_HDF5 = (".h5", ".hdf5")


def read_bag(
    path: str | Path,
    *,
    patches: str | Path | None = None,
    level_downsample: float | None = None,
    patch_size_level0: int | None = None,
) -> Bag:
    """Read the features of one slide.

    Args:
        path: HDF5 file of CLAM or TRIDENT, tensor of CLAM (`.pt`), or a `.zarr` folder of ours.
        patches: File of the tiling step with the attributes that CLAM's features lack; by default
            the one in `patches/` beside the folder of the features, if there is one.
        level_downsample: Of the level of the slide that tiles were read at, for files that name
            the level without it.
        patch_size_level0: Side of a tile in pixels of level 0, for files that do not state it.

    Raises:
        DataError: It is none of these, damaged, or its files contradict each other.
    """
    bag = _read(Path(path), None if patches is None else Path(patches), level_downsample)
    if bag.patch_size_level0 is None and bag.coords is not None:
        bag = replace(bag, patch_size_level0=patch_size_level0)
    return bag


def _read(place: Path, patches: Path | None, level_downsample: float | None) -> Bag:
    if not place.exists():
        raise DataError(f"{place} does not exist; expected a file or folder of features.")
    if place.is_dir():
        if not (place / "zarr.json").is_file():
            raise DataError(
                f"{place}: a folder without zarr.json; expected the features of one slide. A "
                "folder of many is what SlideFeatureDataModule and `bags` read."
            )
        return read_zarr(place)
    own = patches or _beside(place)
    _must_be_there(place, own)
    ending = place.suffix.lower()
    if ending in _HDF5:
        return read_hdf5(place, own, level_downsample)
    if ending == ".pt":
        return read_tensor(place, own, level_downsample)
    raise DataError(f"{place}: features are read from .h5, .pt and .zarr, not from {ending!r}.")


def _must_be_there(place: Path, patches: Path | None) -> None:
    if patches is not None and not patches.is_file():
        raise DataError(
            f"{patches} does not exist; expected the file of the tiling step of {place}."
        )


def _beside(path: Path) -> Path | None:
    folder = path.parent.parent / "patches"
    for name in (f"{path.stem}.h5", f"{path.stem}_patches.h5"):
        if (folder / name).is_file():
            return folder / name
    return None


def bag_header(
    path: str | Path,
    *,
    patches: str | Path | None = None,
    level_downsample: float | None = None,
    patch_size_level0: int | None = None,
) -> tuple[int, Bag]:
    """Return the number of tiles of a bag, and the bag without them; HDF5 is not read whole.

    Args:
        path: As of `read_bag`.
        patches: As of `read_bag`.
        level_downsample: As of `read_bag`.
        patch_size_level0: As of `read_bag`.

    Raises:
        DataError: It is no bag, or its file of the tiling step is not there.
    """
    place, given = Path(path), None if patches is None else Path(patches)
    if place.suffix.lower() in _HDF5 and place.is_file():
        own = given or _beside(place)
        _must_be_there(place, own)
        count, bag = read_hdf5_header(place, own, level_downsample)
    else:
        bag = _read(place, given, level_downsample)
        count = len(bag)
        coords = None if bag.coords is None else bag.coords[:0]
        bag = replace(bag, features=bag.features[:0], coords=coords)
    if bag.patch_size_level0 is None and bag.coords is not None:
        bag = replace(bag, patch_size_level0=patch_size_level0)
    return count, bag


def write_bag(path: str | Path, bag: Bag, layout: Layout, *, dtype: str | None = None) -> Path:
    """Write the features of one slide, complete or not at all.

    Args:
        path: Folder of all slides; the slide's name and the layout give the file.
        bag: What is written.
        layout: `clam`, `trident` or `zarr`.
        dtype: Of the features: `float32`, `float16`, in `zarr` also `int8` with a scale per tile,
            or None for the layout's own: float32, and in `zarr` float16 where no feature is beyond
            1000.

    Returns:
        The file or folder with the features.

    Raises:
        ConfigError: There is no such layout, or type.
        DataError: The layout needs what the bag lacks, or it cannot be written.
    """
    if layout not in get_args(Layout):
        raise ConfigError(
            f"layout: got {layout!r}, expected one of {', '.join(get_args(Layout))}."
            f"{nearest(layout, get_args(Layout))}"
        )
    if dtype not in (None, "float32", "float16", "int8"):
        raise ConfigError(f"dtype: got {dtype!r}, expected float32, float16 or int8.")
    if dtype == "int8" and layout != "zarr":
        raise ConfigError(f"dtype int8: needs a scale per tile, which {layout} lacks; take zarr.")
    if layout == "clam" and dtype == "float16":
        raise ConfigError("dtype: CLAM's features are float32; leave it out.")
    if not bag.slide or Path(bag.slide).name != bag.slide or bag.slide.startswith("."):
        raise DataError(f"{bag.path}: {bag.slide!r} is no name of a file; rename the slide.")
    root = Path(path)
    if layout == "clam":
        return write_clam(root, bag)
    if layout == "trident":
        return write_trident(root, bag, dtype or "float32")
    return write_zarr(root, bag, dtype)


def describe_bag(bag: Bag) -> list[str]:
    """Return lines that tell what a bag holds."""
    lines = [f"{bag.slide}: {len(bag)} tiles of {bag.dim} features ({bag.dtype}, {bag.layout})"]
    lines.append(f"encoder: {bag.encoder or 'not stated'}")
    if bag.coords is None:
        return [*lines, "coordinates: none; a bag without places"]
    if bag.patch_size_level0 is None:
        step = spacing_of(bag.coords) if len(bag) > 1 else None
        apart = f", neighbours lie {step} pixels apart" if step else ""
        return [*lines, f"coordinates: x, y at level 0{apart}; the size of a tile is not stated, "
                        "no grid"]  # fmt: skip
    mpp = f", {bag.mpp_um:g} um per pixel" if bag.mpp_um else ""
    lines.append(
        f"tiles: {bag.patch_size_level0} pixels of level 0, overlap {bag.overlap_level0}"
        f" ({bag.patch_size or '?'} pixels as encoded{mpp})"
    )
    if len(bag) == 0:
        return [*lines, "grid: no tile"]
    grid = to_grid(bag)
    lines.append(
        f"grid: {grid.occupied.shape[0]} rows x {grid.occupied.shape[1]} columns, "
        f"{int(grid.occupied.sum())} cells with tissue"
    )
    if grid.off_lattice:
        lines.append(
            f"{grid.off_lattice} tiles lie off the lattice of the others; {grid.shared_cells} "
            "cells hold more than one, whose features are averaged"
        )
    elif grid.shared_cells:
        lines.append(f"{grid.shared_cells} cells hold more than one tile; features are averaged")
    if grid.not_finite:
        lines.append(f"{grid.not_finite} tiles have features that are not finite")
    return lines
