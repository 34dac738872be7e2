"""DICOM segmentations as label maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import affine_of, write_seg, write_series
from scan_files import at

from domainssl.errors import DataError
from domainssl.io.volume.exam import Exam
from domainssl.io.volume.scan import describe_scan, is_scan, placed, read_labels, read_scan
from domainssl.sources.preparation import prepare
from domainssl.sources.volume_options import Contrast, Preparation


def masks() -> list[np.ndarray]:
    """Two masks, (rows, columns), that do not meet."""
    first, second = np.zeros((5, 4), bool), np.zeros((5, 4), bool)
    first[1:3, 1], second[4, 2:] = True, True
    return [first, second]


def test_segments_lie_at_their_places_with_their_numbers(tmp_path: Path) -> None:
    one, two = masks()
    write_seg(tmp_path / "a.dcm", [two, one, one], [3, 1, 3], [2, 1, 1])
    labels = read_labels(tmp_path / "a.dcm")
    assert labels.facts.format == "dicom-seg" and labels.values.dtype == np.uint8
    assert labels.facts.shape == (4, 5, 3)  # places 1 to 3
    affine = affine_of(start=(-3, -4, -97.5))
    assert at(labels, affine, (1, 1, 0)) == 1 and at(labels, affine, (1, 1, 1)) == 0
    assert at(labels, affine, (3, 4, 2)) == 2 and at(labels, affine, (1, 2, 2)) == 1
    assert (labels.values > 0).sum() == 6
    np.testing.assert_allclose(describe_scan(tmp_path / "a.dcm").spacing, (1.5, 2.0, 2.5))
    assert not is_scan(tmp_path / "a.dcm")


def test_a_label_map_is_read_as_it_is(tmp_path: Path) -> None:
    one, two = masks()
    write_seg(tmp_path / "a.dcm", [one * 7 + two * 9, two * 9], [0, 1], [1, 1], "LABELMAP")
    labels = read_labels(tmp_path / "a.dcm")
    assert at(labels, affine_of(), (1, 1, 0)) == 7 and at(labels, affine_of(), (3, 4, 1)) == 9


def test_overlap_fractions_and_several_files_are_refused(tmp_path: Path) -> None:
    one, _ = masks()
    write_seg(tmp_path / "a.dcm", [one, one], [0, 0], [1, 2])
    with pytest.raises(DataError, match="2 voxels belong to several segments"):
        read_labels(tmp_path / "a.dcm")
    write_seg(tmp_path / "b.dcm", [one * 200], [0], [1], "FRACTIONAL")
    with pytest.raises(DataError, match="a segmentation of fractions"):
        describe_scan(tmp_path / "b.dcm")
    with pytest.raises(DataError, match=r"2 segmentations: a\.dcm, b\.dcm"):
        read_labels(tmp_path)


def test_planes_of_no_segment_are_refused_instead_of_an_empty_map(tmp_path: Path) -> None:
    write_seg(tmp_path / "s.dcm", [np.ones((5, 4), int)] * 2, [0, 1], [1, 2])
    file = pydicom.dcmread(tmp_path / "s.dcm")
    for frame in file.PerFrameFunctionalGroupsSequence:
        del frame.SegmentIdentificationSequence
    file.save_as(tmp_path / "s.dcm")
    with pytest.raises(DataError, match="do not say which segment they show"):
        read_labels(tmp_path / "s.dcm")


def test_a_segmentation_beside_images_is_left_out_with_the_remedy(tmp_path: Path) -> None:
    write_series(tmp_path)
    write_seg(tmp_path / "seg.dcm", masks(), [0, 1], [1, 1])
    text = " ".join(read_scan(tmp_path).facts.left_out)
    assert "1 segmentation: seg.dcm (give the file itself as the label)" in text


def test_a_sparse_segmentation_is_placed_on_the_grid_of_its_images(tmp_path: Path) -> None:
    write_series(tmp_path / "ct")
    images = read_scan(tmp_path / "ct")
    one, two = masks()
    write_seg(tmp_path / "seg.dcm", [one, two], [2, 4], [1, 2])
    labels = placed(read_labels(tmp_path / "seg.dcm"), images.facts.shape, images.affine)
    assert labels.values.shape == images.values.shape
    assert at(labels, affine_of(), (1, 1, 2)) == 1 and at(labels, affine_of(), (3, 4, 4)) == 2
    assert (labels.values > 0).sum() == 4
    write_seg(tmp_path / "beyond.dcm", [one, two], [4, 6], [1, 2])  # one plane lies outside
    beyond = read_labels(tmp_path / "beyond.dcm")
    assert placed(beyond, images.facts.shape, images.affine) is beyond
    half = images.affine.copy()
    half[2, 3] += 1.25
    inside = read_labels(tmp_path / "seg.dcm")
    assert placed(inside, images.facts.shape, half) is inside


def test_the_mask_of_an_exam_may_be_a_sparse_segmentation(tmp_path: Path) -> None:
    write_series(tmp_path / "ct")
    one, two = masks()
    write_seg(tmp_path / "seg.dcm", [one, two], [2, 4], [1, 2])
    exam = Exam(
        id="a", patient="a", scans={"ct": str(tmp_path / "ct")}, mask=str(tmp_path / "seg.dcm")
    )
    options = Preparation(foreground=False)
    prepared = prepare(exam, {"ct": Contrast(value_unit="hu")}, options, with_mask=True)
    assert prepared.mask is not None and prepared.mask.shape == (4, 5, 6)
    assert sorted(np.unique(prepared.mask, return_counts=True)[1].tolist()) == [2, 2, 116]
