"""`fit --plan`: what a run needs and how long it takes, from a few real steps, without the run."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from domainssl.cli.console import console
from domainssl.cli.run.plan_measure import (
    Bounds,
    is_affordable,
    memory_facts,
    small_steps,
    step_seconds,
    tell,
    whole_steps,
)
from domainssl.cli.run.plan_report import lines, problems_of
from domainssl.cli.run.plan_steps import TIMED, Measured
from domainssl.cli.run.request import Request
from domainssl.errors import ConfigError, counted
from domainssl.loading.plan import EpochPlan
from domainssl.loading.stream import BlockStream

__all__ = ["Asked", "for_planning", "show_plan"]

_READ = 32  # items of a batch that are read where whole batches are not needed
BOUNDS = Bounds()
_LIMITS = (
    "max_time", "limit_train_batches", "limit_val_batches", "limit_test_batches", "min_epochs",
    "limit_predict_batches", "overfit_batches", "fast_dev_run", "val_check_interval", "profiler",
    "min_steps", "check_val_every_n_epoch", "reload_dataloaders_every_n_epochs", "plugins",
)  # fmt: skip


@dataclass(kw_only=True)
class Asked:
    """What the configuration asks for, before it is changed to a few steps on one device.

    Attributes:
        name: Name of the run.
        run_dir: Where it would write.
        devices: As the Trainer takes them.
        nodes: Machines.
        accumulate: Batches per optimiser step.
        strategy: Name of the strategy.
        max_epochs: Epochs, None where steps are given.
        max_steps: Optimiser steps, -1 where epochs are given.
        train_batches: `limit_train_batches`.
        callbacks: Their specifications by name.
    """

    name: str
    run_dir: Path
    devices: Any = "auto"
    nodes: int = 1
    accumulate: int = 1
    strategy: str = "auto"
    max_epochs: int | None = None
    max_steps: int = -1
    train_batches: float | int | None = None
    callbacks: dict[str, Any] = field(default_factory=dict)


def for_planning(request: Request) -> Asked:
    """Return what a request asks for, and change it to a short training on one device.

    Args:
        request: Changed in place: no callbacks, no loggers, one device, one epoch.
    """
    trainer = dict(request.config.get("trainer") or {})
    strategy = trainer.get("strategy") or "auto"
    asked = Asked(
        name=request.name,
        run_dir=request.run_dir,
        devices=trainer.get("devices", "auto"),
        nodes=int(trainer.get("num_nodes") or 1),
        accumulate=int(trainer.get("accumulate_grad_batches") or 1),
        strategy=str(strategy.get("class_path") if isinstance(strategy, dict) else strategy),
        max_epochs=trainer.get("max_epochs"),
        max_steps=int(trainer.get("max_steps") or -1),
        train_batches=trainer.get("limit_train_batches"),
        callbacks=dict(request.callbacks),
    )
    for name in (*_LIMITS, "strategy", "max_steps", "num_nodes"):
        trainer.pop(name, None)
    trainer |= {
        "devices": 1, "accumulate_grad_batches": 1, "max_epochs": 1, "limit_val_batches": 0,
        "num_sanity_val_steps": 0, "enable_progress_bar": False, "enable_checkpointing": False,
        "enable_model_summary": False, "log_every_n_steps": 1,
    }  # fmt: skip
    request.config["trainer"] = trainer
    request.config.pop("ckpt_path", None)
    request.callbacks, request.loggers = {}, {}
    return asked


def show_plan(run: Any, asked: Asked, *, as_json: bool) -> int:
    """Measure, print the plan, and say what makes it impossible.

    Args:
        run: What was built of the changed request.
        asked: What the request asked for.
        as_json: Print data.

    Returns:
        0, or 2 where the run is not possible.
    """
    facts = _facts(run, asked)
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=1, allow_nan=False) + "\n")
    else:
        screen = console()
        for line in lines(facts):
            screen.print(line, markup=False, highlight=False)
    return 2 if facts["problems"] else 0


def _facts(run: Any, asked: Asked) -> dict[str, Any]:
    """Return all numbers of the plan, plain."""
    data, model, trainer = run.datamodule, run.model, run.trainer
    devices = _count(trainer.accelerator, asked.devices) * asked.nodes
    facts: dict[str, Any] = {
        "run": asked.name,
        "device": {**_device(trainer), "count": devices, "strategy": asked.strategy},
        "parameters": _parameters(model),
    }
    given = int(getattr(data, "global_batch_size", 0) or 0)
    parts = devices * asked.accumulate
    per_device = max(1, given // parts) if given else None
    if per_device is not None:
        data.global_batch_size = per_device
    trainer.callbacks.clear()  # the record of the run among them: nothing is written
    data.trainer = trainer
    data.setup("fit")
    items = _items(data)
    facts["batch"] = {
        "global": given or None, "devices": devices, "accumulate": asked.accumulate,
        "per_device": per_device, "is_divisible": not given or given % parts == 0,
    }  # fmt: skip
    facts["items"] = items
    facts["disk"] = _disk(run, asked, 0)
    if per_device is not None and items["train"] is not None and items["train"] < given:
        facts["problems"] = problems_of(facts)
        return facts
    stream, measured, reading, size = _measured(run, per_device, facts["device"]["memory_bytes"])
    facts["reading"] = reading
    facts["batch"]["per_device"] = size
    facts["tokens"] = measured.tokens
    facts["memory"] = memory_facts(measured, size, facts["device"]["memory_bytes"])
    epoch = _epoch(data, stream, asked, devices, size)
    facts["reading"]["blocks_per_step"] = epoch.pop("blocks_per_step")
    facts["time"] = _time(measured, size, reading, epoch, asked)
    facts["disk"] = _disk(run, asked, measured.optimizer_bytes)
    facts["problems"] = problems_of(facts)
    data.teardown("fit")
    return facts


def _measured(
    run: Any, per_device: int | None, memory: int
) -> tuple[Any, Measured, dict[str, Any], int]:
    """Take small steps, and whole ones where they are affordable.

    Returns:
        The stream, what the steps told, what reading costs, and the items of a batch.
    """
    data, model = run.datamodule, run.model
    few = max(BOUNDS.items)
    if per_device is None or per_device <= few:
        tell("reading the first batches")
        stream, batches, reading = _read(data, per_device)
        size = _size(batches[0], model)
    else:
        size, data.global_batch_size = per_device, few
        tell(f"reading {few} items")
        batches = _take(data.train_dataloader(), 1)
        if not batches:
            raise _no_batch()
    found = small_steps(run, batches[0], size, BOUNDS)
    is_tried = is_affordable(found, size, memory, BOUNDS)
    if per_device is not None and per_device > few:
        data.global_batch_size = size if is_tried else min(size, _READ)
        tell(f"reading {TIMED} batches of {data.global_batch_size} items")
        stream, batches, reading = _read(data, size)
    if is_tried:
        found = whole_steps(run, batches, size, found)
    data.global_batch_size = size if per_device is not None else data.global_batch_size
    return stream, found, reading, size


def _no_batch() -> ConfigError:
    return ConfigError(
        "data: the training stream has no batch. Lower data.init_args.global_batch_size or use "
        "more data."
    )


def _count(accelerator: Any, devices: Any) -> int:
    """Return the number of devices per machine that a configuration asks for."""
    if devices in ("auto", -1, "-1", None):
        return max(1, int(accelerator.auto_device_count()))
    if isinstance(devices, list | tuple):
        return len(devices)
    text = str(devices)
    return text.count(",") + 1 if "," in text else max(1, int(text))


def _device(trainer: Any) -> dict[str, Any]:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        free, _ = torch.cuda.mem_get_info(device)
        return {"kind": "cuda", "name": found.name, "memory_bytes": free}
    return {
        "kind": device.type,
        "name": counted(torch.get_num_threads(), "thread"),
        "memory_bytes": psutil.virtual_memory().available,
    }


def _parameters(model: torch.nn.Module) -> dict[str, int]:
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    backbone = getattr(model, "backbone", None)
    return {
        "trained": sum(n for n, is_trained in sizes if is_trained),
        "frozen": sum(n for n, is_trained in sizes if not is_trained),
        "backbone": sum(p.numel() for p in backbone.parameters()) if backbone is not None else 0,
    }


def _items(data: Any) -> dict[str, int | None]:
    sources = getattr(data, "_sources", None) or {}
    found = {split: sum(sources[split].sizes) for split in ("train", "val") if split in sources}
    return {"train": found.get("train"), "val": found.get("val")}


def _read(data: Any, size: int | None) -> tuple[Any, list[Any], dict[str, Any]]:
    """Read as many batches as are timed, and say what batches of `size` items cost.

    Raises:
        ConfigError: There is not one batch.
    """
    stream = data.train_dataloader()
    if any(not cache.is_ready(key) for cache in _caches(data) for key in cache.keys):
        _take(stream)  # prepares what these batches need: that is no cost of an epoch
        stream = data.train_dataloader()
    begun = time.perf_counter()
    batches = _take(stream)
    seconds = time.perf_counter() - begun
    if not batches:
        raise _no_batch()
    if not isinstance(stream, BlockStream):
        read = int(getattr(data, "global_batch_size", 0) or 0) or 1
        share = 1.0 if size is None else size / read
        return stream, batches, {"seconds_per_batch": seconds / len(batches) * share}
    tally, loading = stream.tally, stream.loading
    per_item = tally.bytes_decoded / max(1, tally.items)
    size = size or stream.plan(0).batch_size
    reading = {
        "workers": loading.workers or 0,
        "bytes_per_step": round(per_item * size),
        "bytes_needed_per_step": round(tally.bytes_needed / max(1, tally.items) * size),
        "amplification": stream.read_amplification,
        # a window of blocks is read before its first item is given out
        "seconds_per_batch": seconds * size / max(1, tally.items),
    }
    stream.close()
    return stream, batches, reading


def _take(stream: Any, count: int = TIMED) -> list[Any]:
    """Return the first batches of a stream."""
    return list(itertools.islice(stream, count))


def _caches(data: Any) -> list[Any]:
    return list(getattr(data, "preparations", list)())


def _size(batch: Mapping[str, Any], model: Any) -> int:
    """Return the number of items of a batch."""
    names = getattr(getattr(model, "backbone", None), "modalities", {})
    found = [batch[n] for n in names if n in batch]
    found += [v for v in batch.values() if isinstance(v, Tensor) and v.ndim]
    return len(found[0])


def _epoch(data: Any, stream: Any, asked: Asked, devices: int, size: int) -> dict[str, Any]:
    """Return optimiser steps per epoch, and the blocks that a step opens on one device."""
    if isinstance(stream, BlockStream):
        source = data.source("train")
        plan = EpochPlan(
            sizes=tuple(source.sizes), seed=data.seed, epoch=0, world_size=devices, rank=0,
            batch_size=size, window_blocks=data.loading.window_blocks, shuffle=True,
        )  # fmt: skip
        count, blocks = len(plan.batch_sizes), len(plan.pieces)
    else:
        count, blocks = max(1, len(stream) // devices), None
    limit = asked.train_batches
    used = count
    if isinstance(limit, float):
        used = max(1, int(count * limit))
    elif limit is not None:
        used = min(count, int(limit))
    return {
        "steps": math.ceil(used / asked.accumulate),
        "batches": used,
        "blocks_per_step": None if blocks is None else blocks / max(1, count),
    }


def _time(
    found: Measured, size: int, reading: Mapping[str, Any], epoch: Mapping[str, Any], asked: Asked
) -> dict[str, Any]:
    """Return seconds per step, epoch and run, without validation and callbacks."""
    steps = epoch["steps"]
    epochs = asked.max_epochs if asked.max_epochs not in (None, -1) else None
    if asked.max_steps > 0:
        own = asked.max_steps / max(1, steps)
        epochs = own if epochs is None else min(float(epochs), own)
    compute = step_seconds(found, size) if found.failed_at is None and found.fits else None
    step = epoch_s = None
    if compute is not None:
        loading = float(reading["seconds_per_batch"])
        is_parallel = bool(reading.get("workers"))
        step = max(compute, loading) if is_parallel else compute + loading
        epoch_s = step * epoch["batches"]
    return {
        "is_measured": bool(found.seconds),
        "compute_s": compute,
        "batch_s": step,
        "steps_per_epoch": steps,
        "epoch_s": epoch_s,
        "epochs": epochs,
        "run_s": None if epoch_s is None or epochs is None else epoch_s * epochs,
    }


def _disk(run: Any, asked: Asked, optimizer_bytes: int) -> dict[str, Any]:
    """Return the bytes of checkpoints, export and caches, and what is free there."""
    model = run.model
    one = _state_bytes(model) + optimizer_bytes
    kept = 0
    for spec in asked.callbacks.values():
        name = str(spec["class_path"]).rpartition(".")[2]
        kept += _kept(name, spec.get("init_args") or {}, asked)
    backbone = getattr(model, "backbone", None)
    export = _state_bytes(backbone) if backbone is not None else 0
    folder = asked.run_dir.absolute()
    place = next(p for p in (folder, *folder.parents) if p.exists())
    missing = entries = 0
    for cache in _caches(run.datamodule):
        keys = list(cache.keys)
        entries += len(keys)
        missing += sum(not cache.is_ready(key) for key in keys)
    sources = getattr(run.datamodule, "_sources", None) or {}
    unpacked = sum(s.num_bytes for s in sources.values()) if entries else 0
    return {
        "checkpoint_bytes": one,
        "checkpoints": kept,
        "export_bytes": export,
        "run_bytes": one * kept + export,
        "free_bytes": shutil.disk_usage(place).free,
        "cache_entries": entries,
        "cache_missing": missing,
        "cache_bytes": round(unpacked * missing / entries) if entries else 0,
        "place": str(asked.run_dir),
    }


def _state_bytes(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def _kept(name: str, given: Mapping[str, Any], asked: Asked) -> int:
    """Return the most checkpoints of one callback that lie there at once."""
    if name == "AtomicCheckpoint":
        keep = int(given.get("keep_last", 2))
        if keep >= 0:
            return keep + 1  # the new one is complete before the oldest goes
        return max(1, (asked.max_epochs or 1) // max(1, int(given.get("every_n_epochs", 1) or 1)))
    if name == "ModelCheckpoint":
        best = int(given.get("save_top_k", 1))
        return (best if best >= 0 else asked.max_epochs or 1) + bool(given.get("save_last"))
    return 0
