"""What single scans and folders of scans hold: grid, geometry, values, labels, what is left out."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from domainssl.errors import DataError
from domainssl.inspection.files import band_rows, find_geotiffs
from domainssl.inspection.tables import add_row, facts_table, new_table, note_lines, values_table
from domainssl.io.volume.dicom import is_series
from domainssl.io.volume.dicom_studies import series_at
from domainssl.io.volume.geometry import check_same_grid
from domainssl.io.volume.scan import (
    ENDINGS,
    Reading,
    ScanFacts,
    describe_scan,
    is_scan,
    iter_scans,
    read_scan,
    scans_and_aside,
)
from domainssl.sources.blank import only_values, say_only

__all__ = ["inspect_scans", "is_scans", "scan_tables"]

Array = np.ndarray[Any, Any]
_MEASURED = 16  # scans whose values are read
_LISTED = 1000  # whose headers are read
_VOLUMES = 8  # of one file
_LABELS = 256
_ODD_SLICE = 20.0  # times the usual range of a slice
_OTHER_DATA = (".zarr", ".zarr.zip", ".tar", ".zgroup", ".zmetadata", "zarr.json")


def is_scans(path: str, names: Sequence[str] | None) -> bool:
    """Whether a local file is a scan, or a folder holds some.

    Args:
        path: File or folder.
        names: What a folder holds, None for a file.
    """
    if names is None:
        return path.lower().endswith(ENDINGS) or is_scan(path)
    lowered = [name.lower() for name in names if not name.startswith(".")]
    if any(name.endswith(_OTHER_DATA) for name in lowered):
        return False
    if any(name.endswith(ENDINGS) for name in lowered):
        return True
    return any(True for _ in iter_scans(path)) and not find_geotiffs(path)


def inspect_scans(path: str) -> dict[str, Any]:
    """Describe a scan or the scans of a folder.

    Returns:
        Plain data: `scans` with the facts of each header and the values of the first ones;
        `contrasts` of file names that occur in several folders; `notes`; `problems`.
    """
    problems: list[str] = []
    paths = [path] if _is_one(path) else list(iter_scans(path))
    count = len(paths)
    entries = [entry for found in paths[:_LISTED] for entry in _one(found, problems)]
    facts = [entry.facts for entry in entries]
    scans = [_described(entry, problems, measure=n < _MEASURED) for n, entry in enumerate(entries)]
    problems += _blank(scans, is_one=_is_one(path))
    notes = [*_together(entries), *_grids(facts), *_unlike(facts)]
    if not _is_one(path):
        aside = scans_and_aside(path)[1]
        notes += aside.told(path)
        if aside.maps:
            notes.append(f"{path}: {len(aside.maps)} DICOM segmentations, which label maps may be")
    if count > _LISTED:
        notes.append(f"{count} scans; the headers of the first {_LISTED} are read")
    return {
        "kind": "scans",
        "count": count,
        "measured": sum("values" in scan for scan in scans),
        "contrasts": _contrasts([entry.path for entry in facts]),
        "scans": scans,
        "notes": notes,
        "problems": problems,
    }


@dataclass(frozen=True)
class _Entry:
    """A scan, how it is read, and what contrast a series of several shows."""

    facts: ScanFacts
    reading: Reading
    word: str = ""
    study: str = field(default="", repr=False)


def _is_one(path: str) -> bool:
    """Whether a path is one scan: a file, or a DICOM folder without scans below it."""
    if not os.path.isdir(path):
        return True
    return is_series(path) and all(found == path for found in islice(iter_scans(path), 2))


def _one(path: str, problems: list[str]) -> list[_Entry]:
    """Return facts and reading of the scan at a path, of each series where there are several."""
    readings = [(Reading(), "", "")]
    if os.path.isdir(path) or is_series(path):
        try:
            series = series_at(path)
        except DataError as error:
            problems.append(str(error))
            return []
        readings = [(Reading(series=s.key), s.word, s.study) for s in series] or readings
    found = []
    for reading, word, study in readings:
        try:
            found.append(_Entry(describe_scan(path, reading), reading, word, study))
        except DataError as error:
            problems.append(str(error))
    if len(found) > 1:
        problems += _several(path, found)
    return found


def _several(path: str, found: Sequence[_Entry]) -> list[str]:
    """Say how the series of a folder are read, where their contrasts do not tell them apart."""
    words = {(entry.study, entry.word) for entry in found if entry.word}
    if len(words) == len(found):
        return []
    names = ", ".join(
        f"{entry.reading.series} ({entry.word})" if entry.word else str(entry.reading.series)
        for entry in found
    )
    return [
        f"{path}: {len(found)} series: {names}. To read one of them set `series: <key>`; to read "
        "several, set the contrast of each modality to its word, where one series has it, to its "
        "key, or to its description with * for any letters"
    ]


def _together(entries: Sequence[_Entry]) -> list[str]:
    """Say which modalities read the series of flat folders, where their contrasts tell them."""
    words = Counter(entry.word for entry in entries if entry.word)
    several = Counter(entry.facts.path for entry in entries if entry.word)
    if max(several.values(), default=0) < 2:
        return []
    counts = ", ".join(f"{word} ({count})" for word, count in words.items())
    named = ", ".join(f"{word}: {{}}" for word in words)
    return [
        f"DICOM series by contrast: {counts}; modalities named after them read them as one exam "
        f"per folder or study: modalities: {{{named}}}"
    ]


def _described(entry: _Entry, problems: list[str], *, measure: bool) -> dict[str, Any]:
    """Return the facts of a scan as plain data, with its values if they are measured."""
    facts = entry.facts
    report: dict[str, Any] = {
        "path": facts.path,
        "series": entry.reading.series,
        "contrast": entry.word or None,
        "format": facts.format,
        "modality": facts.modality,
        "shape": list(facts.shape),
        "stored_shape": list(facts.stored_shape),
        "channels": facts.channels,
        "volumes": facts.volumes,
        "dtype": facts.dtype,
        "orientation": facts.orientation,
        "spacing": [round(size, 6) for size in facts.spacing],
        "spacing_unit": "mm",
        "affine": (facts.affine.round(6) + 0.0).tolist(),
        "value_unit": "hu" if facts.modality == "CT" else None,
        "left_out": list(facts.left_out),
        "warnings": list(facts.warnings),
    }
    if measure:
        try:
            report |= _values(facts, entry.reading)
        except DataError as error:
            problems.append(str(error))
    return report


def _values(facts: ScanFacts, reading: Reading) -> dict[str, Any]:
    """Return minimum, mean, maximum and deviation of valid values, after scaling, and labels."""
    rows, valid, labels, odd = [], [], None, []
    for volume in range(min(facts.volumes, _VOLUMES)):
        chosen = Reading(
            volume=volume if facts.volumes > 1 else None, series=reading.series, space=reading.space
        )
        scan = read_scan(facts.path, chosen)
        kept = np.ones(scan.values.shape[1:], bool) if scan.valid is None else scan.valid
        prefix = f"volume {volume}" if facts.volumes > 1 else "all"
        names = [f"{prefix}, channel {c}" if len(scan.values) > 1 else prefix
                 for c in range(len(scan.values))]  # fmt: skip
        rows += band_rows(scan.values, names, kept)
        valid.append(float(kept.mean()))
        held = [only_values(scan.values[c : c + 1], kept) for c in range(len(scan.values))]
        odd += [f"{n}: {say_only(v)}" for n, v in zip(names, held, strict=True) if v is not None]
        odd += _odd_slices(scan.values, kept, prefix)
        if facts.volumes == 1 and len(scan.values) == 1:
            labels = _labels(scan.values[0])
    notes = [f"{facts.path}: {text}" for text in odd]
    found: dict[str, Any] = {"values": rows, "valid_fraction": float(np.mean(valid))}
    if labels is not None:
        found["label_values"] = labels
    if notes:
        found["odd"] = notes
    return found


def _blank(scans: Sequence[Mapping[str, Any]], *, is_one: bool) -> list[str]:
    """Say which scans show nothing.

    Whole numbers of one value may be a map of labels without any, unless the scan was asked for.
    """
    found = []
    for scan in scans:
        rows = scan.get("values", ())
        spreads = {row["std"] for row in rows}
        if spreads == {None} or (spreads == {0.0} and (is_one or "label_values" not in scan)):
            held = [row["mean"] for row in rows if row["mean"] is not None]
            found.append(f"{scan['path']}: {say_only(held)}")
    return found


def _labels(values: Array) -> dict[str, int] | None:
    """Return how many voxels have each value, None where the values are no labels."""
    if values.dtype.kind not in "iu" or values.min() < 0:
        return None
    if values.max() < 2**16:
        counts = np.bincount(values.reshape(-1))
        found = np.flatnonzero(counts)
        counts = counts[found]
    else:
        found, counts = np.unique(values, return_counts=True)
    if len(found) > _LABELS // 2:
        return None
    return {str(int(value)): int(count) for value, count in zip(found, counts, strict=True)}


def _odd_slices(values: Array, valid: Array, name: str) -> list[str]:
    """Say which slices range far beyond the others, as after an error of a scanner's scaling."""
    if values.shape[-1] < 3:
        return []
    low = np.where(valid, values, np.inf).min(axis=(0, 1, 2))
    high = np.where(valid, values, -np.inf).max(axis=(0, 1, 2))
    ranges = np.where(high >= low, high - low, 0.0)
    usual = float(np.median(ranges))
    if usual <= 0:
        return []
    return [
        f"{name}: slice {k} ranges from {low[k]:.6g} to {high[k]:.6g}, "
        f"{ranges[k] / usual:.3g} times the usual range"
        for k in np.flatnonzero(ranges > _ODD_SLICE * usual)[:8]
    ]


def _stem(path: str) -> str:
    name = os.path.basename(path).lower()
    ending = max((e for e in ENDINGS if name.endswith(e)), key=len, default="")
    return name[: len(name) - len(ending)]


def _contrasts(paths: Sequence[str]) -> dict[str, int]:
    """Return file names, or what stands after their last `_`, that occur several times."""
    whole = Counter(_stem(path) for path in paths)
    counted = {name: count for name, count in whole.items() if count > 1}
    if not counted:
        ends = Counter(_stem(path).rpartition("_")[2] for path in paths if "_" in _stem(path))
        counted = {name: count for name, count in ends.items() if count > 1}
    return dict(sorted(counted.items(), key=lambda entry: (-entry[1], entry[0]))[:32])


def _grids(facts: Sequence[ScanFacts]) -> list[str]:
    """Say which scans of one folder do not lie on one grid."""
    folders: dict[str, list[ScanFacts]] = defaultdict(list)
    for found in facts:
        if found.format != "dicom":
            folders[os.path.dirname(found.path)].append(found)
    notes = []
    for group in folders.values():
        if not 1 < len(group) <= 8:  # a folder of cases, not of contrasts
            continue
        first = group[0]
        for other in group[1:]:
            try:
                check_same_grid(
                    (first.path, first.shape, first.affine), (other.path, other.shape, other.affine)
                )
            except DataError as error:
                notes.append(str(error))
    return notes[:16]


def _unlike(facts: Sequence[ScanFacts]) -> list[str]:
    """Say how many scans have which orientation and voxel size where they differ."""
    notes = []
    for name, found in (
        ("orientations", Counter(entry.orientation for entry in facts)),
        ("voxel sizes in mm", Counter(" × ".join(f"{s:.3g}" for s in e.spacing) for e in facts)),
    ):
        if len(found) > 1:
            shown = ", ".join(f"{key} ({count})" for key, count in found.most_common(6))
            more = f" and {len(found) - 6} more" if len(found) > 6 else ""
            notes.append(f"{len(found)} {name}: {shown}{more}")
    return notes


def scan_tables(report: Mapping[str, Any]) -> list[Any]:
    """Return a report of `inspect_scans` as tables."""
    parts: list[Any] = note_lines(report)
    if report["contrasts"]:
        parts.append(facts_table("scans by name", report["contrasts"]))
    for scan in report["scans"]:
        if "values" not in scan:
            continue
        title = scan["path"] + (f", series {scan['series']}" if scan["series"] else "")
        shown = {k: v for k, v in scan.items() if k not in ("path", "series", "values", "affine")}
        shown["affine"] = "; ".join(" ".join(f"{v:.5g}" for v in row) for row in scan["affine"][:3])
        for name in ("left_out", "warnings", "odd"):
            shown[name] = "\n".join(scan.get(name, ())) or None
        parts.append(facts_table(title, shown))
        parts.append(values_table("valid voxels, after scaling", scan["values"]))
    rest = [scan for scan in report["scans"] if "values" not in scan]
    if rest:
        table = new_table("not measured", "path", "shape", "spacing mm", "orientation", "dtype")
        for scan in rest[:64]:
            sizes = (
                "×".join(map(str, scan["shape"])),
                " ".join(f"{s:.4g}" for s in scan["spacing"]),
            )
            add_row(table, scan["path"], *sizes, scan["orientation"], scan["dtype"])
        parts.append(table)
    return parts
