"""DICOM series as volumes: order, values, what is left out, and what forbids a stack."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import (
    AXIAL,
    MR,
    PET,
    PRIVATE,
    REPORT,
    RTSTRUCT,
    affine_of,
    blank,
    item,
    plane,
    write_enhanced,
    write_series,
    write_slice,
)
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRBigEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)
from scan_files import at

from domainssl.errors import DataError
from domainssl.io.volume.scan import Reading, Scan, describe_scan, is_scan, list_scans, read_scan


def holds(scan: Scan, values: np.ndarray, affine: np.ndarray) -> None:
    """Compare a few voxels by their places in the world."""
    for place in ((0, 0, 0), (3, 4, values.shape[2] - 1), (1, 3, values.shape[2] // 2)):
        assert at(scan, affine, place) == values[place]


def test_slices_are_ordered_by_position_with_the_distance_of_positions(tmp_path: Path) -> None:
    values = write_series(tmp_path, SliceThickness="5")
    scan = read_scan(tmp_path)
    assert scan.facts.format == "dicom" and scan.facts.modality == "CT"
    assert scan.facts.shape == (4, 5, 6) and scan.facts.orientation == "LPS"
    np.testing.assert_allclose(scan.facts.spacing, (1.5, 2.0, 2.5))
    assert scan.values.dtype == np.int16 and scan.values.min() == -1000
    holds(scan, values, affine_of())
    assert describe_scan(tmp_path).affine.tolist() == scan.affine.tolist()


def test_other_files_are_left_out_counted_and_named(tmp_path: Path) -> None:
    values = write_series(tmp_path)
    (tmp_path / "README.txt").write_text("exported")
    (tmp_path / "._IM0002").write_bytes(b"\0\5\26\7")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(20))
    os.mkfifo(tmp_path / "pipe")
    blank(tmp_path / "SR1", REPORT, "7").save_as(tmp_path / "SR1")
    blank(tmp_path / "RS1", RTSTRUCT, "8").save_as(tmp_path / "RS1")
    write_slice(tmp_path / "SC1", plane(0, 9, 9), None, series="9", modality="OT")
    scan = read_scan(tmp_path)
    holds(scan, values, affine_of())
    text = " | ".join(scan.facts.left_out)
    assert "2 without DICOM: DICOMDIR, README.txt" in text and "1 structured report: SR1" in text
    assert "1 RTSTRUCT: RS1 (contours are not read" in text
    assert "1 image without position: SC1" in text and "._IM" not in text


def test_images_that_a_copy_lost_are_told(tmp_path: Path) -> None:
    values = write_series(tmp_path)
    write_slice(tmp_path / "LAST", plane(6), (-3, -4, -85))
    assert not describe_scan(tmp_path).warnings
    (tmp_path / "LAST").write_bytes(b"")
    (tmp_path / "NEXT").symlink_to("nowhere")
    (tmp_path / "SELF").symlink_to("SELF")
    scan = read_scan(tmp_path)
    holds(scan, values, affine_of())  # shorter than it was
    assert "3 empty or linked to nothing: LAST, NEXT, SELF" in scan.facts.left_out
    assert "LAST, NEXT, SELF; the volume may lack planes. Copy" in scan.facts.warnings[0]


def test_a_localizer_of_the_series_is_left_out_with_a_warning(tmp_path: Path) -> None:
    values = write_series(tmp_path)
    write_slice(tmp_path / "IM0099", plane(0), (0, -8, -90), orientation=(0, 1, 0, 0, 0, -1),
                ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])  # fmt: skip
    scan = read_scan(tmp_path)
    holds(scan, values, affine_of())
    assert "1 localizer: IM0099" in scan.facts.left_out
    assert any("IM0099" in text for text in scan.facts.warnings)
    write_slice(tmp_path / "IM0099", plane(0), (0, -8, -90), orientation=(0, 1, 0, 0, 0, -1))
    assert "1 of another orientation: IM0099" in read_scan(tmp_path).facts.left_out


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_a_series_of_localizers_alone_says_so(tmp_path: Path) -> None:
    write_series(tmp_path, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    facts = describe_scan(tmp_path)
    assert facts.shape == (4, 5, 6) and "every image is marked as a localizer" in facts.warnings[0]


def test_patient_data_appear_nowhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_series(tmp_path / "good", PatientBirthDate="not a date")
    write_series(tmp_path / "two", number=3)
    write_slice(tmp_path / "two" / "b", plane(0), series="2", number=3)
    write_slice(tmp_path / "gap" / "a", plane(0))
    write_slice(tmp_path / "gap" / "b", plane(1), (0, 0, 1))
    write_slice(tmp_path / "gap" / "c", plane(1), (0, 0, 9))
    write_slice(tmp_path / "odd" / "a", plane(0), save=False)
    broken = write_slice(tmp_path / "odd" / "a", plane(0))
    broken.PixelData = broken.PixelData[:-8]
    broken.save_as(tmp_path / "odd" / "a")
    said = [repr(describe_scan(tmp_path / "good"))]
    for folder in ("two", "gap", "odd"):
        with warnings.catch_warnings(record=True) as caught, pytest.raises(DataError) as error:
            warnings.simplefilter("always")
            read_scan(tmp_path / folder)
        said += [str(error.value), repr(error.value.__cause__), *(str(w.message) for w in caught)]
    said += capfd.readouterr()
    assert not [word for word in PRIVATE for text in said if word in text]


def test_padding_is_a_stored_number_whatever_its_sign_in_the_header(tmp_path: Path) -> None:
    stored = plane(0)
    stored[0, 0], stored[1, 1] = -2000, -1995
    for name, more in (("a", {"implicit": True}), ("b", {})):
        file = write_slice(tmp_path / name, stored, save=False, **more)
        file.add_new((0x0028, 0x0120), "SS" if name == "a" else "US", -2000 % (2**16)
                     if name == "b" else -2000)  # fmt: skip
        file.save_as(tmp_path / name)
        scan = read_scan(tmp_path / name)
        assert scan.valid is not None and (~scan.valid).sum() == 1
        assert scan.values[:, ~scan.valid].tolist() == [[-1024]]
    file.add_new((0x0028, 0x0121), "SS", -1990)
    file.save_as(tmp_path / "b")
    scan = read_scan(tmp_path / "b")
    assert scan.valid is not None and (~scan.valid).sum() == 2
    assert scan.values.min() == -1024 and scan.values[:, scan.valid].min() == 25 - 1024


@pytest.mark.parametrize(
    ("stored", "padding", "vr", "signed"),
    [
        (0x0830, 0x0830, "US", True), (0xF830, 0xF830, "US", False), (0x0830, -2000, "SS", True),
        (0x0FFF, 0xFFFF, "US", False),
    ],
)  # fmt: skip
def test_padding_has_the_bits_that_pixels_have(
    tmp_path: Path, stored: int, padding: int, vr: str, signed: bool
) -> None:
    for k in range(3):
        pixels = plane(k).astype("<u2")
        pixels[0, 0] = stored
        file = write_slice(tmp_path / f"{k}", plane(k), (0, 0, k), signed=signed, bits=12,
                           save=False)  # fmt: skip
        file.PixelData = pixels.tobytes()
        file.add_new(0x00280120, vr, padding)
        file.save_as(tmp_path / f"{k}", enforce_file_format=True)
    scan = read_scan(tmp_path)
    assert scan.valid is not None and int((~scan.valid).sum()) == 3
    assert scan.values[0][scan.valid].max() == plane(2).max() - 1024


def test_images_of_the_series_without_a_place_are_a_warning(tmp_path: Path) -> None:
    write_series(tmp_path)
    last = write_slice(tmp_path / "IM0099", plane(0), None)
    assert "ImagePositionPatient" not in last
    [warning] = read_scan(tmp_path).facts.warnings
    assert "1 images of the series that state no position or orientation: IM0099" in warning


def test_ct_that_may_be_no_hounsfield_units_is_a_warning(tmp_path: Path) -> None:
    write_series(tmp_path / "iodine", RescaleType="MGML")
    [warning] = read_scan(tmp_path / "iodine").facts.warnings
    assert "6 of 6 images state the unit MGML (RescaleType)" in warning
    write_series(tmp_path / "hu", RescaleType="HU")
    assert not read_scan(tmp_path / "hu").facts.warnings
    write_series(tmp_path / "named", RescaleType="of Invented Person")
    assert "the unit A TEXT" in read_scan(tmp_path / "named").facts.warnings[0]
    write_series(tmp_path / "mixed")
    write_slice(tmp_path / "mixed" / "IM0002", plane(0), (-3, -4, -100), intercept=0)
    [warning] = read_scan(tmp_path / "mixed").facts.warnings
    assert "1 images of a CT have another scale than 5" in warning and "IM0002" in warning


def test_two_acquisitions_that_alternate_are_a_warning(tmp_path: Path) -> None:
    for k in range(6):
        write_slice(tmp_path / f"{k}", plane(k), (0, 0, k), AcquisitionNumber=k % 2)
    [warning] = read_scan(tmp_path).facts.warnings
    assert "2 kinds by AcquisitionNumber alternate along the volume" in warning


def test_each_slice_has_its_own_slope_in_floating_point(tmp_path: Path) -> None:
    slopes = (1.0, 0.25, 0.013671875, 1.02609e-08)
    for k, slope in enumerate(slopes):
        write_slice(tmp_path / f"{9 - k}", plane(k) + 40000, (0, 0, 3.0 * k), modality="PT",
                    sop=PET, slope=slope, intercept=0, signed=False)  # fmt: skip
    scan = read_scan(tmp_path)
    assert scan.values.dtype == np.float32 and scan.facts.modality == "PT"
    affine = affine_of((0, 0, 3), (0, 0, 0))
    for k, slope in enumerate(slopes):
        expected = (plane(k)[2, 1] + 40000) * slope
        assert at(scan, affine, (1, 2, k)) == pytest.approx(expected, rel=1e-6)


def test_signs_bits_and_photometry(tmp_path: Path) -> None:
    tissue = plane(0) - 900
    write_slice(tmp_path / "a", tissue + 8192, signed=False, intercept=-8192)
    write_slice(tmp_path / "b", (tissue + 1024) | 0x8000, signed=False, bits=12)
    write_slice(tmp_path / "c", tissue + 1024, PhotometricInterpretation="MONOCHROME1")
    write_slice(tmp_path / "d", (tissue & 0x0FFF), bits=12, intercept=0)  # negative in 12 bits
    for name in "abcd":
        scan = read_scan(tmp_path / name)
        assert scan.values.dtype == np.int16
        assert at(scan, affine_of(start=(0, 0, 0)), (1, 2, 0)) == tissue[2, 1], name
    assert read_scan(tmp_path / "a").values.min() == -876


def test_bits_that_do_not_end_at_the_lowest_one_are_refused(tmp_path: Path) -> None:
    write_slice(tmp_path / "a", plane(0) << 4, signed=False, bits=12, HighBit=15)
    with pytest.raises(DataError, match=r"a: its numbers have 12 bits .* up to bit 15 \(HighBit\)"):
        read_scan(tmp_path / "a")


def test_ct_without_a_scale_is_said_and_a_slope_of_zero_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "bare", slope=None)
    scan = read_scan(tmp_path / "bare")
    assert scan.values.min() == 24 and "6 of 6 images state no Rescale" in scan.facts.warnings[0]
    write_series(tmp_path / "mr", slope=None, modality="MR", sop=MR)
    assert describe_scan(tmp_path / "mr").warnings == ()
    write_series(tmp_path / "zero", slope=0)
    with pytest.raises(DataError, match=r"zero: IM\d+ has the RescaleSlope 0"):
        read_scan(tmp_path / "zero")
    write_slice(tmp_path / "empty", np.zeros((5, 4), int), slope=0, intercept=0, modality="PT")
    assert not read_scan(tmp_path / "empty").values.any()  # a slice of PET without a count


def test_values_beyond_16_bits_are_kept(tmp_path: Path) -> None:
    write_slice(tmp_path / "a", plane(0) + 60000, signed=False)
    scan = read_scan(tmp_path / "a")
    assert scan.values.dtype == np.int32 and scan.values.max() == 60067 - 1024


@pytest.mark.parametrize(("depth", "kind"), [(12, "US"), (16, "OW"), (8, "OW")])
def test_a_modality_table_takes_the_place_of_slope_and_intercept(
    tmp_path: Path, depth: int, kind: str
) -> None:
    table = (np.arange(40) * 5 % 251).tolist()
    lut = item(LUTDescriptor=[40, 30, depth], ModalityLUTType="US")
    packed = np.array(table, "u1" if depth == 8 else "<u2").tobytes()
    lut[0].add_new((0x0028, 0x3006), kind, packed if kind == "OW" else table)
    file = write_slice(tmp_path / "a", plane(0), slope=None, save=False)
    file.ModalityLUTSequence = lut
    file.save_as(tmp_path / "a")
    scan = read_scan(tmp_path / "a")
    expected = np.array(table)[np.clip(plane(0) - 30, 0, 39)]  # 24 to 67: cut at both ends
    affine = affine_of(start=(0, 0, 0))
    for c, r in ((0, 0), (1, 2), (3, 4)):
        assert at(scan, affine, (c, r, 0)) == expected[r, c]


def test_enhanced_frames_are_placed_and_scaled_one_by_one(tmp_path: Path) -> None:
    values = write_enhanced(tmp_path / "a", [3, 0, 2, 1])
    scan = read_scan(tmp_path / "a")
    assert scan.values.dtype == np.int16 and scan.facts.spacing == (1.5, 2.0, 2.5)
    holds(scan, values, affine_of())
    values = write_enhanced(tmp_path / "b", [3, 0, 2, 1], [1, 0.5, 2, 0.25])
    holds(read_scan(tmp_path / "b"), values, affine_of())
    write_enhanced(tmp_path / "c", [0, 1], NumberOfFrames=1)
    with pytest.raises(DataError, match="header cannot be read"):
        describe_scan(tmp_path / "c")


def test_enhanced_files_may_state_scale_and_grid_where_single_images_do(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "e.dcm", [2, 0, 1])
    file = pydicom.dcmread(tmp_path / "e.dcm")
    for frame in file.PerFrameFunctionalGroupsSequence:
        del frame.PixelValueTransformationSequence
    del file.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    file.RescaleSlope, file.RescaleIntercept, file.PixelSpacing = "2", "-1024", [2.0, 1.5]
    file.save_as(tmp_path / "e.dcm")
    scan = read_scan(tmp_path / "e.dcm")
    assert scan.values.min() == 2 * plane(0).min() - 1024 and not scan.facts.warnings
    assert scan.facts.spacing == (1.5, 2.0, 2.5)


def test_enhanced_frames_at_two_times_are_two_volumes(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "a", [0, 1, 2, 0, 1, 2])
    file = pydicom.dcmread(tmp_path / "a")
    for n, group in enumerate(file.PerFrameFunctionalGroupsSequence):
        group.FrameContentSequence = item(TemporalPositionIndex=1 + (n < 3))
    file.save_as(tmp_path / "a", enforce_file_format=True)
    facts = describe_scan(tmp_path / "a")
    assert facts.volumes == 2 and facts.shape == (4, 5, 3)
    assert "differ in TemporalPositionIdentifier" in facts.warnings[0]


def test_big_endian_pixels_are_read(tmp_path: Path) -> None:
    file = write_slice(tmp_path / "a", plane(0), save=False)
    file.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    file.PixelData = plane(0).astype(">i2").tobytes()
    file["PixelData"].VR = "OW"
    pydicom.dcmwrite(
        tmp_path / "a", file, implicit_vr=False, little_endian=False, force_encoding=True,
    )  # fmt: skip
    assert at(read_scan(tmp_path / "a"), affine_of(start=(0, 0, 0)), (1, 2, 0)) == -979


def test_gap_duplicate_and_double_places_name_files_and_positions(tmp_path: Path) -> None:
    write_series(tmp_path / "gap")
    (tmp_path / "gap" / "IM0004").unlink()  # the fourth slice, at -92.5
    with pytest.raises(DataError, match=r"5 mm between IM\d+ at -95 mm, IM\d+ at -90 mm, as if 1"):
        describe_scan(tmp_path / "gap")
    write_slice(tmp_path / "gap" / "IM0004", plane(3), None)
    with pytest.raises(DataError, match=r"Left out before: 1 image without position: IM0004"):
        describe_scan(tmp_path / "gap")
    write_series(tmp_path / "copy")
    write_slice(tmp_path / "copy" / "again", plane(1), (-3, -4, -97.5))
    with pytest.raises(DataError, match=r"at one place.*again at -97\.5 mm"):
        describe_scan(tmp_path / "copy")
    write_series(tmp_path / "all")
    for k in range(6):
        write_slice(tmp_path / "all" / f"x{k}", plane(k), (-3, -4, -100 + 2.5 * k))
    with pytest.raises(
        DataError, match="2 images lie at each of 6 places, with nothing that tells"
    ):
        describe_scan(tmp_path / "all")


def test_two_echoes_are_two_volumes_of_which_one_is_chosen(tmp_path: Path) -> None:
    for k in range(3):
        for n, echo in enumerate((80, 9)):
            write_slice(tmp_path / f"{n}{k}", plane(k) + 1000 * n, (0, 0, 2.0 * k), sop=MR,
                        modality="MR", slope=None, EchoTime=str(echo))  # fmt: skip
    with pytest.raises(DataError, match=r"differ in EchoTime: 00 at 0 mm.*`volume: <index>`"):
        read_scan(tmp_path)
    facts = describe_scan(tmp_path)
    assert facts.volumes == 2 and "differ in EchoTime" in facts.warnings[0]
    affine = affine_of((0, 0, 2), (0, 0, 0))
    first = read_scan(tmp_path, Reading(volume=0))  # in the order of echo times
    assert at(first, affine, (1, 2, 2)) == plane(2)[2, 1] + 1000
    assert at(read_scan(tmp_path, Reading(volume=1)), affine, (1, 2, 2)) == plane(2)[2, 1]


def test_mixed_sizes_and_orientations_are_refused_by_name(tmp_path: Path) -> None:
    write_series(tmp_path / "sizes")
    write_slice(tmp_path / "sizes" / "odd", plane(0, 6, 6), (-3, -4, -85))
    with pytest.raises(DataError, match=r"differ in size.*6 × 6 pixels.*odd at -85 mm"):
        describe_scan(tmp_path / "sizes")
    write_series(tmp_path / "both")
    for k in range(4):
        write_slice(tmp_path / "both" / f"s{k}", plane(k), (k, 0, 0),
                    orientation=(0, 1, 0, 0, 0, -1))  # fmt: skip
    with pytest.raises(DataError, match=r"2 orientations: 6 images like .*4 images like s0"):
        describe_scan(tmp_path / "both")
    write_series(tmp_path / "aside", 2)
    write_slice(tmp_path / "aside" / "far", plane(0), (5, -4, -95))
    with pytest.raises(DataError, match="beside the line of the others"):
        describe_scan(tmp_path / "aside")


def test_rounding_of_the_orientation_is_tolerated(tmp_path: Path) -> None:
    c, s = np.cos(0.3), np.sin(0.3)
    normal = np.cross((c, s, 0), (-s, c, 0))
    for k in range(4):
        turned = np.array((c, s, 0, -s, c, 0)) + 4e-4 * (k % 2)
        write_slice(tmp_path / f"{k}", plane(k), normal * 2.5 * k, orientation=turned.round(4))
    facts = describe_scan(tmp_path)
    np.testing.assert_allclose(facts.spacing, (1.5, 2.0, 2.5), atol=1e-5)
    assert facts.warnings == ()


@pytest.mark.parametrize("step", [3.0, -3.0])
@pytest.mark.parametrize(
    "orientation", [(1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1), (0.8, 0.6, 0, 0, 0, -1)]
)
def test_coronal_sagittal_and_oblique_stacks_keep_their_places(
    tmp_path: Path, orientation: tuple[float, ...], step: float
) -> None:
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    normal = np.cross(row, column)
    for k in range(3):
        write_slice(tmp_path / f"{k}", plane(k), normal * step * k, orientation=orientation)
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1], lps[:3, 2] = row * 1.5, column * 2.0, normal * step
    scan = read_scan(tmp_path)
    assert (np.diag(scan.affine)[:3] > 0).all()
    for c, r, k in ((0, 0, 0), (3, 1, 2), (2, 4, 1)):
        expected = plane(k)[r, c] - 1024
        assert at(scan, np.diag([-1.0, -1, 1, 1]) @ lps, (c, r, k)) == expected


def test_a_mosaic_is_refused_with_the_remedy(tmp_path: Path) -> None:
    write_slice(tmp_path / "a", plane(0), ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])
    with pytest.raises(DataError, match="a mosaic.*dcm2niix"):
        describe_scan(tmp_path)


def test_gantry_tilt_keeps_the_sheared_affine(tmp_path: Path) -> None:
    step = (0.0, 0.7, 2.4)
    for k in range(5):
        write_slice(tmp_path / f"{k}", plane(k), np.array(step) * k)
    scan = read_scan(tmp_path)
    assert "gantry tilt of 16.3 degrees" in scan.facts.warnings[0]
    assert at(scan, affine_of(step, (0, 0, 0)), (1, 2, 4)) == plane(4)[2, 1] - 1024


def test_one_of_several_series_is_chosen_by_a_key_without_patient_data(tmp_path: Path) -> None:
    values = write_series(tmp_path, number=3)
    for k in range(2):
        write_slice(tmp_path / f"z{k}", plane(k), (0, 0, k), series="2", number=7)
    wanted = r"2 series: ct-3 \(ct\) with 6 .*ct-7 \(ct\) with 2.*`series: <"
    with pytest.raises(DataError, match=wanted):
        describe_scan(tmp_path)
    scan = read_scan(tmp_path, Reading(series="ct-3"))
    holds(scan, values, affine_of())
    assert "2 of another series (ct-7): z0, z1" in scan.facts.left_out
    with pytest.raises(DataError, match="no series 'ct-2'.*Did you mean"):
        describe_scan(tmp_path, Reading(series="ct-2"))


def test_a_series_without_uid_is_its_folder(tmp_path: Path) -> None:
    values = write_series(tmp_path, series="")
    holds(read_scan(tmp_path), values, affine_of())


def test_a_transfer_syntax_without_decoder_is_named_with_the_extra(tmp_path: Path) -> None:
    file = write_slice(tmp_path / "a", plane(0), save=False)
    file.file_meta.TransferSyntaxUID = HTJ2KLossless
    file.PixelData = encapsulate([b"\xff\x4f\xff\x51" + bytes(20)])
    file["PixelData"].VR = "OB"
    file.save_as(tmp_path / "a")
    with pytest.raises(DataError, match=r"High-Throughput.*'domainssl\[medical\]'"):
        describe_scan(tmp_path / "a")
    raw = (tmp_path / "a").read_bytes()
    deflated = raw.replace(b"1.2.840.10008.1.2.4.201\0", b"1.2.840.10008.1.2.1.99\0\0")
    (tmp_path / "a").write_bytes(deflated)
    with pytest.raises(DataError, match=r"Deflated Explicit VR .*1\.2\.1\.99.*dcmconv"):
        describe_scan(tmp_path / "a")


def test_compressed_pixels_have_the_sign_of_the_header(tmp_path: Path) -> None:
    tissue = plane(0) - 500
    file = write_slice(tmp_path / "rle", tissue, save=False, intercept=0)
    file.compress(RLELossless)
    file.save_as(tmp_path / "rle")
    written = io.BytesIO()  # an unsigned codestream under a signed header
    image = Image.fromarray(tissue.astype(np.int16).view(np.uint16))
    image.save(written, "JPEG2000", irreversible=False, no_jp2=True)
    file = write_slice(tmp_path / "j2k", tissue, save=False, intercept=0)
    file.file_meta.TransferSyntaxUID = JPEG2000Lossless
    file.PixelData = encapsulate([written.getvalue()])
    file["PixelData"].VR = "OB"
    file.save_as(tmp_path / "j2k")
    for name in ("rle", "j2k"):
        scan = read_scan(tmp_path / name)
        assert at(scan, affine_of(start=(0, 0, 0)), (1, 2, 0)) == tissue[2, 1], name


@pytest.mark.parametrize(
    ("kind", "syntax"), [("JPEG2000", JPEG2000Lossless), ("JPEG", JPEGBaseline8Bit)]
)
def test_a_compressed_image_of_another_size_is_not_decoded(
    tmp_path: Path, kind: str, syntax: str
) -> None:
    for side in (5, 3000):
        written = io.BytesIO()
        more = {"irreversible": False, "no_jp2": True} if kind == "JPEG2000" else {}
        Image.new("L", (4 if side == 5 else side, side), 90).save(written, kind, **more)
        file = write_slice(tmp_path / "a", plane(0), save=False, intercept=0, signed=False)
        file.BitsAllocated, file.BitsStored, file.HighBit = 8, 8, 7
        file.file_meta.TransferSyntaxUID = syntax
        file.PixelData = encapsulate([written.getvalue()])
        file["PixelData"].VR = "OB"
        file.save_as(tmp_path / "a")
        if side == 5:
            assert (read_scan(tmp_path / "a").values == 90).all()
            continue
        with pytest.raises(DataError, match="compressed image has 3000 × 3000 pixels.* 5 × 4"):
            read_scan(tmp_path / "a")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_series(tmp_path)
    path = tmp_path / "IM0007"
    content = path.read_bytes()
    for end in (140, 300, 700, len(content) - 4):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match="IM0007"):
            read_scan(tmp_path)
    path.write_bytes(content)
    write_slice(tmp_path / "IM0007", plane(1), (-3, -4, -97.5), ImageOrientationPatient=list(AXIAL))
    assert read_scan(tmp_path).facts.shape == (4, 5, 6)
    odd = write_slice(tmp_path / "o" / "a", plane(0), save=False)
    odd.BitsAllocated = 12
    odd.save_as(tmp_path / "o" / "a")
    with pytest.raises(DataError, match="the DICOM header cannot be read"):
        describe_scan(tmp_path / "o")
    huge = write_slice(tmp_path / "h" / "a", plane(0), save=False)
    huge.Rows = huge.Columns = 60000
    huge.save_as(tmp_path / "h" / "a")
    with pytest.raises(DataError, match="60000 × 60000 pixels"):
        describe_scan(tmp_path / "h")


def test_a_file_without_preamble_is_read(tmp_path: Path) -> None:
    file = write_slice(tmp_path / "a", plane(0), save=False, implicit=True)
    file.preamble, file.file_meta = None, type(file.file_meta)()
    file.save_as(tmp_path / "a", implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert (tmp_path / "a").read_bytes()[128:132] != b"DICM"
    assert at(read_scan(tmp_path / "a"), affine_of(start=(0, 0, 0)), (1, 2, 0)) == -979


def test_folders_with_images_are_listed_once(tmp_path: Path) -> None:
    write_series(tmp_path / "a" / "CT")
    (tmp_path / "b").mkdir()
    blank(tmp_path / "b" / "RS", RTSTRUCT).save_as(tmp_path / "b" / "RS")
    assert list_scans(tmp_path) == [str(tmp_path / "a" / "CT")]
    assert is_scan(tmp_path / "a" / "CT") and not is_scan(tmp_path / "b")
    with pytest.raises(DataError, match=r"holds no DICOM image.*1 RTSTRUCT: RS \(contours"):
        read_scan(tmp_path / "b")
    with pytest.raises(DataError, match="a folder without DICOM files.*CT"):
        read_scan(tmp_path)
