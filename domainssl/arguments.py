"""Remember how an object was built, as plain data that any file format can hold."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Self

from domainssl.errors import ConfigError

__all__ = ["Recorded", "class_name", "class_of", "plain"]


# names of sizes; where some depth may be 0, that of a decoder may not
_SIZE = re.compile(
    r"(?:\w+_)?(?:width|heads|dim|size|channels|hidden|window|embedding)|decoder_depth"
    r"|(?P<may_be_none>(?:\w+_)?depths?)"
)


def plain(value: object) -> Any:
    """Return `value` as dicts, lists, strings, numbers, booleans and None only.

    Raises:
        TypeError: `value` holds something that has no plain form.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Path):
        return str(value)
    to_dict = getattr(value, "to_dict", None)
    if callable(to_dict):
        return plain(to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, tensors
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no plain form: {value!r}")


def class_of(instance: object) -> type:
    """Return the class an object was built from, without the one that FSDP2 puts before it."""
    return next(
        c for c in type(instance).__mro__ if "FSDPModule" not in {b.__name__ for b in c.__mro__}
    )


def class_name(cls: type) -> str:
    """Return the name of a class with its module, as checkpoints and cards hold it."""
    return f"{cls.__module__}.{cls.__qualname__}"


class Recorded:
    """Keep the constructor's arguments, defaults included, in `arguments`.

    Checkpoints and cards store this dict; because it is plain data they load
    without unpickling any class.
    """

    arguments: dict[str, Any]
    arguments_at: ClassVar[str] = ""  # where a configuration has them

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the arguments before any constructor runs."""
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
        except TypeError:
            return self  # __init__ raises the same error, or copy and pickle restore the dict
        bound.apply_defaults()
        recorded: dict[str, Any] = {}
        for name in list(bound.arguments)[1:]:
            is_open = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            value = plain(bound.arguments[name])
            recorded.update(value if is_open else {name: value})
        place = cls.arguments_at or f"{cls.__name__}: "
        for path, value, least in _sizes(recorded):
            if value < least:
                raise ConfigError(f"{place}{path}: got {value!r}, expected {least} or more.")
        object.__setattr__(self, "arguments", recorded)
        return self


def _sizes(
    value: Any, path: str = "", least: int | None = None
) -> Iterator[tuple[str, float, int]]:
    """Yield every number that is the size of something, its path, and the smallest possible."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            found = _SIZE.fullmatch(key)
            smallest = None if found is None else 0 if found["may_be_none"] else 1
            yield from _sizes(item, f"{path}.{key}" if path else key, smallest)
    elif least is not None and isinstance(value, list):
        for item in value:
            yield from _sizes(item, path, least)
    elif least is not None and isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value, least
