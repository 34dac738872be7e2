"""What a user says about cubes: layers, masks, labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from domainssl.errors import ConfigError, nearest
from domainssl.io.raster.read import MaskRule
from domainssl.io.ssl4eo.facts import PRODUCTS
from domainssl.modality import Modality
from domainssl.sensors import canonical_band, wavelengths_nm

__all__ = ["Labels", "Layer", "Mask", "default_layers", "finest_m", "snap_m"]

_UNITS = ("auto", "dn", "dn+1000", "reflectance", "db", "linear", "amplitude", "arbitrary",
          "baseline")  # fmt: skip
# scene classification of L2A: no data, saturated, cloud shadow, clouds, thin cirrus
_SCL_HIDDEN = (0, 1, 3, 8, 9, 10)
_SENTINEL = frozenset(("VV", "VH", "HH", "HV", *PRODUCTS["S2L1C"].bands))


@dataclass(frozen=True)
class Mask:
    """A mask stored beside the bands.

    Attributes:
        variable: Name of the array, such as `scl`.
        values: Classes, or bits, that make a pixel invalid.
        is_bits: The mask holds bit flags.
    """

    variable: str = "scl"
    values: tuple[int, ...] = _SCL_HIDDEN
    is_bits: bool = False

    @property
    def rule(self) -> MaskRule:
        """The part that the reader needs."""
        return MaskRule(tuple(self.values), self.is_bits)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One sensor: where it lies below the root, and what it is.

    Attributes:
        bands: Names in the order wanted.
        path: A store, or a folder of stores or GeoTIFF, one per site; or a pattern with `{site}`,
            `{date}`, `{band}`, `*` and `?`, such as `{site}/s2_{date}.tif`. Files that differ in
            `{band}` alone are joined. Empty means the layer's key.
        value_unit: What batches carry: `dn` (Sentinel-2 numbers without offset), `reflectance`,
            `db`, or `arbitrary` for values as they are.
        stored_unit: What the files hold once scale and offset of their attributes are applied:
            `dn`, `dn+1000`, `reflectance`, `db`, `linear`, `amplitude`; `auto` asks the attributes;
            `baseline` is `dn+1000` on dates of Sentinel-2 processing baseline 04.00 and later and
            `dn` on earlier ones.
        gsd_m: Pixel size delivered, in metres.
        group: Folder inside a store.
        mask: A mask that marks invalid pixels, beside nodata.
        crs: Coordinate reference system where the files do not say.
        is_static: Has no dates even where the others are series, as terrain has none.
        is_location: Has no files: latitude and longitude of the middle of the window, in degrees,
            as a table. `bands` are two names for them.
        mean: Per band; the published ones of SSL4EO-S12 where left out and known.
        std: Per band.
        nodata: A stored number, or several, that mean nothing was measured and that the files do
            not declare.
        wavelengths_nm: Centre of every band in nanometres, for encoders that tell bands by them;
            those of Sentinel-2 are known.
    """

    bands: tuple[str, ...]
    path: str = ""
    value_unit: str = "dn"
    stored_unit: str = "auto"
    gsd_m: float = 10.0
    group: str = ""
    mask: Mask | None = None
    crs: str | None = None
    is_static: bool = False
    is_location: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    nodata: float | tuple[float, ...] | None = None
    wavelengths_nm: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.bands:
            raise ConfigError("data.init_args.modalities: a layer needs 'bands', such as [VV, VH].")
        object.__setattr__(self, "bands", tuple(self.bands))
        if self.is_location and len(self.bands) != 2:
            raise ConfigError(
                "data.init_args.modalities: a layer with is_location has two bands, latitude and "
                f"longitude, such as [lat, lon]; got {list(self.bands)}."
            )
        if self.stored_unit not in _UNITS:
            raise ConfigError(
                f"data.init_args.modalities: stored_unit {self.stored_unit!r} is not one of "
                f"{', '.join(_UNITS)}.{nearest(self.stored_unit, _UNITS)}"
            )
        if self.gsd_m <= 0:
            raise ConfigError(
                f"data.init_args.modalities: gsd_m is {self.gsd_m!r}, expected above 0."
            )

    def modality(self, name: str, size: tuple[int, ...], *, is_series: bool) -> Modality:
        """Return the facts that a backbone is built from, without looking at the files."""
        if self.is_location:
            return Modality(name=name, kind="table", channels=self.bands, value_unit="degrees")
        mean, std, low_high = self._statistics()
        bands = tuple(_spelled(band) for band in self.bands)
        return Modality(
            name=name,
            kind="series" if is_series and not self.is_static else "image",
            channels=bands,
            value_unit=self.value_unit,
            size=size,
            gsd_m=self.gsd_m,
            mean=self.mean or mean,
            std=self.std or std,
            valid_range=low_high,
            nodata=None,  # batches mark it in `valid`
            wavelengths_nm=self.wavelengths_nm or wavelengths_nm(bands),
        )

    def _statistics(self) -> tuple[Any, Any, Any]:
        """Return mean, std and range of SSL4EO-S12 for known bands, in this layer's unit."""
        bands = tuple(canonical_band(band) for band in self.bands)
        name = {"db": "S1GRD"}.get(self.value_unit, "S2L1C" if "B10" in bands else "S2L2A")
        facts = PRODUCTS[name]
        if self.value_unit not in ("dn", "reflectance", "db") or not set(bands) <= set(facts.bands):
            return None, None, None
        scale = 1e-4 if self.value_unit == "reflectance" else 1.0
        at = [facts.bands.index(band) for band in bands]
        return (
            tuple(facts.mean[i] * scale for i in at),
            tuple(facts.std[i] * scale for i in at),
            tuple(v * scale for v in facts.valid_range),
        )


def _spelled(band: str) -> str:
    """Return the canonical spelling of bands of Sentinel-1 and 2, other names as they are."""
    found = canonical_band(band)
    return band if found == band.upper() and found not in _SENTINEL else found


def default_layers() -> dict[str, Layer]:
    """Return the layers of the embedded sample: Sentinel-1 and the 12 bands of L2A."""
    return {
        "s1": Layer(bands=("VV", "VH"), value_unit="db"),
        "s2": Layer(bands=PRODUCTS["S2L2A"].bands, value_unit="dn"),
    }


def snap_m(layers: Mapping[str, Layer]) -> float:
    """Return the pixel of the coarsest layer in metres, to which windows are aligned."""
    return max(layer.gsd_m for layer in layers.values())


def finest_m(layers: Mapping[str, Layer]) -> float:
    """Return the pixel of the finest layer in metres, in which windows of `px` count."""
    return min(layer.gsd_m for layer in layers.values())


@dataclass(frozen=True, kw_only=True)
class Labels:
    """A map of classes; the label of a window is its most frequent class.

    Attributes:
        path: As a layer's.
        variable: Band or array.
        names: Class names, by number; taken from `flag_meanings` where left out.
        nodata: A number, or several, that stand for no class and that the files do not declare.
        mask: Also deliver the class of every pixel of the finest modality, -1 where there is none.
    """

    path: str = "labels"
    variable: str = "label"
    names: tuple[str, ...] = ()
    nodata: float | tuple[float, ...] | None = None
    mask: bool = False
