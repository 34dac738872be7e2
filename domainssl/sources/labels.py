"""The classes of exams, tiles and slides, by number."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from domainssl.errors import ConfigError, DataError, nearest

__all__ = ["class_names"]

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")


def class_names(there: Collection[str], asked: Sequence[str], what: str) -> tuple[str, ...]:
    """Return the classes in the order of their numbers.

    Args:
        there: Those that occur.
        asked: Those of the configuration; empty takes those that occur, sorted, as numbers where
            all are.
        what: What has the classes, for the message.

    Raises:
        ConfigError: One that occurs is not among those asked for.
        DataError: One number is written in two ways.
    """
    written: dict[float, str] = {}
    for label in sorted(there):
        if _NUMBER.fullmatch(label) and written.setdefault(float(label), label) != label:
            raise DataError(
                f"{what} have the classes {written[float(label)]!r} and {label!r}, which are one "
                "number. Write it alike in all rows."
            )
    if not asked:
        are_numbers = all(label.isdecimal() for label in there)
        return tuple(sorted(there, key=int) if are_numbers else sorted(there))
    unknown = sorted(set(there).difference(asked))
    if unknown:
        raise ConfigError(
            f"data.init_args.labels.classes: {', '.join(asked)}, but {what} have the class "
            f"{unknown[0]!r}.{nearest(unknown[0], asked)} List all of {', '.join(sorted(there))}."
        )
    return tuple(asked)
