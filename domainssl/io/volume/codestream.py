"""The size that a compressed image states itself, read before anything decodes it.

A few hundred bytes of JPEG 2000 can unfold to gigabytes, whatever rows and columns the DICOM header
has.
"""

from __future__ import annotations

import struct

__all__ = ["image_size"]

_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7}
_BARE = {0x01, 0xD8, *range(0xD0, 0xD8)}  # markers without a length
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"


def image_size(content: bytes) -> tuple[int, int] | None:
    """Return rows and columns of a JPEG, JPEG-LS or JPEG 2000 image, None of anything else.

    Args:
        content: The compressed image.

    Raises:
        ValueError: It starts like one of them and states no size.
    """
    if content.startswith(_JP2):
        at = content.find(b"\xff\x4f\xff\x51")
        content = content[at:] if at >= 0 else b"\xff\x4f"
    if content.startswith(b"\xff\x4f"):
        if len(content) < 24 or content[2:4] != b"\xff\x51":
            raise ValueError("a JPEG 2000 image without its size")
        columns, rows, left, top = struct.unpack(">4I", content[8:24])
        return rows - top, columns - left
    return _jpeg_size(content) if content.startswith(b"\xff\xd8") else None


def _jpeg_size(content: bytes) -> tuple[int, int]:
    at = 0
    while at + 9 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in _FRAMES:
            rows, columns = struct.unpack(">2H", content[at + 5 : at + 9])
            return rows, columns
        if marker == 0xFF:  # filling
            at += 1
        elif marker in _BARE:
            at += 2
        else:
            at += 2 + max(2, int.from_bytes(content[at + 2 : at + 4], "big"))
    raise ValueError("a JPEG image without its size")
