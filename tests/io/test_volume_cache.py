"""Prepared exams on disk, in both tiers: exact values, boxes without the rest, one build."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from domainssl.cache import clear, entries
from domainssl.errors import ConfigError, DataError
from domainssl.io.volume import stores
from domainssl.io.volume.cache import VolumeCache, identity_of
from domainssl.io.volume.prepared import Prepared, compact, halve

TIERS = ("memmap", "zarr")
SHAPE = (70, 30, 66)  # more than one chunk, none of them full


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOMAINSSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def exam(seed: int = 0) -> Prepared:
    rng = np.random.default_rng(seed)
    valid = np.ones(SHAPE, bool)
    valid[:, 20:, 3] = False
    affine = np.array([[0.7, 0.1, 0, -3], [-0.1, 0.7, 0, 4], [0, 0, 2.5, 5], [0, 0, 0, 1.0]])
    return Prepared(
        values={
            "ct": rng.integers(-1024, 3072, (1, *SHAPE), np.int16),
            "pet": rng.normal(5, 3, (2, *SHAPE)).astype(np.float32),
        },
        valid={"ct": valid, "pet": np.ones(SHAPE, bool)},
        limits={"pet": np.array([[0.1, 9.7], [0.2, 8.8]], np.float32)},
        mask=rng.integers(0, 5, SHAPE, np.uint8),
        affine=affine,
        facts={"spacing_mm": [0.7, 0.7, 2.5], "source": "ct"},
    )


@pytest.mark.parametrize("tier", TIERS)
def test_an_exam_comes_back_exactly(tier) -> None:
    made = exam()
    found = VolumeCache({"version": 1}, tier).fetch("ab" * 16, exam).whole()
    for name, values in made.values.items():
        assert found.values[name].dtype == values.dtype
        np.testing.assert_array_equal(found.values[name], values)
        np.testing.assert_array_equal(found.valid[name], made.valid[name])
    assert found.mask is not None and made.mask is not None and found.mask.dtype == np.uint8
    np.testing.assert_array_equal(found.mask, made.mask)
    np.testing.assert_array_equal(found.limits["pet"], made.limits["pet"])
    np.testing.assert_array_equal(found.affine, made.affine)
    assert dict(found.facts) == dict(made.facts) and set(found.limits) == {"pet"}


@pytest.mark.parametrize("tier", TIERS)
def test_a_box_equals_the_box_of_the_exam_and_lies_where_the_exam_says(tier) -> None:
    made, start, size = exam(), (60, 3, 1), (10, 24, 65)
    stored = VolumeCache({"version": 1}, tier).fetch("ab" * 16, exam)
    assert (stored.shape, stored.modalities, stored.has_mask) == (SHAPE, ("ct", "pet"), True)
    found, wanted = stored.crop(start, size), made.crop(start, size)
    for name in ("ct", "pet"):
        np.testing.assert_array_equal(found.values[name], wanted.values[name])
        np.testing.assert_array_equal(found.valid[name], made.valid[name][60:70, 3:27, 1:66])
    np.testing.assert_array_equal(found.values["ct"], made.values["ct"][:, 60:70, 3:27, 1:66])
    corner = made.affine @ [60, 3, 1, 1]
    np.testing.assert_allclose(found.affine @ [0, 0, 0, 1], corner)
    found.values["ct"][:] = 0  # a copy: the next reader sees what is on the disk
    np.testing.assert_array_equal(stored.crop(start, size).values["ct"], wanted.values["ct"])


@pytest.mark.parametrize("start", [(-1, 0, 0), (61, 0, 0), (0, 0, 2)])
def test_a_box_that_leaves_the_exam_is_refused(start) -> None:
    stored = VolumeCache({}, "memmap").fetch("ab" * 16, exam)
    with pytest.raises(DataError, match=r"leaves an exam of \(70, 30, 66\) voxels"):
        stored.crop(start, (10, 30, 65))


def test_a_box_reads_the_chunks_that_it_touches_only(monkeypatch) -> None:
    big = np.zeros((1, 300, 64, 64), np.int16) + np.arange(64, dtype=np.int16)
    made = Prepared(values={"ct": big}, affine=np.eye(4))
    stored = VolumeCache({}, "zarr").fetch("ab" * 16, lambda: made)
    read: list[int] = []
    part = stores.FolderStore.part
    monkeypatch.setattr(
        stores.FolderStore,
        "part",
        lambda self, key, at, size: read.append(size) or part(self, key, at, size),
    )
    stored.crop((70, 0, 0), (10, 64, 64))
    assert sum(read) < sum(f.stat().st_size for f in stored.folder.rglob("c/**/*")) / 2
    assert len(read) == 2  # the index of one shard and one chunk


def test_another_preparation_file_or_content_is_another_entry(tmp_path) -> None:
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(b"1234")
    files = {"ct": str(path), "mask": ""}
    one, other = VolumeCache({"spacing_mm": [1, 1, 1]}), VolumeCache({"spacing_mm": [2, 1, 1]})
    first, hashed = one.key(identity_of(files)), one.key(identity_of(files, content=True))
    assert first == VolumeCache({"spacing_mm": (1, 1, 1)}, "zarr").key(identity_of(files))
    assert one.folder != other.folder and first != other.key(identity_of(files))
    os.utime(path, ns=(1, 1))
    assert one.key(identity_of(files)) != first
    assert one.key(identity_of(files, content=True)) == hashed
    path.write_bytes(b"1235")
    assert one.key(identity_of(files, content=True)) != hashed
    with pytest.raises(DataError, match=r"scan\.nii\.gz: cannot be read"):
        identity_of({"ct": str(tmp_path / "no" / "scan.nii.gz")})


def test_a_series_in_a_folder_changes_with_every_file_of_it(tmp_path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(b"x")
    before = identity_of({"ct": str(tmp_path)})
    (tmp_path / "c").write_bytes(b"x")
    assert identity_of({"ct": str(tmp_path)}) != before


def test_nothing_on_the_disk_names_a_file_or_a_person(own_cache, tmp_path) -> None:
    path = tmp_path / "Doe_Jane_19700101.nii"
    path.write_bytes(b"x")
    cache = VolumeCache({"series": "1.2.840.99"})
    cache.fetch(cache.key(identity_of({"ct": str(path)})), exam)
    for file in own_cache.rglob("*"):
        assert "Doe" not in file.name
        if file.is_file():
            content = file.read_bytes()
            assert b"Doe" not in content and b"1.2.840.99" not in content
            assert str(tmp_path).encode() not in content
    with pytest.raises(ValueError, match="path or a sentence"):
        Prepared(values=exam().values, affine=np.eye(4), facts={"from": str(path)})


def _count(folder: str, tier: str) -> int:
    def prepare() -> Prepared:
        with open(Path(folder) / "prepared", "a") as file:
            file.write("x")
        return exam()

    stored = VolumeCache({}, tier).fetch("ab" * 16, prepare)  # type: ignore[arg-type]
    return int(stored.crop((0, 0, 0), (4, 4, 4)).values["ct"].sum())


def test_processes_that_ask_together_prepare_once(tmp_path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        sums = pool.starmap(_count, [(str(tmp_path), "memmap")] * 8)
    assert set(sums) == {int(exam().values["ct"][:, :4, :4, :4].sum())}
    assert (tmp_path / "prepared").read_text() == "x"
    folder = VolumeCache({}).folder
    assert [p for p in folder.rglob("*") if ".part-" in p.name] == []


@pytest.mark.parametrize("tier", TIERS)
def test_an_opened_exam_goes_through_fork_and_pickle(tier) -> None:
    stored = VolumeCache({}, tier).fetch("ab" * 16, exam)
    wanted = stored.crop((1, 2, 3), (5, 6, 7)).values["ct"]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply(stored.crop, ((1, 2, 3), (5, 6, 7)))
    np.testing.assert_array_equal(found.values["ct"], wanted)
    again = pickle.loads(pickle.dumps(stored)).crop((1, 2, 3), (5, 6, 7))
    np.testing.assert_array_equal(again.values["ct"], wanted)


def test_the_cache_is_listed_and_cleared_like_all_others() -> None:
    cache = VolumeCache({"version": 1}, "zarr")
    cache.fetch("ab" * 16, exam)
    assert [(e.name, e.version) for e in entries()] == [("volumes", f"{cache.label[:12]}-zarr")]
    assert clear("volumes") == [cache.folder]
    assert not cache.folder.exists()
    assert VolumeCache({"version": 1}, "zarr").fetch("ab" * 16, exam).shape == SHAPE


def test_an_unknown_tier_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'memmap'"):
        VolumeCache({}, "memap")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("low", "high", "dtype", "wanted"),
    [
        (0, 255, "uint8", "uint8"),
        (-1024, 3071, "int32", "int16"),
        (0, 4095, "uint16", "int16"),
        (0, 65535, "uint16", "float32"),
        (0, 2**24 + 1, "int64", "int32"),
        (-3, 3, "float64", "float32"),
        (-3, 3, ">i2", "int16"),
    ],
)
def test_the_smallest_exact_type_is_kept(low, high, dtype, wanted) -> None:
    values = np.array([low, high]).astype(dtype)
    found = compact(values)
    assert found.dtype == np.dtype(wanted) and found.tolist() == values.tolist()


def test_classes_stay_whole_numbers() -> None:
    found = compact(np.array([0, 65535], np.uint16), is_classes=True)
    assert found.dtype == np.int32 and found.tolist() == [0, 65535]


def test_numbers_beyond_32_bit_are_refused() -> None:
    with pytest.raises(DataError, match="do not fit into 32 bit"):
        compact(np.array([2**40]))


def test_half_precision_is_refused_where_it_would_change_a_value() -> None:
    assert halve(np.array([0.5, 1000, np.nan], np.float32), 0.5, "ct").dtype == np.float16
    assert halve(np.array([0, 1e-3, 30_001], np.float32), None, "pet").dtype == np.float16
    for values, precision in (([2049.0], 0.5), ([1e6], None), ([np.inf, 1e-7], None)):
        with pytest.raises(ConfigError, match="float16 would change values of 'pet'"):
            halve(np.array(values, np.float32), precision, "pet")
    whole = np.array([1, 2], np.int16)
    assert halve(whole, 0, "ct") is whole


# ------------------------------------------------------------------------------- damage


def _files(stored: stores.Stored) -> list[Path]:
    return sorted(p for p in stored.folder.rglob("*") if p.is_file() and p.stat().st_size)


@pytest.mark.parametrize("tier", TIERS)
def test_an_entry_with_any_file_cut_short_or_missing_is_prepared_anew(tier, caplog) -> None:
    count = len(_files(VolumeCache({}, tier).fetch("ab" * 16, exam)))
    assert count > 3
    for number in range(count):
        path = _files(VolumeCache({}, tier).open("ab" * 16))[number]
        if number % 2:
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size - 1)
        caplog.clear()
        cache = VolumeCache({}, tier)
        with caplog.at_level(logging.WARNING):
            assert not cache.is_ready("ab" * 16)
        assert path.name == "entry.json" or "prepared anew" in caplog.text
        found = cache.fetch("ab" * 16, exam).whole()
        np.testing.assert_array_equal(found.values["pet"], exam().values["pet"])


@pytest.mark.parametrize("tier", TIERS)
def test_a_changed_byte_of_the_description_is_noticed(tier) -> None:
    path = VolumeCache({}, tier).fetch("ab" * 16, exam).folder / "entry.json"
    path.write_text(path.read_text().replace("2.5", "2.6"))
    with pytest.raises(DataError, match="its checksum differs"):
        VolumeCache({}, tier).open("ab" * 16)


def test_an_entry_of_another_exam_or_preparation_is_not_taken_for_this_one() -> None:
    one = VolumeCache({"version": 1}).fetch("ab" * 16, exam)
    for cache, key in (
        (VolumeCache({"version": 1}), "ab" * 15 + "ac"),
        (VolumeCache({}), "ab" * 16),
    ):
        cache.path(key).parent.mkdir(parents=True, exist_ok=True)
        os.rename(one.folder, cache.path(key))
        with pytest.raises(DataError, match="another exam, preparation or version"):
            cache.open(key)
        os.rename(cache.path(key), one.folder)


@pytest.mark.parametrize("kind", ["zip", "objects", "dtype", "order"])
def test_an_array_that_is_not_what_the_entry_says_is_refused(kind) -> None:
    stored = VolumeCache({}).fetch("ab" * 16, exam)
    path, values = stored.folder / "ct.values.npy", exam().values["ct"]
    if kind == "zip":
        with path.open("wb") as file:
            np.savez(file, values)
    elif kind == "objects":
        np.save(path, values.astype(object))
    else:
        np.save(path, values.view(np.uint16) if kind == "dtype" else values[..., ::-1].transpose())
    facts = path.parent / "entry.json"
    content = json.loads(facts.read_text())
    content["files"][path.name] = stores._facts_of(path)  # sizes and checksums agree
    facts.write_text(json.dumps({**content, "check": stores._digest(content)}))
    with pytest.raises(DataError, match=r"ct\.values cannot be read"):
        VolumeCache({}).open("ab" * 16)


def test_a_file_cut_short_while_it_is_mapped_is_an_error_and_no_crash() -> None:
    stored = VolumeCache({}).fetch("ab" * 16, exam)
    stored.crop((0, 0, 0), SHAPE)
    os.truncate(stored.folder / "ct.values.npy", 4096)
    with pytest.raises(DataError, match="cut short while it was in use"):
        stored.crop((60, 0, 0), (10, 10, 10))


def test_a_changed_chunk_is_an_error_when_it_is_read() -> None:
    noise = np.random.default_rng(0).integers(-1024, 3072, (1, 130, 64, 64), np.int16)
    made = Prepared(values={"ct": noise}, affine=np.eye(4))
    stored = VolumeCache({}, "zarr").fetch("ab" * 16, lambda: made)
    path = max(stored.folder.rglob("c/**/*"), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[50_000:50_004] = bytes(b ^ 255 for b in content[50_000:50_004])
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"ct\.values: a chunk cannot be read"):
        stored.crop((0, 0, 0), (64, 64, 64))


def test_a_changed_byte_of_a_mapped_file_is_an_error_wherever_it_is_served(monkeypatch) -> None:
    monkeypatch.setattr(stores, "_BLOCK", 4096)
    stored = VolumeCache({"version": 1}, "memmap").fetch("ab" * 16, exam)
    made, place = exam(), (1, 40, 15, 30)  # between the blocks that opening compares
    path = stored.folder / "pet.values.npy"
    raw = bytearray(path.read_bytes())
    at = len(raw) - made.values["pet"].nbytes
    at += 4 * int(np.ravel_multi_index(place, made.values["pet"].shape))
    raw[at] ^= 1
    path.write_bytes(raw)
    opened = stores.Stored.open(stored.folder, str(stored.entry["tag"]))  # opening does not see it
    far = opened.crop((0, 0, 0), (30, 30, 66))
    np.testing.assert_array_equal(far.values["pet"], made.values["pet"][:, :30])
    for start, size in (((40, 15, 30), (1, 1, 1)), ((35, 10, 20), (8, 8, 20))):
        with pytest.raises(DataError, match=r"content of pet\.values\.npy differs.*Delete the fol"):
            opened.crop(start, size)
    stores.forget()
    with pytest.raises(DataError, match="differs"):
        opened.whole()


def test_another_file_of_the_same_size_is_never_taken_for_the_right_one() -> None:
    cache = VolumeCache({"version": 1}, "memmap")
    mine, other = cache.fetch("ab" * 16, exam), cache.fetch("cd" * 16, lambda: exam(seed=1))
    for name in ("pet.values.npy", "mask.npy"):
        (mine.folder / name).write_bytes((other.folder / name).read_bytes())
    stores.forget()
    with pytest.raises(DataError, match="differs"):
        mine.crop((0, 0, 0), (1, 1, 1))  # it was opened before
    found = VolumeCache({"version": 1}, "memmap").fetch("ab" * 16, exam).whole()
    np.testing.assert_array_equal(found.values["pet"], exam().values["pet"])
    np.testing.assert_array_equal(found.mask, exam().mask)


def test_blocks_hold_every_byte_of_a_box(monkeypatch) -> None:
    monkeypatch.setattr(stores, "_BLOCK", 64)
    rng, shape, offset = np.random.default_rng(0), (2, 9, 7, 11), 128
    places = np.arange(np.prod(shape)).reshape(shape) * 2 + offset
    for _ in range(20):
        low = [int(rng.integers(0, n)) for n in shape[1:]]
        high = [int(rng.integers(a + 1, n + 1)) for a, n in zip(low, shape[1:])]
        box = (slice(None), *(slice(a, b) for a, b in zip(low, high)))
        needed = {int(p + byte) // 64 for p in places[box].ravel() for byte in (0, 1)}
        found = stores._blocks_of(shape, 2, offset, box)
        assert needed <= found and max(found) == max(needed) and min(found) == min(needed)


def test_files_that_change_while_they_are_read_are_not_cached() -> None:
    cache = VolumeCache({})
    with pytest.raises(DataError, match="changed while they were read"):
        cache.fetch("ab" * 16, exam, lambda: "another")
    assert not cache.is_ready("ab" * 16)
