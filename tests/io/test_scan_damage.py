"""Bytes changed at random in a header end in a scan of finite numbers or in one message."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from dicom_files import PRIVATE, plane, write_enhanced, write_seg, write_slice
from scan_files import (
    lps_lines,
    oblique,
    ramp,
    write_metaimage,
    write_mgh,
    write_nifti,
    write_nrrd,
)

from domainssl.errors import DomainSSLError
from domainssl.io.volume.scan import Reading, read_scan

_TRIES = 60  # per format


def _damage(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(min(len(changed), 1200))
        kind = rng.random()
        if kind < 0.6:
            changed[at] = rng.randrange(256)
        elif kind < 0.8:
            changed[at : at + 4] = b"\xff\xff\xff\x7f"
        else:
            del changed[at : at + rng.randrange(1, 9)]
    return bytes(changed)


def _write(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".dcm"):
        if name == "seg.dcm":
            write_seg(path, [np.eye(5, 4, dtype=bool)] * 2, [0, 2], [1, 2])
        elif name == "frames.dcm":
            write_enhanced(path, [1, 0, 2])
        else:
            write_slice(path, plane(0), implicit=True, PixelPaddingValue=3)
    elif name.endswith(".nrrd"):
        write_nrrd(path, ramp(), lps_lines(oblique()))
    elif name.endswith(".mha"):
        write_metaimage(path, ramp())
    elif name.endswith(".mgh"):
        write_mgh(path, ramp(), oblique())
    else:
        write_nifti(path, ramp((6, 5, 4, 2)))
    return path


@pytest.mark.parametrize(
    "name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.mgh", "slice.dcm", "frames.dcm", "seg.dcm"]
)
def test_random_damage_is_one_message_or_finite_numbers(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path, name)
    content, rng = path.read_bytes(), random.Random(name)
    for _ in range(_TRIES):
        path.write_bytes(_damage(content, rng))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                scan = read_scan(path, Reading(volume=0))
            except DomainSSLError as error:
                said = str(error)
                assert "\n" not in said and path.name in said
                assert not name.endswith(".dcm") or not any(word in said for word in PRIVATE)
                continue
        assert np.isfinite(scan.values).all() and np.isfinite(scan.affine).all()
