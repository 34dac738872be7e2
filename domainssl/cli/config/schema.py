"""Read what a class accepts from its constructor, and say it in words."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Union

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["Parameter", "dataclasses_in", "in_words", "parameters", "rejects", "takes_more"]


@dataclass(frozen=True)
class Parameter:
    """One constructor argument: its annotation, and whether it must be given or may be empty text.

    Only what is empty by default may be empty: elsewhere a variable was not set.
    """

    name: str
    hint: Any
    is_required: bool
    may_be_empty: bool = False


def parameters(cls: type) -> dict[str, Parameter]:
    """Return the arguments of a class by name.

    `**kwargs` are followed to the constructors of the base classes, and to the functions that
    receive them; what a base class requires is taken to be given by the class itself.
    """
    found: dict[str, Parameter] = {}
    first = next(owner for owner in inspect.getmro(cls) if "__init__" in owner.__dict__)
    for owner in inspect.getmro(cls):
        init = owner.__dict__.get("__init__")
        if init is None:
            continue
        if owner is object:
            return found
        hints = _hints(init)
        passes_on = False
        for item in list(inspect.signature(init).parameters.values())[1:]:
            if item.kind is inspect.Parameter.VAR_KEYWORD:
                passes_on = True
            elif item.kind is not inspect.Parameter.VAR_POSITIONAL:
                required = item.default is inspect.Parameter.empty and owner is first
                hint = hints.get(item.name, Any)
                if item.default is None and hint is not Any:
                    hint = Union[hint, None]  # noqa: UP007  # not all annotations know `|`
                known = Parameter(item.name, hint, required, _is_empty_text(item.default))
                found.setdefault(item.name, known)
        if not passes_on:
            return found
        for name in _received_elsewhere(cls):
            found.setdefault(name, Parameter(name, Any, False))
    return found


def _is_empty_text(value: object) -> bool:
    return isinstance(value, str) and not value


def takes_more(cls: type) -> bool:
    """Return True for classes of others whose `**kwargs` may take names no signature tells."""
    if cls.__module__.startswith("domainssl."):
        return False
    owner = next((c for c in inspect.getmro(cls) if "__init__" in c.__dict__), object)
    kinds = [item.kind for item in inspect.signature(owner.__init__).parameters.values()]  # type: ignore[misc]
    return owner is not object and inspect.Parameter.VAR_KEYWORD in kinds


def _received_elsewhere(cls: type) -> list[str]:
    """Return the names that jsonargparse finds by following `**kwargs` through the source."""
    from jsonargparse import ArgumentParser

    try:
        added = ArgumentParser().add_class_arguments(cls, "c", fail_untyped=False)
    except (ValueError, TypeError):
        return []
    return list(dict.fromkeys(name.split(".")[1] for name in added))


def _hints(function: object) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # names that exist for type checkers only
        return {}


def alternatives(hint: Any) -> Iterator[Any]:
    """Yield the members of a union, or the annotation itself."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from alternatives(member)
    else:
        yield hint


def dataclasses_in(hint: Any) -> list[type]:
    """Return the dataclasses that a value with this annotation may be."""
    return [m for m in alternatives(hint) if isinstance(m, type) and dataclasses.is_dataclass(m)]


def mapping_values(hint: Any) -> Any | None:
    """Return the annotation of the values when the annotation is a mapping."""
    for member in alternatives(hint):
        origin = typing.get_origin(member)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return typing.get_args(member)[1]
        if isinstance(member, type) and issubclass(member, Mapping):
            return Any
    return None


def choices(hint: Any) -> list[Any]:
    """Return the values that `Literal` members of the annotation allow."""
    members = [m for m in alternatives(hint) if typing.get_origin(m) is Literal]
    return [value for member in members for value in typing.get_args(member)]


def in_words(hint: Any) -> str:
    """Return an annotation as a reader of a configuration would say it."""
    words = []
    for member in alternatives(hint):
        origin, args = typing.get_origin(member), typing.get_args(member)
        if member is type(None):
            words.append("null")
        elif origin is Literal:
            words += [repr(value) for value in args]
        elif origin in (list, tuple, set, frozenset) or (
            isinstance(origin, type) and issubclass(origin, typing.Iterable)  # type: ignore[arg-type]
        ):
            words.append(_container(origin, args))
        elif isinstance(member, type):
            words.append(
                {"str": "text", "bool": "true or false"}.get(member.__name__) or _plain_name(member)
            )
        else:
            words.append(str(member).replace("typing.", ""))
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _plain_name(member: type) -> str:
    return {"int": "a whole number", "float": "a number"}.get(member.__name__, member.__name__)


def _container(origin: Any, args: tuple[Any, ...]) -> str:
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping of {in_words(args[1])}" if len(args) > 1 else "a mapping"
    if origin is tuple and args and Ellipsis not in args:
        return f"a list of {len(args)} values"
    return f"a list of {in_words(args[0])}" if args else "a list"


def rejects(hint: Any, value: Any) -> bool:
    """Return True when jsonargparse refuses the value for this annotation.

    An annotation that jsonargparse cannot read rejects nothing; the parser that
    instantiates the class has the last word.
    """
    if hint is Any or hint is inspect.Parameter.empty:
        return False
    from jsonargparse import ArgumentError

    parser = _parser_of(hint)
    if parser is None:
        return False
    try:
        parser.parse_object({"value": value})
    except (ArgumentError, TypeError, ValueError):
        return True
    return False


@cache
def _parser_of(hint: Any) -> ArgumentParser | None:
    """Return a parser of `value` with an annotation, or None where jsonargparse has none."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
    except (ValueError, TypeError):
        return None
    return parser
