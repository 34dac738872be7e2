"""Options whose default is decided by one switch: our choice, or the published behaviour."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from domainssl.errors import ConfigError, nearest

__all__ = ["MethodOptions", "as_dataclass", "decide", "named_sizes", "option"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Base of the options of a method.

    Attributes:
        reference: Follow the released code wherever an option is None.
    """

    reference: bool = False


M = TypeVar("M", bound=MethodOptions)


def as_dataclass(cls: type[T], value: T | Mapping[str, Any]) -> T:
    """Return `value` as an instance of a dataclass; recorded arguments hold plain dicts.

    Raises:
        ConfigError: The mapping has a key that is no field.
    """
    if not isinstance(value, Mapping):
        return value
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in value:
        if name not in known:
            raise ConfigError(
                f"{cls.__name__} has no field {name!r}.{nearest(name, known)} "
                f"It has {', '.join(known)}."
            )
    return cls(**value)


def named_sizes(
    sizes: Mapping[Any, T], size: str, architecture: T | Mapping[str, Any], method: str
) -> T:
    """Return the sizes of a name with explicit ones laid over them.

    Args:
        sizes: Dataclass by name.
        size: The name.
        architecture: The same dataclass; fields that are None keep the named value.
        method: Whose sizes they are, for the message.

    Raises:
        ConfigError: There is no such name.
    """
    if size not in sizes:
        raise ConfigError(f"{method}: size {size!r} is not one of {list(sizes)}.")
    named = sizes[size]
    given = vars(as_dataclass(type(named), architecture))
    changes = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(named, **changes)  # type: ignore[type-var]


def option(*, ours: Any, reference: Any, text: str) -> Any:
    """Declare a field of `MethodOptions` that is None until `decide` fills it.

    Args:
        ours: Value with `options.reference: false`.
        reference: Value with `options.reference: true`.
        text: What the option does, for the documentation.
    """
    metadata = {"ours": ours, "reference": reference, "text": text}
    return dataclasses.field(default=None, metadata=metadata)


def decide(cls: type[M], options: M | Mapping[str, Any]) -> M:
    """Return `options` with every None replaced as `reference` says; explicit values win.

    Raises:
        ConfigError: The mapping has a key that is no field.
    """
    given = as_dataclass(cls, options)
    chosen = {}
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        if value is None and "ours" in field.metadata:
            value = field.metadata["reference" if given.reference else "ours"]
        chosen[field.name] = value
    return dataclasses.replace(given, **chosen)
