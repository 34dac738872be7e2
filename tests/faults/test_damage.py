"""Files damaged at any place: a message that names the file, never other values, never a hang."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from ssl4eo_files import write_split

from domainssl.errors import DataError
from domainssl.io.ssl4eo.layout import scan
from domainssl.io.ssl4eo.read import read

PAIR = {"s1": "S1GRD", "s2": "S2L2A"}


def content(root: Path) -> dict[str, list[np.ndarray]]:
    """All values and dates of a folder; DataError where one of them cannot be had."""
    groups = scan(str(root), "train", PAIR).groups
    blocks = [read(group, name, [0, 1, 2, 3]) for group in groups for name in PAIR]
    return {
        "values": [b.values for b in blocks],
        "valid": [b.valid for b in blocks],
        "dates": [b.dates for b in blocks],
    }


def is_equal(one: dict, other: dict) -> bool:
    return all(
        len(one[name]) == len(other[name])
        and all(np.array_equal(a, b) for a, b in zip(one[name], other[name], strict=True))
        for name in one
    )


@pytest.fixture(scope="module", params=["A", "B"])
def whole(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(f"release_{request.param}")
    write_split(root, "train", [[0, 1, 2]], request.param)
    [path] = (root / "train" / "S2L2A").iterdir()
    return root, path, path.read_bytes(), content(root)


def outcome(root: Path, path: Path, damaged: bytes, expected: dict) -> str:
    """`refused` with the file named, `same` values, or `other` values."""
    path.write_bytes(damaged)
    try:
        return "same" if is_equal(content(root), expected) else "other"
    except DataError as error:
        assert path.name in str(error), f"the message does not name the file: {error}"
        return "refused"


def test_a_file_cut_off_anywhere_is_refused(whole):
    root, path, data, expected = whole
    draw = random.Random(0)
    for length in [0, 1, 21, len(data) - 1, *(draw.randrange(len(data)) for _ in range(25))]:
        found = outcome(root, path, data[:length], expected)
        # a tar ends with two blocks of zeros, which carry nothing
        assert found == "refused" or (path.suffix == ".tar" and not data[length:].strip(b"\0"))
    path.write_bytes(data)


def test_a_flipped_byte_is_refused_or_changes_nothing(whole):
    root, path, data, expected = whole
    draw = random.Random(1)
    found = []
    for _ in range(40):
        place = draw.randrange(len(data))
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        found.append(outcome(root, path, bytes(damaged), expected))
        assert found[-1] != "other", f"byte {place} of {len(data)}"
    path.write_bytes(data)
    assert found.count("refused") > 10


def test_a_run_of_zeros_or_rubbish_is_refused_or_changes_nothing(whole):
    root, path, data, expected = whole
    draw = random.Random(2)
    for number in range(20):
        low = draw.randrange(len(data) - 600)
        rubbish = bytes(512) if number % 2 else draw.randbytes(512)
        found = outcome(root, path, data[:low] + rubbish + data[low + 512 :], expected)
        assert found != "other", f"bytes {low} to {low + 512} of {len(data)}"
    path.write_bytes(data)
