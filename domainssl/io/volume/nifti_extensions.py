"""Where the extensions of a NIfTI header end, which stand between it and the voxels."""

from __future__ import annotations

from collections.abc import Iterator

from domainssl.errors import DataError
from domainssl.io.volume.stored import StoredFile

__all__ = ["first_voxel"]

_MARK = 4  # bytes behind the header, of which the first says whether extensions follow
_FIRST_VOXEL = {348: 352, 540: 544}
_STEP = 16  # extensions are multiples of it
_CODES = range(0, 256)  # registered are even numbers up to some 40
_LONGEST = 2**26


def first_voxel(path: str, file: StoredFile, header: int, stated: int, voxels: int) -> int:
    """Return the byte of a single file with the first voxel.

    Voxels that begin inside an extension would be read as numbers of its text.

    Args:
        path: Path as given, for messages.
        file: The file, of which nothing but the head was read.
        header: Bytes of the header.
        stated: `vox_offset`; 0 where none is stated.
        voxels: Bytes of all voxels.

    Raises:
        DataError: The extensions reach beyond `vox_offset`.
    """
    least = _FIRST_VOXEL[header]
    end = least
    for size in _sizes(file, header):
        if least < end == stated or (not file.packing and end + voxels == file.size):
            break  # what follows are voxels
        end += size
        if end > stated and not file.packing and end + voxels > file.size:
            return stated or least  # voxels as well, behind a mark that was set for nothing
    if end <= max(stated, least) or (not stated and end + voxels == file.size):
        return max(stated, end)
    raise DataError(
        f"{path}: vox_offset is {stated}, but the extensions of the header reach to byte {end}: "
        "one of them is wrong, and voxels would be read out of the extensions. Correct "
        f"vox_offset, which is {end} if the voxels follow them, or write the file again."
    )


def _sizes(file: StoredFile, header: int) -> Iterator[int]:
    """Yield the bytes of each extension, up to what is none."""
    at = header + _MARK
    head = file.head(at + _STEP)
    if len(head) <= header or not head[header]:
        return
    order = "little" if int.from_bytes(head[:4], "little") == header else "big"
    while True:
        found = head[at : at + 8]
        size = int.from_bytes(found[:4], order, signed=True)  # type: ignore[arg-type]
        code = int.from_bytes(found[4:], order, signed=True)  # type: ignore[arg-type]
        is_one = len(found) == 8 and size >= _STEP and size % _STEP == 0 and code in _CODES
        if not is_one or at + size > _LONGEST:
            return
        yield size
        at += size
        head = file.head(at + 8)
