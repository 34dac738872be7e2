"""Slides: find them, describe them, read tiles at any resolution.

with Slide("CMU-1.svs") as slide:
    rgb, valid = slide.read(x, y, size_px=256, mpp_um=0.5)     # (x, y) in level-0 pixels
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from domainssl.errors import ConfigError, DataError, DomainSSLError, parsing
from domainssl.files import answer_of_server, open_regular
from domainssl.io.slide.by_openslide import OpenSlidePyramid, is_index, vendor
from domainssl.io.slide.by_picture import PicturePyramid
from domainssl.io.slide.by_tifffile import TiffPyramid, opened
from domainssl.io.slide.facts import Pyramid, Region, SlideFacts, SlideReading, facts_of
from domainssl.io.slide.picture import is_picture
from domainssl.io.slide.resample import resampled
from domainssl.io.slide.tiff_pages import is_ome, orientation_of
from domainssl.io.storage.handles import HandlePool
from domainssl.io.storage.paths import stamp

__all__ = [
    "ENDINGS",
    "FORMATS",
    "Damage",
    "Format",
    "Slide",
    "SlideFacts",
    "SlideReading",
    "describe_slide",
    "is_slide",
    "iter_slides",
    "list_slides",
]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Box = tuple[float, float, float, float]
ENDINGS = (
    ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".tif", ".tiff",
    ".btf", ".tf8", ".qptiff",
)  # fmt: skip
_OPEN = 8  # slides per process
_MOST_READ = 2**24  # pixels of a level at a time
_MOST_KEPT = 4096  # longest side of an overview that others are made from
_ENLARGED = 1.001  # rounding of resolutions, no enlarging
_MANY = 64  # damaged tiles; a slide with more of them than others is given up
_START = 512  # bytes that tell a page of a web server
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OPENSLIDE = (1, 5, 7, 8, 32773, 32946, 50000)  # compressions of TIFF that it reads


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A file whose format is looked for: what its first page is, if it is TIFF.

    `is_plain_rgb` tells whether OpenSlide reads a TIFF of no vendor as it is stored.
    """

    path: str
    is_tiff: bool
    has_levels_inside: bool
    is_plain_rgb: bool


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way to read slides: how it is recognised, opened, described and read.

    Attributes:
        name: What it is called.
        recognise: Whether a file is for it.
        open: Returns the open slide.
        describe: Returns its facts.
        read: Returns a box of a level.
    """

    name: str
    recognise: Callable[[_Candidate], bool]
    open: Callable[[str], Pyramid]
    describe: Callable[[Pyramid, SlideReading, float | None], SlideFacts]
    read: Callable[[Pyramid, int, int, int, int, int], Region]


def _describe(pyramid: Pyramid, reading: SlideReading, mpp_um: float | None) -> SlideFacts:
    return facts_of(pyramid.stored, reading, mpp_um)


def _read(pyramid: Pyramid, level: int, x: int, y: int, width: int, height: int) -> Region:
    return pyramid.region(level, x, y, width, height)


def _is_openslide(candidate: _Candidate) -> bool:
    if is_index(candidate.path):  # or it says which of its files are missing
        return True
    found = vendor(candidate.path)
    # it opens any tiled TIFF as colours, the first of several channels too
    return found is not None and (found != "generic-tiff" or candidate.is_plain_rgb)


FORMATS = (
    Format(
        name="tifffile",  # OpenSlide opens these without an error as one level without resolution
        recognise=lambda c: c.has_levels_inside,
        open=TiffPyramid,
        describe=_describe,
        read=_read,
    ),
    Format(
        name="picture",
        # the index of MIRAX may be a JPEG picture of the slide
        recognise=lambda c: not c.is_tiff and not is_index(c.path) and is_picture(c.path),
        open=PicturePyramid,
        describe=_describe,
        read=_read,
    ),
    Format(
        name="openslide",
        recognise=_is_openslide,
        open=OpenSlidePyramid,
        describe=_describe,
        read=_read,
    ),
    Format(
        name="tifffile",
        recognise=lambda c: c.is_tiff,
        open=TiffPyramid,
        describe=_describe,
        read=_read,
    ),
)

_pool = HandlePool(_OPEN)


def _candidate(path: str) -> _Candidate:
    """Look at the first bytes of a file, and at the first page of a TIFF.

    Raises:
        DataError: Nothing lies there that could be read.
    """
    try:
        with open_regular(path) as file:
            head = file.read(_START)
    except OSError as error:
        is_link = os.path.islink(path) and not os.path.exists(path)
        reason = "a link to a file that is not there" if is_link else error.strerror or str(error)
        raise DataError(
            f"{path}: cannot be opened as a slide ({reason}). Check the path."
        ) from error
    if not head:
        raise DataError(f"{path}: an empty file; the copy was lost on its way. Copy it again.")
    if head[:4] not in _TIFF:
        page = answer_of_server(head)
        if page:
            raise DataError(f"{path}: no slide.{page}")
        return _Candidate(path=path, is_tiff=False, has_levels_inside=False, is_plain_rgb=False)
    with opened(path) as tiff, parsing(f"{path}: the first page"):
        page = tiff.pages[0]
        _check_places(path, page)
        is_eight = getattr(page.dtype, "name", None) == "uint8"
        return _Candidate(
            path=path,
            is_tiff=True,
            has_levels_inside=is_ome(page) or bool(page.subifds),
            is_plain_rgb=int(page.photometric) in (2, 6)
            and is_eight
            and page.samplesperpixel >= 3
            and all(int(kind) in (1, 2) for kind in page.extrasamples or ())  # else taken for alpha
            and int(page.compression) in _OPENSLIDE
            and orientation_of(page) == 1,  # else it turns every tile by itself
        )


def _check_places(path: str, page: Any) -> None:
    """Refuse a TIFF that lists fewer tiles than its size takes: OpenSlide makes up the others.

    Raises:
        DataError: It does.
    """
    if not page.is_tiled or int(page.planarconfig) != 1:
        return
    across, down = page.imagewidth / page.tilewidth, page.imagelength / page.tilelength
    wanted, found = math.ceil(across) * math.ceil(down), len(page.dataoffsets)
    if 0 < found < wanted:
        raise DataError(
            f"{path}: states {page.imagewidth} x {page.imagelength} pixels, but has places for "
            f"{found} of {wanted} tiles. The header is damaged; get the file again."
        )


def _format(path: str) -> Format:
    candidate = _candidate(path)
    for form in FORMATS:
        if form.recognise(candidate):
            return form
    raise DataError(
        f"{path}: no slide, expected a format of OpenSlide (svs, ndpi, mrxs, scn, bif, tiled TIFF "
        "...), OME-TIFF, TIFF, PNG or JPEG."
    )


def describe_slide(
    path: str | os.PathLike[str],
    reading: SlideReading | None = None,
    mpp_um: float | None = None,
) -> SlideFacts:
    """Return what is known of a slide, from its header.

    Args:
        path: A file.
        reading: What the user says about files that leave it open.
        mpp_um: See `Slide`.

    Raises:
        DataError: Nothing lies there, it is no slide, or its header cannot be used.
    """
    return Slide(path, reading, mpp_um).facts


def is_slide(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a slide, by its name and first bytes."""
    try:
        return str(path).lower().endswith(ENDINGS) and _format(str(path)) is not None
    except DomainSSLError:
        return False


def list_slides(folder: str | os.PathLike[str]) -> list[str]:
    """Return the slides below a folder by their names, sorted.

    Hidden files, pipes and links to nothing are passed over; links to folders are not followed.
    """
    return sorted(iter_slides(folder))


def iter_slides(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yield what `list_slides` returns, as it is found."""
    for base, folders, names in os.walk(str(folder)):
        indexed = {os.path.splitext(n)[0] for n in names if n.lower().endswith(".mrxs")}
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in indexed)
        for name in sorted(names):
            path = os.path.join(base, name)
            if not name.startswith(".") and name.lower().endswith(ENDINGS) and os.path.isfile(path):
                yield path


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A stored tile that cannot be read: its place in level-0 pixels, and why."""

    level: int
    x: int
    y: int
    reason: str


class Slide:
    """A slide whose tiles are read at any resolution; opened on first use, in every process.

    Args:
        path: The file.
        reading: What the user says about files that leave it open.
        mpp_um: Micrometres per pixel of level 0 of this slide, as a table states it; counts before
            `reading`.

    Attributes:
        path: Path as given.
        reading: As given.
        mpp_um: As given.
        damaged: Stored tiles that could not be read so far.

    Raises:
        DataError: When it is opened: it is no slide, or its header cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        reading: SlideReading | None = None,
        mpp_um: float | None = None,
    ) -> None:
        self.path = str(path)
        self.reading = reading or SlideReading()
        self.mpp_um = mpp_um
        self.damaged: list[Damage] = []
        self._places: set[tuple[int, int, int]] = set()
        self._facts: SlideFacts | None = None
        self._whole: tuple[Array, Array, tuple[float, float]] | None = None
        self._form: Format | None = None
        self._tried = 0
        self._key: Any = None

    def __enter__(self) -> Self:
        """Open the slide."""
        self._open()
        return self

    def __exit__(self, *error: object) -> None:
        """Give the file free."""
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process."""
        kept = {"damaged": [], "_places": set(), "_tried": 0, "_key": None, "_whole": None}
        return {**self.__dict__, **kept}

    def close(self) -> None:
        """Give the file free; reading opens it again."""
        self._whole = None
        if self._key is not None:
            _pool.drop(self._key)
            self._key = None

    def _open(self) -> Pyramid:
        if self._form is None:
            self._form = _format(self.path)
        form = self._form
        if self._key is None:
            self._key = stamp(self.path)
        pyramid: Pyramid = _pool.get(self._key, lambda: form.open(self.path))
        if self._facts is None:
            self._facts = form.describe(pyramid, self.reading, self.mpp_um)
        return pyramid

    @property
    def facts(self) -> SlideFacts:
        """What is known of the slide.

        Raises:
            DataError: It cannot be opened.
        """
        if self._facts is None:
            self._open()
        assert self._facts is not None
        return self._facts

    def read(self, x: float, y: float, size_px: int, mpp_um: float) -> tuple[Array, Array]:
        """Read a square tile.

        Args:
            x: Left edge in level-0 pixels.
            y: Upper edge in level-0 pixels.
            size_px: Side of the tile in pixels.
            mpp_um: Micrometres per pixel of the tile.

        Returns:
            RGB (H, W, 3) uint8 on white; valid (H, W) bool: False outside the slide, where
            nothing was scanned, and where stored tiles are damaged (`damaged` names them).

        Raises:
            DataError: The resolution is not known or coarser than asked for, the slide holds no
                colours, or most of it is damaged.
        """
        self.refuse_channels()
        return self.read_channels(x, y, size_px, mpp_um)

    def refuse_channels(self) -> None:
        """Refuse a slide whose channels are no colours.

        Raises:
            DataError: It is one.
        """
        facts = self.facts
        if not facts.is_rgb:
            raise DataError(
                f"{self.path}: holds the channels {', '.join(facts.channels)} ({facts.dtype}), "
                "expected red, green and blue. Read them with `read_channels`, or write the image "
                "that pathologists look at as RGB."
            )

    def read_channels(self, x: float, y: float, size_px: int, mpp_um: float) -> tuple[Array, Array]:
        """Read all channels of a square tile as they are stored.

        Returns:
            Values (H, W, C) of the stored type, RGB uint8 for colours; valid (H, W) bool.

        Raises:
            DataError: As `read`, except that any channels will do.
        """
        mpp = self.facts.resolution()
        scale = mpp_um / mpp[0], mpp_um / mpp[1]
        if not 0 < mpp_um < math.inf or size_px < 1:
            raise ConfigError(
                f"tile: got {size_px!r} pixels of {mpp_um!r} um, expected both above 0."
            )
        mpp = self.check_scale(mpp_um)
        scale = mpp_um / mpp[0], mpp_um / mpp[1]
        box = (x, y, x + size_px * scale[0], y + size_px * scale[1])
        return self.read_box(box, (size_px, size_px))

    def tell_overruled(self) -> None:
        """Say what the file states otherwise than the user, whose word counts."""
        for text in self.facts.overruled:
            logger.warning("%s: %s", self.path, text)

    def check_scale(self, mpp_um: float) -> tuple[float, float]:
        """Return the resolution of level 0, which has to be fine enough for tiles.

        Raises:
            DataError: It is not known, or coarser.
        """
        mpp = self.facts.resolution()
        if mpp_um * _ENLARGED < max(mpp) and not self.reading.allow_upsample:
            raise DataError(
                f"{self.path}: tiles of {mpp_um:g} um per pixel would be enlarged, level 0 has "
                f"{max(mpp):.4g} um. Ask for {max(mpp):.4g} um or more, or set "
                "`allow_upsample: true` (`--allow_upsample` of `tile`, "
                "data.init_args.slides.reading of tiles)."
            )
        return mpp

    def overview(
        self, most_px: int, mpp_um: float | None = None
    ) -> tuple[Array, Array, tuple[float, float]]:
        """Read the whole slide at low resolution.

        Args:
            most_px: Longest side of the result.
            mpp_um: Micrometres per pixel, where `most_px` allows it; as fine as possible if None.

        Returns:
            Values and valid as `read_channels`; level-0 pixels per pixel in x and y.

        Raises:
            DataError: Most of it is damaged, or it cannot be opened.
        """
        facts = self.facts
        longest = max(facts.size)
        down = (max(1.0, longest / most_px),) * 2
        if mpp_um is not None:
            x, y = facts.resolution()
            down = max(1.0, mpp_um / x), max(1.0, mpp_um / y)
            more = max(1.0, max(n / d for n, d in zip(facts.size, down, strict=True)) / most_px)
            down = down[0] * more, down[1] * more
        width, height = (
            max(1, math.ceil(n / d - 1e-9)) for n, d in zip(facts.size, down, strict=True)
        )
        values, valid = self._shrunk(down, (width, height))
        tile = facts.tile_size[0] * facts.tile_size[1]
        lost = sum(
            tile * facts.factors[d.level][0] * facts.factors[d.level][1] for d in self.damaged
        )
        if 2 * lost > facts.size[0] * facts.size[1]:
            first = self.damaged[0]
            raise DataError(
                f"{self.path}: most of the slide cannot be read, {len(self.damaged)} stored tiles, "
                f"the first at ({first.x}, {first.y}): {first.reason}. Get the file again."
            )
        return values, valid, down

    def _shrunk(self, down: tuple[float, float], size: tuple[int, int]) -> tuple[Array, Array]:
        """Read the whole slide; where that takes its time, once for all overviews.

        Args:
            down: Level-0 pixels per pixel in x and y.
            size: Width and height of the result.
        """
        box = (0.0, 0.0, size[0] * down[0], size[1] * down[1])
        if not self.facts.cost:
            return self.read_box(box, size)
        if self._whole is None:
            logger.warning("%s: %s", self.path, self.facts.cost)
            step = max(1.0, max(self.facts.size) / _MOST_KEPT)
            columns, rows = (math.ceil(n / step - 1e-9) for n in self.facts.size)
            part = self.read_box((0.0, 0.0, columns * step, rows * step), (columns, rows))
            self._whole = (*part, (step, step))
        values, valid, known = self._whole
        if any(k > d * _ENLARGED for k, d in zip(known, down, strict=True)):
            return self.read_box(box, size)
        inside = (0.0, 0.0, box[2] / known[0], box[3] / known[1])
        return resampled(Region(values=values, valid=valid, origin=(0.0, 0.0)), inside, size)

    def read_box(self, box: Box, size: tuple[int, int]) -> tuple[Array, Array]:
        """Read any part of the slide.

        Args:
            box: Left, upper, right and lower edge in level-0 pixels.
            size: Width and height of the result in pixels.

        Returns:
            As `read_channels`.

        Raises:
            DataError: Most of the slide is damaged, or it cannot be opened.
        """
        facts = self.facts
        scale = (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]
        level = 0
        for n, factor in enumerate(facts.factors):
            if all(f <= s * _ENLARGED for f, s in zip(factor, scale, strict=True)):
                level = max(n, level)
        fx, fy = facts.factors[level]
        if (box[2] - box[0]) / fx * (box[3] - box[1]) / fy <= _MOST_READ or size == (1, 1):
            return self._part(level, box, size)
        axis = 0 if size[0] >= size[1] else 1  # halves are read one after the other
        if facts.tile_size[0] >= facts.size[0] and size[1] > 1:  # rows are stored whole
            axis = 1
        first = size[axis] // 2
        cut = box[axis] + (box[axis + 2] - box[axis]) * first / size[axis]
        sizes = [list(size), list(size)]
        sizes[0][axis], sizes[1][axis] = first, size[axis] - first
        boxes = [list(box), list(box)]
        boxes[0][axis + 2] = boxes[1][axis] = cut
        parts = [
            self.read_box((b[0], b[1], b[2], b[3]), (s[0], s[1]))
            for b, s in zip(boxes, sizes, strict=True)
        ]
        joined = [np.concatenate(arrays, 1 - axis) for arrays in zip(*parts, strict=True)]
        return joined[0], joined[1]

    def _part(self, level: int, box: Box, size: tuple[int, int]) -> tuple[Array, Array]:
        pyramid, facts = self._open(), self.facts
        fx, fy = facts.factors[level]
        inside = (box[0] / fx, box[1] / fy, box[2] / fx, box[3] / fy)
        width, height = facts.levels[level]
        left, upper = max(0, math.floor(inside[0] + 1e-6)), max(0, math.floor(inside[1] + 1e-6))
        right = min(width, math.ceil(inside[2] - 1e-6))
        lower = min(height, math.ceil(inside[3] - 1e-6))
        if right <= left or lower <= upper:
            return self._nothing(size)
        assert self._form is not None
        region = self._form.read(pyramid, level, left, upper, right - left, lower - upper)
        wide, high = facts.tile_size
        tiles = (-(-right // wide) - left // wide) * (-(-lower // high) - upper // high)
        self._note(level, region, tiles)
        return resampled(region, inside, size)

    def _nothing(self, size: tuple[int, int]) -> tuple[Array, Array]:
        facts = self.facts
        dtype = np.dtype(np.uint8 if facts.is_rgb else facts.dtype)
        shape = (size[1], size[0], 3 if facts.is_rgb else len(facts.channels))
        white = np.iinfo(dtype).max
        return np.full(shape, white, dtype), np.zeros(shape[:2], bool)

    def _note(self, level: int, region: Region, tiles: int) -> None:
        """Count damaged tiles, name the first one, give up where most are damaged.

        Args:
            level: The level.
            region: What was read.
            tiles: Stored tiles that it lies on.

        Raises:
            DataError: Most stored tiles that were read so far are damaged.
        """
        self._tried += tiles
        for x, y, reason in region.damaged:
            if (level, x, y) in self._places:
                continue
            self._places.add((level, x, y))
            self.damaged.append(Damage(level=level, x=x, y=y, reason=reason))
            if len(self.damaged) == 1:
                logger.warning(
                    "%s: the stored tile at (%d, %d) of level %d cannot be read (%s); it is not "
                    "valid, the rest is read.",
                    self.path, x, y, level, reason,
                )  # fmt: skip
        if len(self.damaged) >= _MANY and 2 * len(self.damaged) > self._tried:
            first = self.damaged[0]
            raise DataError(
                f"{self.path}: {len(self.damaged)} stored tiles cannot be read, the first at "
                f"({first.x}, {first.y}): {first.reason}. Get the file again."
            )
