"""The options of feature bags: encoder, regions or samples of tiles, files and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from domainssl.errors import ConfigError, nearest
from domainssl.io.ids import IDS
from domainssl.io.slide.bag_slides import WantedSlides
from domainssl.modality import Modality, sides_of

__all__ = ["SlideFiles", "SlideLabels", "SlideWindow", "TileFeatures", "wanted_slides"]

_WHERE = "data.init_args"
_MODES = ("grid", "bag")
_FILLS = ("mask", "repeat")


@dataclass(frozen=True, kw_only=True)
class TileFeatures:
    """What a modality reads of every slide.

    Attributes:
        dim: Width of the features.
        encoder: Which features, where there are those of several encoders; what the files state is
            compared with it.
        mpp_um: Microns per pixel of the tiles; what the files state is compared with it.
        mean: Mean per feature for the normalisation form `zscore`: one number for all, or as many
            as features; empty for none. A file of `statistics` counts before it.
        std: Standard deviation per feature, likewise.
    """

    dim: int
    encoder: str = ""
    mpp_um: float | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ConfigError(f"{_WHERE}.modalities: got dim={self.dim!r}, expected 1 or more.")
        for name in ("mean", "std"):
            given = tuple(getattr(self, name))
            if len(given) == 1:
                given *= self.dim
            object.__setattr__(self, name, given)

    def modality(self, name: str, size: tuple[int, ...]) -> Modality:
        """Return the facts of the modality under a key."""
        return Modality(
            name=name,
            kind="features",
            channels=tuple(f"f{i}" for i in range(self.dim)),
            value_unit="arbitrary",
            size=size,
            mpp_um=self.mpp_um,
            mean=self.mean or None,
            std=self.std or None,
        )


@dataclass(frozen=True, kw_only=True)
class SlideWindow:
    """What an item shows of a slide: a region of its grid, or a sample of its tiles.

    Attributes:
        mode: `grid` gives all cells of a region, row by row, and background as not valid; `bag`
            gives a fixed number of tiles in no order.
        size: Rows and columns of a region in tiles, one number or two.
        tokens: Tiles of a bag.
        per_slide: Items per slide and epoch in training.
        min_foreground: Fraction of a region that should hold tiles; where no region does, the
            densest is taken.
        fill: A bag of fewer tiles is filled with what is not valid (`mask`), or with tiles drawn
            again (`repeat`).
        legacy_titan_grid: Lay tiles out as TITAN's released code: sums of features, zero vectors
            as background, x along rows. Only for its released weights.
    """

    mode: Literal["grid", "bag"] = "grid"
    size: int | tuple[int, int] = 16
    tokens: int = 2048
    per_slide: int = 1
    min_foreground: float = 0.25
    fill: Literal["mask", "repeat"] = "mask"
    legacy_titan_grid: bool = False

    def __post_init__(self) -> None:
        for name, options in (("mode", _MODES), ("fill", _FILLS)):
            value = getattr(self, name)
            if value not in options:
                raise ConfigError(
                    f"{_WHERE}.window.{name}: got {value!r}, expected one of {', '.join(options)}."
                    f"{nearest(value, options)}"
                )
        for name in ("tokens", "per_slide"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{_WHERE}.window.{name}: got {getattr(self, name)!r}, expected 1 or more."
                )
        if min(self.region) < 1:
            raise ConfigError(f"{_WHERE}.window.size: got {self.size!r}, expected 1 or more.")
        if not 0 <= self.min_foreground <= 1:
            raise ConfigError(
                f"{_WHERE}.window.min_foreground: got {self.min_foreground!r}, expected a fraction "
                "from 0 to 1."
            )

    @property
    def region(self) -> tuple[int, int]:
        """Rows and columns of a region."""
        rows, columns = sides_of(self.size, 2, f"{_WHERE}.window.size")
        return rows, columns

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of the modality: of a region (rows, columns), of a bag its number of tiles."""
        return self.region if self.mode == "grid" else (self.tokens,)


@dataclass(frozen=True, kw_only=True)
class SlideFiles:
    """How slides are found and named.

    Attributes:
        manifest: A table of the slides, CSV, JSON lines or Parquet, relative to the root, with
            the columns `slide_id`, `patient_id` (or `case_id`), `label`, `split`; None takes
            `manifest.csv`, `.jsonl` or `.parquet` in it, if there is one.
        splits: A file of splits as CLAM writes them, such as `splits_0.csv` (a column of slides for
            `train`, `val` and `test`) or `splits_0_bool.csv`, relative to the root; slides that it
            does not name are left out. It counts before the column `split` of the table.
        patches: Folder of the tiling step, relative to the root, where it is not beside the
            features.
        patient: Regular expression whose first group, found in the name of a slide, is its
            patient; empty takes the column, TCGA's barcode, or the slide itself.
        level_downsample: Of the level that tiles were read at, for coordinates that name a level
            without it.
        patch_size_level0: Side of a tile in pixels of level 0, for files that do not state it.
        keep_mb: Features that a process keeps in memory.
        id_table: CSV file to write that tells which id is which slide and patient; None writes
            none.
        ids: `hashed` ids tell nothing about names of slides and patients; `plain` is for public
            data, as the embedded sample has them.
    """

    manifest: str | None = None
    splits: str | None = None
    patches: str | None = None
    patient: str = ""
    level_downsample: float | None = None
    patch_size_level0: int | None = None
    keep_mb: float = 512.0
    id_table: str | None = None
    ids: Literal["hashed", "plain"] = "hashed"

    def __post_init__(self) -> None:
        if self.ids not in IDS:
            raise ConfigError(
                f"{_WHERE}.slides.ids: got {self.ids!r}, expected one of {', '.join(IDS)}."
                f"{nearest(self.ids, IDS)}"
            )
        for name in ("level_downsample", "patch_size_level0"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ConfigError(f"{_WHERE}.slides.{name}: got {value!r}, expected 1 or more.")
        if self.keep_mb < 0:
            raise ConfigError(f"{_WHERE}.slides.keep_mb: got {self.keep_mb!r}, expected 0 or more.")


@dataclass(frozen=True, kw_only=True)
class SlideLabels:
    """What is known of slides beside their features, for evaluation and tasks.

    Attributes:
        column: Column of the table with the class of a slide; empty for none.
        classes: The classes by number; empty takes those that occur, sorted.
    """

    column: str = "label"
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))


def wanted_slides(
    features: TileFeatures, files: SlideFiles, labels: SlideLabels | None, window: SlideWindow
) -> WantedSlides:
    """Return what is looked for in a data set."""
    return WantedSlides(
        dim=features.dim,
        manifest=files.manifest,
        splits=files.splits,
        patches=files.patches,
        encoder=features.encoder,
        patient=files.patient,
        label=labels.column if labels else "",
        mpp_um=features.mpp_um,
        as_grid=window.mode == "grid",
        level_downsample=files.level_downsample,
        patch_size_level0=files.patch_size_level0,
    )
