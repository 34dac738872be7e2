"""What is known of sensors: bands in order, their wavelengths and other names, plausible values."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = [
    "DARK_DN",
    "DARK_FRACTION",
    "L1C_BANDS",
    "L2A_BANDS",
    "S1_BANDS",
    "S2_M",
    "VALID_RANGES",
    "canonical_band",
    "names_of_band",
    "unit_in_name",
    "wavelengths_nm",
]

S2_M = 10.0  # finest pixel of Sentinel-2, and that of Sentinel-1 GRD
S1_BANDS = ("VV", "VH")
L1C_BANDS = (
    "B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12",
)  # fmt: skip
L2A_BANDS = tuple(band for band in L1C_BANDS if band != "B10")
# Numbers with the offset of +1000 are hardly ever this low: reflectances below -0.05
DARK_DN = 500
DARK_FRACTION = 0.01  # of the pixels, up to which they may be
# Lowest and highest plausible value by unit
VALID_RANGES = {"dn": (-1000.0, 32767.0), "db": (-60.0, 40.0), "rgb8": (0.0, 255.0)}

_CENTRES_NM = {  # of Sentinel-2A
    "B01": 442.7, "B02": 492.7, "B03": 559.8, "B04": 664.6, "B05": 704.1, "B06": 740.5,
    "B07": 782.8, "B08": 832.8, "B8A": 864.7, "B09": 945.1, "B10": 1373.5, "B11": 1613.7,
    "B12": 2202.4,
}  # fmt: skip
_NAMES = {  # of STAC and its catalogues, without blanks, hyphens and underscores
    "coastal": "B01", "aerosol": "B01", "coastalaerosol": "B01", "blue": "B02", "green": "B03",
    "red": "B04", "rededge": "B05", "rededge1": "B05", "rededge2": "B06", "rededge3": "B07",
    "rededge071": "B05", "rededge075": "B06", "rededge078": "B07", "nir": "B08", "nir08": "B8A",
    "nirnarrow": "B8A", "b08a": "B8A", "nir09": "B09", "watervapor": "B09", "watervapour": "B09",
    "cirrus": "B10", "swir1": "B11", "swir16": "B11", "swir2": "B12", "swir22": "B12",
}  # fmt: skip
_NUMBERED = re.compile(r"b(?:and)?(\d+)", re.ASCII)
_SEPARATORS = re.compile(r"[\s_\-]+")
_RADAR = re.compile(  # of SNAP and its like: Sigma0_VV_db, Gamma0_VH, VV_dB, Intensity_VV
    r"(?:(?:sigma|gamma|beta)(?:0|nought|naught)?|intensity|amplitude)?(vv|vh|hv|hh)(db)?"
)
# of Earth Engine's toBands(): the product stands before the band
_PRODUCT = re.compile(r"^\d{8}T\d{6}_\d{8}T\d{6}_T\d{2}[A-Z]{3}_")
_SIZE = re.compile(r"^(b(?:and)?[\s_\-]*\d+a?)[\s_\-]+(?:10|20|60)\s?m$", re.IGNORECASE)  # B02_10m


def canonical_band(name: str) -> str:
    """Return the canonical spelling of a band: `b2`, `Band 2`, `B02_10m`, `blue` -> `B02`.

    GDAL's own descriptions of Sentinel-2 (`B2, central wavelength 490 nm`), Earth Engine's
    (`20200501T101031_20200501T101031_T32TQM_B2`) and SNAP's of radar (`Sigma0_VV_db` -> `VV`) are
    bands as well.
    """
    text = _PRODUCT.sub("", str(name).strip().split(", central wavelength")[0])
    text = _SIZE.sub(r"\1", text)
    plain = _SEPARATORS.sub("", text.lower())
    if plain in _NAMES:
        return _NAMES[plain]
    numbered, radar = _NUMBERED.fullmatch(plain), _RADAR.fullmatch(plain)
    if radar:
        return radar[1].upper()
    return f"B{int(numbered[1]):02d}" if numbered else text.upper()


def unit_in_name(name: str) -> str:
    """Return `dB` where the name of a radar band says so, as `Sigma0_VV_db` does; else nothing."""
    radar = _RADAR.fullmatch(_SEPARATORS.sub("", str(name).lower()))
    return "dB" if radar and radar[2] else ""


def names_of_band(band: str) -> list[str]:
    """Return the names that a band is known by, its canonical one first."""
    known = canonical_band(band)
    return [known, *(name for name, meant in _NAMES.items() if meant == known)]


def wavelengths_nm(bands: Sequence[str]) -> tuple[float, ...] | None:
    """Return the centre wavelengths of Sentinel-2A bands, None where one is no such band."""
    if not set(bands) <= set(_CENTRES_NM):
        return None
    return tuple(_CENTRES_NM[band] for band in bands)
