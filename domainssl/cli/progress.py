"""A bar on stderr for work in pieces."""

from __future__ import annotations

__all__ = ["Bar"]


class Bar:
    """Pieces done and time left, for as long as the context lasts.

    Args:
        noun: What pieces are, in plural.

    Attributes:
        done: Pieces done so far.
        total: Their number.
    """

    def __init__(self, noun: str = "blocks") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        from domainssl.cli.console import error_console

        self.done, self.total = 0, 0
        self._bar = Progress(
            BarColumn(), MofNCompleteColumn(), noun, TimeRemainingColumn(),
            console=error_console(), transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show how far the work is."""
        self.done, self.total = done, total
        self._bar.update(self._task, completed=done, total=total)
