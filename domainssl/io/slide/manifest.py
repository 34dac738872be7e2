"""Find tiles and slides: which pictures show which place, in which stain, of which patient.

found = find_tiles("/data/tiles", Wanted(stains={"he": "he", "ihc": "ihc"}))
found.items[0].pictures["he"][0]        # "/data/tiles/he/slide01/0_512.png"
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from domainssl.errors import ConfigError, DataError, nearest
from domainssl.io.slide.listed import MppColumns, file_column, with_ending
from domainssl.io.slide.picture import ENDINGS
from domainssl.io.slide.pyramid import ENDINGS as SLIDES
from domainssl.io.slide.pyramid import describe_slide, list_slides
from domainssl.io.subjects import (
    EVERY,
    Found,
    alike,
    ends_with,
    patients_in_two_splits,
    shared_files,
    split_of,
)
from domainssl.io.tables import MANIFESTS, own_columns, read_table, without_patient

__all__ = ["LAYOUTS", "TileSet", "WantedTiles", "find_tiles"]

LAYOUTS = ("manifest", "folder", "slides")
_TIFF = (".tif", ".tiff")
_TRIED = 16  # files that are looked at for what they are
_TILED_SIDE, _SIDE = 2048, 4096  # pixels: a larger TIFF of one level, tiled or not, is a slide
_NAMED = 5  # missing files that a message names
_PATIENT = ("patient", "patient_id", "case_id")
_OWN = ("id", "slide", "slide_id", "split", *_PATIENT)
_WHERE = "data.init_args"


@dataclass(frozen=True, kw_only=True)
class TileSet:
    """The tiles of one slide, in all stains.

    Attributes:
        id: The slide.
        patient: Whose it is; slides of one patient stay in one split.
        split: `train`, `val`, `test`, or empty where the data do not say.
        names: Id of every tile.
        pictures: File per tile in every stain, by modality key; empty where a tile lacks one. No
            stains where tiles are cut out of slides.
        labels: Class per tile, empty where unknown; of a slide before it has tiles, its own.
        slides: File of the slide in every stain that it has, where tiles are cut out of slides.
        corners: Upper left corners of tiles in pixels of level 0 of the first of `slides`, int64
            (N, 2), x and y.
        mpp_um: Micrometres per pixel by modality key, where a table states them: of level 0 of
            slides, of the first tile of pictures.
    """

    id: str
    patient: str
    split: str = ""
    names: Sequence[str] = ()
    pictures: Mapping[str, Sequence[str]] = field(default_factory=dict)
    labels: Sequence[str] = ()
    slides: Mapping[str, str] = field(default_factory=dict)
    corners: Any = None
    mpp_um: Mapping[str, float] = field(default_factory=dict)

    def shows(self, name: str) -> int:
        """Return the number of tiles that have a stain."""
        if self.slides:
            return len(self) if name in self.slides else 0
        return sum(bool(path) for path in self.pictures[name])

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.names)


@dataclass(frozen=True, kw_only=True)
class WantedTiles:
    """What is looked for.

    Attributes:
        stains: Name of the stain in the data, per modality key.
        label: Column of a table that holds the class of a tile; empty for none.
        patient: Regular expression whose first group, found in a tile's id, is the patient.
        slide: The same for its slide.
    """

    stains: Mapping[str, str]
    label: str = "label"
    patient: str = ""
    slide: str = ""


@dataclass(kw_only=True)
class _Rows:
    """The tiles of a slide while they are collected."""

    patient: str
    split: str
    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    files: list[Mapping[str, str]] = field(default_factory=list)
    mpp_um: Mapping[str, float] = field(default_factory=dict)


def find_tiles(
    root: str, wanted: WantedTiles, *, manifest: str | None = None, layout: str = "auto"
) -> Found[TileSet]:
    """Return the tiles under a folder, by slide; those of one patient are in one split.

    Args:
        root: The folder.
        wanted: Stains and labels that are looked for.
        manifest: A table that lists the tiles; paths in it are relative to the root.
        layout: One of `LAYOUTS`, or `auto`, which recognises it. `slides`: the files, in folders or
            a table, are whole slides, whose tiles are not known here.

    Raises:
        ConfigError: There is no such folder or manifest.
        DataError: Files or columns are missing, or a patient is in two splits.
    """
    if not os.path.isdir(root):
        raise ConfigError(
            f"{_WHERE}.root: {root!r} is no folder. Give one with tiles, or the embedded sample: "
            "sample:tiles."
        )
    there = [name for name in MANIFESTS if os.path.isfile(os.path.join(root, name))]
    if manifest is not None and not os.path.isfile(os.path.join(root, manifest)):
        raise ConfigError(
            f"{_WHERE}.tiles.manifest: there is no file {os.path.join(root, manifest)!r}; expected "
            "a CSV, JSON lines or Parquet file, relative to the root or absolute."
        )
    if layout == "manifest" and manifest is None and not there:
        raise ConfigError(
            f"{_WHERE}.tiles.layout: manifest, but {root} has none of {', '.join(MANIFESTS)}. "
            f"Name the table in {_WHERE}.tiles.manifest."
        )
    if layout != "folder" and (manifest is not None or there):
        path = os.path.join(root, manifest or there[0])
        found = _read_manifest(path, root, wanted, layout)
    else:
        found = _read_folder(root, wanted, layout)
    patients_in_two_splits(found.items, root, "Slides")
    if wanted.label not in ("", WantedTiles.label) and not any(each.labels for each in found.items):
        raise DataError(
            f"{root}: {_WHERE}.labels.column is {wanted.label!r}, but no tile has a class there "
            f"(layout {found.layout}). It is a column of the table of tiles or slides."
        )
    shared = shared_files(_files(found), root, "picture", "slides")
    problems = [*found.problems, *shared, *alike(found.items, root)]
    items = sorted(found.items, key=lambda each: each.id)
    return replace(found, items=items, problems=problems)


def _files(found: Found[TileSet]) -> Iterator[tuple[Hashable, str, TileSet]]:
    """Yield the files of a table; those of a folder are there once."""
    for each in found.items if found.layout != "folder" else ():
        for paths in (*each.pictures.values(), each.slides.values()):
            yield from ((os.path.normpath(path), path, each) for path in paths if path)


# A table ------------------------------------------------------------------------------------


def _read_manifest(path: str, root: str, wanted: WantedTiles, layout: str) -> Found[TileSet]:
    """Return the tiles of a table: `id`, `patient`, `slide`, `split`, a column per stain."""
    columns, rows = read_table(path)
    every = file_column(columns)
    wanted = replace(wanted, stains={n: _column(s, every) for n, s in wanted.stains.items()})
    for name, column in wanted.stains.items():
        if column not in columns:
            raise DataError(
                f"{path}: no column {column!r} for the modality {name!r}, only "
                f"{', '.join(columns)}.{nearest(column, columns)} Set "
                f"{_WHERE}.modalities.{name}.stain to one of them."
            )
    own = own_columns(columns, (*_OWN, wanted.label))
    if wanted.label and wanted.label != WantedTiles.label and wanted.label not in own:
        raise DataError(
            f"{path}: no column {wanted.label!r}, only {', '.join(columns)}."
            f"{nearest(wanted.label, columns)} Set {_WHERE}.labels.column to one of them."
        )
    slides: dict[str, _Rows] = {}
    seen: set[str] = set()
    missing: list[str] = []
    named, mpp = [own[name] for name in _PATIENT if name in own], MppColumns.among(columns)
    problems = [] if wanted.patient else without_patient(path, columns, rows, named, "slide")
    cells_there = (row[c] for row in rows for c in wanted.stains.values() if row[c])
    files_there = (with_ending(os.path.join(root, cell)) for cell in cells_there)
    are_slides = layout == "slides" or (layout == "auto" and _are_slides(files_there))
    for number, read in enumerate(rows, 2):
        where = f"{path}, line {number}"
        row = {**read, **{name: read[column] for name, column in own.items()}}
        cells = {name: row[column] for name, column in wanted.stains.items() if row[column]}
        if not cells:
            problems.append(f"{where}: no picture of {', '.join(wanted.stains)}")
            continue
        tile = row.get("id") or os.path.splitext(next(iter(cells.values())))[0]
        if tile in seen:
            raise DataError(f"{where}: the id {tile!r} stands twice; every tile needs its own.")
        seen.add(tile)
        files = {name: os.path.join(root, cell) for name, cell in cells.items()}
        if every in wanted.stains.values():
            files = {name: with_ending(file) for name, file in files.items()}
        missing += [file for file in files.values() if not os.path.isfile(file)]
        split = row.get("split", "")
        if split and not split_of(split):
            raise DataError(f"{where}: split is {split!r}, expected train, val or test.")
        slide = _group(wanted.slide, tile, "slide") or _first(row, "slide", "slide_id")
        slide = slide or ("" if are_slides else os.path.dirname(tile)) or tile
        patient = _group(wanted.patient, tile, "patient") or _first(row, *_PATIENT) or slide
        label = row.get(wanted.label, "") if wanted.label else ""
        _add(slides, slide, patient, split_of(split), tile, label, files, where)
        stated = {name: mpp.stated(read, wanted.stains[name], where) for name in files}
        slides[slide].mpp_um = slides[slide].mpp_um or {n: v for n, v in stated.items() if v}
    if missing:
        raise DataError(
            f"{path}: {len(missing)} files that it names are not there, such as "
            f"{', '.join(missing[:_NAMED])}. Paths are relative to {root}; leave the cell empty "
            "where a tile lacks a stain."
        )
    sets = _slides(slides, path) if are_slides else _sets(slides, wanted)
    return Found(layout="slides" if are_slides else "manifest", items=sets, problems=problems)


def _column(stain: str, every: str | None) -> str:
    """Return the column of a stain; of `*` that which names files, as in a list of slides."""
    return every if stain == EVERY and every is not None else stain


def _first(row: Mapping[str, str], *columns: str) -> str:
    return next((row[name] for name in columns if row.get(name)), "")


# A folder -----------------------------------------------------------------------------------


def _read_folder(root: str, wanted: WantedTiles, layout: str) -> Found[TileSet]:
    """Return the tiles of a folder: `[split/]<stain>/<slide>/<x>_<y>.png`, in any order of these.

    A picture belongs to the stain that is one of its folders or ends its name. The rest of the
    path is the tile, its last folder the slide, its first folder the patient. Of whole slides,
    the rest of the path is the slide.
    """
    if layout == "auto":
        layout = _recognised(root, wanted)
    paths = list(_pictures(root)) if layout != "slides" else list_slides(root)
    files: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    matched: set[str] = set()
    names: list[str] = []
    for path in paths:
        parts = _parts(path, root)
        names.append(os.path.relpath(path, root))
        for name, stain in wanted.stains.items():
            tile = _tile_of(parts, stain)
            if tile is None:
                continue
            matched.add(name)
            own = files.setdefault(tile, {})
            if name in own:
                text = f"{path}: a second picture of {name!r} beside {own[name]}; left out."
                problems.append(text)
            else:
                own[name] = path
    _must_match(root, wanted, matched, names)
    slides: dict[str, _Rows] = {}
    for tile, own in sorted(files.items()):
        folders = tile.split("/")[:-1]
        split = split_of(folders[0]) if folders else ""
        folders = folders[bool(split) :]
        slide = _group(wanted.slide, tile, "slide")
        slide = slide or (tile if layout == "slides" else "/".join(folders))
        if not slide:
            raise DataError(
                f"{root}: the tile {tile!r} lies in no folder of a slide. Lay tiles out as "
                f"<stain>/<slide>/<x>_<y>.png, or set {_WHERE}.tiles.slide to a regular "
                "expression with one group that finds the slide in a tile's name."
            )
        patient = _group(wanted.patient, tile, "patient") or (folders[0] if folders else slide)
        _add(slides, slide, patient, split, tile, "", own, os.path.join(root, tile))
    if layout == "slides":
        return Found(layout="slides", items=_slides(slides, root), problems=problems)
    return Found(layout="folder", items=_sets(slides, wanted), problems=problems)


def _parts(path: str, root: str) -> list[str]:
    """Return the folders of a file below the root, and its name without the ending."""
    *folders, name = os.path.relpath(path, root).split(os.sep)
    return [*folders, os.path.splitext(name)[0]]


def _recognised(root: str, wanted: WantedTiles) -> str:
    """Return `slides` or `folder`, by those files that show a stain which is wanted.

    Raises:
        ConfigError: There are both, whole slides and pictures.
    """
    stains = wanted.stains.values()

    def shown(paths: Iterable[str]) -> Iterator[str]:
        return (p for p in paths if any(_tile_of(_parts(p, root), s) is not None for s in stains))

    slides = list(shown(list_slides(root)))
    slide = next((path for path in slides if not path.lower().endswith(_TIFF)), None)
    if slide is None and _are_slides(slides):
        slide = slides[0]
    pictures = (path for path in _pictures(root) if not path.lower().endswith(_TIFF))
    picture = None if slide is None else next(shown(pictures), None)
    if picture is not None:
        raise ConfigError(
            f"{_WHERE}.tiles.layout: {root} holds whole slides, such as {slide}, and pictures, "
            f"such as {picture}. Say which are read: slides, or folder for the pictures; or let "
            f"{_WHERE}.modalities.<name>.stain name the folder of one kind."
        )
    return "folder" if slide is None else "slides"


def _tile_of(parts: Sequence[str], stain: str) -> str | None:
    """Return the path of a picture without the stain; None where it shows another one."""
    if stain == EVERY:
        return "/".join(parts)
    before = ends_with(parts[-1], stain)
    if before:
        return "/".join([*parts[:-1], before])
    lowered = [part.lower() for part in parts[:-1]]
    if stain.lower() not in lowered:
        return None
    at = lowered.index(stain.lower())
    return "/".join([*parts[:at], *parts[at + 1 :]])


def _pictures(root: str) -> Iterable[str]:
    """Yield all pictures below a folder, sorted; hidden files, pipes and lost links are not."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.lower().endswith(ENDINGS) and name[0] != "." and os.path.isfile(path):
                yield path


def _must_match(root: str, wanted: WantedTiles, matched: set[str], names: Sequence[str]) -> None:
    if not names:
        raise DataError(
            f"{root}: no tile there ({', '.join(ENDINGS)}). Check {_WHERE}.root, or take the "
            "embedded sample: sample:tiles."
        )
    for name, stain in wanted.stains.items():
        if name not in matched:
            raise DataError(
                f"{root}: no picture lies in a folder {stain!r} or has a name that ends with it, "
                f"as modality {name!r} asks for; there are {len(names)} pictures, such as "
                f"{', '.join(names[:3])}. Set {_WHERE}.modalities.{name}.stain to the name of the "
                f"folder, or to '{EVERY}' where every picture is a tile."
            )


def _are_slides(paths: Iterable[str]) -> bool:
    """Tell whole slides from pictures by the first file that tells; damaged ones do not."""
    told = (found for path in islice(paths, _TRIED) if (found := _is_slide(path)) is not None)
    return next(told, False)


def _is_slide(path: str) -> bool | None:
    """Tell a whole slide from a picture of a tile: by its name, or by levels or size of a TIFF.

    Returns:
        None for a TIFF that cannot be read.
    """
    lower = path.lower()
    if not lower.endswith(_TIFF):
        return lower.endswith(SLIDES)
    try:
        facts = describe_slide(path)
    except DataError:
        return None
    is_tiled = all(t < s for t, s in zip(facts.tile_size, facts.size, strict=True))
    least = _TILED_SIDE if is_tiled else _SIDE
    return len(facts.levels) > 1 or max(facts.size) > least


# Both ---------------------------------------------------------------------------------------


def _group(pattern: str, name: str, option: str) -> str:
    """Return what the group of a pattern finds in a name; empty without a pattern."""
    if not pattern:
        return ""
    found = re.search(pattern, name)
    if found is None or not found.re.groups or not found[1]:
        raise DataError(
            f"{_WHERE}.tiles.{option}: {pattern!r} finds no group in the id {name!r}; expected a "
            "regular expression with one group, such as '(TCGA-..-....)'."
        )
    return found[1]


def _add(
    slides: dict[str, _Rows],
    slide: str,
    patient: str,
    split: str,
    tile: str,
    label: str,
    files: Mapping[str, str],
    where: str,
) -> None:
    """Add a tile to its slide, which is of one patient and in one split."""
    rows = slides.setdefault(slide, _Rows(patient=patient, split=split))
    for what, now, before in (("patient", patient, rows.patient), ("split", split, rows.split)):
        if now != before:
            raise DataError(
                f"{where}: the slide {slide!r} has the {what} {now!r} here and {before!r} before. "
                f"Tiles of one slide belong to one {what}; correct the table or the folders."
            )
    rows.names.append(tile)
    rows.labels.append(label)
    rows.files.append(files)


def _sets(slides: Mapping[str, _Rows], wanted: WantedTiles) -> list[TileSet]:
    return [
        TileSet(
            id=slide,
            patient=rows.patient,
            split=rows.split,
            names=rows.names,
            pictures={
                name: [files.get(name, "") for files in rows.files] for name in wanted.stains
            },
            labels=rows.labels if any(rows.labels) else (),
            mpp_um=rows.mpp_um,
        )
        for slide, rows in slides.items()
    ]


def _slides(slides: Mapping[str, _Rows], where: str) -> list[TileSet]:
    """Return whole slides, a file per stain each."""
    for slide, rows in slides.items():
        if len(rows.files) > 1:
            raise DataError(
                f"{where}: {len(rows.files)} files are of the slide {slide!r}: "
                f"{', '.join(rows.names[:_NAMED])}. A slide has one file per stain; correct the "
                f"column `slide`, or {_WHERE}.tiles.slide."
            )
    return [
        TileSet(
            id=slide,
            patient=rows.patient,
            split=rows.split,
            labels=rows.labels if any(rows.labels) else (),
            slides=dict(rows.files[0]),
            mpp_um=rows.mpp_um,
        )
        for slide, rows in slides.items()
    ]
