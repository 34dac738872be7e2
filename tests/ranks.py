"""Run a function on several gloo ranks and return what each of them returned."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["run_ranks"]


def _work(rank: int, world: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    try:
        torch.save(function(*args), Path(folder) / f"rank_{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_ranks(function: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh gloo group.

    Args:
        function: Importable function; it returns plain data and tensors.
        args: Picklable arguments, the same for all ranks.
        world: Number of processes.

    Returns:
        The results in rank order. An exception on any rank is raised here.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, args=(world, folder, function, args), nprocs=world, join=True)
        return [
            torch.load(Path(folder) / f"rank_{rank}.pt", weights_only=True) for rank in range(world)
        ]
