"""Measure the bands of a whole data set in one pass: in parallel, exactly, and resumable.

    catalogue = scan("/data/ssl4eo", "train", {"s1": "S1GRD", "s2": "S2L2A"})
    measurement = measure(catalogue, "stats.yaml", Plan(workers=8))

Blocks are merged in the order of the catalogue, whoever measured them, so the figures do not
depend on the number of processes. After every block the state is in `stats.yaml.partial`.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import signal
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from domainssl.errors import ConfigError, DataError
from domainssl.inspection.moments import Grid, Moments
from domainssl.io.ssl4eo.facts import product
from domainssl.io.ssl4eo.layout import Catalogue, Group
from domainssl.io.ssl4eo.read import DNOffset, read

__all__ = ["PERCENTS", "Measurement", "Plan", "measure"]

logger = logging.getLogger(__name__)

FORMAT = "domainssl statistics 1"
PERCENTS = (0.1, 1.0, 2.0, 5.0, 25.0, 50.0, 75.0, 95.0, 98.0, 99.0, 99.9)
_STEPS = {"dn": 1.0, "rgb8": 1.0, "db": 0.01}  # whole numbers are exact
_AHEAD = 2  # blocks under way per process


@dataclass(frozen=True)
class Plan:
    """How a data set is measured.

    Attributes:
        workers: Processes; 0 measures in this one, None takes one per core.
        limit: Measure so many blocks only, evenly spread over the data set.
        mask_clouds: Leave out clouds and their shadow too.
        dn_offset: What stored Sentinel-2 values carry: 0, 1000 or `auto`.
        skip_bad: Leave out blocks that cannot be read, and list them; otherwise the first ends it.
        restart: Forget what an interrupted call has measured.
    """

    workers: int | None = None
    limit: int | None = None
    mask_clouds: bool = False
    dn_offset: DNOffset = "auto"
    skip_bad: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: got {value!r}, expected at least {least}.")


@dataclass
class Measurement:
    """What was measured.

    Attributes:
        moments: Per modality.
        blocks: Blocks measured or skipped.
        skipped: Why a block was left out, by its key.
        resumed: Blocks of `blocks` that an earlier call had measured.
    """

    moments: dict[str, Moments]
    blocks: int = 0
    skipped: dict[str, str] | None = None
    resumed: int = 0

    def report(self, catalogue: Catalogue, plan: Plan) -> dict[str, Any]:
        """Return plain data, in the form that `data.statistics` reads.

        Raises:
            DataError: A modality has no valid pixel.
        """
        out: dict[str, Any] = {
            "format": FORMAT,
            "data": {
                "root": catalogue.root,
                "split": catalogue.split,
                "release": catalogue.release,
                "blocks": self.blocks,
                "blocks_of_data_set": len(catalogue.groups),
                "mask_clouds": plan.mask_clouds,
                "dn_offset": plan.dn_offset,
                "skipped": dict(self.skipped or {}),
            },
            "modalities": {},
        }
        for name, moments in self.moments.items():
            if not moments.count:
                raise DataError(
                    f"{catalogue.root} ({catalogue.split}): {name!r} has no valid pixel in "
                    f"{self.blocks} block(s), so there are no statistics. Look with `inspect`."
                )
            out["modalities"][name] = _entry(catalogue.products[name], moments)
        return out


def _entry(product_name: str, moments: Moments) -> dict[str, Any]:
    facts = product(product_name)
    rows = moments.percentiles(PERCENTS)
    return {
        "product": product_name,
        "channels": list(facts.bands),
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


def measure(
    catalogue: Catalogue,
    output: str | os.PathLike[str],
    plan: Plan | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Measure all locations and dates of a catalogue, and write the figures to `output`.

    An interrupted call leaves `<output>.partial`; the same call goes on from there.

    Args:
        catalogue: From `scan`.
        output: YAML file; replaced as a whole when all is measured.
        plan: Processes and choices.
        progress: Called with the blocks done and their number, first before the first block.

    Raises:
        DataError: A block cannot be read, or a process died.
        ConfigError: The partial file belongs to another call.
    """
    plan = plan or Plan()
    output = Path(output)
    groups = _chosen(catalogue.groups, plan.limit)
    request = _request(catalogue, groups, plan)
    partial = output.with_name(output.name + ".partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    state = None if plan.restart else _resume(partial, request, catalogue)
    if state is None:
        moments = {
            name: Moments(len(product(p).bands), _grid(p)) for name, p in catalogue.products.items()
        }
        state = Measurement(moments, skipped={})
    assert state.skipped is not None
    if progress is not None:
        progress(state.blocks, len(groups))
    with closing(_results(groups[state.blocks :], plan)) as results:
        for group, result in results:
            if isinstance(result, str):
                logger.warning("block %s is left out: %s", group.key, result)
                state.skipped[group.key] = result
            else:
                for name, part in result.items():
                    state.moments[name].merge(part)
            state.blocks += 1
            _save(partial, request, state)
            if progress is not None:
                progress(state.blocks, len(groups))
    report = state.report(catalogue, plan)
    text = yaml.safe_dump(report, sort_keys=False, default_flow_style=None, width=10_000)
    _replace(output, text.encode())
    partial.unlink(missing_ok=True)
    return state


def _chosen(groups: tuple[Group, ...], limit: int | None) -> tuple[Group, ...]:
    if limit is None or limit >= len(groups):
        return groups
    return tuple(groups[i * len(groups) // limit] for i in range(limit))


def _grid(product_name: str) -> Grid:
    facts = product(product_name)
    low, high = facts.valid_range
    return Grid(low, high, _STEPS[facts.value_unit])


# ---------------------------------------------------------------------------- one block


def _measure_block(group: Group, plan: Plan) -> dict[str, Moments] | str:
    """Return the moments of one block per modality, or why it cannot be read."""
    out: dict[str, Moments] = {}
    try:
        for name, product_name in group.products.items():
            grid = _grid(product_name)
            total = Moments(len(product(product_name).bands), grid)
            for date in range(group.dates):  # one at a time: a block of all dates is large
                block = read(
                    group,
                    name,
                    [date],
                    fix_s1_order=False,  # the order of dates does not matter here
                    mask_clouds=plan.mask_clouds,
                    dn_offset=plan.dn_offset,
                )
                for values, valid in zip(block.values, block.valid, strict=True):
                    # (T, C, Y, X) -> (C, T, Y, X)
                    total.merge(Moments.measure(values.swapaxes(0, 1), valid, grid))
            out[name] = total
    except DataError as error:
        return str(error)
    return out


def _results(
    groups: tuple[Group, ...], plan: Plan
) -> Generator[tuple[Group, dict[str, Moments] | str], None, None]:
    """Yield the blocks in order; unreadable ones as text where they are to be skipped."""
    workers = _cores() if plan.workers is None else plan.workers
    workers = min(workers, len(groups))
    source = _in_processes(groups, plan, workers) if workers > 1 else _in_turn(groups, plan)
    with closing(source):
        for group, result in source:
            if isinstance(result, str) and not plan.skip_bad:
                raise DataError(
                    f"{result} Add --skip_bad to leave such blocks out; the others measured so "
                    "far are kept, and the same command goes on with this one."
                )
            yield group, result


def _in_turn(groups: tuple[Group, ...], plan: Plan) -> Generator[tuple[Group, Any], None, None]:
    for group in groups:
        yield group, _measure_block(group, plan)


def _in_processes(
    groups: tuple[Group, ...], plan: Plan, workers: int
) -> Generator[tuple[Group, Any], None, None]:
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context(method), initializer=_follow_the_parent
    )
    waiting: deque[tuple[Group, Future[Any]]] = deque()
    ahead = iter(groups)
    try:
        while True:
            while len(waiting) < _AHEAD * workers and (group := next(ahead, None)) is not None:
                waiting.append((group, pool.submit(_measure_block, group, plan)))
            if not waiting:
                return
            group, future = waiting.popleft()
            try:
                result = future.result()
            except BrokenProcessPool as error:
                raise DataError(
                    f"A process died at or near block {group.key!r}, most likely for want of "
                    "memory. What is measured so far is kept: call the same again with fewer "
                    "--workers; 0 measures in this process and shows a crash."
                ) from error
            yield group, result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _follow_the_parent() -> None:
    """Leave interrupts to the parent, and end when it is killed: nobody else would tell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------- partial files


def _request(catalogue: Catalogue, groups: tuple[Group, ...], plan: Plan) -> dict[str, Any]:
    """Return what a partial file must have been made from to go on with it."""
    return {
        "format": FORMAT,
        "data": catalogue.identity(),
        "blocks": [groups[0].key, groups[-1].key, len(groups)],
        "limit": plan.limit,
        "mask_clouds": plan.mask_clouds,
        "dn_offset": plan.dn_offset,
    }


def _save(path: Path, request: dict[str, Any], state: Measurement) -> None:
    facts = {"request": request, "blocks": state.blocks, "skipped": state.skipped}
    arrays = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
    for name, moments in state.moments.items():
        arrays.update(moments.arrays(f"{name}/"))
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    _replace(path, content.getbuffer())


def _resume(path: Path, request: dict[str, Any], catalogue: Catalogue) -> Measurement | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            facts = json.loads(bytes(stored["facts"]))
            arrays = {name: stored[name] for name in stored.files}
        moments = {
            name: Moments.restore(arrays, f"{name}/", _grid(p))
            for name, p in catalogue.products.items()
            if facts["request"] == request
        }
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path}: not a partial file of `stats` ({error}). Delete it, or add --restart."
        ) from error
    if facts["request"] != request:
        differing = [k for k in request if facts["request"].get(k) != request[k]]
        raise ConfigError(
            f"{path}: an earlier call stopped here after {facts['blocks']} blocks, but it measured "
            f"something else ({', '.join(differing)} differ). Call it as before to go on, choose "
            "another --output, or add --restart to forget it."
        )
    return Measurement(moments, facts["blocks"], facts["skipped"], resumed=facts["blocks"])


def _replace(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is either complete or not there."""
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}). Choose another --output."
        ) from error
