"""The places that outputs go to: a folder, free of results of something else, and names in it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from domainssl.errors import ConfigError, DataError, unwritable
from domainssl.files import read_json, write_json
from domainssl.io.ids import as_utf8

__all__ = [
    "beside",
    "encoder_name",
    "file_name",
    "file_states",
    "is_made_from",
    "is_output",
    "keep_source",
    "make_folder",
    "read_record",
    "refuse_ending",
    "refuse_inputs",
    "refuse_inside",
    "refuse_one_file",
    "refuse_other",
    "repeated",
    "tell_again",
    "was_written",
]

_log = logging.getLogger(__name__)
_ENDING = re.compile(r"\w\.[A-Za-z][A-Za-z0-9]{0,9}$")  # such as .zarr, .nii.gz, .h5; not v1.2


def beside(output: Path, ending: str) -> Path:
    """Return a file that goes with an output: its name whole, so that no two share one."""
    return output.with_name(f"{output.name}.{ending}")


def file_name(item: str) -> str:
    """Return the id of an item as the name of one file."""
    return as_utf8(item).replace("/", "__").replace(os.sep, "__")


def encoder_name(backbone: str) -> str:
    """Return a name for features: the run's, where a file or folder in it has none of its own."""
    path = Path(backbone)
    names = [path.name.removesuffix(".ckpt")]
    if path.exists():
        names += [parent.name for parent in path.resolve().parents if parent.name]
    own = (n for n in names if n not in ("backbone", "backbone.safetensors", "checkpoints", "last"))
    return next(own, names[0])


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that are there more than once, in order."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def file_states(paths: Iterable[str | Path]) -> list[list[int]]:
    """Return size and time of change in nanoseconds of files, -1 of those that are not there.

    Of a folder, such as a series of DICOM images or an array of a store, which does not change when
    a file in it is written over: the sum of the sizes, and a number that depends on all sizes and
    times in it.
    """
    return [_folder_state(path) if os.path.isdir(path) else _state(path) for path in paths]


def _state(path: str | Path) -> list[int]:
    try:
        facts = os.stat(path)
    except OSError:  # whoever reads it says so, or leaves it out
        return [-1, -1]
    return [facts.st_size, facts.st_mtime_ns]


def _folder_state(path: str | Path) -> list[int]:
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    states = file_states(os.path.join(path, name) for name in names)
    digest = hashlib.blake2b(repr(states).encode(), digest_size=6).digest()
    return [sum(size for size, _ in states), int.from_bytes(digest, "big")]


def keep_source(output: Path, source: Any) -> None:
    """Write beside an output what it was made from, once it is complete.

    Args:
        output: A file that is there.
        source: Plain data without paths and names of persons.
    """
    write_json(_source_path(output), source)


def is_made_from(output: Path, source: Any) -> bool:
    """Tell whether an output is there, and was made from this; see `keep_source`."""
    record = _source_path(output)
    if not output.is_file() or not record.is_file():
        return False
    return bool(read_json(record) == json.loads(json.dumps(source)))


def is_output(path: str, output: Path, given: str) -> bool:
    """Tell whether something below a folder of inputs is a result.

    Args:
        path: What was found.
        output: Where results go, a folder or the name of a file.
        given: The folder of inputs.
    """
    place, root = os.path.realpath(output), os.path.realpath(given)
    inside = place != root and _lies_in(os.path.realpath(path), place)
    return inside or was_written(path)


def was_written(path: str) -> bool:
    """Tell whether `embed` or `predict` left a record beside something, or beside its scale."""
    plain = Path(path.replace("_scale.tif", ".tif"))
    return any(
        _source_path(each).is_file() or "weights_sha256" in _record(each)
        for each in {Path(path), plain}
    )


def _record(output: Path) -> Any:
    """Return what `embed` wrote beside an output, nothing where it did not."""
    path = beside(output, "json")
    try:
        return read_record(path) if path.is_file() else {}
    except DataError:
        return {}


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def refuse_inside(output: Path, source: str) -> None:
    """Refuse results in a folder of which every scan is read.

    Raises:
        ConfigError: They would lie in it.
    """
    if _lies_in(os.path.realpath(output), os.path.realpath(source)):
        raise ConfigError(
            f"--output {output}: lies in {source}, whose scans are the input; the next call would "
            "take results for scans. Give a folder outside of it."
        )


def tell_again(output: Path) -> None:
    """Say of an output that is there that it is made again."""
    if output.is_file():
        _log.warning(
            "%s: its input has changed since, or is read otherwise; it is made again", output.name
        )


def read_record(path: Path) -> dict[str, Any]:
    """Return what a call wrote about its outputs.

    Raises:
        DataError: It cannot be read, or is something else.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise DataError(
            f"{path}: no record of what was made, but a {type(found).__name__}. Delete it and the "
            "output beside it, or choose another --output."
        )
    return found


def _source_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.source")


def make_folder(folder: Path, named: Path) -> None:
    """Make a folder, and those above it.

    Args:
        folder: Which one.
        named: What the message names: what the user gave.

    Raises:
        StorageError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(named, error) from error


def parquet_path(output: Path) -> Path:
    """Return the file of a table of vectors.

    Raises:
        ConfigError: Its name does not end like one.
    """
    if output.suffix.lower() not in (".parquet", ".geoparquet"):
        raise ConfigError(
            f"--output {output}: one vector per item goes into one table; give a .parquet file."
        )
    return output


def refuse_one_file(output: Path, count: int, noun: str) -> None:
    """Refuse the name of one file for the outputs of several inputs.

    Raises:
        ConfigError: There are several.
    """
    if count > 1:
        raise ConfigError(
            f"--output {output}: the name of one file, but there are {count} {noun}. Give a folder."
        )


def refuse_ending(output: Path, written: str) -> None:
    """Refuse the name of a file of another kind where a folder would be made of it.

    Args:
        output: What the user gave; it has none of the endings that are written.
        written: What is written, for the message.

    Raises:
        ConfigError: It ends like a file, and is no folder.
    """
    if _ENDING.search(output.name) and not output.is_dir():
        raise ConfigError(
            f"--output {output}: ends like a file, but {written}. Give one of these endings, or "
            f"the name of a folder; one that is called so has to be there (mkdir {output})."
        )


def refuse_inputs(folder: Path, outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Refuse to write over what is read.

    Args:
        folder: Where outputs go.
        outputs: The files that are to be written.
        inputs: What the user gave.

    Raises:
        ConfigError: An output is an input, or the folder of outputs is a folder of inputs.
    """
    given = {os.path.realpath(path): path for path in inputs if "://" not in str(path)}
    for output in (folder, *outputs):
        place = os.path.realpath(output)
        if place in given and (output != folder or os.path.isdir(place)):
            raise ConfigError(
                f"--output: {output} is the input {given[place]}, which would be taken for a "
                "result, or written over. Give another folder."
            )


def refuse_other(target: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare what an output was made from with what is asked for.

    Raises:
        ConfigError: They differ.
    """
    differing = _differences("", found, wanted)
    if differing:
        more = f"; {len(differing) - 6} more" if len(differing) > 6 else ""
        raise ConfigError(
            f"{target}: made from something else: {'; '.join(differing[:6])}{more}. Choose another "
            "--output, or add --restart to write it anew."
        )


def _differences(name: str, found: Any, wanted: Any) -> list[str]:
    """Return what differs with both values, named by the way to it."""
    if found == wanted:
        return []
    if name == "items" and isinstance(found, list) and isinstance(wanted, list):
        members = dict(found), dict(wanted)  # pairs of name and facts
        return _differences(name, *members) or ["the order of the items differs"]
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return [
            text
            for key in sorted({*found, *wanted})
            for text in _differences(f"{name}.{key}" if name else key, found.get(key),
                                     wanted.get(key))
        ]  # fmt: skip
    if name.rpartition(".")[2] in ("file", "files"):
        name = f"{name} (bytes, time of change in ns)"
    return [f"{name} was {_short(found)}, is {_short(wanted)}"]


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
