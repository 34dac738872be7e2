"""Names of exams that tell nothing about patients: a keyed hash of where an exam lies.

The key lies in the cache folder (readable by its owner alone), or in the environment variable
DOMAINSSL_ID_KEY; runs, ranks and machines with the same key give an exam the same id.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from domainssl.cache import cache_dir
from domainssl.errors import ConfigError, DataError, nearest
from domainssl.files import new_file, open_regular

__all__ = [
    "IDS",
    "KEY_VARIABLE",
    "as_utf8",
    "id_key",
    "ids_of",
    "is_hashed",
    "write_ids",
    "write_table",
]

IDS = ("hashed", "plain")
KEY_VARIABLE = "DOMAINSSL_ID_KEY"
_FILE = "id.key"
_LEAST = 16  # characters of a key
_SURROGATE = re.compile("[\udc80-\udcff]")  # how Python holds such a byte
_DIGITS = 16  # of an id: 64 bit


def id_key() -> bytes:
    """Return the key, making one in the cache folder where there is none.

    Raises:
        ConfigError: The key of the environment is too short, or others may read the file.
        DataError: The file cannot be read or written.
    """
    given = os.environ.get(KEY_VARIABLE)
    if given is not None:
        if len(given) < _LEAST:
            raise ConfigError(
                f"{KEY_VARIABLE}: {len(given)} characters, expected at least {_LEAST}: ids made "
                'with a short key can be guessed. Make one: python -c "import secrets; '
                'print(secrets.token_hex())"'
            )
        return given.encode()
    path = cache_dir() / _FILE
    try:
        if not path.exists():
            _make(path)
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise ConfigError(
                f"{path}: other users may read the key of the ids. Remove their permission: "
                f"chmod 600 {path}"
            )
        with open_regular(path) as file:
            key = file.read(4096)
    except OSError as error:
        raise DataError(
            f"{path}: the key of the ids cannot be read or written ({error.strerror or error}). "
            f"Point DOMAINSSL_CACHE at a folder you can write to, or set {KEY_VARIABLE}."
        ) from error
    if len(key) < _LEAST:
        raise ConfigError(
            f"{path}: the key of the ids has {len(key)} bytes, expected at least {_LEAST}. Delete "
            "the file to get a new one; ids then change."
        )
    return key


def _make(path: Path) -> None:
    """Write a new key, complete before it has its name; of two processes the first one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_hex(32).encode())
        try:
            os.link(part, path)
        except FileExistsError:
            pass  # another process was faster
        except OSError:  # no hard links on this file system
            if not path.exists():
                os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def ids_of(names: Iterable[str], mode: str) -> Sequence[str]:
    """Return the ids of exams by name.

    Args:
        names: Paths relative to the root, or ids of a manifest.
        mode: `hashed`, or `plain` for names that may be public.

    Raises:
        ConfigError: The mode or the key cannot be used.
    """
    if mode not in IDS:
        raise ConfigError(
            f"data.init_args.exams.ids: got {mode!r}, expected one of {', '.join(IDS)}."
            f"{nearest(mode, IDS)}"
        )
    if mode == "plain":
        return [as_utf8(name) for name in names]
    key = id_key()
    coded = (name.encode("utf-8", "surrogateescape") for name in names)  # any name of a file
    return [hmac.new(key, name, hashlib.sha256).hexdigest()[:_DIGITS] for name in coded]


def as_utf8(name: str) -> str:
    """Return the name of a file with bytes that are no UTF-8 as `%FF`: tables cannot hold them."""
    return _SURROGATE.sub(lambda found: f"%{ord(found[0]) - 0xDC00:02X}", name)


def is_hashed(name: str) -> bool:
    """Whether a name looks like one that `ids_of` makes."""
    return re.fullmatch(f"[0-9a-f]{{{_DIGITS}}}", name) is not None


def write_table(path: str, named: Sequence[tuple[str, str]], mode: str, what: str = "exam") -> None:
    """Write which id is which exam and patient, readable by the owner alone.

    Args:
        path: File to write.
        named: Name of every exam or tile, and its patient.
        mode: As in `ids_of`.
        what: Title of the column of names.

    Raises:
        DataError: The file cannot be written.
    """
    names = [name for name, _ in named]
    rows = [(i, *pair) for i, pair in zip(ids_of(names, mode), named, strict=True)]
    _write(path, [("id", what, "patient"), *rows], "data.init_args.exams.id_table")


def write_ids(path: str | Path, ids: Sequence[str], names: Sequence[str], what: str) -> None:
    """Write which id is which input, readable by the owner alone.

    Args:
        path: File to write.
        ids: Of every input.
        names: What the user knows each by.
        what: Title of the column of names.

    Raises:
        DataError: The file cannot be written.
    """
    _write(path, [("id", what), *zip(ids, names, strict=True)], "--id_table")


def _write(path: str | Path, rows: Sequence[Sequence[str]], option: str) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    try:
        with new_file(Path(path)) as file:
            if os.name == "posix":
                os.fchmod(file.fileno(), 0o600)
            file.write(text.getvalue().encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}). Choose another {option}."
        ) from error
