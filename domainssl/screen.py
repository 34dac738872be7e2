"""Text for people: names out of files and folders never reach a terminal as they are."""

from __future__ import annotations

import errno
import unicodedata
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["COMMAND", "printable", "screen"]

COMMAND = "python -m domainssl"
"""How the commands start that reports and messages offer."""

_KEPT = "\n\t"


def printable(text: str) -> str:
    """Return a text with control characters, surrogates and marks of direction written out."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in _KEPT or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else _written(c)
        for c in text
    )


def _written(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


@cache
def _console_class() -> type[Any]:
    from rich.console import Console
    from rich.segment import Segment

    class PrintableConsole(Console):
        """A console that writes control characters out, styles of its own aside."""

        def render(self, renderable: Any, options: Any = None) -> Any:
            """Yield the segments of a renderable."""
            for segment in super().render(renderable, options):
                is_clean = segment.control is not None
                yield segment if is_clean else Segment(printable(segment.text), segment.style)

        def on_broken_pipe(self) -> None:
            """Leave it to `cli.main` that nobody reads any more; rich ends with status 1."""
            raise BrokenPipeError(errno.EPIPE, "nobody reads the output any more")

    return PrintableConsole


def screen(**arguments: Any) -> Console:
    """Return a console on the current stdout (or, with `stderr=True`, stderr)."""
    made: Console = _console_class()(highlight=False, soft_wrap=True, **arguments)
    return made
