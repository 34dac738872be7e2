"""Damaged and wrong SSL4EO-S12 files: the error names file, array and place."""

from __future__ import annotations

import re
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from ssl4eo_files import DATES, SIDE, tile_table, write_split

from domainssl.errors import DataError
from domainssl.io.raster.zarr import open_cube
from domainssl.io.ssl4eo.layout import scan
from domainssl.io.ssl4eo.read import check_same, read
from domainssl.io.ssl4eo.write import write_release_a
from domainssl.io.storage import archives
from domainssl.io.storage.archives import tar_index

PAIR = {"s1": "S1GRD", "s2": "S2L2A"}
FILE = "ssl4eos12_train_seasonal_data_000001.zarr.zip"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split(tmp_path, "train", [[0, 1], [2, 3]])
    return tmp_path


@pytest.fixture
def root_b(tmp_path: Path) -> Path:
    write_split(tmp_path, "train", [[0, 1, 2]], "B")
    return tmp_path


def rewrite(path: Path, change) -> None:
    """Write a zip again with members changed: `change(name, data)` gives (name, data) or None."""
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            changed = change(name, data)
            if changed is not None:
                file.writestr(*changed)


def first_group(root: Path):
    return scan(str(root), "train", PAIR).groups[0]


def test_missing_folder_names_the_sample() -> None:
    with pytest.raises(DataError, match=r"no folder at '/nowhere'.*'sample'"):
        scan("/nowhere", "train", PAIR)


def test_missing_product_folder_is_named_with_what_is_there(root: Path) -> None:
    with pytest.raises(DataError, match=r"no folder 'S2L1C'.*S1GRD, S2L2A"):
        scan(str(root), "train", {"s2": "S2L1C"})


def test_unknown_product_suggests_the_nearest(root: Path) -> None:
    with pytest.raises(DataError, match="Did you mean 'S2L2A'"):
        scan(str(root), "train", {"s2": "S2L2"})


def test_missing_partner_file_is_named(root: Path) -> None:
    (root / "train" / "S1GRD" / FILE).unlink()
    with pytest.raises(DataError, match=rf"missing partner file: '.*S1GRD/{re.escape(FILE)}'"):
        scan(str(root), "train", PAIR)


def test_releases_are_not_mixed(root: Path) -> None:
    folder = root / "train" / "S1GRD"
    for path in folder.iterdir():
        path.unlink()
    with tarfile.open(folder / "ssl4eos12_shard_000001.tar", "w"):
        pass
    with pytest.raises(DataError, match="releases are mixed"):
        scan(str(root), "train", PAIR)


def test_truncated_zip_is_found_by_the_scan_and_named_by_the_read(root: Path) -> None:
    path = root / "train" / "S2L2A" / FILE
    path.write_bytes(path.read_bytes()[:-500])
    catalogue = scan(str(root), "train", {"s2": "S2L2A", "s1": "S1GRD"})
    assert catalogue.count == 4 and FILE in catalogue.problems[0]
    with pytest.raises(DataError, match=rf"S2L2A/{re.escape(FILE)}: not a complete zip"):
        read(catalogue.groups[0], "s2", [0])


def test_group_of_which_no_file_opens_counts_like_the_others(root: Path) -> None:
    for product in PAIR.values():
        (root / "train" / product / FILE).write_bytes(b"PK")
    catalogue = scan(str(root), "train", PAIR)
    assert [group.count for group in catalogue.groups] == [2, 2]
    with pytest.raises(DataError, match="not a complete zip"):
        read(catalogue.groups[0], "s1", [0])


def test_scan_ends_when_no_file_at_all_can_be_opened(root: Path) -> None:
    for path in root.rglob("*.zarr.zip"):
        path.write_bytes(b"PK")
    with pytest.raises(DataError, match="not a complete zip"):
        first_group(root)


def test_flipped_bits_in_a_chunk_are_named(root: Path) -> None:
    path = root / "train" / "S2L2A" / FILE
    with zipfile.ZipFile(path) as file:
        info = file.getinfo("bands/0.1.0.0.0")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 200] ^= 0xFF
    path.write_bytes(data)
    group = first_group(root)
    read(group, "s2", [0])  # other dates are not touched
    with pytest.raises(DataError, match=rf"{re.escape(FILE)}: member 'bands/0.1.0.0.0' is damaged"):
        read(group, "s2", [1])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: b"",
        lambda raw: raw[:-7],
        lambda raw: raw[:4] + struct.pack("<I", 64) + raw[8:],
        lambda raw: raw[:16] + bytes(len(raw) - 16),
    ],
    ids=["empty", "short", "other size", "zeros"],
)
def test_chunk_that_does_not_decode_is_named(root: Path, spoil) -> None:
    path = root / "train" / "S2L2A" / FILE
    key = "bands/0.2.0.0.0"
    rewrite(path, lambda name, raw: (name, spoil(raw) if name == key else raw))
    pattern = rf"{re.escape(FILE)}: array 'bands', chunk '{key}' does not decode"
    with pytest.raises(DataError, match=pattern):
        read(first_group(root), "s2", [2])


def test_file_replaced_after_it_was_read_is_opened_anew(root: Path) -> None:
    group = first_group(root)
    read(group, "s2", [0])
    path = root / "train" / "S2L2A" / FILE
    rewrite(path.rename(path.with_name("old")), lambda name, raw: (name, raw[:20]))
    path.with_name("old").rename(path)
    with pytest.raises(DataError, match=re.escape(FILE)):
        read(group, "s2", [0])


def test_absent_chunk_reads_as_no_data(root: Path) -> None:
    path = root / "train" / "S1GRD" / FILE
    rewrite(path, lambda name, raw: None if name == "bands/0.1.0.0.0" else (name, raw))
    block = read(first_group(root), "s1", [0, 1])
    assert block.valid[:, 0].all() and not block.valid[:, 1].any()


def test_diverging_ids_are_named_with_both_files(root: Path) -> None:
    values = np.full((2, DATES, 2, SIDE, SIDE), -10, np.float16)
    write_release_a(root / "train" / "S1GRD" / FILE, "S1GRD", values, tile_table([0, 9], s1=True))
    group = first_group(root)
    blocks = {name: read(group, name, [0]) for name in PAIR}
    with pytest.raises(DataError, match=r"S2L2A/.*'sample', location 1: id '0000001', but .*S1GRD"):
        check_same(blocks)


def test_partner_with_fewer_locations_is_refused(root: Path) -> None:
    values = np.full((1, DATES, 2, SIDE, SIDE), -10, np.float16)
    write_release_a(root / "train" / "S1GRD" / FILE, "S1GRD", values, tile_table([0], s1=True))
    group = scan(str(root), "train", {"s2": "S2L2A", "s1": "S1GRD"}).groups[0]
    with pytest.raises(DataError, match=r"S1GRD/.*holds 1 locations.*its partners 2"):
        read(group, "s1", [0])


def test_wrong_product_in_a_folder_is_refused_by_its_bands(root: Path) -> None:
    values = np.full((2, DATES, 13, SIDE, SIDE), 1500, np.int16)
    write_release_a(root / "train" / "S2L2A" / FILE, "S2L1C", values, tile_table([0, 1]))
    with pytest.raises(DataError, match=r"wrong set of bands for S2L2A: found 13.*expected 12"):
        read(first_group(root), "s2", [0])


def test_bands_in_another_order_are_refused(root: Path) -> None:
    path = root / "train" / "S1GRD" / FILE
    names = np.array(["vh", "vv"], "<U2").tobytes()

    def swap(name: str, raw: bytes) -> tuple[str, bytes]:
        if name == "band/.zarray" or name == ".zmetadata":
            raw = re.sub(
                rb'("band/.zarray": \{.*?"compressor": )\{.*?\}', rb"\1null", raw, flags=re.S
            )
            if name == "band/.zarray":
                raw = re.sub(rb'"compressor": \{.*?\}', b'"compressor": null', raw, flags=re.S)
        return name, names if name == "band/0" else raw

    rewrite(path, swap)
    with pytest.raises(DataError, match=r"wrong order of bands for S1GRD: found 2 \(VH VV\)"):
        read(first_group(root), "s1", [0])


@pytest.mark.parametrize("dates", [[], [4], [-1]])
def test_dates_that_are_not_there_are_refused(root: Path, dates: list[int]) -> None:
    with pytest.raises(DataError, match=r"expected at least one of 0\.\.3"):
        read(first_group(root), "s2", dates)


def test_zip_member_outside_the_archive_is_refused(root: Path) -> None:
    path = root / "train" / "S2L2A" / FILE
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("../evil", b"")
    with pytest.raises(DataError, match=r"refuses member '../evil'"):
        open_cube(str(path)).arrays  # noqa: B018


@pytest.mark.parametrize("name", ["../a.zarr.zip", "/a.zarr.zip", "x/../../a.zarr.zip"])
def test_tar_member_outside_the_archive_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match="refuses member"):
        tar_index(str(path))


def test_truncated_tar_is_named(root_b: Path) -> None:
    path = root_b / "train" / "S2L2A" / "ssl4eos12_shard_000001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"shard_000001.tar: not a complete tar, \d members found"):
        first_group(root_b)


def test_a_truncated_tar_among_others_is_left_out_with_its_partners(tmp_path: Path) -> None:
    """It ended the run, also with `on_bad_sample: replace`."""
    write_split(tmp_path, "train", [[0, 1, 2], [3]], "B")
    path = tmp_path / "train" / "S2L2A" / "ssl4eos12_shard_000001.tar"
    (path.parent / "._ssl4eos12_shard_000001.tar").write_bytes(b"as macOS adds them")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    catalogue = scan(str(tmp_path), "train", PAIR)
    assert [group.key for group in catalogue.groups] == ["ssl4eos12_shard_000002#0"]
    [problem] = catalogue.problems
    assert re.search(r"000001.tar: not a complete tar.* left out, with its partners", problem)


def test_the_first_members_of_a_tar_may_be_damaged(tmp_path: Path) -> None:
    write_split(tmp_path, "train", [[0, 1]], "B")
    for path in (tmp_path / "train").rglob("*.tar"):
        raw = bytearray(path.read_bytes())
        entry = tar_index(str(path))[0]
        raw[entry.offset : entry.offset + entry.size] = bytes(entry.size)
        path.write_bytes(raw)
    catalogue = scan(str(tmp_path), "train", PAIR)
    assert (catalogue.count, catalogue.dates, catalogue.size) == (2, DATES, (SIDE, SIDE))
    assert read(catalogue.groups[0], "s2", [0], slice(1, 2)).ids


def test_diverging_tar_keys_are_named_with_their_place(root_b: Path) -> None:
    path = root_b / "train" / "S1GRD" / "ssl4eos12_shard_000001.tar"
    other = path.with_name("other")
    with tarfile.open(path) as old, tarfile.open(other, "w") as new:
        for i, info in enumerate(old.getmembers()):
            data = old.extractfile(info)
            if i == 2:
                info.name = "ssl4eos12_train_seasonal_data_0000007.zarr.zip"
            new.addfile(info, data)
    other.rename(path)
    with pytest.raises(DataError, match=r"keys diverge from .*S1GRD.* at member 2: .*0000002'"):
        first_group(root_b)


def test_damaged_member_is_named_by_tar_and_key(root_b: Path) -> None:
    path = root_b / "train" / "S2L2A" / "ssl4eos12_shard_000001.tar"
    entry = tar_index(str(path))[1]
    data = bytearray(path.read_bytes())
    data[entry.offset + entry.size - 22 : entry.offset + entry.size - 18] = b"xxxx"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard_000001.tar:.*0000001.zarr.zip: not a complete zip"):
        read(first_group(root_b), "s2", [0])


def test_a_file_that_the_system_cannot_read_is_one_error_in_every_way_of_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: str) -> None:
        raise OSError(5, "Input/output error")

    (tmp_path / "a").write_bytes(b"content")
    store = archives.FolderStore(tmp_path)
    assert (store.get("a"), store.part("a", -4, 2), store.get("b")) == (b"content", b"te", None)
    assert store.open("b") is None and store.part("b", 0, 1) is None
    monkeypatch.setattr(archives, "open_regular", broken)
    for reading in (store.get, store.open, lambda key: store.part(key, 0, 1)):
        with pytest.raises(DataError, match="/a: cannot be read .*Input/output error"):
            reading("a")
