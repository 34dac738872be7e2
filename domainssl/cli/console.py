"""Where the command line writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "error_console"]

_PIPE_WIDTH = 140


def console() -> Console:
    """Return a console on the current stdout."""
    from rich.console import Console

    screen = Console(highlight=False, soft_wrap=True)
    if not screen.is_terminal:  # files and pipes have no width of their own
        screen = Console(highlight=False, soft_wrap=True, width=_PIPE_WIDTH)
    return screen


def error_console() -> Console:
    """Return a console on the current stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)
