"""Memory that is used again holds the right bytes, and only verified ones."""

import pickle
import threading
import zipfile

import numpy as np
import pytest

from domainssl.errors import DataError
from domainssl.io.storage.archives import ZipFileStore
from domainssl.io.storage.scratch import Scratch, stored_member

LARGE = np.random.default_rng(0).integers(0, 256, 3 * 2**20, dtype=np.uint8).tobytes()


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("first", LARGE)
        file.writestr("dänisch", LARGE[::-1])
        file.writestr("small", b"small")
        file.writestr("packed", bytes(2**21), compress_type=zipfile.ZIP_DEFLATED)
    return path


def test_the_same_memory_serves_the_next_request_of_a_name() -> None:
    scratch = Scratch()
    first = scratch.empty("a", (4, 5), np.dtype("<i2"))
    other = scratch.empty("b", (4, 5), np.dtype("<i2"))
    again = scratch.empty("a", (2, 5), np.dtype("<f4"))
    assert again.shape == (2, 5) and again.dtype == np.float32
    assert np.shares_memory(first, again) and not np.shares_memory(first, other)


def test_threads_do_not_share_memory() -> None:
    scratch = Scratch()
    found = [scratch.empty("a", (9,), np.dtype(np.uint8))]
    ask = threading.Thread(
        target=lambda: found.append(scratch.empty("a", (9,), np.dtype(np.uint8)))
    )
    ask.start()
    ask.join()
    assert not np.shares_memory(*found)


def test_scratch_travels_to_workers_empty() -> None:
    scratch = Scratch()
    scratch.empty("a", (2**16,), np.dtype(np.uint8))
    assert len(pickle.dumps(scratch)) < 200
    assert isinstance(pickle.loads(pickle.dumps(scratch)), Scratch)


@pytest.mark.parametrize("key", ["first", "dänisch", "small", "packed", "absent"])
def test_borrowed_bytes_are_those_that_get_returns(archive, key) -> None:
    store = ZipFileStore(archive, "a.zip")
    borrowed, own = store.borrow(key), store.get(key)
    assert (borrowed is None and own is None) or bytes(borrowed) == own


def test_large_stored_members_of_local_files_are_read_into_kept_memory(archive) -> None:
    with zipfile.ZipFile(archive) as file, open(archive, "rb") as raw:
        info = {entry.filename: entry for entry in file.infolist()}
        assert isinstance(stored_member(info["first"], raw), memoryview)
        assert isinstance(stored_member(info["dänisch"], raw), memoryview)
        assert stored_member(info["small"], raw) is None
        assert stored_member(info["packed"], raw) is None


def test_a_flipped_byte_is_found_in_kept_memory_too(archive) -> None:
    content = bytearray(archive.read_bytes())
    content[100_000] ^= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match="member 'first' is damaged.*CRC"):
        ZipFileStore(archive, "a.zip").borrow("first")


def test_a_file_that_became_shorter_is_found(archive) -> None:
    store = ZipFileStore(archive, "a.zip")
    with open(archive, "r+b") as file:
        file.truncate(2**20)
    with pytest.raises(DataError, match="member 'first' is damaged"):
        store.borrow("first")
