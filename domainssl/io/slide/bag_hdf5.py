"""Feature bags of CLAM and TRIDENT: HDF5 files, and CLAM's tensors.

CLAM says where tiles lie and how large they are in another file than their features; TRIDENT says
it beside them. Both write one row per chunk, so whole datasets are read at once.
"""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from domainssl.errors import DataError, parsing, require, unwritable
from domainssl.files import PART, open_regular
from domainssl.io.slide.bag import Bag
from domainssl.io.storage.hdf5 import attributes, dataset, open_hdf5

__all__ = [
    "read_hdf5", "read_hdf5_header", "read_places", "read_tensor", "refuse_vector", "write_clam",
    "write_trident",
]  # fmt: skip

Array = np.ndarray[Any, Any]
_LIMIT = 2**33  # bytes of the features of one slide
_FARTHEST = 2**24  # pixels of level 0; slides have up to some 2**18 in a row
_NOMINAL_MPP = 10.0  # microns per pixel times magnification
_HEIGHT = "patch_size_level0_y"  # of `tile`, where pixels are not square
_DROPPED = {"patch_size_level0", "overlap"}


def read_hdf5(path: Path, patches: Path | None, level_downsample: float | None) -> Bag:
    """Read features, coordinates and what is said about them.

    Args:
        path: File with `features`, and `coords` in most cases.
        patches: File of CLAM or TRIDENT that says how large tiles are; used where `path` does not.
        level_downsample: Of the level of the slide that tiles were read at, where no file says it.

    Raises:
        DataError: It holds no bag, or files contradict each other.
    """
    with open_hdf5(path, "pathology") as file, parsing(f"{path}: the HDF5"):
        found = _found_features(path, file)
        facts = attributes(found)
        features, dtype = _unbatched(path, "features", found[()]), str(found.dtype)
        coords, places = _coords(path, file) if "coords" in file else (None, {})
    bag = Bag(
        slide=path.stem,
        features=_features(path, features, coords),
        coords=coords,
        encoder=str(facts.get("encoder") or places.get("encoder") or ""),
        dtype=dtype,
        path=str(path),
    )
    return _placed(bag, {**facts, **places}, patches, level_downsample)


def read_hdf5_header(
    path: Path, patches: Path | None, level_downsample: float | None
) -> tuple[int, Bag]:
    """Return the number of tiles, and all but them: `coords` is empty, None where there are none.

    Raises:
        DataError: As `read_hdf5`, as far as no number has to be read.
    """
    with open_hdf5(path, "pathology") as file, parsing(f"{path}: the HDF5"):
        found = _found_features(path, file)
        facts, dtype = attributes(found), str(found.dtype)
        refuse_vector(path, found.shape)
        shape, has_places = _of_one_slide(path, "features", found.shape), "coords" in file
        places: dict[str, Any] = {}
        if has_places:
            other = dataset(path, file, "coords", dims=(1, 2, 3), kinds="iuf", limit=_LIMIT)
            places = attributes(other)
            of_places = _of_one_slide(path, "coords", other.shape)
            if of_places not in ((shape[0], 2), (0,)):
                _refuse_coords(path, of_places, other.dtype)
            _same_count(path, int(shape[0]), int(of_places[0]), "")
    bag = Bag(
        slide=path.stem,
        features=np.zeros((0, int(shape[1]) if len(shape) == 2 else 0), np.float32),
        coords=None,
        encoder=str(facts.get("encoder") or places.get("encoder") or ""),
        dtype=dtype,
        path=str(path),
    )
    bag = _placed(bag, {**facts, **places}, patches, level_downsample)
    no_places = np.zeros((0, 2), np.int64)
    return int(shape[0]), replace(bag, coords=no_places if has_places else None)


def read_places(path: Path) -> Bag:
    """Read a file of the tiling step: the places of tiles, and features of width 0.

    Raises:
        DataError: It is no such file.
    """
    with open_hdf5(path, "pathology") as file, parsing(f"{path}: the HDF5"):
        coords, facts = _coords(path, file)
    bag = Bag(
        slide=path.stem.removesuffix("_patches"),
        features=np.zeros((len(coords), 0), np.float32),
        coords=coords,
        path=str(path),
    )
    return _placed(bag, facts, None, None)


def read_tensor(path: Path, patches: Path | None, level_downsample: float | None) -> Bag:
    """Read a tensor (N, D) of CLAM's `pt_files`, unpickling no class.

    Raises:
        DataError: It holds something else, or its number of rows is not that of the coordinates.
    """
    torch = require("torch", "pathology")
    try:
        reading = parsing(f"{path}: the tensor", also=(pickle.UnpicklingError,), quoted=False)
        with reading, open_regular(path):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except DataError as error:
        raise DataError(f"{error} Tensors alone are read; no other object is unpickled.") from error
    if isinstance(content, torch.Tensor) and content.ndim == 3 and len(content) == 1:
        content = content[0]  # a batch of one slide
    if not isinstance(content, torch.Tensor) or content.ndim != 2 or content.is_complex():
        kind = tuple(content.shape) if isinstance(content, torch.Tensor) else type(content).__name__
        raise DataError(f"{path}: holds {kind}, expected one tensor of features (N, D).")
    features = content.detach().float().numpy()
    bag = Bag(
        slide=path.stem,
        features=features,
        coords=None,
        layout="tensor",
        dtype=str(content.dtype).removeprefix("torch."),
        path=str(path),
    )
    beside = path.parent.parent / "h5_files" / f"{path.stem}.h5"
    for other in (beside, patches):
        if other is not None and other.is_file() and bag.coords is None:
            with open_hdf5(other, "pathology") as file, parsing(f"{other}: the HDF5"):
                coords, places = _coords(other, file)
            _same_count(path, len(features), len(coords), f" in {other}")
            bag = replace(bag, coords=coords, attributes=places)
    if bag.coords is None:
        return bag
    return _placed(bag, bag.attributes, patches, level_downsample)


def _found_features(path: Path, file: Any) -> Any:
    """Return the dataset of the features.

    Raises:
        DataError: There is none, or it cannot be that.
    """
    if "features" not in file and "coords" in file:
        others = sorted(name for name in file if name not in ("coords", "imgs"))
        raise DataError(
            f"{path}: places of tiles without features; this is a file of the tiling step. "
            "Give the file of the same slide in the folder of features."
            if not others
            else f"{path}: no dataset 'features', only coords and {', '.join(others)}. "
            "Name that of the features 'features'."
        )
    return dataset(path, file, "features", dims=(1, 2, 3), kinds="fiu", limit=_LIMIT)


def _refuse_coords(path: Path, shape: tuple[int, ...], dtype: Any) -> NoReturn:
    raise DataError(
        f"{path}: 'coords' has the shape {shape} and type {dtype}, expected whole numbers (N, 2): "
        "x and y at level 0."
    )


def _unbatched(path: Path, name: str, values: Array) -> Array:
    """Return a batch of one slide as the slide.

    Raises:
        DataError: It holds several.
    """
    _of_one_slide(path, name, values.shape)
    return values[0] if values.ndim == 3 else values


def _of_one_slide(path: Path, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 3 and shape[0] != 1:
        raise DataError(
            f"{path}: {name!r} has the shape {shape}, expected those of one slide, (N, D). "
            "Write a file per slide."
        )
    return shape[1:] if len(shape) == 3 else shape


def refuse_vector(path: Path, shape: tuple[int, ...]) -> None:
    """Refuse features of a whole slide; (0,) is a slide without tissue.

    Raises:
        DataError: They are that.
    """
    if len(shape) == 1 and shape[0]:
        raise DataError(
            f"{path}: one vector of {shape[0]} features for the whole slide, expected those of "
            "tiles, (N, D). TRIDENT keeps them in features_<encoder>/."
        )


def _features(path: Path, found: Array, coords: Array | None) -> Array:
    """Return float32 (N, D); (0,) of a slide without tissue becomes (0, 0)."""
    if found.ndim == 1:
        refuse_vector(path, found.shape)
        found = found.reshape(0, 0)
    if coords is not None:
        _same_count(path, len(found), len(coords), "")
    with np.errstate(over="ignore"):  # beyond float32 is not finite, and counted as that
        return np.ascontiguousarray(found, np.float32)


def _same_count(path: Path, features: int, coords: int, where: str) -> None:
    if features != coords:
        raise DataError(
            f"{path}: features of {features} tiles and coordinates of {coords}{where}; expected as "
            "many. The file was cut short or two runs were mixed; extract the slide again."
        )


def _coords(path: Path, file: Any) -> tuple[Array, dict[str, Any]]:
    found = dataset(path, file, "coords", dims=(1, 2, 3), kinds="iuf", limit=_LIMIT)
    coords = _unbatched(path, "coords", found[()])
    if coords.ndim == 1 and len(coords) == 0:
        coords = coords.reshape(0, 2)
    whole = coords.dtype.kind != "f" or (np.isfinite(coords).all() and (coords % 1 == 0).all())
    if coords.ndim != 2 or coords.shape[1] != 2 or not whole:
        _refuse_coords(path, coords.shape, coords.dtype)
    if coords.size and not -_FARTHEST < min(coords.min(), 0) <= max(coords.max(), 0) < _FARTHEST:
        raise DataError(
            f"{path}: 'coords' reaches from {coords.min():.6g} to {coords.max():.6g}, expected "
            "places in pixels of level 0. The file is damaged; write it again."
        )
    return coords.astype(np.int64), attributes(found)


def _placed(
    bag: Bag, facts: Mapping[str, Any], patches: Path | None, level_downsample: float | None
) -> Bag:
    """Add the size of a tile, from the file itself or else from that of the tiling step."""
    source = bag.path
    if not _says_size(facts) and patches is not None:
        with open_hdf5(patches, "pathology") as file, parsing(f"{patches}: the HDF5"):
            coords, more = _coords(patches, file)
        _same_tiles(bag, coords, patches)
        facts, source = {**facts, **more}, str(patches)
    size0 = _size_level0(facts, source, level_downsample)
    size = _whole(facts.get("patch_size"))
    is_trident = facts.get("patch_size_level0") is not None
    scale = size0 / size if is_trident and size0 and size else 1.0
    target, level0 = (_number(facts.get(f"{n}_magnification")) for n in ("target", "level0"))
    sides = [_whole(facts.get(f"level0_{n}")) for n in ("width", "height")]
    high = _whole(facts.get(_HEIGHT))
    return replace(
        bag,
        patch_size_level0=size0,
        aspect=high / size0 if is_trident and high and size0 else 1.0,
        overlap_level0=round((_number(facts.get("overlap")) or 0) * scale) if is_trident else 0,
        patch_size=size,
        mpp_um=_NOMINAL_MPP / target if target else None,
        level0_mpp_um=_NOMINAL_MPP / level0 if level0 else None,
        level0_size=(sides[0], sides[1]) if sides[0] and sides[1] else None,
        layout=bag.layout or ("trident" if is_trident else "clam"),
        attributes=dict(facts),
    )


def _says_size(facts: Mapping[str, Any]) -> bool:
    return facts.get("patch_size_level0") is not None or facts.get("patch_size") is not None


def _same_tiles(bag: Bag, coords: Array, patches: Path) -> None:
    """Refuse sizes from a file that lists other tiles: they would be of another tiling."""
    if bag.coords is None:
        return
    ours, theirs = ({*map(tuple, c.tolist())} for c in (bag.coords, coords))
    if not ours <= theirs:
        raise DataError(
            f"{bag.path}: {len(ours - theirs)} of {len(ours)} tiles are not in {patches}, which "
            "therefore is of another tiling. Give the folder of patches that the features were "
            "extracted with."
        )


def _size_level0(
    facts: Mapping[str, Any], source: str, level_downsample: float | None
) -> int | None:
    """Return the side of a tile at level 0: never `patch_size` alone, which counts elsewhere.

    `custom_downsample` is by how much more tiles were shrunk after they were read at their level.
    """
    size0 = _whole(facts.get("patch_size_level0"))
    size = _whole(facts.get("patch_size"))
    if size0 is not None or size is None:
        return size0
    level = _whole(facts.get("patch_level"))
    scales = facts.get("downsample")
    if scales is None and level == 0:
        scales = 1.0
    if scales is None:
        scales = level_downsample
    if scales is None:
        return None
    listed = list(scales) if isinstance(scales, list | tuple) else [scales]
    pair = np.array([_number(each) or 0.0 for each in listed])
    if len(pair) not in (1, 2) or pair.min() < 1 or np.ptp(pair) > 0.02 * pair.max():
        raise DataError(
            f"{source}: 'downsample' is {_plain(scales)}, expected a factor of 1 or more, "
            "nearly equal along x and y."
        )
    stated = facts.get("custom_downsample")
    more = 1.0 if stated is None or stated == "None" else _number(stated)
    if more is None or more < 1:
        raise DataError(f"{source}: 'custom_downsample' is {_plain(stated)}, expected 1 or more.")
    return round(size * float(pair.mean()) * more)


def _plain(value: Any) -> Any:
    """Return NumPy values as Python's, for messages."""
    return np.asarray(value).tolist()


def _number(value: Any) -> float | None:
    """Return a finite number; of a list the one that all its entries are."""
    if isinstance(value, list | tuple) and value and all(each == value[0] for each in value):
        value = value[0]
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if np.isfinite(found) else None


def _whole(value: Any) -> int | None:
    found = _number(value)
    return round(found) if found is not None and found >= 0 else None


# Writing --------------------------------------------------------------------------------------


def write_clam(root: Path, bag: Bag) -> Path:
    """Write `h5_files`, `pt_files` and, where sizes are known, `patches`; return the first.

    Tiles are said to lie on level 0 unless the bag came from CLAM: CLAM's attributes then count.
    """
    torch = require("torch", "pathology")
    if bag.aspect != 1:
        raise DataError(
            f"{bag.path or bag.slide}: tiles are {bag.aspect:g} times as high as wide at level 0, "
            "which CLAM's layout cannot state. Write trident or zarr."
        )
    target = root / "h5_files" / f"{bag.slide}.h5"
    coords = _needed(bag)
    with _new_hdf5(target) as file:
        file.create_dataset("features", data=bag.features, chunks=_rows(bag.features, 32))
        file.create_dataset("coords", data=coords.astype(np.int32))
    with _hidden(root / "pt_files" / f"{bag.slide}.pt") as hidden:
        torch.save(torch.from_numpy(bag.features), hidden)
    if bag.patch_size_level0 is not None:
        own = {k: v for k, v in bag.attributes.items() if k not in _DROPPED}
        if bag.layout != "clam" or own.get("downsample") is None:
            width, height = bag.level0_size or (0, 0)
            own = {
                "patch_size": bag.patch_size_level0,
                "patch_level": 0,
                "downsample": [1.0, 1.0],
                "downsampled_level_dim": [width, height],
                "level_dim": [width, height],
            }
        own |= {"name": bag.slide, "save_path": "None"}
        with _new_hdf5(root / "patches" / f"{bag.slide}.h5") as file:
            found = file.create_dataset("coords", data=coords)
            _attach(found, own)
    return target


def write_trident(root: Path, bag: Bag, dtype: str = "float32") -> Path:
    """Write `features_<encoder>` and `patches` in the folder of the tiling; return the former.

    What is not known is written as TRIDENT writes it, the text `None`; so is the folder, because
    paths may name patients.
    """
    coords = _needed(bag)
    size0, size = bag.patch_size_level0, bag.patch_size or bag.patch_size_level0
    magnification = _NOMINAL_MPP / bag.mpp_um if bag.mpp_um else None
    overlap = round(bag.overlap_level0 * size / size0) if size and size0 else 0
    facts = {
        "patch_size": size,
        "patch_size_level0": size0,
        "level0_magnification": _short(_NOMINAL_MPP / bag.level0_mpp_um)
        if bag.level0_mpp_um
        else None,
        "target_magnification": _short(magnification),
        "overlap": overlap,
        "name": bag.slide,
        "level0_width": bag.level0_size[0] if bag.level0_size else None,
        "level0_height": bag.level0_size[1] if bag.level0_size else None,
    }
    if bag.aspect != 1 and size0:
        facts[_HEIGHT] = round(size0 * bag.aspect)
    if magnification and size:
        root = root / f"{_short(magnification)}x_{size}px_{overlap}px_overlap"
    encoder = bag.encoder or "unknown"
    target = root / f"features_{encoder}" / f"{bag.slide}.h5"
    places = {**facts, "savetodir": None}
    with _new_hdf5(target) as file:
        values = bag.features.astype(dtype)
        found = file.create_dataset("features", data=values, chunks=_rows(values, 1))
        own = {"name": bag.slide, "savetodir": None, "encoder": encoder}
        if "computed_in" in bag.attributes:
            own["computed_in"] = bag.attributes["computed_in"]
        _attach(found, own)
        _attach(file.create_dataset("coords", data=coords), places)
    with _new_hdf5(root / "patches" / f"{bag.slide}_patches.h5") as file:
        _attach(file.create_dataset("coords", data=coords), places)
    return target


def _short(value: float | None) -> float | int | None:
    return int(value) if value is not None and float(value).is_integer() else value


def _needed(bag: Bag) -> Array:
    if bag.coords is None:
        raise DataError(
            f"{bag.path or bag.slide}: features without coordinates cannot be written in this "
            "layout. Give the file of the tiling step (patches=…)."
        )
    return bag.coords


def _rows(values: Array, count: int) -> tuple[int, int] | None:
    return (min(count, len(values)), values.shape[1]) if values.size else None


def _attach(found: Any, facts: Mapping[str, Any]) -> None:
    for name, value in facts.items():
        found.attrs[name] = "None" if value is None else value


@contextmanager
def _new_hdf5(path: Path) -> Iterator[Any]:
    """Open a new HDF5 file that takes its name when the block ends without an error."""
    h5py = require("h5py", "pathology")
    with _hidden(path) as hidden, h5py.File(hidden, "w", locking=False) as file:
        yield file


@contextmanager
def _hidden(path: Path) -> Iterator[Path]:
    # of a long name the beginning, so that no file system finds this one too long
    hidden = path.with_name(f".{path.name[:40]}{PART}{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield hidden
        os.replace(hidden, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        hidden.unlink(missing_ok=True)
