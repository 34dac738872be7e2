"""Measure the bands of a whole data set in one pass: in parallel, exactly, and resumable.

    catalogue = scan("/data/ssl4eo", "train", {"s1": "S1GRD", "s2": "S2L2A"})
    measurement = measure(OfCatalogue(catalogue), "stats.yaml", Plan(jobs=8))

Pieces are merged in the order of the subject, whoever measured them, so the figures depend neither
on the number of processes nor on shards. The state is in `stats.yaml.partial`: it is saved after
every piece, and where there are many as often as takes a twentieth of the time, as it grows too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from domainssl.arguments import plain
from domainssl.errors import DataError
from domainssl.inspection.blank import blank_items
from domainssl.inspection.moments import Grid, Moments
from domainssl.inspection.subjects import Measured, Subject
from domainssl.pieces import Ledger, Pieces, Plan, Shard, replace, spread, work_through

__all__ = ["PERCENTS", "Measurement", "measure", "measure_piece"]

FORMAT = "domainssl statistics 1"
PERCENTS = (0.1, 1.0, 2.0, 5.0, 25.0, 50.0, 75.0, 95.0, 98.0, 99.0, 99.9)
_FEW = 64  # pieces after each of which the state is saved
_RARELY = 20.0  # times as long as saving takes, until it is saved again
Array = np.ndarray[Any, Any]


@dataclass(kw_only=True)
class Measurement:
    """What was measured.

    Attributes:
        moments: Per modality; empty while other shards are missing.
        blocks: Pieces measured or skipped.
        skipped: Why a piece was left out, by its key.
        blank: Items that hold one value or nothing valid, by modality.
        resumed: Pieces of `blocks` that an earlier call had measured.
        missing: Shards that have not finished yet.
        report: Plain data, as written to the file.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    blocks: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    blank: dict[str, list[str]] = field(default_factory=dict)
    resumed: int = 0
    missing: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


def measure(
    subject: Subject,
    output: str | os.PathLike[str],
    plan: Plan | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Measure all pieces of a subject, and write the figures to `output`.

    An interrupted call leaves `<output>.partial`; the same call goes on from there.

    Args:
        subject: What is measured.
        output: YAML file; replaced as a whole when all is measured.
        plan: Processes and choices.
        progress: Called with the pieces done and their number, first before the first piece.

    Raises:
        DataError: A piece cannot be read, a modality has no valid pixel, or a process died.
        ConfigError: The partial file belongs to another call.
    """
    plan = plan or Plan()
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    keys = subject.keys
    chosen = spread(range(len(keys)), plan.limit)
    request = _request(subject, chosen, plan)
    with Ledger(_partial(output, plan.shard), request, restart=plan.restart) as ledger:
        own = plan.shard.mine(chosen)
        state = _State(subject.modalities, ledger)
        resumed = len(state.done)
        pieces = Pieces(own[resumed:], len(own), name=lambda number: keys[number])

        def take(number: int, result: dict[str, Moments] | str) -> None:
            if isinstance(result, str):
                result = subject.written(result)
            state.add(number, keys[number], result)
            state.save_if_due()

        try:
            work_through(pieces, partial(measure_piece, subject), plan, take, progress)
        finally:
            state.save_if_due(at_once=True)
        return _finish(subject, output, plan, state, chosen, resumed)


def _finish(
    subject: Subject,
    output: Path,
    plan: Plan,
    own: _State,
    chosen: list[int],
    resumed: int,
) -> Measurement:
    """Merge all shards, write the file and remove their states; or say which are missing."""
    states, missing = [], []
    for shard in plan.shard.all():
        if shard == plan.shard:
            states.append(own)
            continue
        other = Ledger(_partial(output, shard), {**own.ledger.request, "shard": str(shard)})
        other.load()
        states.append(_State(subject.modalities, other))
        if len(states[-1].done) < len(shard.mine(chosen)):
            missing.append(str(shard))
    found = Measurement(blocks=len(own.done), resumed=resumed, missing=missing)
    if missing:
        own.save()  # nothing may have been left to do for this shard
        return found
    found.blocks = len(chosen)
    found.skipped = {k: v for state in states for k, v in state.skipped.items()}
    blank = {n: [t for state in states for t in state.blank[n]] for n in subject.modalities}
    found.blank = {name: sorted(texts) for name, texts in blank.items() if texts}
    where = {
        number: (s, i) for s, state in enumerate(states) for i, number in enumerate(state.done)
    }
    for name, facts in subject.modalities.items():
        rows = [states[s].rows[name][i] for s, i in (where[number] for number in chosen)]
        histogram = np.sum([state.histograms[name] for state in states], axis=0)
        found.moments[name] = Moments.of_rows(np.array(rows), histogram, facts.classes)
    found.report = _report(subject, found)
    text = yaml.safe_dump(found.report, sort_keys=False, default_flow_style=None, width=10_000)
    replace(output, text.encode())
    for state in states:
        state.ledger.path.unlink(missing_ok=True)
    return found


def _report(subject: Subject, found: Measurement) -> dict[str, Any]:
    """Return plain data, in the form that `data.statistics` reads."""
    about = dict(subject.facts)
    out: dict[str, Any] = {
        "format": FORMAT,
        "data": {
            **about,
            "blocks": found.blocks,
            "blocks_of_data_set": len(subject.keys),
            "skipped": found.skipped,
            **({"blank": found.blank} if found.blank else {}),
        },
        "modalities": {},
    }
    for name, moments in found.moments.items():
        if not moments.count:
            raise DataError(
                f"{about.get('split')}: {name!r} has no valid pixel in "
                f"{found.blocks} block(s), so there are no statistics. Look with `inspect`."
            )
        out["modalities"][name] = _entry(subject.modalities[name], moments)
    return out


def _entry(facts: Measured, moments: Moments) -> dict[str, Any]:
    rows = moments.percentiles(PERCENTS)
    return {
        **({"product": facts.product} if facts.product else {}),
        "channels": list(facts.channels),
        "value_unit": facts.value_unit,
        "mean": moments.mean.tolist(),
        "std": moments.std.tolist(),
        "min": moments.low.tolist(),
        "max": moments.high.tolist(),
        "percentiles": {f"{p:g}": row.tolist() for p, row in zip(PERCENTS, rows, strict=True)},
        "percentile_resolution": moments.grid.step,
        "pixels": moments.total,
        "valid_pixels": moments.count,
        "valid_share": moments.count / moments.total,
    }


def measure_piece(subject: Subject, number: int) -> dict[str, Moments] | str:
    """Return the moments of one piece per modality, or why it cannot be read."""
    facts = subject.modalities
    out = {name: Moments(len(f.channels), f.classes) for name, f in facts.items()}
    try:
        for name, values, valid, names in subject.parts(number):
            out[name].merge(Moments.measure(values, valid, facts[name].classes))
            out[name].blank += blank_items(values, valid, names)
    except DataError as error:
        return str(error)
    return out


def _partial(output: Path, shard: Shard) -> Path:
    part = "" if shard.count == 1 else f"-{shard.number}-of-{shard.count}"
    return output.with_name(f"{output.name}.partial{part}")


def _request(subject: Subject, chosen: list[int], plan: Plan) -> dict[str, Any]:
    """Return what a partial file must have been made from to go on with it."""
    keys = subject.keys
    request: dict[str, Any] = {
        "format": FORMAT,
        "data": subject.identity(),
        "blocks": [keys[chosen[0]], keys[chosen[-1]], len(chosen)] if chosen else [],
        "limit": plan.limit,
        **subject.facts,
        "shard": str(plan.shard),
    }
    return plain(request)


class _State:
    """What one shard has measured: a row per piece and modality, and summed histograms."""

    def __init__(self, modalities: Mapping[str, Measured], ledger: Ledger) -> None:
        self.ledger = ledger
        facts, arrays = ledger.facts or {"done": [], "skipped": {}}, ledger.arrays
        self.done: list[int] = facts["done"]
        self.skipped: dict[str, str] = facts["skipped"]
        self.blank: dict[str, list[str]] = {
            n: facts.get("blank", {}).get(n, []) for n in modalities
        }
        self._saved, self._saved_at, self._saving_s = len(self.done), time.monotonic(), 0.0
        self.rows: dict[str, list[Array]] = {}
        self.histograms: dict[str, Array] = {}
        for name, measured in modalities.items():
            empty = Moments(len(measured.channels), measured.classes)
            self.rows[name] = list(arrays.get(f"{name}/rows", ()))
            self.histograms[name] = empty.histogram
            if f"{name}/places" in arrays:
                empty.histogram.reshape(-1)[arrays[f"{name}/places"]] = arrays[f"{name}/times"]

    def add(self, number: int, key: str, result: dict[str, Moments] | str) -> None:
        """Take in the next piece."""
        self.done.append(number)
        for name, rows in self.rows.items():
            if isinstance(result, str):
                bands = len(self.histograms[name])
                rows.append(Moments(bands, Grid(0, 0, 1)).row)
                continue
            rows.append(result[name].row)
            self.blank[name] += result[name].blank
            self.histograms[name] += result[name].histogram
        if isinstance(result, str):
            self.skipped[key] = result

    def save_if_due(self, *, at_once: bool = False) -> None:
        """Replace the file of the shard, unless that was done a moment ago.

        Args:
            at_once: Whenever something is new.
        """
        since = time.monotonic() - self._saved_at
        is_due = at_once or len(self.done) <= _FEW or since > _RARELY * self._saving_s
        if is_due and len(self.done) > self._saved:
            self.save()

    def save(self) -> None:
        """Replace the file of the shard."""
        start = time.monotonic()
        arrays: dict[str, Array] = {}
        for name, histogram in self.histograms.items():
            places = np.flatnonzero(histogram)
            arrays[f"{name}/rows"] = np.array(self.rows[name])
            arrays[f"{name}/places"] = places
            arrays[f"{name}/times"] = histogram.reshape(-1)[places]
        facts = {"done": self.done, "skipped": self.skipped, "blank": self.blank}
        self.ledger.save(facts, arrays)
        self._saved, self._saved_at = len(self.done), time.monotonic()
        self._saving_s = self._saved_at - start
