"""Distances of a 64 x 64 grid, and the backbone on 64 x 64 patches with the memory it takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from domainssl.bench.models import autocast, croma, made_up_batch, peak_memory
from domainssl.bench.report import Goal, Row, Settings, timed
from domainssl.nn.alibi import pairwise_distance
from domainssl.nn.patching import grid_coordinates

__all__ = ["measure"]

_PATCH = 8


def measure(settings: Settings) -> Iterator[Row]:
    """Yield the time of the distances, then time and memory of a pass without gradients."""
    side = 24 if settings.quick else 64
    coords = grid_coordinates((side, side), device=torch.device(settings.device)).unsqueeze(0)
    rounds = settings.pick(15, 2, settings.rounds)
    pairwise_distance(coords, coords)
    times = [
        1000 * timed(lambda: pairwise_distance(coords, coords), settings.device)
        for _ in range(rounds)
    ]
    yield Row(
        subject="distances",
        what=f"distances of a {side} x {side} grid",
        values=tuple(times),
        unit="ms",
        goal=Goal("at most", 100.0),
        note="once per pass and pair of sensors",
    )
    backbone = croma(settings, side * _PATCH).backbone.eval()
    batch = made_up_batch(1, side * _PATCH, settings.device)

    def encode() -> None:
        with torch.no_grad(), autocast(settings):
            backbone(batch)

    if settings.device.startswith("cuda"):
        encode()  # compiles and tunes kernels
    seconds = timed(encode, settings.device)
    peak = peak_memory(encode, settings.device)
    scores = len(backbone.slopes) * side**4 * 4
    what = f"backbone on {side} x {side} patches"
    yield Row(
        subject="distances",
        what=what,
        values=(seconds,),
        unit="s",
        goal=None,
        note="batch 1, both sensors and joint, no gradients",
    )
    yield Row(
        subject="distances",
        what=f"{what}, peak memory / one float32 score per head and pair",
        values=(peak / scores,),
        unit="",
        goal=Goal("at most", 0.75),
        note=f"batch 1; {peak / 2**20:.0f} MiB beyond weights and batch, heads x N x N is "
        f"{scores / 2**20:.0f} MiB",
    )
