"""Folders of feature bags: which layout, which slides; and one layout turned into another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from domainssl.errors import ConfigError, DataError, nearest
from domainssl.io.slide.features import Layout, read_bag, write_bag
from domainssl.pieces import Pieces, Plan, spread, work_through

__all__ = ["BagFile", "Bags", "convert_bags", "find_bags", "has_bag"]

_ENDINGS = (".h5", ".hdf5", ".pt")
_FEATURES, _TILING = "features_", "_overlap"


@dataclass(frozen=True)
class BagFile:
    """Where the features of a slide lie.

    Attributes:
        slide: Name of the slide.
        path: File or folder of its features.
        patches: File of the tiling step; None leaves the search to `read_bag`.
    """

    slide: str
    path: str
    patches: str | None = None


@dataclass(frozen=True)
class Bags:
    """The bags of a folder.

    Attributes:
        layout: `clam`, `trident`, `zarr`, or `files` for a folder of nothing but files.
        folder: Where the files of features lie.
        files: One per slide, by name.
    """

    layout: str
    folder: str
    files: Sequence[BagFile]


def find_bags(root: str | Path, *, patches: str | None = None, encoder: str = "") -> Bags:
    """Find the bags below a folder in the layout of CLAM or TRIDENT, or of our own.

    Args:
        root: Folder of the job, of one tiling of it, or of the files themselves.
        patches: Folder of the tiling step, where it is not beside the features.
        encoder: Which features, where there are those of several encoders.

    Raises:
        DataError: There are none.
        ConfigError: There are several tilings or encoders and none is chosen.
    """
    place = Path(root)
    if not place.is_dir():
        raise DataError(
            f"{place}: no such folder. Expected features in the layout of CLAM (h5_files/), of "
            "TRIDENT (features_<encoder>/) or of this library (<slide>.zarr); 'sample:bags' is the "
            "embedded sample."
        )
    if patches is not None and not Path(patches).is_dir():
        raise DataError(f"{patches}: no such folder; expected the patches of the tiling step.")
    layout, folder = _layout(place, encoder)
    names = sorted(os.listdir(folder))
    if layout == "zarr":
        found = [n for n in names if n.endswith(".zarr") and not n.startswith(".")]
    else:
        found = [n for n in names if n.lower().endswith(_ENDINGS) and not n.startswith(".")]
    files: dict[str, BagFile] = {}
    for name in found:
        slide = name.rpartition(".")[0]
        if slide in files:
            raise DataError(
                f"{folder}: {os.path.basename(files[slide].path)} and {name} are both of the slide "
                f"{slide!r}. Keep one file per slide."
            )
        files[slide] = BagFile(slide, str(folder / name), _patches(patches, slide))
    if not files:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise DataError(
            f"{folder}: no features of a slide, expected .h5, .pt or .zarr, one per slide. It "
            f"holds {shown or 'nothing'}."
        )
    if patches is not None and not any(os.path.isfile(str(f.patches)) for f in files.values()):
        slide = next(iter(files))
        raise DataError(
            f"{patches}: neither {slide}.h5 nor {slide}_patches.h5, nor those of any of "
            f"{len(files)} slides; expected the files of the tiling step of {folder}."
        )
    return Bags(layout, str(folder), tuple(files.values()))


def _layout(place: Path, encoder: str) -> tuple[str, Path]:
    names = {entry.name for entry in os.scandir(place) if entry.is_dir()}
    for name in ("h5_files", "pt_files"):
        if name in names:
            return "clam", place / name
    tilings = [place, *(place / name for name in sorted(names) if name.endswith(_TILING))]
    found = [
        tiling / name
        for tiling in tilings
        for name in sorted(os.listdir(tiling))
        if name.startswith(_FEATURES) and (tiling / name).is_dir()
    ]
    if found:
        return "trident", _chosen(place, found, encoder)
    if any(name.endswith(".zarr") for name in names):
        return "zarr", place
    return "files", place


def _chosen(place: Path, found: Sequence[Path], encoder: str) -> Path:
    known = sorted({path.name.removeprefix(_FEATURES) for path in found})
    fitting = [p for p in found if not encoder or p.name == _FEATURES + encoder]
    if not fitting:
        raise ConfigError(
            f"{place}: no features of the encoder {encoder!r}, only of {', '.join(known)}."
            f"{nearest(encoder, known)}"
        )
    if len(fitting) > 1:
        listed = ", ".join(str(p.relative_to(place)) for p in fitting)
        raise ConfigError(
            f"{place}: features in {listed}; expected those of one tiling and encoder. Choose the "
            "encoder, or give the folder of the tiling."
        )
    return fitting[0]


def _patches(folder: str | None, slide: str) -> str | None:
    """Return the file of the tiling step; one that is not there is told when the bag is read."""
    if folder is None:
        return None
    named = [Path(folder) / name for name in (f"{slide}.h5", f"{slide}_patches.h5")]
    return str(next((path for path in named if path.is_file()), named[0]))


def convert_bags(
    bags: Bags,
    output: str | Path,
    layout: Layout,
    plan: Plan,
    *,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write all bags in another layout; those that are there already are left alone.

    Args:
        bags: What `find_bags` has found.
        output: Folder to write; another one than they lie in.
        layout: `clam`, `trident` or `zarr`.
        plan: Processes, shard, and whether slides that cannot be read are left out.
        dtype: See `write_bag`.
        progress: Called with the slides done and their number.

    Returns:
        Number of slides of this call that are there now.

    Raises:
        DataError: A bag cannot be read or written.
        ConfigError: The output is where the bags lie.
    """
    target = Path(output)
    if target.resolve() in {Path(bags.folder).resolve(), *Path(bags.folder).resolve().parents}:
        raise ConfigError(f"{target}: the bags themselves lie there; choose another output.")
    own = plan.shard.mine(spread(bags.files, plan.limit))
    todo = [file for file in own if plan.restart or not has_bag(target, layout, file.slide)]
    bad: list[str] = []

    def take(file: BagFile, reason: str | None) -> None:
        if reason is not None:
            bad.append(file.slide)

    work = partial(_convert, output=target, layout=layout, dtype=dtype)
    pieces = Pieces(todo, len(own), name=lambda file: file.slide, noun="slides")
    work_through(pieces, work, plan, take, progress)
    return len(own) - len(bad)


def _convert(file: BagFile, output: Path, layout: Layout, dtype: str | None) -> str | None:
    try:
        write_bag(output, read_bag(file.path, patches=file.patches), layout, dtype=dtype)
    except DataError as error:
        return str(error)
    return None


def has_bag(
    output: Path, layout: Layout, slide: str, encoder: str = "*", since_ns: int = 0
) -> bool:
    """Tell whether `write_bag` has written a slide, of an encoder or of any, not before a time."""
    files: Iterable[Path] = output.glob(f"**/{_FEATURES}{encoder}/{slide}.h5")
    if layout == "zarr":
        files = [output / f"{slide}.zarr" / "zarr.json"]
    elif layout == "clam":
        if not (output / "patches" / f"{slide}.h5").is_file():
            return False
        files = [output / "h5_files" / f"{slide}.h5"]
    return any(file.is_file() and file.stat().st_mtime_ns >= since_ns for file in files)
