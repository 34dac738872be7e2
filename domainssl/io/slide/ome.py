"""What OME-XML says about an image: size of pixels, channels, names; entities are refused."""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree

__all__ = ["OmeImage", "ome_images"]

_LONGEST = 2**26  # characters
_UNITS_UM = {
    "m": 1e6, "cm": 1e4, "mm": 1e3, "\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0, "micron": 1.0,
    "nm": 1e-3, "pm": 1e-6, "\u00c5": 1e-4, "\u212b": 1e-4, "angstrom": 1e-4, "in": 25_400.0,
    "inch": 25_400.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OmeImage:
    """One image of a file.

    Attributes:
        name: As stated.
        size: Width and height.
        mpp: Micrometres per pixel in x and y, None where not stated in a unit of length.
        bits: Bits that are used of every number, None where not stated.
        channels: Names; empty texts where there are none.
        colors: Colour of every channel as stated, signed RGBA.
        power: Objective power.
    """

    name: str
    size: tuple[int, int]
    mpp: tuple[float, float] | None
    bits: int | None
    channels: tuple[str, ...]
    colors: tuple[int | None, ...]
    power: float | None


def ome_images(text: str) -> list[OmeImage]:
    """Return the images that OME-XML describes; none where it cannot be read.

    Raises:
        ValueError: It defines entities, which a description of an image has no use for.
    """
    if len(text) > _LONGEST:
        return []
    if "<!ENTITY" in text or "<!DOCTYPE" in text:
        raise ValueError("the OME-XML defines entities")
    try:
        root = ElementTree.fromstring(text.strip().rstrip("\0"))
    except ElementTree.ParseError:
        return []
    powers = [_float(e.get("NominalMagnification")) for e in _all(root, "Objective")]
    power = next((p for p in powers if p), None)
    return [found for e in _all(root, "Image") if (found := _image(e, power)) is not None]


def _all(element: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [e for e in element.iter() if e.tag.rpartition("}")[2] == name]


def _image(element: ElementTree.Element, power: float | None) -> OmeImage | None:
    pixels = next(iter(_all(element, "Pixels")), None)
    if pixels is None:
        return None
    width, height = (_float(pixels.get(f"Size{axis}")) for axis in "XY")
    if not width or not height:
        return None
    channels = _all(pixels, "Channel")
    bits = _float(pixels.get("SignificantBits"))
    x, y = (_micrometres(pixels, axis) for axis in "XY")
    colors = tuple(_color(channel.get("Color")) for channel in channels)
    return OmeImage(
        name=element.get("Name", ""),
        size=(int(width), int(height)),
        mpp=None if not (x or y) else (float(x or y or 0), float(y or x or 0)),
        bits=int(bits) if bits and 1 <= bits <= 16 else None,
        channels=tuple(channel.get("Name", "") for channel in channels),
        colors=colors,
        power=power,
    )


def _micrometres(pixels: ElementTree.Element, axis: str) -> float | None:
    value = _float(pixels.get(f"PhysicalSize{axis}"))
    unit = pixels.get(f"PhysicalSize{axis}Unit", "\u00b5m").strip()
    scale = _UNITS_UM.get(unit, _UNITS_UM.get(unit.lower()))
    return None if not value or scale is None else value * scale


def _float(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < 1e12 else None


def _color(text: str | None) -> int | None:
    try:
        return int(text or "") & 0xFFFFFFFF
    except ValueError:
        return None
