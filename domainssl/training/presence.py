"""Know which modalities a step has seen on any rank, without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from domainssl.distributed import all_reduce_sum, world_size
from domainssl.modality import key, present_mask

__all__ = ["PresenceRecord"]


class PresenceRecord:
    """Collects, over the batches of one optimiser step, which modalities any rank has had."""

    def __init__(self) -> None:
        self._noted: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def note(self, batch: Mapping[str, Any], names: Sequence[str], device: torch.device) -> None:
        """Queue the presence of one batch; it is read after the backward pass.

        Args:
            batch: The batch; a missing key counts as absent.
            names: Modalities, in the order that `absent` will be given.
            device: Where the collective runs.
        """
        is_certain = all(n in batch and key(n, "present") not in batch for n in names)
        if world_size() == 1 and is_certain:
            return
        none = torch.zeros((), dtype=torch.bool, device=device)
        flags = [present_mask(batch, n).any() if n in batch else none for n in names]
        counts = all_reduce_sum(torch.stack(flags).float())
        event = None
        if counts.is_cuda:  # the copy is queued before the forward pass, so reading is no wait
            on_host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            counts = on_host.copy_(counts, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._noted.append((counts, event))

    def absent(self, names: Sequence[str]) -> list[str]:
        """Return the modalities that no rank has had since the last call."""
        noted, self._noted = self._noted, []
        if not noted:
            return []
        for _, event in noted:
            if event is not None:
                event.synchronize()
        counts = torch.stack([counts for counts, _ in noted]).sum(0).tolist()
        return [name for name, count in zip(names, counts, strict=True) if count == 0]
