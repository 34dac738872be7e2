"""The stored numbers of DICOM files, decoded by whatever pydicom finds installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from domainssl.errors import DataError, require
from domainssl.io.volume.codestream import image_size
from domainssl.io.volume.dicom_file import DAMAGED, DicomFile, dicom, reading_dicom

__all__ = ["check_decoder", "decode"]

Array = np.ndarray[Any, Any]


def check_decoder(file: DicomFile) -> None:
    """Refuse a transfer syntax that nothing installed decodes.

    Raises:
        DataError: It names the syntax and what to install.
    """
    pydicom = dicom()
    uid = pydicom.uid.UID(file.syntax)
    try:
        decoder = require("pydicom.pixels", "medical").get_decoder(uid)
    except NotImplementedError:
        decoder = None
    if decoder is None or not decoder.is_available:
        raise DataError(
            f"{file.path}: no decoder for its transfer syntax {uid.name} ({uid}). JPEG, JPEG-LS, "
            "JPEG 2000 and RLE are read with python-gdcm: pip install 'domainssl[medical]'; HTJ2K "
            "with pip install pylibjpeg pylibjpeg-openjpeg. Or export it as explicit VR little "
            "endian."
        )


def decode(file: DicomFile, frames: Sequence[int]) -> list[Array]:
    """Return the stored numbers of some frames, (rows, columns) each.

    Bits above BitsStored are no part of a number; the sign is that of PixelRepresentation.

    Raises:
        DataError: There is no decoder, or the pixels are damaged.
    """
    check_decoder(file)
    pixels = require("pydicom.pixels", "medical")
    with reading_dicom(f"{file.path}: the pixels"):
        content = dicom().dcmread(file.path, force=True)
        content.file_meta.TransferSyntaxUID = dicom().uid.UID(file.syntax)
        if content.file_meta.TransferSyntaxUID.is_encapsulated:
            _check_images(file, content)
        found = pixels.pixel_array(content, raw=True)
        if len(file.planes) > 1:
            return [found[frame] for frame in frames]
        if found.ndim != 2:
            raise ValueError("not one plane")
        return [found]


def _check_images(file: DicomFile, content: Any) -> None:
    """Compare the size in each compressed image with that of the header, before it is decoded."""
    encaps = require("pydicom.encaps", "medical")
    frames = encaps.generate_frames(content.PixelData, number_of_frames=len(file.planes))
    for plane, frame in zip(file.planes, frames, strict=False):
        size = image_size(frame)
        if size is not None and size != (plane.rows, plane.columns):
            raise DataError(
                f"{file.path}: the compressed image has {size[0]} × {size[1]} pixels, its header "
                f"{plane.rows} × {plane.columns}. {DAMAGED}"
            )
