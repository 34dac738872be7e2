"""Trainer strategies."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from domainssl.training._lightning import OneGroupStrategy
from domainssl.training.sharded_folder import check_sharded_folder

__all__ = ["FSDP2Strategy"]


class FSDP2Strategy(OneGroupStrategy):
    """Share parameters, gradients and optimiser states over all devices (FSDP2).

    Every device of the run, on all nodes, belongs to one data-parallel group.

    Args:
        save_distributed_checkpoint: Write one folder with a file per rank instead of one file.
        process_group_backend: `nccl` or `gloo`; None chooses by device.
        timeout_s: How long a collective may take before the run ends.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout_s: float = 1800,
    ) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_s),
        )

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; a folder is looked through before torch unpickles its metadata."""
        if Path(checkpoint_path).is_dir():
            check_sharded_folder(Path(checkpoint_path))
        return super().load_checkpoint(checkpoint_path, weights_only)
