"""One run of `learning` in a process of its own: measures its cost, and ends with its parent.

Called as `python -m domainssl.matrix.child COST_FILE VERB [options]`, with a pipe from the
parent as standard input.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import threading
import time
from pathlib import Path

__all__ = ["main"]


def main(argv: list[str]) -> None:
    """Run the command line with `argv[1:]`, and write its cost into the file `argv[0]`.

    Args:
        argv: File for `{"cpu_seconds": ..., "wall_seconds": ..., "memory_mb": ...}` (the largest
            resident set), then the words after `python -m domainssl`.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start = time.perf_counter()
    sys.argv = ["domainssl", *argv[1:]]
    try:
        runpy.run_module("domainssl", run_name="__main__", alter_sys=True)
    finally:
        used = os.times()  # of this process and of the children it has waited for
        processor = used.user + used.system + used.children_user + used.children_system
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        cost = {
            "cpu_seconds": processor,
            "wall_seconds": time.perf_counter() - start,
            "memory_mb": resident / 1e6,
        }
        Path(argv[0]).write_text(json.dumps(cost), encoding="utf-8")


def _end_with_parent() -> None:
    """Wait for the parent's end of the pipe to close, as it does however the parent ends."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
