"""A bar on stderr for work in pieces."""

from __future__ import annotations

import time
from datetime import timedelta

__all__ = ["Bar"]

_LINE_S = 60.0  # between lines in a log


class Bar:
    """Pieces done and time left, for as long as the context lasts.

    Where stderr is a file, such as the log of a job, a line every minute says both.

    An interrupt ends with how far the work was, and that the same command goes on from there.

    Args:
        noun: What pieces are, in plural.
        kept: Where those that are done lie, such as `in DIR`; empty says nothing of it.

    Attributes:
        done: Pieces done so far.
        total: Their number.
    """

    def __init__(self, noun: str = "blocks", kept: str = "") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        from domainssl.cli.console import error_console

        self.done, self.total = 0, 0
        self._noun, self._kept = noun, kept
        self._bar = Progress(
            BarColumn(), MofNCompleteColumn(), noun, TimeRemainingColumn(),
            console=error_console(), transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None)
        self._first = (0.0, 0, -1)  # when, where and of what total the counting began
        self._told = time.monotonic()

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        from domainssl.cli.console import console

        self._bar.stop()
        if self._kept and isinstance(kind, type) and issubclass(kind, KeyboardInterrupt):
            console().print(
                f"Stopped after {self.done} of {self.total} {self._noun}; they are kept "
                f"{self._kept}. The same command goes on from there.",
                markup=False,
            )

    def __call__(self, done: int, total: int) -> None:
        """Show how far the work is."""
        self.done, self.total = done, total
        self._bar.update(self._task, completed=done, total=total)
        if not self._bar.console.is_terminal:
            self._tell()

    def _tell(self) -> None:
        """Print a line, unless the last one is less than a minute old."""
        now = time.monotonic()
        if self._first[2] != self.total or self.done < self._first[1]:
            self._first = (now, self.done, self.total)
        began, first, _ = self._first
        if now - self._told < _LINE_S or self.done == self.total:
            return
        self._told = now
        rate = (self.done - first) / (now - began) if now > began else 0.0
        left = timedelta(seconds=round((self.total - self.done) / rate)) if rate else None
        self._bar.console.print(
            f"{self.done} of {self.total} {self._noun}"
            + (f", about {left} left" if left is not None else ""),
            markup=False, highlight=False,
        )  # fmt: skip
