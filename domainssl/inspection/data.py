"""What a DataModule finds: splits, modalities, validity, dates, values, and what is wrong or odd.

Everything is asked from the DataModule and its sources, so that what is said here is what training
would do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from domainssl.datamodules.base import DomainDataModule
from domainssl.errors import ConfigError, DataError
from domainssl.inspection.files import band_rows
from domainssl.inspection.items import OfSource, channel_first
from domainssl.loading.plan import Piece
from domainssl.loading.source import Source
from domainssl.missing import told
from domainssl.modality import Batch, Modality, key
from domainssl.pieces import spread
from domainssl.units import UnitCheck

__all__ = ["inspect_data", "subject_of"]

_BLOCKS, _ITEMS = 8, 16  # looked at per split, and in each block
_MOSTLY = 0.5  # a modality with fewer valid pixels is odd


def subject_of(data: DomainDataModule, split: str) -> OfSource:
    """Return the items of a split as something to measure; the DataModule is set up."""
    root = str(getattr(data, "root", ""))
    is_private = bool(data.withheld)
    about = {
        "root": "(withheld)" if is_private else root,
        "split": split,
        "data": type(data).__name__,
    }
    return OfSource(
        source=data.source(split),
        described=data.modalities,
        about=about,
        name_data=data.identity,
        is_private=is_private,
    )


def inspect_data(data: DomainDataModule) -> dict[str, Any]:
    """Describe a DataModule by a part of its items.

    Returns:
        Plain data: `kind` is `data`; `notes` what it found; `splits` with items, blocks and, per
        modality, validity, dates and values; `problems`.
    """
    report: dict[str, Any] = {"kind": "data", "data": type(data).__name__, "splits": {}}
    problems: list[str] = []
    odd: list[str] = []
    try:
        data.prepare_data()
        data.setup("fit")
    except (DataError, ConfigError) as error:
        return {**report, "notes": [], "problems": [str(error)]}
    problems += data.problems
    for split in ("train", "val"):
        try:
            source = data.source(split)
        except ConfigError:
            odd.append(f"there is no split {split!r}: nothing is held out for validation")
            continue
        report["splits"][split] = _split(data, source, split, problems, odd)
    notes = [text for text in data.describe() if not text.startswith("problem: ")]
    return {**report, "notes": [*notes, *odd], "problems": list(dict.fromkeys(problems))}


def _split(
    data: DomainDataModule, source: Source, split: str, problems: list[str], odd: list[str]
) -> dict[str, Any]:
    sizes = source.sizes
    check = UnitCheck(data.modalities, data.units_stated)
    found: dict[str, list[Batch]] = {name: [] for name in data.modalities}
    measured = 0
    for block in spread([i for i, size in enumerate(sizes) if size], _BLOCKS):
        try:
            with told() as numbers:
                rows = source.load(Piece(block, 0, min(sizes[block], _ITEMS)), 0)
            problems += [f"{split}: {text}" for text in numbers.values()]
        except DataError as error:
            problems.append(f"{split}: {error}")
            continue
        problems += [f"{split}: {reason}" for reason in rows.bad.values()]
        measured += rows.count - len(rows.bad)
        if not rows.data or rows.bad:
            continue
        problem = check.find(_tensors(rows.data, data.modalities), split, f"the {split} data")
        if problem:
            problems.append(problem)
        for name in found:
            if name in rows.data:
                found[name].append(rows.data)
    modalities = {
        name: _modality(
            modality,
            found[name],
            f"{split}: {name}",
            problems,
            odd,
            days_are_relative=data.days_are_relative,
            has_dates=name not in data.timeless,
        )
        for name, modality in data.modalities.items()
    }
    return {
        "items": sum(sizes),
        "blocks": len(sizes),
        "items_looked_at": measured,
        "modalities": modalities,
    }


def _tensors(data: Batch, modalities: Mapping[str, Modality]) -> Batch:
    names = [n for m in modalities for n in (m, key(m, "valid"), key(m, "present")) if n in data]
    names += [key(m, "frames") for m in modalities if key(m, "frames") in data]
    return {name: torch.as_tensor(np.asarray(data[name])) for name in names}


def _modality(
    modality: Modality,
    batches: list[Batch],
    where: str,
    problems: list[str],
    odd: list[str],
    *,
    days_are_relative: bool = False,
    has_dates: bool = True,
) -> dict[str, Any]:
    """Describe one modality; `problems` are for a person to mend, `odd` is what data may be."""
    facts: dict[str, Any] = {
        "kind": modality.kind,
        "channels": list(modality.channels),
        "value_unit": modality.value_unit,
        "size": list(modality.size),
        "statistics": "known" if modality.mean is not None else "not known: measure with `stats`",
    }
    if not batches:
        problems.append(f"{where}: none of the items looked at has it")
        return facts
    parts = [channel_first(data, modality.name, modality) for data in batches]
    values = np.concatenate([v.reshape(len(v), -1) for v, _ in parts], axis=1)
    valid = np.concatenate([mask.reshape(-1) for _, mask in parts])
    present = np.concatenate([_companion(b, modality.name, "present", True) for b in batches])
    facts["items_without_it"] = float(1 - present.mean())
    facts["valid_fraction"] = float(valid.mean()) if valid.size else 0.0
    if not valid.any():
        problems.append(f"{where}: not one pixel of {len(present)} items is valid")
    elif facts["valid_fraction"] < _MOSTLY:
        problems.append(f"{where}: {1 - facts['valid_fraction']:.0%} of the pixels are not valid")
    if not present.all():
        odd.append(f"{where}: {1 - present.mean():.0%} of the items lack it")
    if has_dates:
        facts |= _dates(batches, modality.name, where, None if days_are_relative else problems)
    rows = band_rows(values, modality.channels, valid)
    constant = [row["band"] for row in rows if row["std"] == 0.0]
    if constant:
        problems.append(f"{where}: all valid pixels of {' '.join(constant)} have one value")
    return {**facts, "values": rows}


def _companion(data: Batch, name: str, companion: str, default: Any) -> Any:
    given = data.get(key(name, companion))
    return np.full(len(data[name]), default) if given is None else np.asarray(given)


def _dates(
    batches: list[Batch], name: str, where: str, problems: list[str] | None
) -> dict[str, Any]:
    """Return the first and the last date, or, without `problems`, day since the first visit."""
    days = []
    for data in batches:
        if key(name, "dates") in data:
            found = np.asarray(data[key(name, "dates")])
            real = _companion(data, name, "frames", True) if key(name, "frames") in data else None
            days.append(found.reshape(-1) if real is None else found[real])
    if not days:
        return {}
    every = np.concatenate(days)
    if problems is None:  # day 0 is the first visit, not an unknown date
        return {"days": [int(every.min()), int(every.max())]} if every.size else {}
    known = every[every > 0]
    undated = len(every) - len(known)
    if undated:
        problems.append(f"{where}: {undated} of {len(every)} acquisitions have no known date")
    if not known.size:
        return {"dates": None, "undated": undated}
    span = [str(np.datetime64(int(day), "D")) for day in (known.min(), known.max())]
    return {"dates": span, "undated": undated}
