"""Processes of tests that are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import torch

__all__ = ["killed"]


def killed(call: Callable[[], object]) -> bool:
    """Call something in a forked process; return whether that was killed by SIGKILL."""
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)  # threads do not survive a fork
        try:
            call()
        finally:
            os._exit(3)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
