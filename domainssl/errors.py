"""Exceptions a user can meet, and the helpers that make their text useful."""

from __future__ import annotations

import difflib
import importlib
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType

__all__ = [
    "ConfigError",
    "DataError",
    "DomainSSLError",
    "MissingExtraError",
    "StorageError",
    "UnreadableError",
    "WeightsError",
    "counted",
    "nearest",
    "parsing",
    "require",
    "setting",
    "unwritable",
]

# what parsers of files raise on content that they were not written for
_DAMAGE: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError,
    RuntimeError, TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip
_LONGEST = 300  # characters of a library's own message


class DomainSSLError(Exception):
    """Base of every error that domainssl raises on purpose."""


class ConfigError(DomainSSLError, ValueError):
    """A configuration or an argument cannot be used."""


class DataError(DomainSSLError, ValueError):
    """A file, a store or a batch is not what it should be."""


class UnreadableError(DataError):
    """A file cannot be taken apart: cut off, damaged or of another format, whatever it should hold.

    Readers of many files leave such a one out and say so; other errors end them.
    """


class StorageError(DomainSSLError, RuntimeError):
    """Nothing can be written: a full disk, quota or missing permission, and no bad data."""


class WeightsError(DomainSSLError, ValueError):
    """Weights do not fit the model, or the data do not fit the weights."""


class MissingExtraError(DomainSSLError, ImportError):
    """An optional library is needed and not installed."""


@contextmanager
def parsing(
    what: str,
    *,
    kind: type[DomainSSLError] = UnreadableError,
    advice: str = "The file is damaged or not of this format; get it again from its publisher.",
    also: tuple[type[Exception], ...] = (),
    quoted: bool = True,
) -> Iterator[None]:
    """Turn what a parser raises on damaged or odd content into an error that names the file.

    Wrap the calls that take content of a file apart, and nothing else.

    Args:
        what: The file and what was read from it: `'a.tif: the header'`.
        kind: The error to raise.
        advice: What to do about it.
        also: Exceptions of the parser's own that derive from none of the usual ones.
        quoted: Whether the parser's own words are shown; not where they may hold names of persons.

    Raises:
        DomainSSLError: An error of `kind`; errors of ours pass unchanged.
    """
    try:
        yield
    except DomainSSLError:
        raise
    except (*_DAMAGE, *also) as error:
        words = " ".join(str(error).split())[:_LONGEST]
        is_shown = quoted and bool(words)
        reason = f"{type(error).__name__}: {words}" if is_shown else type(error).__name__
        raise kind(f"{what} cannot be read ({reason}). {advice}") from (error if quoted else None)


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number and what is counted: `1 exam`, `2 exams`; `plural` where it is no `s`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {plural or noun + 's'}"


def nearest(name: object, options: Iterable[object]) -> str:
    """Return `" Did you mean 'x'?"` for the closest option, or an empty string."""
    texts = [str(option) for option in options]
    lowered = {text.lower(): text for text in texts}
    found = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.6)
    return f" Did you mean {lowered[found[0]]!r}?" if found else ""


def setting(name: str) -> str:
    """Return how an option of a modality is set where runs, and where `embed` and `predict` read.

    Args:
        name: Such as `crs`.
    """
    return f"data.init_args.modalities.<name>.{name}, or --{name} of embed and predict"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library.

    Args:
        module: Dotted name of the module to import.
        extra: The extra of this package that installs it.

    Raises:
        MissingExtraError: The library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module!r} is needed here and could not be imported ({error}). "
            f"Install it with: pip install 'domainssl[{extra}]'"
        ) from error


def unwritable(place: object, error: BaseException, advice: str = "") -> StorageError:
    """Return what is raised where a result cannot be written; it is no fault of the data.

    Args:
        place: File or folder.
        error: What the system said.
        advice: What to do; empty offers another `--output`.
    """
    said = getattr(error, "strerror", None) or error
    what = advice or "Make room, or choose another --output; the same command goes on."
    return StorageError(f"{place}: cannot be written ({said}). {what}")
