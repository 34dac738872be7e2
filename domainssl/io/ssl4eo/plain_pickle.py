"""Pickles of tuples of bytes and whole numbers, read without running them.

SSL4EO-S12 v1.0 keeps its samples as such pickles in LMDB. Unpickling may run any code; here the
stream is taken apart by `pickletools`, and any other instruction than those that make bytes,
numbers and tuples is refused.
"""

from __future__ import annotations

import pickletools
from typing import Any

from domainssl.errors import DataError, parsing

__all__ = ["parse_plain"]

_CONSTANTS = {
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
}  # fmt: skip
_IGNORED = {"PROTO", "FRAME"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()
_MOST = 1000  # instructions


def parse_plain(data: bytes, where: str) -> tuple[Any, ...]:
    """Return the tuple that a pickle makes.

    Args:
        data: The pickle.
        where: How errors call it.

    Raises:
        DataError: It is damaged, or makes anything but tuples of bytes and whole numbers.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    with parsing(f"{where}: the pickle", also=(IndexError, UnicodeDecodeError)):
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            name = opcode.name
            if count > _MOST:
                raise ValueError(f"more than {_MOST} instructions")
            if name in _CONSTANTS:
                if type(argument) not in (bytes, int):
                    raise ValueError("a truth value")
                stack.append(argument)
            elif name in _TUPLES:
                size = _TUPLES[name]
                if size > len(stack):
                    raise ValueError("a tuple of more than there is")
                stack[len(stack) - size :] = [_tuple(stack[len(stack) - size :])]
            elif name == "MARK":
                stack.append(_MARK)
            elif name == "TUPLE":
                at = max(i for i, one in enumerate(stack) if one is _MARK)
                stack[at:] = [_tuple(stack[at + 1 :])]
            elif name == "MEMOIZE" or name in _PUT:
                memo[len(memo) if name == "MEMOIZE" else int(argument or 0)] = stack[-1]
            elif name in _GET:
                stack.append(memo[int(argument or 0)])
            elif name == "STOP":
                break
            elif name not in _IGNORED:
                raise DataError(
                    f"{where}: the pickle holds the instruction {name}, but a sample is a tuple of "
                    "bytes and whole numbers. It is not of SSL4EO-S12 v1.0, or hostile; nothing "
                    "of it was run."
                )
        if len(stack) != 1 or not isinstance(stack[0], tuple):
            raise ValueError("no tuple of bytes and whole numbers")
    return stack[0]  # type: ignore[no-any-return]


def _tuple(values: list[Any]) -> tuple[Any, ...]:
    # checked while it is made: one that is walked through afterwards may hold itself 2^300 times
    if any(value is _MARK for value in values):
        raise ValueError("a mark within a tuple")
    return tuple(values)
