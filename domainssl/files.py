"""Files that are written completely or not at all, and small ones that are read whole."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from domainssl.errors import DataError, DomainSSLError, parsing

__all__ = [
    "PART",
    "answer_of_server",
    "new_file",
    "open_regular",
    "read_json",
    "read_small",
    "remove_parts",
    "remove_rests",
    "sync_folder",
    "write_json",
    "write_text",
    "write_whole",
]

_HIDDEN = re.compile(r"(\.part-.*|\.lock|\.claims)\Z")
_ENDING = re.compile(r"\.(tif|nii\.gz|geojson)\Z")
PART = ".part-"  # in the names of files that are being written: `.<name>.part-<number>`

_SMALL = 2**26  # bytes of a table, a card or any other file that is read whole


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a local file for reading; pipes, devices and sockets would wait or never end.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(21, "is a folder", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(22, "is a pipe, a device or a socket and no regular file", str(path))
    return open(path, "rb")


def answer_of_server(start: bytes) -> str:
    """Return a sentence where a file begins as what servers send in place of one, else nothing.

    Args:
        start: Its first bytes, some hundred.
    """
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not text.startswith((b"<!doctype html", b"<html")) and b"<error>" not in text:
        return ""
    return (
        " It holds a page of a web server, such as a login or an error, that was saved under the "
        "name of the file; look at it as text, and download the file again."
    )


def read_small(
    path: str | os.PathLike[str], *, limit: int = _SMALL, kind: type[DomainSSLError] = DataError
) -> str:
    """Return the text of a small file in UTF-8.

    Args:
        path: The file.
        limit: Most bytes that it may have.
        kind: The error to raise.

    Raises:
        DomainSSLError: An error of `kind`: no such file, larger than `limit`, or not UTF-8.
    """
    with parsing(f"{path}:", kind=kind, advice="Check the path and its permissions."):
        with open_regular(path) as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise kind(f"{path}: more than {limit / 1e6:.0f} MB, which no file of its kind has.")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise kind(
                f"{path}: text that is no UTF-8 (byte {error.start}). Save it as UTF-8, which "
                "spreadsheets call CSV UTF-8."
            ) from error


def read_json(path: str | os.PathLike[str], *, kind: type[DomainSSLError] = DataError) -> Any:
    """Return what a small JSON file holds.

    Raises:
        DomainSSLError: An error of `kind`: it cannot be read, or is no JSON.
    """
    text = read_small(path, kind=kind)
    with parsing(f"{path}: no JSON file, it", kind=kind, advice="Get the file again."):
        return json.loads(text)


@contextmanager
def new_file(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a hidden file beside `path` that takes its name when the block ends without an error.

    Args:
        path: Final name; replaced in one step.
        durable: Wait until content and name are on the disk, so that a power failure cannot
            leave an empty file under the final name.
    """
    hidden = path.with_name(f".{path.name}{PART}{uuid.uuid4().hex}")
    try:
        with hidden.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        hidden.replace(path)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            hidden.unlink()
        raise


def remove_parts(folder: Path, name: str) -> None:
    """Remove what a killed process left of the unfinished files and folders of a name.

    Args:
        folder: Where they lie.
        name: Begin of the final names; nobody writes such names at this time.
    """
    for hidden in folder.glob(f".{glob.escape(name)}.*{PART}*"):
        if hidden.is_dir():
            shutil.rmtree(hidden, ignore_errors=True)
        else:
            hidden.unlink(missing_ok=True)


def remove_rests(outputs: Iterable[Path]) -> None:
    """Remove what killed processes left beside finished outputs: hidden parts, locks and claims.

    Args:
        outputs: Those that are complete, with their records: nobody writes beside them any more.
    """
    finished: dict[Path, set[str]] = {}
    for output in outputs:
        finished.setdefault(output.parent, set()).add(output.name)
    for folder, names in finished.items():
        for hidden in folder.glob(".*"):
            name = hidden.name.lstrip(".")  # a part of a hidden file has two dots
            of = _HIDDEN.sub("", name)  # an output, or a file that goes with one
            if of == name or not any(_goes_with(of, each) for each in names):
                continue
            if hidden.is_dir():
                shutil.rmtree(hidden, ignore_errors=True)
            else:
                hidden.unlink(missing_ok=True)


def _goes_with(name: str, output: str) -> bool:
    """Tell whether a file is an output, lies beside it (`x.tif.png`), or is its second file."""
    stem = _ENDING.sub("", output)
    seconds = (f"{stem}_tiles.", f"{stem}_scale.") if stem != output else ()
    return name == output or name.startswith((f"{output}.", *seconds))


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_whole(path: Path, content: bytes | memoryview, *, durable: bool = False) -> None:
    """Write bytes completely or not at all."""
    with new_file(path, durable=durable) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, completely or not at all."""
    write_whole(path, text.encode("utf-8"))


def write_json(path: Path, data: object) -> None:
    """Write JSON completely or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
