"""The options of volumes: contrasts, files, preparation, windows and labels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from domainssl.errors import ConfigError, nearest
from domainssl.io.ids import IDS
from domainssl.io.volume.exam import Exam, Wanted
from domainssl.io.volume.exams import LAYOUTS
from domainssl.io.volume.scan import Reading
from domainssl.io.volume.stores import TIERS
from domainssl.modality import Modality
from domainssl.sources.augmentation import Augmentation
from domainssl.sources.windows import Window

__all__ = ["Contrast", "ExamFiles", "ExamLabels", "ExamWindow", "Preparation"]

_WHERE = "data.init_args"
_RANGES = {"hu": (-4096.0, 32767.0)}  # scanners fill what they do not see with -3024 and the like
_DEFAULT = Window(size=96.0)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """What a modality reads of every exam.

    Attributes:
        contrast: Its name in the data: a column of the manifest, the end of a file name, a BIDS
            suffix, a channel; `*` takes every scan of a folder as an exam. Empty means the key.
        value_unit: `hu` for CT, `arbitrary` for MR and PET.
        channels: Names of the channels of one file; empty means one.
        sources: What the scan may be, such as [ct, mr]; batches carry its number in `<m>.source`.
        percentiles: Of the valid foreground of the whole volume, from 0 to 100: the limits in
            `<m>.window` that the normalisation form `item` scales by.
        window_hu: The limits in `<m>.window` where values are Hounsfield units: of the unit `hu`,
            or of the source `ct`.
        mean: Mean per channel for the normalisation form `zscore`, where it is known; empty for
            none. A file of `statistics` counts before it.
        std: Standard deviation per channel, likewise.
        reading: How its files are read where they say too little.
    """

    contrast: str = ""
    value_unit: str = "arbitrary"
    channels: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    percentiles: tuple[float, float] = (1.0, 99.0)
    window_hu: tuple[float, float] = (-1000.0, 1000.0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    reading: Reading = field(default_factory=Reading)

    def __post_init__(self) -> None:
        low, high = self.percentiles
        if not 0 <= low < high <= 100 or not self.window_hu[0] < self.window_hu[1]:
            raise ConfigError(
                f"{_WHERE}.modalities: got percentiles={self.percentiles!r}, "
                f"window_hu={self.window_hu!r}; expected two ascending numbers each, percentiles "
                "from 0 to 100."
            )
        for name in ("channels", "sources", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def modality(
        self,
        name: str,
        size: tuple[int, ...],
        spacing_mm: tuple[float, ...] | None,
        *,
        kind: Literal["volume", "series"] = "volume",
    ) -> Modality:
        """Return the facts of the modality under a key."""
        return Modality(
            name=name,
            kind=kind,
            channels=self.channels or (self.contrast.strip("*") or name,),
            value_unit=self.value_unit,
            size=size,
            spacing_mm=spacing_mm,
            valid_range=_RANGES.get(self.value_unit),
            mean=self.mean or None,
            std=self.std or None,
        )

    def reading_of(self, exam: Exam, name: str) -> Reading:
        """Return how the file of an exam is read, with the volume or series that the exam means."""
        reading = self.reading
        if name in exam.volumes and reading.volume in (None, "split"):
            reading = replace(reading, volume=exam.volumes[name])
        if name in exam.series and reading.series is None:
            reading = replace(reading, series=exam.series[name])
        return reading

    def is_hu(self, source: str) -> bool:
        """Tell whether the values of a scan are Hounsfield units."""
        return self.value_unit == "hu" or (source == "ct" and "ct" in self.sources)


@dataclass(frozen=True, kw_only=True)
class ExamFiles:
    """How exams are found.

    Attributes:
        layout: `auto` recognises it; `manifest`, `nnssl`, `nnunet`, `decathlon`, `bids`, `folder`.
        manifest: A table of the exams, CSV, JSON lines or Parquet, relative to the root; None
            takes `manifest.csv`, `.jsonl` or `.parquet` in it, if there is one.
        patient: Regular expression whose first group, found in the id of an exam, is its patient;
            empty takes the column `patient`, or the first folder below the root.
        id_table: CSV file to write that tells which id is which exam and patient; None writes none.
        dates: Column with the date of an exam, or with days since the first visit: an item is then
            a patient, and every modality the series of its visits. In BIDS a column of
            `sessions.tsv` or `scans.tsv`, `acq_time`. Empty trains on single exams.
        max_visits: Most visits of a patient, evenly spread over those there are; None reads all.
        ids: `hashed` ids tell nothing about names of files and patients; `plain` is for public
            data, as the embedded samples have them.
    """

    layout: str = "auto"
    manifest: str | None = None
    patient: str = ""
    id_table: str | None = None
    dates: str = ""
    max_visits: int | None = None
    ids: Literal["hashed", "plain"] = "hashed"

    def __post_init__(self) -> None:
        if self.max_visits is not None and (self.max_visits < 1 or not self.dates):
            raise ConfigError(
                f"{_WHERE}.exams.max_visits: got {self.max_visits!r}, expected 1 or more, and "
                "exams.dates that tells when the visits were."
            )
        for name, options in (("layout", ("auto", *LAYOUTS)), ("ids", IDS)):
            value = getattr(self, name)
            if value not in options:
                raise ConfigError(
                    f"{_WHERE}.exams.{name}: got {value!r}, expected one of {', '.join(options)}."
                    f"{nearest(value, options)}"
                )


@dataclass(frozen=True, kw_only=True)
class ExamLabels:
    """What is known of exams beside their scans, for evaluation and tasks.

    Attributes:
        column: Column of a table with the class of an exam; empty for none.
        classes: The classes by number; empty takes those that occur, sorted.
        merge: Other name per class, to put several into one: {m1: metastases, m2: metastases}.
        mask: Column, or end of the file names, of segmentation maps; empty for none.
        names: Name per value of the maps, from 0 on.
    """

    column: str = "label"
    classes: tuple[str, ...] = ()
    merge: dict[str, str] = field(default_factory=dict)
    mask: str = "mask"
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done to a whole exam, once, before windows are cut out of it.

    Attributes:
        spacing_mm: Voxel size that every scan is resampled to, one number per axis; None keeps
            that of the files.
        resample_to: Key of the modality whose grid the others are resampled to; None refuses an
            exam whose scans lie on different grids.
        foreground: Cut the volume to the box around what is not air.
        margin_mm: Left around that box.
        cache: Keep prepared exams on disk: `memmap` for speed, `zarr` for space, or `none`.
        cache_dir: Folder of that cache; None means the user's cache folder.
        cache_key: `place` knows a file by path, size and time of change; `content` reads it all,
            and finds the exam wherever a copy of it lies.
        cache_half: Keep float values as float16; an error where that changes one noticeably.
        keep_mb: Prepared volumes that a process keeps in memory, without a cache on disk.
    """

    spacing_mm: tuple[float, float, float] | None = None
    resample_to: str | None = None
    foreground: bool = True
    margin_mm: float = 10.0
    cache: Literal["none", "memmap", "zarr"] = "none"
    cache_dir: str | None = None
    cache_key: Literal["place", "content"] = "place"
    cache_half: bool = False
    keep_mb: float = 512.0

    def __post_init__(self) -> None:
        if self.spacing_mm is not None:
            object.__setattr__(self, "spacing_mm", tuple(float(s) for s in self.spacing_mm))
            if len(self.spacing_mm) != 3 or min(self.spacing_mm) <= 0:
                raise ConfigError(
                    f"{_WHERE}.preparation.spacing_mm: got {list(self.spacing_mm)!r}, expected "
                    "three numbers above 0: voxel sizes along x, y and z in mm."
                )
        for name, choices in (("cache", ("none", *TIERS)), ("cache_key", ("place", "content"))):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{_WHERE}.preparation.{name}: got {getattr(self, name)!r}, expected one of "
                    f"{', '.join(choices)}.{nearest(getattr(self, name), choices)}"
                )
        for name in ("margin_mm", "keep_mb"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"{_WHERE}.preparation.{name}: got {getattr(self, name)!r}, expected 0 or more."
                )


@dataclass(frozen=True, kw_only=True)
class ExamWindow(Window):
    """The box of voxels that an item shows, the same for all contrasts of an exam.

    Training draws its place, held-out exams show the middle. Where an exam is smaller than the
    window, the rest is not valid.

    Attributes:
        flips: Mirror at random along every axis, or one answer per axis; objectives mirror their
            views themselves, and left and right differ in a body.
        quarter_turns: Turn at random in the plane of the first two axes.
        per_exam: Windows per exam and epoch in training.
        min_foreground: Fraction of the window that should not be air.
        tries: Places that are drawn until one has it; then the best of them is taken.
        augmentation: Random changes that all contrasts of an exam share.
    """

    flips: bool | tuple[bool, ...] = False
    quarter_turns: bool = False
    per_exam: int = 1
    min_foreground: float = 0.2
    tries: int = 8
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("per_exam", 1), ("tries", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{_WHERE}.window.{name}: got {getattr(self, name)!r}, expected at least "
                    f"{least}."
                )
        if not 0 <= self.min_foreground <= 1:
            raise ConfigError(
                f"{_WHERE}.window.min_foreground: got {self.min_foreground!r}, expected a fraction "
                "from 0 to 1."
            )

    def in_voxels(self, spacing_mm: tuple[float, ...] | None) -> ExamWindow:
        """Return the same window in whole voxels.

        Raises:
            ConfigError: It is given in a length, and the voxel size is not known.
        """
        asked = self.sized(_DEFAULT)
        asked.must_not_resize()
        if asked.unit == "px":
            window = asked.on_grid(1.0, axes=3, name="voxels")
        elif spacing_mm is None:
            raise ConfigError(
                f"{_WHERE}.window.unit: {asked.unit!r}, but voxels of these data have no common "
                f"size. Set {_WHERE}.preparation.spacing_mm, or give the size in px."
            )
        else:
            sizes = asked.size if isinstance(asked.size, tuple) else (asked.size,) * 3
            per_axis = [
                replace(asked, size=size).on_grid(step * 1e-3, axes=1, name="voxels").shape[0]
                for size, step in zip(sizes, spacing_mm, strict=True)
            ]
            window = replace(asked, size=tuple(per_axis), unit="px")
        assert isinstance(window, ExamWindow)
        return window


def wanted(contrasts: dict[str, Contrast], files: ExamFiles, labels: ExamLabels | None) -> Wanted:
    """Return what is looked for in a data set."""
    return Wanted(
        contrasts={name: c.contrast or name for name, c in contrasts.items()},
        label=labels.column if labels else "",
        mask=labels.mask if labels else "",
        patient=files.patient,
        dates=files.dates,
    )
