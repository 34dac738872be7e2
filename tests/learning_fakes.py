"""A DataModule for runs of `learning`: takes a seed, and can keep a run from getting on."""

from __future__ import annotations

import threading
from pathlib import Path

from tiny import TinyData

__all__ = ["SeededData"]


class SeededData(TinyData):
    """The tiny items, in more of them.

    Args:
        folder: Where the test steers runs from.
        seed: Seed of the run. While `folder` holds `hold_<seed>`, the run stops before its first
            batch for ever. Where that is a FIFO the run says in it that it has come so far, and
            keeps it open until it ends.
    """

    def __init__(self, folder: str, seed: int = 0) -> None:
        super().__init__(items=64, held_out=60)
        self.folder, self.seed = folder, seed

    def setup(self, stage: str) -> None:
        """Stop here if the test wants it."""
        path = Path(self.folder) / f"hold_{self.seed}"
        if path.is_fifo():
            with path.open("w") as file:
                file.write("here\n")
                file.flush()
                threading.Event().wait()
        if path.exists():
            threading.Event().wait()
