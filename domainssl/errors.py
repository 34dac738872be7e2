"""Exceptions a user can meet, and the helpers that make their text useful."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

__all__ = [
    "ConfigError",
    "DataError",
    "DomainSSLError",
    "MissingExtraError",
    "WeightsError",
    "nearest",
    "require",
]


class DomainSSLError(Exception):
    """Base of every error that domainssl raises on purpose."""


class ConfigError(DomainSSLError, ValueError):
    """A configuration or an argument cannot be used."""


class DataError(DomainSSLError, ValueError):
    """A file, a store or a batch is not what it should be."""


class WeightsError(DomainSSLError, ValueError):
    """Weights do not fit the model, or the data do not fit the weights."""


class MissingExtraError(DomainSSLError, ImportError):
    """An optional library is needed and not installed."""


def nearest(name: object, options: Iterable[object]) -> str:
    """Return `" Did you mean 'x'?"` for the closest option, or an empty string."""
    texts = [str(option) for option in options]
    lowered = {text.lower(): text for text in texts}
    found = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.6)
    return f" Did you mean {lowered[found[0]]!r}?" if found else ""


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
