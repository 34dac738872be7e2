"""Ask constructors what they refuse, one part of a configuration at a time."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from domainssl.cli.config.nodes import Mistake, Node, Where
from domainssl.errors import DomainSSLError

__all__ = ["placed", "refusals", "said_for_the_user"]

_MOST = 10  # refusals of one constructor
# what libraries raise on values that they cannot build anything from, such as a width of -1
_REFUSED = (ValueError, ArithmeticError, AssertionError, RuntimeError)


def refusals(node: Node, path: str, cls: type, arguments: dict[str, Any]) -> list[Mistake]:
    """Return what the constructor of a class refuses.

    Every value that it names is taken out for the next try, so that all are found.

    Args:
        node: The mapping of the arguments.
        path: Its place, such as `callbacks.checkpoint.init_args`.
        cls: The class.
        arguments: Its arguments as plain data, those included that no file gives.
    """
    found: list[Mistake] = []
    for _ in range(_MOST):
        error = _error_of(cls, arguments)
        if error is None:
            break
        keys = _named(node, str(error), path)
        where = _at(node, keys).where if keys else node.where
        found.append(_mistake(f"{_prefix(path, keys, str(error))}{error}", where))
        if not keys or not _take_out(arguments, keys):
            break
    return found


def placed(tree: Node, error: Exception) -> Mistake | None:
    """Return an error that names a key of the configuration as a mistake with its place."""
    text = str(error)
    for path in _paths(tree):
        dotted = ".".join(path)
        short = dotted.replace(".init_args", "")
        if any(re.search(rf"(?<![\w.]){re.escape(p)}(?![\w])", text) for p in (dotted, short)):
            return _mistake(text, _at(tree, path).where)
    return None


def said_for_the_user(error: BaseException | None) -> Exception | None:
    """Return what was said for the user out of what libraries have wrapped around it."""
    last: Exception | None = None
    while error is not None:
        if isinstance(error, DomainSSLError):
            return error
        if not str(error).strip():
            pass  # an assertion without a word
        elif isinstance(error, _REFUSED) or type(error).__name__ == "MisconfigurationException":
            last = error  # type: ignore[assignment]
        else:
            last = None
        error = error.__cause__ or error.__context__
    return last


def _error_of(cls: type, arguments: dict[str, Any]) -> Exception | None:
    from jsonargparse import ArgumentError, ArgumentParser
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    parser = ArgumentParser(exit_on_error=False)
    with _silent():
        try:
            parser.add_class_arguments(cls, "it", fail_untyped=False)
            parser.instantiate_classes(parser.parse_object({"it": arguments}))
        except (ArgumentError, DomainSSLError, MisconfigurationException) as error:
            return said_for_the_user(error) or error
        except (ValueError, TypeError, ArithmeticError) as error:
            return said_for_the_user(error) or error
    return None


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what a part says about itself for the time when it is built to be used."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _paths(node: Node, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the keys of a tree, the longest paths first."""
    found: list[tuple[str, ...]] = []
    for key, child in node.children.items():
        found += [*_paths(child, (*above, key)), (*above, key)]
    return sorted(found, key=len, reverse=True)


def _named(node: Node, text: str, path: str) -> tuple[str, ...]:
    """Return the key below `node` that a message is about, the one it names first."""
    best: tuple[int, tuple[str, ...]] | None = None
    for keys in _paths(node):
        value = _at(node, keys).value
        words = [keys[-1], *([value] if isinstance(value, str) and value else [])]
        match = re.search("|".join(rf"\b{re.escape(word)}\b" for word in words), text)
        if match is not None and (best is None or match.start() < best[0]):
            best = match.start(), keys
    return best[1] if best else ()


def _at(node: Node, keys: tuple[str, ...]) -> Node:
    for key in keys:
        node = node.children[key]
    return node


def _take_out(arguments: dict[str, Any], keys: tuple[str, ...]) -> bool:
    for key in keys[:-1]:
        arguments = arguments[key]
    return arguments.pop(keys[-1], arguments) is not arguments


def _prefix(path: str, keys: tuple[str, ...], text: str) -> str:
    """Return the place in the configuration, unless the message has it already."""
    dotted = ".".join((path, *keys))
    return "" if dotted in text or dotted.replace(".init_args", "") in text else f"'{dotted}': "


def _mistake(text: str, where: Where | None) -> Mistake:
    first, _, rest = text.strip().partition("\n")
    return Mistake(first.rstrip("."), where, rest)
