"""Which bands make a token of Galileo, and what the released weights were trained on.

Source: Tseng et al. 2025 (arXiv 2502.09356), section 3, and the released code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from domainssl.errors import ConfigError, nearest
from domainssl.modality import Modality
from domainssl.sensors import S1_BANDS, S2_M

__all__ = [
    "ARRAYS",
    "PUBLISHED_FORMS",
    "PUBLISHED_GROUPS",
    "PUBLISHED_MODALITIES",
    "Array",
    "GalileoGroup",
    "location_xyz",
    "usable_groups",
]

Array = Literal["space_time", "space", "time", "static"]
Derived = Literal["", "difference", "mean", "sphere"]
ARRAYS: tuple[Array, ...] = get_args(Array)


@dataclass(frozen=True, kw_only=True)
class GalileoGroup:
    """Bands of one modality that make one token at every place of their array.

    Attributes:
        name: Of the group; weights are named after it.
        array: What it varies over: `space_time` (series or images of one date), `space` (images),
            `time` (series, whose pixels are averaged) or `static` (tables).
        modality: Where the bands are.
        bands: Channels of the modality, in order.
        derived: What is computed of them: nothing, the normalised difference (a - b) / (a + b) of
            two raw bands, the mean over the valid pixels (`mean`), or the unit vector of latitude
            and longitude in degrees (`sphere`).
        target_depth: Share of the encoder's blocks after which pretraining takes its targets where
            whole groups are predicted; 0 is the bare projection.
    """

    name: str
    array: Array
    modality: str
    bands: tuple[str, ...]
    derived: Derived = ""
    target_depth: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bands", tuple(self.bands))
        for value, known in ((self.array, ARRAYS), (self.derived, get_args(Derived))):
            if value not in known:
                raise ConfigError(
                    f"groups.{self.name}: {value!r} is not one of {', '.join(map(repr, known))}."
                    f"{nearest(value, known)}"
                )
        if not 0 <= self.target_depth <= 1:
            raise ConfigError(
                f"groups.{self.name}: target_depth is {self.target_depth!r}, expected a share of "
                "the blocks in [0, 1]."
            )
        if self.derived in ("difference", "sphere") and len(self.bands) != 2:
            raise ConfigError(
                f"groups.{self.name}: {self.derived!r} is computed of two bands, got "
                f"{list(self.bands)}."
            )

    @property
    def width(self) -> int:
        """Number of values that go into the projection."""
        return {"difference": 1, "sphere": 3}.get(self.derived, len(self.bands))


_DYNAMIC_WORLD = (
    "water", "trees", "grass", "flooded_vegetation", "crops", "shrub_and_scrub", "built", "bare",
    "snow_and_ice",
)  # fmt: skip
_WORLD_CEREAL = ("temporarycrops", "maize", "wintercereals", "springcereals", "irrigation")
_S2 = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")


def _group(
    name: str, array: Array, modality: str, *bands: str, derived: Derived = "", depth: float = 1.0
) -> Any:
    return GalileoGroup(
        name=name, array=array, modality=modality, bands=bands, derived=derived, target_depth=depth
    )


# The order within an array is that of the released weights' channel embeddings.
PUBLISHED_GROUPS: tuple[GalileoGroup, ...] = (
    _group("S1", "space_time", "s1", *S1_BANDS),
    _group("S2_RGB", "space_time", "s2", *_S2[:3]),
    _group("S2_Red_Edge", "space_time", "s2", *_S2[3:6]),
    _group("S2_NIR_10m", "space_time", "s2", "B08"),
    _group("S2_NIR_20m", "space_time", "s2", "B8A"),
    _group("S2_SWIR", "space_time", "s2", "B11", "B12"),
    _group("NDVI", "space_time", "s2", "B08", "B04", derived="difference", depth=0.5),
    _group("SRTM", "space", "dem", "elevation", "slope", depth=0.5),
    _group("DW", "space", "dynamic_world", *_DYNAMIC_WORLD, depth=0),
    _group("WC", "space", "world_cereal", *_WORLD_CEREAL, depth=0),
    _group("ERA5", "time", "era5", "temperature_2m", "total_precipitation_sum", depth=0.5),
    _group("TC", "time", "terraclimate", "def", "soil", "aet", depth=0.5),
    _group("VIIRS", "time", "viirs", "avg_rad"),
    _group("LS", "static", "landscan", "b1", depth=0),
    _group("location", "static", "latlon", "lat", "lon", derived="sphere"),
    _group("DW_static", "static", "dynamic_world", *_DYNAMIC_WORLD, derived="mean", depth=0),
    _group("WC_static", "static", "world_cereal", *_WORLD_CEREAL, derived="mean", depth=0),
)


def _described(
    name: str, kind: Any, bands: Sequence[str], unit: str, values: str = "", **more: Any
) -> Modality:
    """Return a modality; `values` are means, then standard deviations."""
    numbers = tuple(float(value) for value in values.split())
    mean, std = numbers[: len(bands)] or None, numbers[len(bands) :] or None
    return Modality(
        name=name, kind=kind, channels=tuple(bands), value_unit=unit, mean=mean, std=std, **more
    )


_TABLE = (
    _described(
        "s1", "series", S1_BANDS, "db",
        "-11.728724389184965 -18.85558188024017 4.887145774840315 5.730270320384294",
        gsd_m=S2_M,
    ),
    _described(
        "s2", "series", _S2, "dn",
        "1395.3408730676722 1338.4026921784578 1343.09883810357 1543.8607982512297 "
        "2186.2022069512263 2525.0932853316694 2410.3377187373408 2750.2854646886753 "
        "2234.911100061487 1474.5311266077113 "
        "917.7041440370853 913.2988423581528 1092.678723527555 1047.2206083460424 "
        "1048.0101611156767 1143.6903026819996 1098.979177731649 1204.472755085893 "
        "1145.9774063078878 980.2429840007796",
        gsd_m=S2_M,
    ),
    _described(
        "dem", "image", ("elevation", "slope"), "m",
        "673.0152819503362 5.930092668915115 983.0697298296237 8.167406789813247", gsd_m=S2_M,
    ),
    _described("dynamic_world", "image", _DYNAMIC_WORLD, "probability", gsd_m=S2_M),
    _described("world_cereal", "image", _WORLD_CEREAL, "percent", gsd_m=S2_M),
    _described(
        "era5", "series", ("temperature_2m", "total_precipitation_sum"), "K, m",
        "271.5674963541667 0.08554303677156566 79.80828940314427 0.11669547098151486",
    ),
    _described(
        "terraclimate", "series", ("def", "soil", "aet"), "arbitrary",
        "657.3181260091111 692.1291795806885 562.781331880633 "
        "704.0008695557707 925.0116126406431 453.2434022278578",
    ),
    _described(
        "viirs", "series", ("avg_rad",), "arbitrary", "1.5647115934036666 7.513020170832818"
    ),
    # mean 188.2 and std 1154.6: the released table holds shift and divisor as whole numbers
    _described("landscan", "table", ("b1",), "arbitrary", "189.0 1154.5"),
    _described("latlon", "table", ("lat", "lon"), "degrees"),
)  # fmt: skip
PUBLISHED_MODALITIES: dict[str, Modality] = {modality.name: modality for modality in _TABLE}
PUBLISHED_FORMS = {
    name: "zscore" if modality.mean is not None else "identity"
    for name, modality in PUBLISHED_MODALITIES.items()
} | {"world_cereal": "scale(100)"}


def usable_groups(
    groups: Sequence[GalileoGroup | Mapping[str, Any]], modalities: Mapping[str, Modality]
) -> tuple[GalileoGroup, ...]:
    """Return the groups of some modalities, in order.

    Raises:
        ConfigError: A modality has no group, lacks a band of one, or is of a kind that does not
            vary over the array.
    """
    found = tuple(g if isinstance(g, GalileoGroup) else GalileoGroup(**g) for g in groups)
    names = [group.name for group in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"groups: every group has its own name; got {names}.")
    known = {group.modality: None for group in found}
    for name in modalities:
        if name not in known:
            raise ConfigError(
                f"Galileo has no group of the modality {name!r}.{nearest(name, known)} It has some "
                f"of {', '.join(known)}; leave {name!r} out in the DataModule, or name its groups: "
                "groups=[{name, array, modality, bands}, …]."
            )
    kept = tuple(group for group in found if group.modality in modalities)
    for group in kept:
        _check_group(group, modalities[group.modality])
    return kept


def _check_group(group: GalileoGroup, modality: Modality) -> None:
    missing = [band for band in group.bands if band not in modality.channels]
    if missing:
        raise ConfigError(
            f"groups.{group.name}: modality {modality.name!r} has no {', '.join(missing)}."
            f"{nearest(missing[0], modality.channels)} Its bands: {', '.join(modality.channels)}."
        )
    kinds = {
        "space_time": ("series", "image"), "space": ("image",), "time": ("series", "image"),
        "static": ("image", "series") if group.derived == "mean" else ("table",),
    }[group.array]  # fmt: skip
    if modality.kind not in kinds or modality.spatial_dims == 3:
        raise ConfigError(
            f"groups.{group.name}: the array {group.array!r} takes {' or '.join(kinds)} in two "
            f"dimensions, and modality {modality.name!r} has axes {modality.axes}. Name another "
            "array, or choose another kind in the DataModule."
        )


def location_xyz(degrees: Tensor) -> Tensor:
    """Return the unit vectors of latitudes and longitudes.

    Args:
        degrees: (..., 2), latitude first.

    Returns:
        (..., 3).

    Examples:
        >>> location_xyz(torch.tensor([0.0, 90.0])).round(decimals=3).tolist()
        [0.0, 1.0, 0.0]
    """
    lat, lon = degrees.deg2rad().unbind(-1)
    return torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], dim=-1)
