"""The words of `fit --plan`: a page of numbers, and what to change where a run is not possible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from domainssl.errors import counted

__all__ = ["lines", "problems_of"]


def lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a plan."""
    device, batch = facts["device"], facts["batch"]
    yield f"plan of {facts['run']} (no run is made; callbacks and validation are left out)"
    yield _row(
        "device",
        f"{device['count']} x {device['kind']}, {device['name']}, "
        f"{_bytes(device['memory_bytes'])} free"
        + (f", strategy {device['strategy']}" if device["count"] > 1 else ""),
    )
    items = facts["items"]
    if items["train"] is not None:
        yield _row("items", f"{items['train']} train, {items['val'] or 0} val")
    parts = f"{batch['per_device']} per device"
    if batch["accumulate"] > 1:
        parts += f" x {batch['accumulate']} accumulated"
    whole = f" = {batch['global']} per step" if batch["global"] else ""
    yield _row("batch", f"{parts} x {counted(batch['devices'], 'device')}{whole}")
    if facts.get("tokens"):
        found = ", ".join(f"{name} {count}" for name, count in facts["tokens"].items())
        yield _row("tokens", f"{found} per item")
    own = facts["parameters"]
    yield _row(
        "parameters",
        f"{own['trained']:,} trained, {own['frozen']:,} frozen; "
        f"{own['backbone']:,} in the backbone",
    )
    if "memory" in facts:
        yield from _memory(facts["memory"], device)
        yield from _reading(facts["reading"])
        yield from _time(facts["time"])
    yield from _disk(facts["disk"])
    for problem in facts["problems"]:
        yield f"not possible: {problem}"


def _row(name: str, text: str) -> str:
    return f"  {name:<11}{text}"


def _memory(memory: Mapping[str, Any], device: Mapping[str, Any]) -> Iterator[str]:
    if memory["bytes_per_device"] is None:
        yield _row("memory", f"a step of {memory['failed_at']} items does not fit")
        return
    how = "measured" if memory["is_measured"] else f"estimated from {memory['measured_at']} items"
    sharded = "" if device["count"] == 1 else ", without sharding"
    yield _row(
        "memory",
        f"{_bytes(memory['bytes_per_device'])} per device, {how}{sharded}; at most "
        f"{memory['largest_batch']} items fit",
    )


def _reading(reading: Mapping[str, Any]) -> Iterator[str]:
    if "bytes_per_step" not in reading:
        yield _row("reading", f"{_seconds(reading['seconds_per_batch'])} per batch")
        return
    blocks = reading["blocks_per_step"]
    yield _row(
        "reading",
        f"{_bytes(reading['bytes_per_step'])} per step and device from "
        f"{blocks:.3g} block{'s' * (blocks != 1)}, of which "
        f"{_bytes(reading['bytes_needed_per_step'])} are used (amplification "
        f"{reading['amplification']:.2f}); {_seconds(reading['seconds_per_batch'])} with "
        f"{counted(reading['workers'], 'worker')}",
    )


def _time(time: Mapping[str, Any]) -> Iterator[str]:
    if time["batch_s"] is None:
        yield _row("time", "not measured: a step does not fit")
        return
    steps = counted(time["steps_per_epoch"], "step")
    about = "" if time["is_measured"] else "about "  # from steps of a few items
    text = (
        f"{about}{_seconds(time['compute_s'])} to compute a batch, {_seconds(time['batch_s'])} "
        f"with reading; {steps} and {_seconds(time['epoch_s'])} per epoch"
    )
    if time["run_s"] is not None:
        whole = f"{time['epochs']:g} epoch{'s' * (time['epochs'] != 1)}"
        text += f"; {whole}: {_seconds(time['run_s'])}"
    yield _row("time", text)


def _disk(disk: Mapping[str, Any]) -> Iterator[str]:
    kept = counted(disk["checkpoints"], "checkpoint")
    yield _row(
        "disk",
        f"{_bytes(disk['run_bytes'])} in {disk['place']}: {kept} of "
        f"{_bytes(disk['checkpoint_bytes'])}, export {_bytes(disk['export_bytes'])}; "
        f"{_bytes(disk['free_bytes'])} free",
    )
    if disk["cache_entries"]:
        yield _row(
            "cache",
            f"{disk['cache_missing']} of {disk['cache_entries']} entries are to be prepared, about "
            f"{_bytes(disk['cache_bytes'])}",
        )


def problems_of(facts: Mapping[str, Any]) -> list[str]:
    """Return why a run is not possible, each with the change that would make it so."""
    found = [*_batch_problems(facts), *_memory_problems(facts)]
    disk = facts["disk"]
    if disk["run_bytes"] > disk["free_bytes"]:
        found.append(
            f"checkpoints and export need {_bytes(disk['run_bytes'])} and "
            f"{_bytes(disk['free_bytes'])} are free at {disk['place']}. Set run_dir to another "
            "disk, or callbacks.checkpoint.init_args.keep_last=1."
        )
    return found


def _batch_problems(facts: Mapping[str, Any]) -> Iterator[str]:
    batch, items = facts["batch"], facts["items"]["train"]
    total, parts = batch["global"], batch["devices"] * batch["accumulate"]
    if total is None:
        return
    if not batch["is_divisible"]:
        lower = total // parts * parts
        choices = f"{lower} or {lower + parts}" if lower else f"{parts}"
        yield (
            f"data.init_args.global_batch_size={total} cannot be divided by "
            f"{counted(batch['devices'], 'device')} x "
            f"{counted(batch['accumulate'], 'accumulated batch', 'accumulated batches')}. "
            f"Set it to {choices}."
        )
    if items is not None and items < total:
        fitting = items // parts * parts
        advice = (
            f"Set data.init_args.global_batch_size={fitting} or lower"
            if fitting
            else "Use fewer devices or accumulated batches"
        )
        yield (
            f"a batch of {total} is larger than the {items} training items. {advice}, or use more "
            "data."
        )


def _memory_problems(facts: Mapping[str, Any]) -> Iterator[str]:
    memory, batch = facts.get("memory"), facts["batch"]
    if memory is None:
        return
    needed, available = memory["bytes_per_device"], memory["available_bytes"]
    if memory["failed_at"] is None and needed is not None and needed <= available:
        return
    fits = memory["largest_batch"]
    what = (
        f"a step of {counted(memory['failed_at'], 'item')} did not fit"
        if needed is None or memory["failed_at"] is not None
        else f"a step of {batch['per_device']} items needs about {_bytes(needed)}"
    )
    others = (
        "model.init_args.execution.gradient_checkpointing=true, trainer.precision=bf16-mixed, or a "
        "smaller model or window"
    )
    if fits < 1:
        yield f"{what}, of {_bytes(available)} free, with the smallest batch too. Use {others}."
        return
    fits = min(fits, batch["per_device"])
    times = -(-batch["per_device"] // fits) * batch["accumulate"]
    total = batch["global"]
    while total and times < total and total % (times * batch["devices"]):
        times += 1
    advice = (
        f"Set trainer.accumulate_grad_batches={times}, which keeps the batch per step (losses "
        "over a batch then see fewer items)"
    )
    if total:
        smaller = fits * batch["devices"] * batch["accumulate"]
        advice += f", or data.init_args.global_batch_size={smaller}"
    yield (f"{what}, of {_bytes(available)} free; {fits} fit. {advice}, or use {others}.")


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    if value < 7200:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h"
