"""Which slides have features, of which patients, in which split, of which class."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from domainssl.errors import ConfigError, DataError, counted
from domainssl.io.ids import ids_of, is_hashed
from domainssl.io.slide.bag import Bag, check_step
from domainssl.io.slide.bag_folders import BagFile, Bags, find_bags
from domainssl.io.slide.features import bag_header
from domainssl.io.slide.listed import MppColumns
from domainssl.io.slide.pyramid import ENDINGS
from domainssl.io.subjects import (
    Found,
    alike,
    first_few,
    patients_in_two_splits,
    split_of,
)
from domainssl.io.tables import MANIFESTS, own_columns, read_table, without_patient

__all__ = ["SlideBag", "WantedSlides", "find_slides", "slides_of_table"]

_SLIDES = ("slide", "slide_id", "id", "wsi", "path")
_PATIENTS = ("patient", "patient_id", "case_id")
_TCGA = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}")
_WHERE = "data.init_args"
_NAMED = 5  # slides that a message names
_MPP_TOLERANCE = 0.1
_NOMINAL = 0.25  # of tiles cut by the nominal power: scanners of 40x have 0.2 to 0.3 um


@dataclass(frozen=True, kw_only=True)
class SlideBag:
    """A slide with features.

    Attributes:
        id: Name of the slide.
        patient: Whose it is; slides of one patient stay in one split.
        file: Where its features lie.
        tiles: Number of tiles N.
        split: `train`, `val`, `test`, or empty where the data do not say.
        label: Class of the slide; empty where unknown.
    """

    id: str
    patient: str
    file: BagFile
    tiles: int
    split: str = ""
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class WantedSlides:
    """What is looked for.

    Attributes:
        dim: Width of the features.
        manifest: Table of the slides, relative to the root; None takes one that is there.
        splits: File of splits in CLAM's layout, relative to the root; None for none.
        patches: Folder of the tiling step, relative to the root; None searches beside the features.
        encoder: Which features, where there are several.
        patient: Regular expression whose first group, found in the name of a slide, is its patient.
        label: Column of the table that holds the class; empty for none.
        mpp_um: Micrometres per pixel of the tiles; None takes all.
        as_grid: Whether a bag has to say how large its tiles are at level 0.
        level_downsample: See `read_bag`.
        patch_size_level0: See `read_bag`.
    """

    dim: int
    manifest: str | None = None
    splits: str | None = None
    patches: str | None = None
    encoder: str = ""
    patient: str = ""
    label: str = "label"
    mpp_um: float | None = None
    as_grid: bool = False
    level_downsample: float | None = None
    patch_size_level0: int | None = None


def find_slides(root: str, wanted: WantedSlides) -> Found[SlideBag]:
    """Find the bags of a folder, and what a table says of their slides.

    Raises:
        DataError: There are none, their features have another width, or a patient is in two splits.
        ConfigError: The table, or a choice among several encoders, is missing.
    """
    patches = None if wanted.patches is None else os.path.join(root, wanted.patches)
    bags = find_bags(root, patches=patches, encoder=wanted.encoder)
    path = _table(root, wanted.manifest)
    rows, problems = ({}, []) if path is None else _rows(path, bags, wanted)
    chosen = None if wanted.splits is None else _clam_splits(os.path.join(root, wanted.splits))
    if chosen is not None:
        there = {file.slide for file in bags.files}
        chosen = {_as_file(name, there): split for name, split in chosen.items()}
        problems += _unmatched(chosen.keys(), {file.slide for file in bags.files}, wanted.splits)
    asked = [
        file
        for file in bags.files
        if (path is None or file.slide in rows) and (chosen is None or file.slide in chosen)
    ]
    sizes, odd = _measured(root, asked, wanted, _resolutions(rows, path))
    problems += odd
    slides = _named(sizes, rows, path, chosen, wanted)
    patients_in_two_splits(slides, path or root, "Slides")
    if wanted.label not in ("", WantedSlides.label) and not any(each.label for each in slides):
        raise DataError(
            f"{path or root}: {_WHERE}.labels.column is {wanted.label!r}, but no slide has a class "
            "there. It is a column of the table of slides."
        )
    problems += alike(slides, path or root)
    return Found(layout=bags.layout, items=slides, problems=problems)


def slides_of_table(root: str, bags: Bags) -> tuple[str, list[SlideBag], list[str]] | None:
    """Return what the table beside some bags says of them, without opening them.

    Returns:
        The table, its slides that have features, and what is odd; None without a table.

    Raises:
        DataError: The table cannot be used, or a patient is in two splits.
    """
    path = _table(root, None)
    if path is None:
        return None
    wanted = WantedSlides(dim=0)
    rows, problems = _rows(path, bags, wanted)
    slides = _named([(f, 0) for f in bags.files if f.slide in rows], rows, path, None, wanted)
    patients_in_two_splits(slides, path, "Slides")
    return path, slides, [*problems, *alike(slides, path)]


def _named(
    sizes: Sequence[tuple[BagFile, int]],
    rows: Mapping[str, Mapping[str, str]],
    path: str | None,
    chosen: Mapping[str, str] | None,
    wanted: WantedSlides,
) -> list[SlideBag]:
    """Return bags, with their tiles, as slides of a patient, split and class."""
    slides = []
    for file, tiles in sizes:
        known = rows.get(file.slide, {})
        named = (is_hashed(file.slide) and _first(known, _SLIDES).strip()) or file.slide
        patient = _first(known, _PATIENTS) or _patient(named, wanted.patient)
        slides.append(
            SlideBag(
                id=file.slide,
                patient=patient,
                file=file,
                tiles=tiles,
                split=(
                    _split(path, file.slide, known.get("split", ""))
                    if chosen is None
                    else chosen[file.slide]
                ),
                label=known.get(wanted.label, "") if wanted.label else "",
            )
        )
    return slides


def _measured(
    root: str, files: Sequence[BagFile], wanted: WantedSlides, stated: Mapping[str, float]
) -> tuple[list[tuple[BagFile, int]], list[str]]:
    """Return the bags that can be read, with their tiles, and why others are left out.

    Args:
        root: The folder, for messages.
        files: The bags.
        wanted: What their features have to be.
        stated: Micrometres per pixel of level 0 of slides, by the table.

    Raises:
        DataError: None is left.
    """
    found: list[tuple[BagFile, int]] = []
    kept: list[Bag] = []
    problems: list[str] = []
    lost: list[str] = []
    others: list[tuple[str, str]] = []
    for file in files:
        try:
            tiles, bag = bag_header(
                file.path,
                patches=file.patches,
                level_downsample=wanted.level_downsample,
                patch_size_level0=wanted.patch_size_level0,
            )
            if tiles and (wanted.as_grid or bag.coords is None):
                check_step(bag)
        except DataError as error:
            lost.append(f"{error} The slide is left out.")
            continue
        if tiles == 0:
            problems.append(f"{file.slide}: no tile (a slide without tissue)")
            continue
        other = _other_features(bag, wanted, stated.get(file.slide))
        if other is None:
            found.append((file, tiles))
            kept.append(bag)
        else:
            others.append(other)
    if others and not found:
        raise DataError(" ".join(others[-1]))
    problems += first_few(
        lost, f"{len(lost)} of {len(files)} slides cannot be read and are left out."
    )
    problems += first_few(
        [f"{text} The slide is left out." for text, _ in others],
        f"{len(others)} of {len(files)} slides in all have other features and are left out.",
    )
    if not found:
        raise DataError(f"{root}: none of {counted(len(files), 'slide')} is left. {problems[0]}")
    return found, [*problems, *_mixed(root, kept)]


def _other_features(bag: Bag, wanted: WantedSlides, stated: float | None) -> tuple[str, str] | None:
    """Return how the features of a bag differ from what is wanted, and what to do; None if not."""
    where = f"{_WHERE}.modalities.<name>"
    if bag.dim != wanted.dim:
        return (
            f"{bag.path}: {bag.dim} features per tile, the configuration says {wanted.dim}.",
            f"Set {where}.dim to {bag.dim}, or give the features of the encoder that is meant.",
        )
    if bag.encoder and wanted.encoder and bag.encoder != wanted.encoder:
        return (
            f"{bag.path}: encoder is {bag.encoder!r}, the configuration says {wanted.encoder!r}.",
            f"Correct {where}.encoder, or give the features that are meant.",
        )
    of_table = None
    if stated and bag.patch_size_level0 and bag.patch_size:
        of_table = stated * bag.patch_size_level0 / bag.patch_size
    for mpp, tolerance, source in (
        (bag.mpp_um, _MPP_TOLERANCE, ""), (of_table, _NOMINAL, " by the table of slides"),
    ):  # fmt: skip
        if mpp and wanted.mpp_um and abs(mpp / wanted.mpp_um - 1) > tolerance:
            return (
                f"{bag.path}: mpp_um is {mpp:g}{source}, the configuration says {wanted.mpp_um:g}.",
                f"Correct {where}.mpp_um, or extract the slide at that resolution.",
            )
    return None


def _mixed(root: str, bags: Sequence[Bag]) -> list[str]:
    """Say which encoders and resolutions stand side by side: their vectors do not compare."""
    problems = []
    encoders = Counter(bag.encoder for bag in bags if bag.encoder)
    if len(encoders) > 1:
        shown = ", ".join(f"{name} ({counted(n, 'slide')})" for name, n in encoders.most_common())
        problems.append(
            f"{root}: features of {len(encoders)} encoders of one width, which do not compare: "
            f"{shown}. Set {_WHERE}.modalities.<name>.encoder to one of them; the others are left "
            "out then"
        )
    whole = [bag for bag in bags if "int" in bag.dtype and bag.layout != "zarr"]
    if 0 < len(whole) < len(bags):
        problems.append(
            f"{whole[0].path}: features of {whole[0].dtype}, as of {counted(len(whole), 'slide')} "
            f"of {len(bags)}; the others are fractions. Numbers that were quantised need the scale "
            "that only bags of our own layout keep; extract the slides again"
        )
    sizes = Counter(bag.mpp_um for bag in bags if bag.mpp_um)
    if sizes and max(sizes) > (1 + _MPP_TOLERANCE) * min(sizes):
        shown = ", ".join(f"{mpp:g} um ({counted(n, 'slide')})" for mpp, n in sizes.most_common())
        problems.append(
            f"{root}: tiles of {len(sizes)} resolutions: {shown}. Set "
            f"{_WHERE}.modalities.<name>.mpp_um to one of them; the others are left out then"
        )
    return problems


def _resolutions(rows: Mapping[str, Mapping[str, str]], path: str | None) -> dict[str, float]:
    """Return micrometres per pixel of level 0 by slide, where the table states them."""
    columns = MppColumns.among(list(next(iter(rows.values()), {})))
    stated = {name: columns.stated(row, "", f"{path}, {name}") for name, row in rows.items()}
    return {name: mpp for name, mpp in stated.items() if mpp is not None}


def _table(root: str, manifest: str | None) -> str | None:
    if manifest is None:
        there = [os.path.join(root, n) for n in MANIFESTS if os.path.isfile(os.path.join(root, n))]
        return there[0] if there else None
    path = os.path.join(root, manifest)
    if not os.path.isfile(path):
        raise ConfigError(
            f"{_WHERE}.slides.manifest: there is no file {path!r}; expected a CSV, JSON lines or "
            "Parquet file, relative to the root or absolute, with a column slide_id."
        )
    return path


def _rows(
    path: str, bags: Bags, wanted: WantedSlides
) -> tuple[dict[str, Mapping[str, str]], list[str]]:
    """Return the rows of a table by slide, and what is in one of both only."""
    columns, read = read_table(path)
    own = own_columns(columns, (*_SLIDES, *_PATIENTS, "split", wanted.label))
    if not read:
        raise DataError(f"{path}: has no row. Write one per slide, or remove the table.")
    rows = [{**row, **{name: row[column] for name, column in own.items()}} for row in read]
    column = next((name for name in _SLIDES if name in own), None)
    if column is None:
        raise DataError(
            f"{path}: no column {', '.join(_SLIDES)}, only {', '.join(columns)}. One of them names "
            "the slides as the files of features are named."
        )
    found: dict[str, Mapping[str, str]] = {}
    there = {file.slide for file in bags.files}
    for row in rows:
        name = _as_file(row[column].strip(), there)
        if name in found:
            raise DataError(f"{path}: slide {name!r} is there twice; keep one row per slide.")
        found[name] = row
    problems = _unmatched(found.keys(), there, path)
    patients = [own[name] for name in _PATIENTS if name in own]
    if not wanted.patient and not any(_TCGA.match(name) for name in there):
        problems += without_patient(path, columns, read, patients, "slide")
    if not found.keys() & there:
        raise DataError(
            f"{path}: none of its {len(found)} slides, such as {next(iter(found))!r}, has features "
            f"in {bags.folder}, whose files are named like {sorted(there)[0]!r}. Name the slides "
            "as the files are named."
        )
    return found, problems


def _unmatched(named: Set[str], there: Set[str], path: str | None) -> list[str]:
    """Return which slides are in a table alone, and which have features alone."""
    table = os.path.basename(path or "")
    problems = []
    for names, text in (
        (sorted(named - there), f"slides of {table} have no features"),
        (sorted(there - named), f"slides are not in {table}"),
    ):
        if names:
            more = ", …" if len(names) > _NAMED else ""
            problems.append(
                f"{len(names)} {text} and are left out: {', '.join(names[:_NAMED])}{more}"
            )
    return problems


def _clam_splits(path: str) -> dict[str, str]:
    """Return the split of every slide that a file of CLAM names.

    Raises:
        ConfigError: There is no such file.
        DataError: It is no file of splits, or a slide is in two of them.
    """
    if not os.path.isfile(path):
        raise ConfigError(
            f"{_WHERE}.slides.splits: there is no file {path!r}; expected one as CLAM writes it, "
            "such as splits_0.csv, relative to the root or absolute."
        )
    columns, rows = read_table(path)
    splits = [name for name in columns if split_of(name)]
    if not splits:
        raise DataError(
            f"{path}: no column train, val or test, only {', '.join(columns)}. Give splits_k.csv "
            "or splits_k_bool.csv of CLAM; a table with a column `split` is slides.manifest."
        )
    found: dict[str, str] = {}
    others = [name for name in columns if name not in splits]
    is_bool = {row[n].lower() for row in rows for n in splits} <= {"true", "false"}
    for row in rows:
        for name in splits:
            if is_bool and row[name].lower() == "false":
                continue
            cell = row[others[0]] if is_bool and others else row[name]
            slide, split = _stem(cell), split_of(name)
            if slide and found.setdefault(slide, split) != split:
                raise DataError(
                    f"{path}: slide {slide!r} is in {found[slide]} and in {split}; a slide "
                    "belongs in one split."
                )
    return found


def _as_file(name: str, files: Set[str]) -> str:
    """Return the name of the features of a slide that a table names.

    Tables name slides as files, without their endings, or, where `tile` named the features by
    keyed hashes, as the paths below the folder that it was given, with the ending or without.
    """
    if name in files or (stem := _stem(name)) in files:
        return name if name in files else stem
    if (
        flat := stem.replace("/", "__")
    ) in files:  # as `tile --ids plain` names a slide in a folder
        return flat
    if any(map(is_hashed, files)):
        asked = (name, *(f"{stem}{ending}" for ending in ENDINGS))
        return next((i for i in ids_of(asked, "hashed") if i in files), stem)
    return stem


def _stem(name: str) -> str:
    """Return the name of a slide without the ending of its file, as feature files are named."""
    return re.sub(
        r"\.(svs|ndpi|mrxs|scn|bif|tiff?|ome\.tiff?|dcm|h5|pt)\Z", "", name.strip(), flags=re.I
    )


def _first(row: Mapping[str, str], names: Sequence[str]) -> str:
    return next((row[name] for name in names if row.get(name)), "")


def _patient(slide: str, pattern: str) -> str:
    """Return the patient in the name of a slide; TCGA's barcodes are known."""
    if pattern:
        found = re.search(pattern, slide)
        if found is None or not found.groups():
            raise ConfigError(
                f"{_WHERE}.slides.patient: {pattern!r} finds no group in {slide!r}; expected a "
                "regular expression whose first group is the patient."
            )
        return found[1]
    barcode = _TCGA.match(slide)
    return barcode[0] if barcode else slide


def _split(path: str | None, slide: str, text: str) -> str:
    if text and not split_of(text):
        raise DataError(f"{path}: split of {slide!r} is {text!r}, expected train, val or test.")
    return split_of(text)
