"""HDF5 files that would unfold to more than they say, and those that only look like it."""

from __future__ import annotations

import resource
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from bag_files import TRIDENT

from domainssl.errors import DataError
from domainssl.io.slide.features import bag_header, read_bag
from domainssl.io.storage import hdf5


def _written(path: Path, chunk: tuple[int, int], filters: list[int], raw: bytes) -> Path:
    """A bag of 4 tiles whose only chunk of features is given as it is stored."""
    with h5py.File(path, "w") as file:
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_chunk(chunk)
        for number in filters:
            made.set_filter(number, h5py.h5z.FLAG_OPTIONAL, (4,) if number == 1 else ())
        space = h5py.h5s.create_simple((4, 8), (h5py.h5s.UNLIMITED,) * 2)
        found = h5py.h5d.create(file.id, b"features", h5py.h5t.IEEE_F32LE, space, made)
        if raw:
            found.write_direct_chunk((0, 0), raw)
        file.create_dataset("coords", data=np.zeros((4, 2), np.int64)).attrs.update(TRIDENT)
    return path


def _unfolding(size: int, times: int = 1) -> bytes:
    packed = b"\0" * size
    for _ in range(times):
        packed = zlib.compress(packed, 9)
    return packed


_LZF = b"\x00a" + b"\xe0\xff\x00" * 400_000  # the first byte again and again: 105 MB


@pytest.mark.parametrize(
    ("chunk", "filters", "raw", "said"),
    [
        ((4, 8), [1], _unfolding(2**28), "unfolds to more than its 128 bytes"),
        ((4, 8), [2, 1], _unfolding(2**28), "unfolds to more than its 128 bytes"),
        ((4, 8), [h5py.h5z.FILTER_LZF], _LZF, "unfolds to more than its 128 bytes"),
        ((4, 8), [1, 1], _unfolding(2**28, 2), r"filters \[1, 1\] of HDF5; expected one of gzip"),
        ((4, 8), [6], b"\xff" * 64, r"filters \[6\]"),
        ((2**15, 2**15), [1], b"", "GB by its shape .* and chunks"),
    ],
    ids=["gzip", "shuffled", "lzf", "twice", "other filter", "large chunk"],
)
def test_features_that_unfold_to_more_than_their_chunk_are_refused(
    chunk: tuple[int, int], filters: list[int], raw: bytes, said: str, tmp_path: Path
) -> None:
    path = _written(tmp_path / "a.h5", chunk, filters, raw)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_bag, bag_header):
        with pytest.raises(DataError, match=rf"a\.h5: .*{said}"):
            read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("filters", [{}, {"compression": "lzf"}, {"compression": "gzip"}])
def test_compressed_features_are_read_as_they_were_written(
    filters: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5, "_UNCHECKED", 2**18)  # check all chunks of these
    rng = np.random.default_rng(0)
    values = rng.integers(0, 3, (2048, 16)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        more = {"shuffle": True, "fletcher32": True} if filters else {}
        file.create_dataset("features", data=values, chunks=(300, 16), **filters, **more)
        places = file.create_dataset("coords", data=np.arange(4096).reshape(-1, 2) * 256)
        places.attrs.update(TRIDENT)
    assert np.array_equal(read_bag(tmp_path / "a.h5").features, values)


def test_texts_that_share_what_is_stored_do_not_fill_the_memory(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        kind = h5py.string_dtype()
        file.create_dataset("names", (3000,), kind)[:] = ["x" * 300_000, *["y"] * 2999]
    raw = (tmp_path / "a.h5").read_bytes()
    with h5py.File(tmp_path / "a.h5") as file:
        at = file["names"].id.get_offset()
    (tmp_path / "a.h5").write_bytes(raw[:at] + raw[at : at + 16] * 3000 + raw[at + 48_000 :])
    with hdf5.open_hdf5(tmp_path / "a.h5") as file:
        with pytest.raises(DataError, match=r"'names' has more than 0\.27 GB of text"):
            hdf5.texts(tmp_path / "a.h5", file, "names")
