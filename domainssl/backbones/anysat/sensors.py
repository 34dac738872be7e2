"""Sensors that AnySat's released weights know: their bands, pixels and calendars.

Source: Astruc et al. 2025 (arXiv 2412.14123) and the released code. The order of the bands is that
in which its data sets deliver them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from domainssl.errors import ConfigError, WeightsError, nearest
from domainssl.modality import Modality, as_modalities
from domainssl.sensors import L2A_BANDS, S1_BANDS, S2_M

__all__ = ["CELL_M", "SENSORS", "AnySatSensor", "described", "sensors_of"]

CELL_M = 10.0  # patches are multiples of it


@dataclass(frozen=True, kw_only=True)
class AnySatSensor:
    """One sensor of the released weights.

    Attributes:
        name: Of its projector, with underscores for dashes.
        bands: Bands in the order of the weights.
        gsd_m: Side of a pixel in metres.
        kind: `image`, or `series`.
        part_px: Side of a part of a patch in pixels; every part is one token of the first
            transformer.
        whole: A pixel covers more than a tile: it is one token without a place.
        calendar_length: Base of the sinusoids of its dates.
        input_norm: Groups of channels are normalised over the dates.
    """

    name: str
    bands: tuple[str, ...]
    gsd_m: float
    kind: Literal["image", "series"] = "series"
    part_px: int = 1
    whole: bool = False
    calendar_length: int = 367
    input_norm: bool = False

    @property
    def part_m(self) -> float:
        """Side of a part in metres."""
        return self.part_px * self.gsd_m


def _numbered(*numbers: int) -> tuple[str, ...]:
    return tuple(f"B{i}" for i in numbers)


_S2 = tuple(band for band in L2A_BANDS if band not in ("B01", "B09"))
_RATIO = (*S1_BANDS, "ratio")
_TABLE = (
    AnySatSensor(
        name="aerial", bands=("NIR", "G", "B", "R"), gsd_m=0.2, kind="image", part_px=10,
    ),
    AnySatSensor(
        name="aerial_flair", bands=("R", "G", "B", "NIR", "elevation"), gsd_m=0.2, kind="image",
        part_px=10,
    ),
    AnySatSensor(name="spot", bands=("R", "G", "B"), gsd_m=1.0, kind="image", part_px=10),
    AnySatSensor(name="naip", bands=("R", "G", "B", "NIR"), gsd_m=1.25, kind="image", part_px=8),
    AnySatSensor(name="s2", bands=_S2, gsd_m=S2_M, input_norm=True),
    AnySatSensor(name="s1_asc", bands=S1_BANDS, gsd_m=S2_M),
    AnySatSensor(name="s1", bands=_RATIO, gsd_m=S2_M),
    AnySatSensor(name="alos", bands=("HH", "HV", "ratio"), gsd_m=30.0),
    AnySatSensor(name="l7", bands=_numbered(1, 2, 3, 4, 5, 7), gsd_m=30.0),
    AnySatSensor(
        name="l8", bands=_numbered(8, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11), gsd_m=S2_M,
        calendar_length=366,
    ),
    AnySatSensor(name="modis", bands=_numbered(1, 2, 3, 4, 5, 6, 7), gsd_m=250.0, whole=True),
)  # fmt: skip
SENSORS: dict[str, AnySatSensor] = {sensor.name: sensor for sensor in _TABLE}


def sensors_of(
    modalities: Mapping[str, Modality], named: Mapping[str, str]
) -> dict[str, AnySatSensor]:
    """Return the sensor of every modality: the one of its name, or the one that `named` gives it.

    Raises:
        ConfigError: There is no such sensor, the modality is of another kind, or its pixels are of
            another size.
    """
    for name in named:
        if name not in modalities:
            raise ConfigError(f"sensors: {name!r} is no modality.{nearest(name, modalities)}")
    found = {}
    for name, modality in modalities.items():
        known = named.get(name, name)
        if known not in SENSORS:
            raise ConfigError(
                f"AnySat has no sensor {known!r}.{nearest(known, SENSORS)} It has "
                f"{', '.join(SENSORS)}; leave {name!r} out in the DataModule, or name the one it "
                f"is most like: sensors={{{name!r}: 's2'}}."
            )
        sensor = found[name] = SENSORS[known]
        kinds = ("image",) if sensor.kind == "image" else ("series", "image")
        if modality.kind not in kinds or modality.spatial_dims != 2:
            raise ConfigError(
                f"{name}: AnySat's {known} takes {' or '.join(kinds)} in two dimensions, got axes "
                f"{modality.axes}. Choose another kind in the DataModule."
            )
        if modality.gsd_m is not None and abs(modality.gsd_m / sensor.gsd_m - 1) > 0.01:
            raise ConfigError(
                f"{name}: pixels of {modality.gsd_m:g} m, but AnySat's {known} has "
                f"{sensor.gsd_m:g} m. Resample it in the DataModule."
            )
    return found


def described(
    sensors: Mapping[str, AnySatSensor], data: Mapping[str, Modality | Mapping[str, Any]]
) -> dict[str, Modality]:
    """Return what the weights take, with the statistics of some data.

    The publisher standardises every data set by its own statistics, and the weights bring none.

    Args:
        sensors: Sensor of every modality.
        data: The data; bands of the weights that they lack get mean 0 and deviation 1.

    Raises:
        WeightsError: The data have no statistics.
    """
    found = {}
    for name, modality in as_modalities(data).items():
        bands, mean, std = sensors[name].bands, modality.mean, modality.std
        if mean is None or std is None:
            raise WeightsError(
                f"{name}: the weights of AnySat bring no statistics, and {name!r} has no mean and "
                "std. Its publisher standardises every data set by its own: run `stats`, or set "
                "data.init_args.statistics."
            )
        at = {band: i for i, band in enumerate(modality.channels)}
        found[name] = dataclasses.replace(
            modality,
            channels=bands,
            mean=tuple(mean[at[band]] if band in at else 0.0 for band in bands),
            std=tuple(std[at[band]] if band in at else 1.0 for band in bands),
            wavelengths_nm=None,
        )
    return found
