"""How measurements are made and told: interleaved runs, spread, goals, surroundings."""

from __future__ import annotations

import importlib
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib import metadata
from io import StringIO
from typing import Any, Literal

from domainssl.errors import ConfigError, nearest
from domainssl.pieces import cores

__all__ = [
    "SUBJECTS",
    "Goal",
    "Row",
    "Settings",
    "cpu_name",
    "environment",
    "interleaved",
    "ratio",
    "run_subjects",
    "silent",
    "timed",
]

SUBJECTS = {
    "stream": "the SSL4EO-S12 stream against bare decoding of the same blocks",
    "cubes": "blocks of Zarr cubes against zarr-python reading the same chunks",
    "stats": "statistics of a data set against NumPy's mean and std of the same chunks",
    "step": "CROMA's training step against materialised attention with bias tables per item",
    "matmul": "CROMA's training step against its own matrix products run back to back",
    "objectives": "the step of each other objective against its own matrix products",
    "decur": "DeCUR's loss from Gram matrices against the one from correlation matrices",
    "omnisat": "OmniSat's image path and token contrast against plain forms, time and memory",
    "scan": "opening many sites, cold and from the index, against plain loops over their files",
    "distances": "distances of a large grid, and the backbone on it with its memory",
    "attention3d": "attention over a volume with computed biases against biases held in memory",
    "wait": "time that training from files spends waiting for data",
    "volumes": "boxes of prepared volumes from both tiers against MONAI's cached data sets",
    "tiles": "tiles of slides against plain OpenSlide reads of the same tiles, and memory",
    "sliding": "sliding windows over volumes against MONAI's in memory, and memory at 384³",
    "embed": "embedding a scene against a plain loop over the same windows, and memory",
    "overhead": "logging and callbacks of the recipe against a bare Trainer",
    "evaluate": "from the start of evaluate to its report, cold and with kept features",
    "startup": "import and help against importing Lightning's command line",
}


_MODELS = ("step", "matmul", "distances", "wait")
_READERS = {  # of a setting that not all subjects read
    "batch": ("stream", "step", "matmul", "overhead", "wait", "objectives", "decur", "omnisat",
              "attention3d", "volumes"),
    "precision": (*_MODELS, "objectives", "overhead"),
    "attention": (*_MODELS, "attention3d"),
    "workers": ("stream", "volumes", "wait"),
    "compile": ("step",),
    "volume": ("volumes",),
    "sites": ("scan",),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user may choose.

    Attributes:
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        quick: Sizes that show that a subject runs; its figures mean nothing.
        rounds: Interleaved repetitions; None takes each subject's own.
        batch: Items per step; None takes each subject's own for the device.
        precision: `32`, `bf16` (autocast), or None: bf16 on CUDA, 32 elsewhere.
        attention: Path of our side (see `nn.attention`).
        workers: Loading processes of `stream` (None measures 0 and 2) and `volumes` (None: 2).
        compile: Compile the transformer blocks of our side of `step`.
        volume: Voxels of a volume of `volumes`; None takes a small one.
        sites: Most sites of `scan`; None takes 10,000.
    """

    device: str = "auto"
    quick: bool = False
    rounds: int | None = None
    batch: int | None = None
    precision: Literal["32", "bf16"] | None = None
    attention: Literal["fused", "flex"] = "fused"
    workers: int | None = None
    compile: bool = False
    volume: tuple[int, int, int] | None = None
    sites: int | None = None

    def resolved(self) -> Settings:
        """Return the settings with device and precision decided.

        Raises:
            ConfigError: The device is not there, or a number is out of range.
        """
        import torch

        for name, least in (("rounds", 1), ("batch", 2), ("workers", 0), ("sites", 8)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"bench --{name}: got {value}, expected at least {least}.")
        has_cuda = torch.cuda.is_available()
        device = ("cuda" if has_cuda else "cpu") if self.device == "auto" else self.device
        if device.partition(":")[0] not in ("cpu", "cuda"):
            raise ConfigError(
                f"bench --device: got {self.device!r}, expected auto, cpu, cuda or cuda:N."
                f"{nearest(self.device, ('auto', 'cpu', 'cuda'))}"
            )
        if device.startswith("cuda") and not has_cuda:
            raise ConfigError(
                f"bench --device={self.device}: torch finds no CUDA device. "
                "`python -m domainssl doctor` says why; --device=cpu measures on the CPU."
            )
        precision = self.precision or ("bf16" if device.startswith("cuda") else "32")
        return Settings(**{**asdict(self), "device": device, "precision": precision})

    def refuse_unread(self, subjects: Sequence[str]) -> None:
        """Refuse what none of some subjects reads.

        Raises:
            ConfigError: Something of it was chosen.
        """
        for name, readers in _READERS.items():
            if getattr(self, name) != getattr(Settings, name) and not {*subjects} & {*readers}:
                raise ConfigError(
                    f"bench --{name}: is read by {', '.join(readers)}, but measured is "
                    f"{', '.join(subjects)}. Leave it out."
                )

    def pick(self, full: int, quick: int, chosen: int | None = None) -> int:
        """Return what the user chose, else the number for this kind of run."""
        return chosen if chosen is not None else (quick if self.quick else full)


@dataclass(frozen=True)
class Goal:
    """What a figure should reach."""

    direction: Literal["at least", "at most"]
    bound: float

    def is_met(self, value: float) -> bool:
        """Tell whether `value` reaches the goal."""
        return value >= self.bound if self.direction == "at least" else value <= self.bound


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure: a value per round.

    Attributes:
        subject: Name in `SUBJECTS`.
        what: What is measured, over what.
        values: One per round.
        unit: Empty for ratios.
        goal: What the median should reach, if anything.
        note: Batch, sizes and the absolute numbers behind a ratio.
    """

    subject: str
    what: str
    values: tuple[float, ...]
    unit: str = ""
    goal: Goal | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.values)

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or nothing without a goal."""
        if self.goal is None:
            return ""
        return "met" if self.goal.is_met(self.median) else "missed"

    def plain(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return {
            **asdict(self),
            "values": list(self.values),
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "verdict": self.verdict,
        }


def interleaved(
    a: Callable[[], Any],
    b: Callable[[], Any],
    rounds: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[float, float]]:
    """Run A B A B … and return the seconds of every pair; each ran once before, unmeasured."""
    a()
    b()
    return [(timed(a, device, clock), timed(b, device, clock)) for _ in range(rounds)]


def timed(
    run: Callable[[], Any], device: str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the seconds of one run, the device's queue empty before and after."""
    _wait(device)
    start = clock()
    run()
    _wait(device)
    return clock() - start


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def ratio(
    subject: str,
    what: str,
    pairs: Sequence[tuple[float, float]],
    goal: Goal | None = None,
    note: str = "",
    unit_s: tuple[str, str] = ("ours", "other"),
) -> Row:
    """Return `other / ours` of every pair: above 1, ours is faster.

    Args:
        subject: Name of the subject.
        what: What is compared.
        pairs: Seconds (ours, other).
        goal: For the median.
        note: Said first, before the medians of both sides.
        unit_s: What the two sides are called in the note.
    """
    ours, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    absolute = f"{unit_s[0]} {_seconds(ours)}, {unit_s[1]} {_seconds(other)}"
    values = tuple(b / a for a, b in pairs)
    return Row(
        subject=subject,
        what=what,
        values=values,
        unit="",
        goal=goal,
        note=f"{note}; {absolute}" if note else absolute,
    )


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def cpu_name() -> str:
    """Return what the processor calls itself."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def environment(settings: Settings) -> dict[str, Any]:
    """Return what the figures depend on: device, versions, threads, load."""
    import torch

    device = settings.device
    if device.startswith("cuda"):
        device = f"{device} ({torch.cuda.get_device_name(device)})"
    return {
        "device": device,
        "cpu": f"{cpu_name()}, {cores()} cores",
        "threads": torch.get_num_threads(),
        "precision": settings.precision,
        "load": [round(value, 1) for value in os.getloadavg()],
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "lightning", "numpy", "numcodecs")},
        "quick": settings.quick,
    }


def run_subjects(names: Sequence[str], settings: Settings) -> Iterator[Row]:
    """Measure subjects one after another.

    Raises:
        ConfigError: A subject is not known.
    """
    for name in names:
        if name not in SUBJECTS:
            raise ConfigError(
                f"bench: unknown subject {name!r}.{nearest(name, SUBJECTS)} "
                f"Subjects: {', '.join(SUBJECTS)}"
            )
    for name in names:
        yield from importlib.import_module(f"domainssl.bench.{name}").measure(settings)


@contextmanager
def silent() -> Iterator[None]:
    """Keep what the measured code prints and logs out of the report."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "domainssl")]
    levels = [each.level for each in loggers]
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in loggers:
            each.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)
