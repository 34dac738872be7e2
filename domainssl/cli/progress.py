"""A bar on stderr for work in pieces."""

from __future__ import annotations

__all__ = ["Bar"]


class Bar:
    """Pieces done and time left, for as long as the context lasts.

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
