"""What slides, tile pictures and feature files hold: facts, colours, tissue, damage."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from domainssl.errors import DataError, DomainSSLError, parsing
from domainssl.inspection.files import band_rows
from domainssl.inspection.tables import add_row, facts_table, new_table, note_lines, values_table
from domainssl.io.slide.by_tifffile import opened
from domainssl.io.slide.listed import TABLES, ListedSlide, is_slide_table, slides_at
from domainssl.io.slide.picture import picture_facts, read_tile_picture
from domainssl.io.slide.pyramid import ENDINGS, Slide, iter_slides
from domainssl.io.slide.tiff_pages import is_ome
from domainssl.io.slide.tissue import TissueOptions, slide_tissue
from domainssl.pieces import spread

__all__ = [
    "are_colours",
    "inspect_pictures",
    "inspect_slides",
    "is_pictures",
    "is_slides",
    "picture_tables",
    "slide_tables",
]

Array = np.ndarray[Any, Any]
_TRIED = 16  # files of a folder that are looked at for what it is
_MEASURED = 8  # slides whose pixels are read
_LISTED = 1000  # slides, pictures
_STORED = 400  # stored tiles of a slide that are looked at for damage
_OVERVIEW = 512  # pixels
_READ = 64  # pictures whose pixels are read
_LARGE = 4096  # pixels of an untiled TIFF that is a slide and no tile
_TIFF = (".tif", ".tiff")
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")  # JPEG 2000 may be a map
_GEO = (33550, 33922, 34264, 34735)  # tags of GeoTIFF
_DARK = 64  # of 255: glass is brighter
_COLOURED = 60  # of 255: the brightest part of a slide is glass, which has no colour


def is_slides(path: str, names: Sequence[str] | None) -> bool:
    """Whether a local file is a slide or a table of slides, or the first file of a folder is one.

    Args:
        path: File or folder.
        names: What a folder holds, None for a file.
    """
    if names is None and path.lower().endswith(TABLES):
        return is_slide_table(path)
    if names is None:
        return path.lower().endswith(ENDINGS) and _kind(path) == "slide"
    return _first_kind(iter_slides(path)) == "slide"


def is_pictures(path: str, names: Sequence[str] | None) -> bool:
    """Whether a local file is a tile picture, or the first picture of a folder is."""
    if names is None:
        return path.lower().endswith((*_PICTURES, *_TIFF)) and _kind(path) == "picture"
    return _first_kind(_pictures(path, limit=_TRIED)) == "picture"


def are_colours(folders: Iterable[str]) -> bool:
    """Whether local folders of TIFF files hold slides, perhaps with masks, or tile pictures."""
    kinds = {_first_kind(_pictures(folder, limit=_TRIED)) for folder in folders}
    return kinds <= {"slide", "picture"} or ("slide" in kinds and "map" not in kinds)


def _first_kind(paths: Iterable[str]) -> str:
    """Return the kind of the first file that tells: neither a damaged one nor a mask does."""
    found = (kind for path in islice(paths, _TRIED) if (kind := _kind(path)) != "other")
    return next(found, "other")


def _kind(path: str) -> str:
    """Return `slide`, `picture`, `map` or `other`: TIFF without colours, or that is damaged."""
    if not path.lower().endswith((*_TIFF, ".btf", ".tf8")):
        return "picture" if path.lower().endswith(_PICTURES) else "slide"
    try:
        with opened(path) as tiff, parsing(f"{path}: the header"):
            page = tiff.pages[0]
            if any(tag in page.tags for tag in _GEO):
                return "map"
            if is_ome(page) or page.subifds:
                return "slide"
            if int(page.photometric) not in (2, 3, 6):
                return "other"
            is_large = max(page.imagewidth, page.imagelength) > _LARGE
            return "slide" if page.is_tiled or is_large else "picture"
    except DomainSSLError:
        return "other"


def _pictures(folder: str, *, limit: int | None = None) -> list[str]:
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(base, name)
            is_named = name.lower().endswith((*_PICTURES, *_TIFF)) and not name.startswith(".")
            if is_named and os.path.isfile(path):
                found.append(path)
                if limit is not None and len(found) == limit:
                    return found
    return found


def inspect_slides(path: str) -> dict[str, Any]:
    """Describe a slide, or the slides of a folder or a table.

    Returns:
        Plain data: `slides` with the facts of each header, and colours, tissue and damage of the
        first ones; `notes`; `problems`.
    """
    problems: list[str] = []
    found = slides_at(path)
    slides: list[dict[str, Any]] = []
    for listed in found[:_LISTED]:
        measure = sum("values" in entry for entry in slides) < _MEASURED
        try:
            slides.append(_described(listed, problems, measure=measure))
        except DataError as error:
            problems.append(str(error))
    notes = []
    for key, title in (("mpp", "resolutions in um"), ("backend", "backends")):
        counts = Counter(str(entry[key]) for entry in slides)
        if len(counts) > 1:
            shown = ", ".join(f"{name} ({count})" for name, count in counts.most_common(6))
            notes.append(f"{len(counts)} {title}: {shown}")
    if len(found) > _LISTED:
        notes.append(f"{len(found)} slides; the headers of the first {_LISTED} are read")
    return {
        "kind": "slides",
        "count": len(found),
        "measured": sum("values" in entry for entry in slides),
        "slides": slides,
        "notes": notes,
        "problems": problems,
    }


def _described(listed: ListedSlide, problems: list[str], *, measure: bool) -> dict[str, Any]:
    """Return the facts of a slide as plain data.

    Raises:
        DataError: It cannot be opened.
    """
    path = listed.path
    with Slide(path, mpp_um=listed.mpp_um) as slide:
        facts = slide.facts
        problems += [f"{path}: {text}" for text in facts.overruled]
        report: dict[str, Any] = {
            "path": facts.path,
            "backend": facts.backend,
            "format": facts.format,
            "size": list(facts.size),
            "levels": [list(size) for size in facts.levels],
            "downsamples": list(facts.downsamples),
            "mpp": None if facts.mpp is None else list(facts.mpp),
            "mpp_source": facts.mpp_source,
            "mpp_stated": [list(entry) for entry in facts.stated],
            "objective_power": facts.objective_power,
            "channels": list(facts.channels),
            "dtype": facts.dtype,
            "tile_size": list(facts.tile_size),
            "color_profile": facts.has_color_profile,
            "warnings": [text for text in facts.warnings if text not in facts.overruled],
        }
        if facts.mpp is None:
            try:
                facts.resolution()
            except DataError as error:
                problems.append(str(error))
        if measure:
            try:
                report |= _measured(slide)
            except DataError as error:
                problems.append(str(error))
        rows = report.get("values", ())
        if rows and all(row["min"] == row["max"] for row in rows):
            problems.append(
                f"{path}: the whole overview has the value {rows[0]['min']:g}; nothing is seen on "
                "the slide"
            )
        damage = report.get("damaged_tiles")
        if damage:
            shown = ", ".join(f"({x}, {y})" for _, x, y in damage[:4])
            problems.append(
                f"{path}: {len(damage)} of {report['checked_tiles']} stored tiles looked at cannot "
                f"be read, at {shown} of level 0; they are not valid, the rest is read"
            )
    return report


def _measured(slide: Slide) -> dict[str, Any]:
    """Return colours over the slide, its tissue, and damaged tiles among some of level 0.

    Raises:
        DataError: Most of the slide is damaged.
    """
    facts = slide.facts
    tissue = None
    if facts.is_rgb and facts.mpp is not None:
        options = TissueOptions(most_px=_OVERVIEW * 2)
        tissue = round(float(slide_tissue(slide, options).mask.mean()), 6)
    values, valid, down = slide.overview(_OVERVIEW)
    width, height = (max(1, int(n / d)) for n, d in zip(facts.size, down, strict=True))
    values, valid = values[:height, :width], valid[:height, :width]  # the last may reach beyond
    report: dict[str, Any] = {
        "values": band_rows(np.moveaxis(values, -1, 0), facts.channels, valid),
        "valid_fraction": round(float(valid.mean()), 6),
    }
    if tissue is not None:
        report["tissue_fraction"] = tissue
    odd = [f"{facts.path}: {facts.cost}"] if facts.cost else []
    if facts.is_rgb and facts.dtype == "uint16" and valid.any() and values[valid].max() < _DARK:
        odd.append(
            f"{facts.path}: 16-bit colours reach {values[valid].max()} of 255 after scaling to 8 "
            "bit: the scanner used fewer bits than the file states, and pictures are nearly black. "
            "Scale the colours to 16 or 8 bit"
        )
    if facts.is_rgb and facts.format == "dicom" and valid.any():
        bright = values[valid][np.argsort(values[valid].mean(-1))[-valid.sum() // 50 - 1 :]]
        if np.ptp(bright.mean(0)) > _COLOURED:
            odd.append(
                f"{facts.path}: the brightest part has the colour "
                f"{bright.mean(0).round().astype(int).tolist()}, expected glass: are luma and "
                "chroma read as red, green and blue?"
            )
    if odd:
        report["odd"] = odd
    width, height = facts.tile_size
    columns, rows = -(-facts.size[0] // width), -(-facts.size[1] // height)
    chosen = spread(range(columns * rows), _STORED)
    for index in chosen:
        x, y = index % columns * width, index // columns * height
        slide.read_box((x, y, x + width, y + height), (width, height))
    report["stored_tiles"], report["checked_tiles"] = columns * rows, len(chosen)
    report["damaged_tiles"] = [[d.level, d.x, d.y] for d in slide.damaged if d.level == 0]
    return report


def inspect_pictures(path: str) -> dict[str, Any]:
    """Describe a tile picture or those of a folder.

    Returns:
        Plain data: `sizes`, `modes` and `formats` with their counts, `folders` with theirs,
        `values` of the pictures that were read; `notes`; `problems`.
    """
    problems: list[str] = []
    paths = [path] if os.path.isfile(path) else _pictures(path)
    facts = []
    for name in spread(paths, _LISTED):
        try:
            facts.append(picture_facts(name))
        except DataError as error:
            problems.append(str(error))
    total, square, count, valid, read = np.zeros(3), np.zeros(3), 0, 0, 0
    low, high = np.full(3, 255), np.zeros(3, int)
    for entry in spread(facts, _READ):
        try:
            rgb, seen = read_tile_picture(entry.path)
        except DataError as error:
            problems.append(str(error))
            continue
        read += 1
        kept = rgb[seen].astype(np.float64)
        count, valid = count + seen.size, valid + len(kept)
        if len(kept):
            total, square = total + kept.sum(0), square + (kept**2).sum(0)
            low, high = np.minimum(low, kept.min(0)), np.maximum(high, kept.max(0))
    mean = total / max(valid, 1)
    std = np.sqrt(np.maximum(square / max(valid, 1) - mean**2, 0))
    sizes = Counter(f"{w} x {h}" for w, h in (entry.size for entry in facts))
    notes = [] if len(sizes) < 2 else [f"{len(sizes)} sizes of pictures; tiles usually have one"]
    if len(paths) > _LISTED:
        notes.append(f"{len(paths)} pictures; the headers of {_LISTED} of them are read")
    folders = Counter(os.path.relpath(os.path.dirname(p), path) for p in paths if p != path)
    return {
        "kind": "pictures",
        "count": len(paths),
        "measured": read,
        "sizes": dict(sizes.most_common(8)),
        "modes": dict(Counter(entry.mode for entry in facts)),
        "formats": dict(Counter(entry.format for entry in facts)),
        "dtypes": dict(Counter(entry.dtype for entry in facts)),
        "folders": dict(folders.most_common(16)),
        "valid_fraction": round(valid / count, 6) if count else None,
        "values": [
            {"band": name, "min": float(low[c]), "mean": float(mean[c]), "max": float(high[c]),
             "std": float(std[c])}
            for c, name in enumerate(("red", "green", "blue"))
        ] if valid else [],
        "notes": notes,
        "problems": problems,
    }  # fmt: skip


def slide_tables(report: Mapping[str, Any]) -> list[Any]:
    """Return a report of `inspect_slides` as tables."""
    parts: list[Any] = note_lines(report)
    for slide in report["slides"]:
        if "values" not in slide:
            continue
        shown = {k: v for k, v in slide.items() if k not in ("path", "values", "mpp_stated", "odd")}
        for name in ("size", "tile_size"):
            shown[name] = f"{shown[name][0]} x {shown[name][1]} pixels"
        shown["levels"] = ", ".join(f"{w} x {h}" for w, h in slide["levels"])
        shown["downsamples"] = ", ".join(f"{d:.6g}" for d in slide["downsamples"])
        shown["mpp"] = (
            None if slide["mpp"] is None else " x ".join(f"{m:.6g}" for m in slide["mpp"])
        )
        shown["warnings"] = "\n".join((*slide["warnings"], *slide.get("odd", ()))) or None
        shown["damaged_tiles"] = (
            ", ".join(f"({x}, {y})" for _, x, y in slide["damaged_tiles"][:8]) or "none"
        )
        parts.append(facts_table(slide["path"], shown))
        parts.append(values_table("valid pixels of the overview", slide["values"]))
    rest = [slide for slide in report["slides"] if "values" not in slide]
    if rest:
        table = new_table("not measured", "path", "size", "levels", "mpp", "backend")
        for slide in rest[:64]:
            mpp = "-" if slide["mpp"] is None else f"{slide['mpp'][0]:.4g}"
            size = " x ".join(map(str, slide["size"]))
            add_row(table, slide["path"], size, str(len(slide["levels"])), mpp, slide["backend"])
        parts.append(table)
    return parts


def picture_tables(report: Mapping[str, Any]) -> list[Any]:
    """Return a report of `inspect_pictures` as tables."""
    left_out = ("path", "kind", "values", "notes", "problems", "count", "measured", "next")
    facts = {k: v for k, v in report.items() if k not in left_out}
    parts = [*note_lines(report), facts_table("pictures", facts)]
    if report["values"]:
        parts.append(values_table("valid pixels, as RGB on white", report["values"]))
    return parts
