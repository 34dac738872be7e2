"""NIfTI files as arrays in RAS axis order, and what their headers may not claim."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scan_files import at, nifti_bytes, oblique, ramp, write_nifti

from domainssl.errors import ConfigError, DataError
from domainssl.io.volume.geometry import check_same_grid, displacement
from domainssl.io.volume.scan import (
    Reading,
    describe_scan,
    is_scan,
    list_scans,
    read_labels,
    read_scan,
    scans_and_aside,
)

PLACES = ((0, 0, 0), (5, 4, 3), (2, 1, 3))


def test_the_stored_axes_are_turned_to_ras_together_with_the_affine(tmp_path: Path) -> None:
    values = ramp()
    scan = read_scan(write_nifti(tmp_path / "a.nii.gz", values))
    assert scan.values.shape == (1, 6, 5, 4) and scan.values.dtype == np.int16
    assert scan.facts.orientation == "LAS" and scan.valid is None
    assert (np.diag(scan.affine)[:3] > 0).all()
    np.testing.assert_allclose(scan.facts.spacing, (0.8, 1.2, 3.0), rtol=1e-6)
    for place in PLACES:
        assert at(scan, oblique(), place) == values[place]


def test_axes_stored_in_another_order_are_permuted(tmp_path: Path) -> None:
    affine = np.array([[0, 0, -2.0, 9], [1.5, 0, 0, 8], [0, -3.0, 0, 7], [0, 0, 0, 1]])
    values = ramp()
    scan = read_scan(write_nifti(tmp_path / "a.nii", values, affine))
    assert scan.facts.stored_shape == (6, 5, 4) and scan.facts.shape == (4, 6, 5)
    assert scan.facts.orientation == "AIL" and scan.facts.spacing == (2.0, 1.5, 3.0)
    for place in PLACES:
        assert at(scan, affine, place) == values[place]


def test_describing_says_what_reading_returns(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", ramp((6, 5, 4, 3)))
    facts = describe_scan(path)
    scan = read_scan(path, Reading(volume=2))
    assert facts.shape == scan.values.shape[1:] and facts.volumes == 3
    np.testing.assert_array_equal(facts.affine, scan.affine)
    assert at(scan, oblique(), (2, 1, 3)) == ramp((6, 5, 4, 3))[2, 1, 3, 2]


@pytest.mark.parametrize("order", ["<", ">"])
def test_byte_order_is_that_of_the_machine_after_reading(tmp_path: Path, order: str) -> None:
    scan = read_scan(write_nifti(tmp_path / "a.nii", ramp(), order=order))
    assert scan.values.dtype == np.int16 and scan.values.dtype.isnative
    assert at(scan, oblique(), (2, 1, 3)) == ramp()[2, 1, 3]


def test_a_float_volume_is_float32_and_what_is_not_finite_is_not_valid(tmp_path: Path) -> None:
    values = ramp(dtype="float64")
    values[0, 0, 0], values[1, 0, 0], values[2, 0, 0] = np.nan, np.inf, 1e300
    scan = read_scan(write_nifti(tmp_path / "a.nii", values))
    assert scan.values.dtype == np.float32 and np.isfinite(scan.values).all()
    assert scan.valid is not None and (~scan.valid).sum() == 3
    assert at(scan, oblique(), (0, 0, 0)) == 3.0  # the least of the others


def test_a_slope_is_applied_in_float64(tmp_path: Path) -> None:
    values = np.full((2, 2, 2), 16_777_217, np.int32)
    scan = read_scan(write_nifti(tmp_path / "a.nii", values, slope=0.5, intercept=-8_388_608.0))
    assert scan.values.dtype == np.float32 and (scan.values == 0.5).all()


def test_a_slope_without_a_finite_intercept_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", ramp(), slope=2.0, intercept=float("nan"))
    with pytest.raises(DataError, match=r"a\.nii: scl_slope is 2 and scl_inter nan"):
        describe_scan(path)
    scan = read_scan(write_nifti(tmp_path / "b.nii", ramp(), slope=float("inf")))
    assert scan.values.dtype == np.int16 and "scl_slope is infinite" in scan.facts.warnings[0]


def test_rgb_is_three_channels_and_vectors_of_volumes_keep_their_places(tmp_path: Path) -> None:
    colour = np.zeros((6, 5, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    colour["R"], colour["B"] = ramp() % 251, 7
    scan = read_scan(write_nifti(tmp_path / "rgb.nii", colour, datatype=128))
    assert scan.values.shape == (3, 6, 5, 4) and scan.facts.dtype == "uint8"
    assert at(scan, oblique(), (2, 1, 3)).tolist() == [ramp()[2, 1, 3] % 251, 0, 7]
    both = np.stack([ramp((6, 5, 4, 3)), -ramp((6, 5, 4, 3))], axis=-1)
    scan = read_scan(write_nifti(tmp_path / "both.nii.gz", both), Reading(volume=1))
    assert at(scan, oblique(), (2, 1, 3)).tolist() == both[2, 1, 3, 1].tolist()


def test_complex_numbers_and_a_sixth_axis_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="complex numbers.*magnitude or phase"):
        read_scan(write_nifti(tmp_path / "a.nii", ramp(dtype="complex64")))
    with pytest.raises(DataError, match="a sixth or seventh axis is not read"):
        read_scan(write_nifti(tmp_path / "b.nii", np.zeros((2, 2, 2, 1, 1, 2), np.int16)))


def test_lengths_in_metres_and_micrometres_become_millimetres(tmp_path: Path) -> None:
    for units, factor in ((1, 1e-3), (3, 1e3)):
        affine = oblique() @ np.diag([factor, factor, factor, 1])
        affine[:3, 3] *= factor
        facts = describe_scan(write_nifti(tmp_path / "a.nii", ramp(), affine, units=units))
        np.testing.assert_allclose(facts.spacing, (0.8, 1.2, 3.0), rtol=1e-5)
        assert "converted to mm" in facts.warnings[0] and len(facts.warnings) == 1
    facts = describe_scan(write_nifti(tmp_path / "a.nii", ramp(), units=1))  # mm called metres
    assert "hardly a scan's" in facts.warnings[1]


def test_a_file_without_orientation_is_read_only_where_it_is_asked_for(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", ramp(), code=0, pixdim=(0.8, 1.2, 3.0))
    with pytest.raises(DataError, match=r"a\.nii.*`orientation: assume_pixdim`"):
        describe_scan(path)
    facts = describe_scan(path, Reading(orientation="assume_pixdim"))
    np.testing.assert_allclose(facts.spacing, (0.8, 1.2, 3.0), rtol=1e-6)
    assert not facts.is_oriented and "orientation assumed" in facts.warnings[0]
    stated = write_nifti(tmp_path / "b.nii", ramp())
    assert describe_scan(stated, Reading(orientation="assume_pixdim")).orientation == "LAS"


def test_sizes_and_forms_that_disagree_are_a_warning(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", ramp(), np.diag([2.0, 2, 3, 1]), pixdim=(2, 2, 5))
    facts = describe_scan(path)
    np.testing.assert_allclose(facts.spacing, (2, 2, 3))
    assert "voxels of 2 × 2 × 3 by the sform, which counts, but 2 × 2 × 5" in facts.warnings[0]
    image = nibabel.Nifti1Image(ramp(), np.diag([2.0, 2, 3, 1]))
    image.set_qform(np.diag([2.0, 2, 3, 1]) + np.eye(4, k=3) * 7, code=1)
    nibabel.save(image, tmp_path / "b.nii")
    facts = describe_scan(tmp_path / "b.nii")
    assert facts.affine[0, 3] == 0 and "differ by up to 7 mm (3.5 voxels)" in facts.warnings[0]


def test_one_of_several_volumes_has_to_be_chosen(tmp_path: Path) -> None:
    volumes = np.stack([ramp(), ramp() + 100], axis=-1)
    path = write_nifti(tmp_path / "a.nii", volumes, pixdim=(2, 2, 2, 1))
    with pytest.raises(
        DataError, match=r"a\.nii: holds 2 volumes \(4D\).*`volume: <index>` \(0 to 1\)"
    ):
        read_scan(path)
    first, second = (read_scan(path, Reading(volume=number)).values for number in (0, 1))
    assert np.array_equal(second, first + 100)


def _qform_only(path: Path, affine: np.ndarray, field: int, *numbers: float) -> Path:
    """A file with a qform alone, of which float fields from byte `field` on are set."""
    image = nibabel.Nifti1Image(ramp(), None)
    image.set_qform(affine, code=1)
    nibabel.save(image, path)
    content = bytearray(path.read_bytes())
    content[field : field + 4 * len(numbers)] = np.array(numbers, "<f4").tobytes()
    path.write_bytes(content)
    return path


def test_fields_of_a_qform_that_tools_leave_odd_are_read_and_said(tmp_path: Path) -> None:
    right = oblique() * [1, 1, -1, 1]  # pixdim[0] is 1
    scan = read_scan(_qform_only(tmp_path / "a.nii", right, 76, 0.0))
    np.testing.assert_allclose(scan.affine, read_scan(
        _qform_only(tmp_path / "b.nii", right, 76, 1.0)).affine, atol=1e-6)  # fmt: skip
    assert at(scan, right, (2, 1, 3)) == ramp()[2, 1, 3]
    assert "pixdim[0] is 0" in scan.facts.warnings[0]
    scan = read_scan(_qform_only(tmp_path / "c.nii", oblique(), 80, -0.8, 1.2, -3.0))
    assert at(scan, oblique(), (2, 1, 3)) == ramp()[2, 1, 3]
    assert "signs do not count" in scan.facts.warnings[0]
    turned = np.diag([2.0, -3.0, -4.0, 1.0])  # the quaternion (0, 1, 0, 0)
    facts = describe_scan(_qform_only(tmp_path / "d.nii", turned, 256, 1.00001, 0.0, 0.0))
    np.testing.assert_allclose(facts.spacing, (2, 3, 4), rtol=1e-6)
    assert facts.orientation == "RPI" and facts.warnings == ()
    with pytest.raises(DataError, match=r"e\.nii: the quaternion of the qform has the length 1\.2"):
        describe_scan(_qform_only(tmp_path / "e.nii", turned, 256, 0.9, 0.8, 0.0))


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_files_of_nibabel_are_read_by_their_coded_form(tmp_path: Path, kind: type) -> None:
    image = kind(ramp(), None)
    image.header.set_xyzt_units("mm")
    image.set_qform(oblique(), code=1)
    image.header["sform_code"] = 0
    image.header["srow_x"] = (1, 0, 0, 0)
    nibabel.save(image, tmp_path / "a.nii.gz")
    scan = read_scan(tmp_path / "a.nii.gz")
    assert at(scan, oblique(), (2, 1, 3)) == ramp()[2, 1, 3] and scan.facts.warnings == ()
    image.set_sform(np.diag([2.0, 2, 2, 1]), code=2)
    image.header["qform_code"] = 1
    nibabel.save(image, tmp_path / "a.nii")
    facts = describe_scan(tmp_path / "a.nii")
    assert facts.spacing == (2.0, 2.0, 2.0)
    assert any("sform and qform are both coded and differ" in text for text in facts.warnings)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "uint32", "int64", "uint8"])
def test_whole_numbers_keep_their_type(tmp_path: Path, dtype: str) -> None:
    scan = read_scan(write_nifti(tmp_path / "a.nii", (ramp() % 100).astype(dtype)))
    assert scan.values.dtype == dtype and at(scan, oblique(), (2, 1, 3)) == ramp()[2, 1, 3] % 100


def test_a_singular_sform_is_refused(tmp_path: Path) -> None:
    flat = oblique()
    flat[:, 2] = flat[:, 1]
    with pytest.raises(DataError, match="singular or not finite"):
        describe_scan(write_nifti(tmp_path / "a.nii", ramp(), flat))


@pytest.mark.parametrize("name", ["huge.nii", "huge.nii.gz"])
def test_a_header_is_not_believed_beyond_the_size_of_the_file(tmp_path: Path, name: str) -> None:
    path = write_nifti(tmp_path / name, ramp(), dims=(3, 30000, 30000, 30000))
    with pytest.raises(DataError, match=rf"{name}: the header gives 30000 × 30000 × 30000"):
        describe_scan(path)
    path = write_nifti(tmp_path / name, ramp(), dims=(3, 1000, 1000, 1000))
    with pytest.raises(DataError, match=rf"{name}: the header speaks of 1000 × 1000 × 1000"):
        describe_scan(path)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dims": (3, 6, 0, 4)}, "axes of"),
        ({"dims": (3, 6, -5, 4)}, "axes of"),
        ({"dims": (1, 6)}, "axes of"),
        ({"datatype": 1}, "cannot be read"),
        ({"datatype": 999}, "cannot be read"),
        ({"offset": float("nan")}, "vox_offset is nan"),
        ({"offset": 100.0}, "vox_offset is 100"),
        ({"offset": 1e9}, "the header speaks of"),
    ],
)
def test_impossible_headers_are_errors_that_name_the_file(
    tmp_path: Path, wrong: dict, words: str
) -> None:
    path = write_nifti(tmp_path / "odd.nii", ramp(), **wrong)
    with pytest.raises(DataError, match=rf"odd\.nii.*{words}"):
        read_scan(path)


def test_every_truncation_and_a_wrong_checksum_are_refused(tmp_path: Path) -> None:
    content = gzip.compress(nifti_bytes(ramp((16, 16, 16))), 6)
    path = tmp_path / "a.nii.gz"
    for end in (0, 1, 2, 10, 100, len(content) // 2, len(content) - 9, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=r"a\.nii\.gz"):
            read_scan(path)
    path.write_bytes(content[:-8] + bytes(4) + content[-4:])
    with pytest.raises(DataError, match="CRC"):
        read_scan(path)


def _extended(tmp_path: Path) -> tuple[bytes, np.ndarray]:
    """A file of nibabel whose header has extensions of 32 and 48 bytes, and its values."""
    image = nibabel.Nifti1Image(ramp(), np.eye(4))
    for length in (20, 40):
        note = nibabel.nifti1.Nifti1Extension("comment", b"x" * length)
        image.header.extensions.append(note)
    nibabel.save(image, tmp_path / "whole.nii")
    return (tmp_path / "whole.nii").read_bytes(), ramp()


def test_voxels_are_never_read_out_of_the_extensions_of_a_header(tmp_path: Path) -> None:
    content, values = _extended(tmp_path)
    np.testing.assert_array_equal(read_scan(tmp_path / "whole.nii").values[0], values)
    wrong = content[:108] + np.float32(352).tobytes() + content[112:]
    for name, packed in (("a.nii", wrong), ("a.nii.gz", gzip.compress(wrong))):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(DataError, match=r"vox_offset is 352, but .* to byte 432"):
            read_scan(tmp_path / name)
    (tmp_path / "b.nii").write_bytes(content[:108] + bytes(4) + content[112:])  # not stated
    np.testing.assert_array_equal(read_scan(tmp_path / "b.nii").values[0], values)
    marked = bytearray(nifti_bytes(values))
    marked[348] = 1  # some writers set the mark and write no extension
    (tmp_path / "c.nii").write_bytes(marked)
    assert read_scan(tmp_path / "c.nii").values.max() == values.max()


def test_a_file_that_is_longer_than_its_header_says_is_a_warning(tmp_path: Path) -> None:
    content = nifti_bytes(ramp())
    (tmp_path / "a.nii").write_bytes(content + bytes(200))
    assert "200 bytes follow" in describe_scan(tmp_path / "a.nii").warnings[0]
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content) * 2)
    assert f"{len(content)} bytes follow" in read_scan(tmp_path / "a.nii.gz").facts.warnings[0]
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(nifti_bytes(ramp((6, 5, 4, 3)))[:-400]))
    with pytest.raises(DataError, match="400 of 1072 bytes early"):  # of the last volume
        read_scan(tmp_path / "b.nii.gz", Reading(volume=0))


def test_a_data_type_of_other_bits_than_stated_is_a_warning(tmp_path: Path) -> None:
    content = nifti_bytes(ramp())
    (tmp_path / "a.nii").write_bytes(content[:72] + b"\x08\0" + content[74:])
    assert "bitpix is 8, but the data type int16" in read_scan(tmp_path / "a.nii").facts.warnings[0]


def test_a_pair_is_read_by_either_name_and_needs_both_files(tmp_path: Path) -> None:
    content = bytearray(nifti_bytes(ramp(), offset=0.0))
    content[344:348] = b"ni1\0"
    (tmp_path / "a.hdr").write_bytes(content[:348])
    with pytest.raises(DataError, match=r"a\.img.*not there"):
        read_scan(tmp_path / "a.hdr")
    (tmp_path / "a.img").write_bytes(content[352:])
    for name in ("a.hdr", "a.img"):
        assert at(read_scan(tmp_path / name), oblique(), (2, 1, 3)) == ramp()[2, 1, 3]
    assert list_scans(tmp_path) == [str(tmp_path / "a.hdr")]
    (tmp_path / "a.img").write_bytes(content[352:-2])
    with pytest.raises(DataError, match="the header speaks of"):
        describe_scan(tmp_path / "a.hdr")


def test_analyze_is_told_from_nifti(tmp_path: Path) -> None:
    content = nifti_bytes(ramp())
    (tmp_path / "a.nii").write_bytes(content[:344] + bytes(4) + content[348:])
    with pytest.raises(DataError, match=r"ANALYZE 7\.5, which states no orientation"):
        read_scan(tmp_path / "a.nii")


def test_pipes_companions_and_dangling_links_are_not_listed(tmp_path: Path) -> None:
    good = write_nifti(tmp_path / "good.nii.gz", ramp())
    (tmp_path / "._good.nii.gz").write_bytes(b"\0\5\26\7")
    (tmp_path / ".hidden").mkdir()
    write_nifti(tmp_path / ".hidden" / "a.nii", ramp())
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "gone.nii").symlink_to(tmp_path / "nowhere.nii")
    (tmp_path / "linked.nii.gz").symlink_to(good)
    (tmp_path / "round").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert list_scans(tmp_path) == [str(good), str(tmp_path / "linked.nii.gz")]
    lost, linked = scans_and_aside(tmp_path)[1].told(str(tmp_path))
    assert "2 left out, linked to nothing: gone.nii, self. Copy them again" in lost
    assert "1 linked to folders, which are not followed: round. Give the folder" in linked
    with pytest.raises(DataError, match=r"pipe\.nii.*no regular file"):
        read_scan(tmp_path / "pipe.nii")
    with pytest.raises(DataError, match="a link to a file that is not there"):
        read_scan(tmp_path / "gone.nii")
    assert is_scan(good) and not is_scan(tmp_path / "pipe.nii")


def test_texts_of_the_header_appear_nowhere(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", ramp((6, 5, 4, 2)), note=b"Invented^Person", units=1)
    with pytest.raises(DataError) as error:
        read_scan(path)
    assert "Invented" not in repr(describe_scan(path)) + str(error.value)


def test_labels_are_whole_numbers_in_one_channel(tmp_path: Path) -> None:
    labels = read_labels(write_nifti(tmp_path / "a.nii", ramp(dtype="float32") + 1))
    assert labels.values.dtype == np.int32 and at(labels, oblique(), (0, 0, 0)) == 1
    with pytest.raises(DataError, match=r"b\.nii: holds the value .*\.5, expected whole numbers"):
        read_labels(write_nifti(tmp_path / "b.nii", ramp(), slope=0.5))
    near = (np.arange(120).reshape(6, 5, 4) * 255).astype(np.int16)
    for more in ({"slope": 1 / 255}, {"slope": 1 / 255, "intercept": 1e-6}):  # 3 is 3.0000002
        labels = read_labels(write_nifti(tmp_path / "a.nii", near, **more))
        assert at(labels, oblique(), (2, 1, 3)) == 47 and labels.values.max() == 119
    with pytest.raises(DataError, match=r"b\.nii: holds the value 3\.125, expected"):
        read_labels(write_nifti(tmp_path / "b.nii", np.full((2, 2, 2), 3.125, np.float32)))
    with pytest.raises(DataError, match=r"d\.nii: holds 3 maps .*Merge them into one"):
        read_labels(write_nifti(tmp_path / "d.nii", np.zeros((2, 2, 2, 3), np.uint8)))
    with pytest.raises(DataError, match="2 values per voxel, expected one label"):
        read_labels(write_nifti(tmp_path / "c.nii", np.zeros((2, 2, 2, 1, 2), np.uint8)))


def test_labels_that_are_not_stated_are_of_no_class_instead_of_the_first(tmp_path: Path) -> None:
    values = np.ones((3, 3, 3), np.float32)
    values[0, 0, 0], values[1, 1, 1] = np.nan, 0
    labels = read_labels(write_nifti(tmp_path / "a.nii", values, np.eye(4)))
    assert labels.values[0, 0, 0, 0] == -1 and labels.values[0, 1, 1, 1] == 0
    assert int((labels.values == 1).sum()) == 25


def test_reading_refuses_unknown_words_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'assume_pixdim'"):
        Reading(orientation="assume_pixdims")
    with pytest.raises(ConfigError, match="space: got 'LSP'"):
        Reading(space="LSP")
    with pytest.raises(ConfigError, match="volume: got -1"):
        Reading(volume=-1)
    path = write_nifti(tmp_path / "a.nii", ramp())
    with pytest.raises(DataError, match="`volume: 1` asks for a volume that is not there"):
        read_scan(path, Reading(volume=1))


def test_grids_are_equal_to_a_tenth_of_a_voxel() -> None:
    affine, shape = oblique(), (64, 64, 20)
    near, far = affine.copy(), affine.copy()
    near[:3, 3] += affine[:3, 2] * 0.09
    far[:3, 3] += affine[:3, 0] * 0.2
    check_same_grid(("ct", shape, affine), ("pet", shape, near))
    with pytest.raises(DataError, match=r"pet: not on the grid of ct: .*0\.16 mm \(0\.2 voxels\)"):
        check_same_grid(("ct", shape, affine), ("pet", shape, far))
    with pytest.raises(DataError, match=r"64 × 64 × 19 voxels.*resample_to: ct"):
        check_same_grid(
            ("ct", shape, affine), ("pet", (64, 64, 19), affine), option="resample_to: ct"
        )
    turned = affine @ np.diag([1, 1, 1.01, 1])  # adds up to 0.19 voxel at the far end
    assert displacement(affine, turned, shape)[1] == pytest.approx(0.19)


def test_a_label_map_stored_in_another_axis_order_lies_on_the_same_grid(tmp_path: Path) -> None:
    values, affine = ramp(), oblique()
    image = read_scan(write_nifti(tmp_path / "a.nii", values, affine))
    turned = np.eye(4)  # axes k, i, j with j reversed
    turned[:3, :3] = [[0, 1, 0], [0, 0, -1], [1, 0, 0]]
    turned[1, 3] = values.shape[1] - 1
    stored = values.transpose(2, 0, 1)[:, :, ::-1]
    label = read_labels(write_nifti(tmp_path / "b.nii", stored, affine @ turned))
    assert label.facts.orientation != image.facts.orientation
    check_same_grid(("a", image.facts.shape, image.affine), ("b", label.facts.shape, label.affine))
    np.testing.assert_array_equal(label.values, image.values)
