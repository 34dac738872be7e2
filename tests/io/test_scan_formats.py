"""NRRD, MetaImage and MGH: geometry, extra axes, and what their headers may not claim."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from scan_files import (
    at,
    lps_lines,
    oblique,
    ramp,
    write_metaimage,
    write_mgh,
    write_nrrd,
)

from domainssl.errors import DataError
from domainssl.io.volume.scan import Reading, describe_scan, list_scans, read_labels, read_scan

PLACES = ((0, 0, 0), (5, 4, 3), (2, 1, 3))


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "ascii"])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_oblique_nrrd_has_its_vectors_as_columns(
    tmp_path: Path, encoding: str, endian: str
) -> None:
    affine, values = oblique(), ramp()
    path = write_nrrd(
        tmp_path / "a.nrrd", values, lps_lines(affine), encoding=encoding, endian=endian
    )
    scan = read_scan(path)
    assert scan.values.dtype == np.int16 and scan.facts.orientation == "LAS"
    for place in PLACES:
        assert at(scan, affine, place) == values[place]


def test_spaces_other_than_lps_are_negated_by_name(tmp_path: Path) -> None:
    affine = oblique()
    for name, sign in (("RAS", (-1, -1)), ("left-anterior-superior", (1, -1))):
        path = write_nrrd(tmp_path / "a.nrrd", ramp(), lps_lines(affine, f"space: {name}"))
        found = np.diag([*sign, 1.0, 1.0]) @ affine  # of what the lines say, taken for LPS
        assert at(read_scan(path), found, (2, 1, 3)) == ramp()[2, 1, 3]


def test_a_space_that_is_not_named_needs_an_override(tmp_path: Path) -> None:
    for line in ("space dimension: 3", "space: scanner-xyz"):
        path = write_nrrd(tmp_path / "a.nrrd", ramp(), lps_lines(oblique(), line))
        with pytest.raises(DataError, match=r"a\.nrrd.*Set `space: LPS`"):
            describe_scan(path)
        scan = read_scan(path, Reading(space="LPS"))
        assert at(scan, oblique(), (2, 1, 3)) == ramp()[2, 1, 3]
        assert "read as LPS" in scan.facts.warnings[0]


def test_spacings_alone_need_an_override(tmp_path: Path) -> None:
    path = write_nrrd(tmp_path / "a.nrrd", ramp(), ["spacings: 0.8 1.2 3"])
    with pytest.raises(DataError, match=r"no space directions.*`orientation: assume_pixdim`"):
        describe_scan(path)
    facts = describe_scan(path, Reading(orientation="assume_pixdim"))
    assert facts.spacing == (0.8, 1.2, 3.0) and not facts.is_oriented
    path = write_nrrd(tmp_path / "b.nrrd", ramp(), [])
    with pytest.raises(DataError, match="neither space directions nor spacings"):
        describe_scan(path, Reading(orientation="assume_pixdim"))


def test_space_units_are_converted(tmp_path: Path) -> None:
    lines = [*lps_lines(oblique()), 'space units: "cm" "cm" "cm"']
    facts = describe_scan(write_nrrd(tmp_path / "a.nrrd", ramp(), lines))
    np.testing.assert_allclose(facts.spacing, (8.0, 12.0, 30.0))
    assert "converted to mm" in facts.warnings[0]


def test_the_axis_that_is_none_of_space_is_channels_or_volumes_by_its_kind(tmp_path: Path) -> None:
    values = np.stack([ramp(), ramp() + 9])  # (2, i, j, k)
    lines = lps_lines(oblique())
    lines[1] = lines[1].replace("space directions: ", "space directions: none ")
    colours = [*lines, "kinds: vector domain domain domain"]
    scan = read_scan(write_nrrd(tmp_path / "a.nrrd", values, colours))
    assert at(scan, oblique(), (2, 1, 3)).tolist() == values[:, 2, 1, 3].tolist()
    layers = write_nrrd(
        tmp_path / "b.seg.nrrd", values, [*lines, "kinds: list domain domain domain"]
    )
    with pytest.raises(DataError, match=r"b\.seg\.nrrd: holds 2 maps .*one label map"):
        read_labels(layers)
    second = read_labels(layers, Reading(volume=1))
    assert at(second, oblique(), (2, 1, 3)) == values[1, 2, 1, 3]


def test_detached_voxels_lie_in_the_folder_of_the_header(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    lines = [*lps_lines(oblique()), "data file: a.raw"]
    path = write_nrrd(tmp_path / "in" / "a.nhdr", ramp(), lines)
    assert at(read_scan(path), oblique(), (2, 1, 3)) == ramp()[2, 1, 3]
    spaced = [*lps_lines(oblique()), "data file: 50 % of a 2.raw"]
    path = write_nrrd(tmp_path / "in" / "b.nhdr", ramp(), spaced)
    assert at(read_scan(path), oblique(), (2, 1, 3)) == ramp()[2, 1, 3]
    path = write_nrrd(tmp_path / "in" / "a.nhdr", ramp(), lines)
    for outside in ("../a.raw", str(tmp_path / "in" / "a.raw"), "C:/a.raw", "..\\a.raw"):
        path.write_text(path.read_text().replace("data file: a.raw", f"data file: {outside}"))
        with pytest.raises(DataError, match="outside its own folder"):
            describe_scan(path)
        path.write_text(path.read_text().replace(f"data file: {outside}", "data file: a.raw"))
    path.write_text(path.read_text().replace("a.raw", "s%02d.raw 1 4 1"))
    with pytest.raises(DataError, match="several files"):
        describe_scan(path)


def test_values_may_start_after_lines_or_lie_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.raw").touch()
    path = write_nrrd(tmp_path / "a.nhdr", ramp(), [*lps_lines(oblique()), "data file: a.raw"])
    raw = tmp_path / "a.raw"
    stored = raw.read_bytes()
    for line, content in (
        ("byte skip: -1", b"anything" + stored),
        ("byte skip: 3", b"abc" + stored),
        ("line skip: 2", b"one\ntwo\n" + stored),
    ):
        raw.write_bytes(content)
        head = path.read_text()
        path.write_text(head + line + "\n")
        assert at(read_scan(path), oblique(), (2, 1, 3)) == ramp()[2, 1, 3]
        path.write_text(head)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sizes: 30000 30000 30000", "30000 × 30000 × 30000"),
        ("sizes: 600 500 400", "the header speaks of"),
        ("sizes: 6 -5 4", "expected at least one"),
        ("sizes: 6 5", "2 sizes for 3 dimensions"),
        ("type: shrot", "Did you mean 'short'"),
        ("encoding: hex", "the encoding 'hex' is not read"),
        ("endian: middle", "endian is 'middle'"),
    ],
)
def test_damaged_nrrd_headers_are_errors(tmp_path: Path, line: str, words: str) -> None:
    path = write_nrrd(tmp_path / "a.nrrd", ramp(), lps_lines(oblique()))
    head, _, values = path.read_bytes().partition(b"\n\n")
    name = line.split(":")[0]
    lines = [line if n.startswith(name) else n for n in head.decode().split("\n")]
    path.write_bytes("\n".join(lines).encode() + b"\n\n" + values)
    with pytest.raises(DataError, match=rf"a\.nrrd.*{words}"):
        read_scan(path)


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "ascii"])
def test_truncated_nrrd_is_refused(tmp_path: Path, encoding: str) -> None:
    path = write_nrrd(tmp_path / "a.nrrd", ramp(), lps_lines(oblique()), encoding=encoding)
    content = path.read_bytes()
    for end in (3, 40, content.index(b"\n\n"), len(content) - 40, len(content) - 5):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=r"a\.nrrd"):
            read_scan(path)


@pytest.mark.parametrize("name", ["a.mha", "a.mhd"])
@pytest.mark.parametrize("packed", [False, True])
def test_metaimage_is_read_in_lps(tmp_path: Path, name: str, packed: bool) -> None:
    values = ramp()
    path = write_metaimage(tmp_path / name, values, packed=packed, Modality="MET_MOD_CT")
    scan = read_scan(path)
    assert scan.facts.modality == "CT" and scan.facts.orientation == "LAS"
    for place in PLACES:
        assert at(scan, oblique(), place) == values[place]
    assert list_scans(tmp_path) == [str(path)]


def test_metaimage_channels_volumes_and_byte_order(tmp_path: Path) -> None:
    colours = np.stack([ramp(), ramp() + 9])  # interleaved, channel first in the file
    scan = read_scan(write_metaimage(tmp_path / "a.mha", colours, ElementNumberOfChannels=2))
    assert at(scan, oblique(), (2, 1, 3)).tolist() == colours[:, 2, 1, 3].tolist()
    swapped = write_metaimage(tmp_path / "b.mha", ramp().byteswap(), BinaryDataByteOrderMSB=True)
    assert at(read_scan(swapped), oblique(), (2, 1, 3)) == ramp()[2, 1, 3]


def test_metaimage_without_orientation_or_with_a_function_of_intensity(tmp_path: Path) -> None:
    path = write_metaimage(tmp_path / "a.mha", ramp(), drop=("TransformMatrix",))
    with pytest.raises(DataError, match="no TransformMatrix.*assume_pixdim"):
        describe_scan(path)
    assert not describe_scan(path, Reading(orientation="assume_pixdim")).is_oriented
    path = write_metaimage(tmp_path / "b.mha", ramp(), ElementToIntensityFunctionSlope=2)
    with pytest.raises(DataError, match="slope 2 and offset 0"):
        describe_scan(path)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"DimSize": "30000 30000 30000"}, "30000 × 30000 × 30000"),
        ({"DimSize": "600 500 400"}, "the header speaks of"),
        ({"DimSize": "6 5"}, "DimSize has 2 numbers"),
        ({"ElementType": "MET_SHORTS"}, "Did you mean 'MET_SHORT'"),
        ({"ElementSpacing": "1 0 1"}, "ElementSpacing is"),
        ({"TransformMatrix": "1 0 0 0 1 0 0 0"}, "TransformMatrix has 8"),
        ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "singular"),
        ({"ElementDataFile": "../a.raw"}, "outside its own folder"),
        ({"ElementDataFile": "LIST"}, "several files"),
        ({"ElementDataFile": "none.raw"}, "not there"),
        ({"CompressedData": "perhaps"}, "neither True nor False"),
        ({"BinaryData": "Srue"}, "neither True nor False"),
    ],
)
def test_damaged_metaimage_headers_are_errors(tmp_path: Path, wrong: dict, words: str) -> None:
    path = write_metaimage(tmp_path / "a.mha", ramp(), **wrong)
    with pytest.raises(DataError, match=rf"a\.mha.*{words}"):
        read_scan(path)


@pytest.mark.parametrize("packed", [False, True])
def test_truncated_metaimage_is_refused(tmp_path: Path, packed: bool) -> None:
    path = write_metaimage(tmp_path / "a.mha", ramp(), packed=packed)
    content = path.read_bytes()
    for end in (5, 100, content.index(b"LOCAL"), len(content) - 20, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=r"a\.mha"):
            read_scan(path)


@pytest.mark.parametrize("name", ["a.mgh", "a.mgz"])
def test_mgh_agrees_with_nibabel(tmp_path: Path, name: str) -> None:
    values = ramp((6, 5, 4, 2), "float32")
    path = write_mgh(tmp_path / name, values, oblique())
    theirs = nibabel.load(path)
    np.testing.assert_allclose(theirs.affine, oblique(), atol=1e-4)
    scan = read_scan(path, Reading(volume=1))
    assert at(scan, theirs.affine, (2, 1, 3)) == theirs.get_fdata()[2, 1, 3, 1]
    with pytest.raises(DataError, match="holds 2 volumes"):
        read_scan(path)


def test_mgh_without_directions_or_cut_off(tmp_path: Path) -> None:
    path = write_mgh(tmp_path / "a.mgz", ramp(), oblique(), good=0)
    with pytest.raises(DataError, match="goodRASFlag is 0.*assume_pixdim"):
        describe_scan(path)
    assert describe_scan(path, Reading(orientation="assume_pixdim")).spacing == (1.0, 1.0, 1.0)
    path = write_mgh(tmp_path / "b.mgh", ramp(), oblique())
    content = path.read_bytes()
    for end in (4, 60, 284, len(content) - 21):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=r"b\.mgh"):
            read_scan(path)
    path.write_bytes(content[:4] + b"\0\0\x75\x30" * 3 + content[16:])
    with pytest.raises(DataError, match="30000 × 30000 × 30000"):
        describe_scan(path)


def test_a_file_is_told_by_its_bytes_where_the_name_misleads(tmp_path: Path) -> None:
    path = write_nrrd(tmp_path / "a.nii", ramp(), lps_lines(oblique()))
    assert read_scan(path).facts.format == "nrrd"
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"notes\.txt: no scan, expected NIfTI"):
        read_scan(tmp_path / "notes.txt")
