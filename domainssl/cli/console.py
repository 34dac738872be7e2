"""Where the command line writes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from domainssl.screen import printable, screen

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "error_console", "printable_logs"]

_PIPE_WIDTH = 140


def console() -> Console:
    """Return a console on the current stdout."""
    found = screen()
    # files and pipes have no width of their own
    return found if found.is_terminal else screen(width=_PIPE_WIDTH)


def error_console() -> Console:
    """Return a console on the current stderr."""
    return screen(stderr=True)


@contextmanager
def printable_logs() -> Iterator[None]:
    """Write control characters in log records and warnings out, for as long as a verb runs."""
    make, show = logging.getLogRecordFactory(), warnings.formatwarning

    def record(*arguments: Any, **more: Any) -> logging.LogRecord:
        found = make(*arguments, **more)
        text = found.getMessage()
        if printable(text) != text:
            found.msg, found.args = printable(text), ()
        return found

    def warning(*arguments: Any, **more: Any) -> str:
        return printable(show(*arguments, **more))

    logging.setLogRecordFactory(record)
    warnings.formatwarning = warning
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
        warnings.formatwarning = show
