"""Real scans hold the values that the plain libraries read from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from domainssl.errors import DataError
from domainssl.io.volume.geometry import check_same_grid
from domainssl.io.volume.scan import Reading, describe_scan, read_labels, read_scan

# name -> stored orientation, RAS shape, RAS origin, minimum, maximum, mean
SCANS = {
    "totalsegmentator/example_ct_sm.nii.gz": (
        "RAS", (122, 101, 30), (-177.9563, 11.3190, 94.3018), -1100, 1207, -354.095309),
    "totalsegmentator/example_mr_sm.nii.gz": (
        "LPS", (117, 91, 20), (-179.4004, -103.6406, 28.9896), -47, 833, 193.663525),
    "nibabel/anatomical.nii": (
        "LAS", (33, 41, 25), (-32, -40, -16), -610, 30393, 8401.066726),
    "sct_testing_data/mt/mt0.nii.gz": (
        "LAS", (40, 40, 5), (-22.1656, -17.3144, -26.0379), 4, 871, 311.6465),
    "sct_testing_data/mt/mt1.nii.gz": (
        "LAS", (40, 40, 5), (-22.1656, -17.3144, -26.0379), 1, 774, 243.780875),
    "sct_testing_data/mt/t1w.nii.gz": (
        "LAS", (40, 40, 5), (-22.1656, -17.3144, -26.0379), 2.666656, 580.666687, 207.764354),
    "sct_testing_data/t1/t1w.nii.gz": (
        "RAS", (42, 76, 77), (-31.2193, -36.2134, -21.3217), 0, 949, 296.675805),
    "pyradiomics/breast1_image.nrrd": (
        "LPS", (45, 120, 21), (87.3243, -30.8787, 9.45), 6, 248, 63.380441),
    "pyradiomics/prostate_phantom_subvolume.nrrd": (
        "RAS", (82, 67, 13), (-15.6834, -76.5358, -52.7761), 0, 2017, 389.403363),
    "pydicom/CT_small.dcm": (
        "LPS", (128, 128, 1), (74.1294, 95.0294, -75.7), -896, 1167, -119.073853),
    "pydicom/MR_small.dcm": (
        "LPS", (64, 64, 1), (64.2188, 71.5125, 6.6406), 127, 2145, 518.881348),
    "totalsegmentator/ct_dicom": (
        "LPS", (512, 512, 8), (-249.5117, -61.5117, -780.5), -1024, 1839, -622.073957),
}  # fmt: skip


@pytest.fixture(scope="module")
def scans(shared_data: Path) -> Path:
    folder = shared_data / "medical"
    if not folder.is_dir():
        pytest.skip("no real scans among the sample data")
    return folder


@pytest.mark.parametrize("name", SCANS)
def test_a_real_scan_has_its_grid_and_values(scans: Path, name: str) -> None:
    orientation, shape, origin, low, high, mean = SCANS[name]
    scan = read_scan(scans / name)
    assert scan.facts.orientation == orientation and scan.values.shape == (1, *shape)
    np.testing.assert_allclose(scan.affine[:3, 3], origin, atol=6e-5)
    assert (np.diag(scan.affine)[:3] > 0).all() and scan.valid is None
    assert scan.values.min() == pytest.approx(low, abs=1e-5)
    assert scan.values.max() == pytest.approx(high, abs=1e-5)
    assert scan.values.mean(dtype=np.float64) == pytest.approx(mean, abs=1e-6 * max(1, abs(mean)))


def test_the_liver_has_its_hounsfield_values(scans: Path) -> None:
    folder = scans / "totalsegmentator"
    ct, labels = (
        read_scan(folder / "example_ct_sm.nii.gz"),
        read_labels(folder / "example_seg.nii.gz"),
    )
    check_same_grid(("ct", ct.facts.shape, ct.affine), ("seg", labels.facts.shape, labels.affine))
    for label, mean in ((5, 45.2911), (1, 32.8372), (52, 42.2718)):
        assert ct.values[labels.values == label].mean() == pytest.approx(mean, abs=1e-4)
    assert (labels.values == 5).sum() == 38634 and len(np.unique(labels.values)) == 42


def test_real_slices_are_sorted_by_position(scans: Path) -> None:
    facts = describe_scan(scans / "totalsegmentator" / "ct_dicom")
    np.testing.assert_allclose(facts.spacing, (0.9765625, 0.9765625, 2.0))
    places = [facts.affine @ (0, 0, k, 1) for k in (0, 7)]
    assert [place[2] for place in places] == [-780.5, -766.5]
    assert facts.modality == "CT" and facts.left_out == () and facts.warnings == ()


def test_a_real_label_equal_to_two_ten_thousandths_is_on_the_same_grid(scans: Path) -> None:
    image, label = (describe_scan(scans / "sct_testing_data/mt" / name)
                    for name in ("mt1.nii.gz", "mt1_seg.nii.gz"))  # fmt: skip
    assert np.abs(image.affine - label.affine).max() > 1e-4
    check_same_grid(("mt1", image.shape, image.affine), ("seg", label.shape, label.affine))


@pytest.mark.parametrize(
    ("name", "volumes", "mean"),
    [
        ("nibabel/functional.nii", 20, 3637.408514),
        ("nibabel/example4d.nii.gz", 2, 172.908115),
        ("sct_testing_data/dmri/dmri.nii.gz", 7, 98.924388),
    ],
)
def test_real_volumes_in_time_are_read_one_by_one(
    scans: Path, name: str, volumes: int, mean: float
) -> None:
    with pytest.raises(DataError, match=f"holds {volumes} volumes"):
        read_scan(scans / name)
    found = [read_scan(scans / name, Reading(volume=v)).values.mean(dtype=np.float64)
             for v in range(volumes)]  # fmt: skip
    assert np.mean(found) == pytest.approx(mean, abs=2e-4)
