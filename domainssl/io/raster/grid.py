"""Where a raster lies: its coordinate reference system and regular grid, read from what is there.

Zarr cubes say it in several ways; the order in which they are asked is that of the functions.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from domainssl.errors import DataError, require, setting
from domainssl.io.raster.attributes import check_scaling, number_of
from domainssl.io.raster.zarr import ArrayInfo, Cube

__all__ = ["METRES_PER_DEGREE", "X_NAMES", "Y_NAMES", "Bounds", "Grid", "crs_of", "grid_of",
           "plain_crs", "said_crs"]  # fmt: skip

logger = logging.getLogger(__name__)

METRES_PER_DEGREE = 111_319.49079327358  # along the equator, as most tools that make such grids
Y_NAMES = ("y", "lat", "latitude", "north", "northing")
X_NAMES = ("x", "lon", "longitude", "east", "easting")
_TOLERANCE = 1e-3  # of a pixel
_KILOMETRES = ("km", "kilometre", "kilometres", "kilometer", "kilometers")
_RADIANS = ("rad", "radian", "radians", "microradian", "microradians")
_KNOWN_TEXTS: dict[str, str] = {}
_MOST_TEXTS = 1024


@dataclass(frozen=True, slots=True)
class Bounds:
    """A rectangle in the units of a coordinate reference system."""

    left: float
    bottom: float
    right: float
    top: float

    @property
    def width(self) -> float:
        """Extent from west to east."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Extent from south to north."""
        return self.top - self.bottom

    def shared(self, other: Bounds) -> Bounds:
        """Return the intersection; width or height are not positive where there is none."""
        return Bounds(
            max(self.left, other.left),
            max(self.bottom, other.bottom),
            min(self.right, other.right),
            min(self.top, other.top),
        )

    def part(self, row: int, column: int, height: int, width: int, step: float) -> Bounds:
        """Return a rectangle of pixels with sides `step`, counted from the upper left corner."""
        left, top = self.left + column * step, self.top - row * step
        return Bounds(left, top - height * step, left + width * step, top)


_MOST_PIXELS = 1e12  # from the origin of coordinates, to a ten-thousandth of a pixel


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A regular raster of square pixels.

    Attributes:
        left: Outer edge of the westernmost column.
        top: Outer edge of the northernmost row.
        step: Side of a pixel in CRS units.
        height: Rows.
        width: Columns.
        is_y_ascending: Row 0 lies in the south.
    """

    left: float
    top: float
    step: float
    height: int
    width: int
    is_y_ascending: bool = False

    @property
    def bounds(self) -> Bounds:
        """The outer edges."""
        return Bounds(
            self.left,
            self.top - self.height * self.step,
            self.left + self.width * self.step,
            self.top,
        )

    @classmethod
    def of_transform(cls, transform: Sequence[float], height: int, width: int, where: str) -> Grid:
        """Return the grid of an affine map (a, b, c, d, e, f) from (column, row) outer corners.

        Raises:
            DataError: Pixels are turned, mirrored west to east, not square, or lie nowhere.
        """
        a, b, c, d, e, f = numbers = [float(v) for v in transform[:6]]
        if not np.isfinite(numbers).all() or max(abs(c), abs(f)) > _MOST_PIXELS * abs(a):
            raise DataError(
                f"{where}: the transform {numbers} is not finite, or so far from the origin that "
                "numbers do not tell its pixels apart. Write one with gdal_edit.py -a_ullr."
            )
        if b or d or a <= 0 or abs(abs(e) - a) > _TOLERANCE * a:
            raise DataError(
                f"{where}: the transform {[a, b, c, d, e, f]} is turned, mirrored or has pixels "
                "that are not square. Resample the raster to square pixels with north up."
            )
        top = f if e < 0 else f + height * a
        return cls(left=c, top=top, step=a, height=height, width=width, is_y_ascending=e > 0)


def said_crs(value: str | None) -> str | None:
    """Return what a user says as `plain_crs`; None where nothing is said.

    Raises:
        DataError: It is not understood.
    """
    return None if value is None else plain_crs(value, setting("crs"))


def plain_crs(value: Any, where: str) -> str:
    """Return a coordinate reference system as `EPSG:n`, or as WKT where it has no number.

    Raises:
        DataError: It is not understood.
    """
    text = str(value).strip()
    found = re.fullmatch(r"(?:EPSG:)?(\d{4,6})", text, re.IGNORECASE)
    if found:
        return _numbered(int(found.group(1)), where)
    return _plain_text(value, where) if isinstance(value, str) else _plain_any(value, where)


@cache
def _is_known(number: int) -> bool:
    pyproj = require("pyproj", "geo")
    try:
        pyproj.CRS.from_epsg(number)
    except pyproj.exceptions.CRSError:
        return False
    return True


def _numbered(number: int, where: str) -> str:
    """Return a number of EPSG, of which those of UTM and WGS 84 are known without a look."""
    is_utm = number // 100 in (326, 327) and 1 <= number % 100 <= 60
    if not is_utm and number != 4326 and not _is_known(number):
        raise DataError(
            f"{where}: EPSG:{number} is no coordinate reference system that PROJ knows. Expected a "
            "number such as EPSG:32632 (UTM zone 32 north), or WKT."
        )
    return f"EPSG:{number}"


def _plain_any(value: Any, where: str) -> str:
    pyproj = require("pyproj", "geo")
    try:
        crs = pyproj.CRS.from_user_input(value)
    except pyproj.exceptions.CRSError as error:
        raise DataError(
            f"{where}: coordinate reference system {str(value).strip()[:80]!r} is not understood."
        ) from error
    crs = _horizontal(crs)
    number = 4326 if crs.to_authority() == ("OGC", "CRS84") else crs.to_epsg()
    return f"EPSG:{number}" if number else str(crs.to_wkt())


def _horizontal(crs: Any) -> Any:
    """Return the part of a CRS that places pixels: no heights, and no shift to another datum.

    Terrain is often written with a vertical system beside the one of the map; they are partners.
    """
    if crs.is_compound:
        crs = crs.sub_crs_list[0]
    elif len(crs.axis_info) == 3:
        crs = crs.to_2d()
    return crs.source_crs if crs.is_bound and crs.source_crs.to_epsg() else crs


def _plain_text(text: str, where: str) -> str:
    """Return what a text means, remembered: most sites of a data set share a few of them."""
    if text not in _KNOWN_TEXTS:
        if len(_KNOWN_TEXTS) >= _MOST_TEXTS:
            _KNOWN_TEXTS.clear()
        _KNOWN_TEXTS[text] = _plain_any(text, where)
    return _KNOWN_TEXTS[text]


def crs_of(cube: Cube, array: str) -> str | None:
    """Return the CRS of an array: `spatial_ref`, GeoZarr, the array's own fields, STAC; or None."""
    info = cube.info(array)
    where = f"{cube.name}: {array}"
    folder = array.rpartition("/")[0]
    for value in (
        *_grid_mapping(cube, folder, info.attrs),
        *_scalars(cube, folder),
        *(_field(cube.group_attrs(group)) for group in _upwards(folder)),
        _field(info.attrs),
        _stac(cube),
    ):
        if value is not None:
            return plain_crs(value, where)
    return None


def _upwards(folder: str) -> list[str]:
    parts = folder.split("/") if folder else []
    return ["/".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _grid_mapping(cube: Cube, folder: str, attrs: Mapping[str, Any]) -> list[Any]:
    """Return what the grid-mapping variables beside the array and above it say."""
    found = []
    group = cube.group_attrs(folder)
    name = _mapping_name(attrs) or _mapping_name(group) or "spatial_ref"
    for above in _upwards(folder):
        path = f"{above}/{name}" if above else name
        if path in cube.arrays:
            theirs = cube.arrays[path].attrs
            found += [theirs.get(n) for n in ("crs_wkt", "spatial_ref", "epsg_code")]
            if not any(found) and theirs.get("grid_mapping_name"):
                found.append(_of_parameters(theirs, f"{cube.name}: {path}"))
    return found


def _mapping_name(attrs: Mapping[str, Any]) -> str:
    """Return the grid mapping of a variable, the first one of CF's longer form `crs: x y`."""
    return str(attrs.get("grid_mapping") or "").split(":")[0].strip()


def _of_parameters(attrs: Mapping[str, Any], where: str) -> Any:
    """Return the CRS that the parameters of a CF grid mapping make."""
    pyproj = require("pyproj", "geo")
    try:
        return pyproj.CRS.from_cf(dict(attrs))
    except (pyproj.exceptions.CRSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: the grid mapping {attrs['grid_mapping_name']!r} makes no coordinate "
            f"reference system ({error!r:.200}). Write crs_wkt into it."
        ) from error


def _scalars(cube: Cube, folder: str) -> list[Any]:
    """Return what single numbers or texts beside the array and above it say (stackstac)."""
    found = []
    for above in _upwards(folder):
        for name in ("proj:code", "proj:epsg", "epsg"):
            info = cube.arrays.get(f"{above}/{name}" if above else name)
            if info is not None and info.shape in ((), (1,)):
                is_text = info.dtype.kind in "USTO"
                value = np.ravel(np.asarray((cube.read_text if is_text else cube.read)(info.name)))
                found.append(str(value[0]) if is_text else int(value[0]))
    return found


def _field(attrs: Mapping[str, Any]) -> Any:
    for name in ("proj:code", "proj:epsg", "proj:wkt2", "proj:projjson", "crs", "crs_wkt", "epsg"):
        if attrs.get(name):
            return attrs[name]
    of_gdal = attrs.get("_CRS")  # a mapping of three ways to say it
    if isinstance(of_gdal, Mapping):
        return next((of_gdal[n] for n in ("url", "wkt", "projjson") if of_gdal.get(n)), None)
    return None


def _stac(cube: Cube) -> Any:
    item = cube.group_attrs("").get("stac_discovery")
    properties = item.get("properties", {}) if isinstance(item, Mapping) else {}
    return properties.get("proj:code") or properties.get("proj:epsg")


def grid_of(cube: Cube, array: str, y: str, x: str) -> Grid:
    """Return the grid of an array from its coordinate arrays, or else from its attributes.

    Coordinates are centres of pixels unless a transform beside them says that they are edges, as
    stackstac writes them. A transform that fits is taken, since coordinates may be rounded.

    Args:
        cube: The store.
        array: Path of the array.
        y: Name of the dimension from north to south.
        x: Name of the dimension from west to east.

    Raises:
        DataError: There is neither, or coordinates are not evenly spaced, or contradict.
    """
    info = cube.info(array)
    sizes = dict(zip(info.dims, info.shape, strict=True))
    where = f"{cube.name}: {array}"
    folder = array.rpartition("/")[0]
    stated = _transform(cube, folder, info.attrs)
    # bands that lie on one grid share it, and their coordinates are read once
    key = (folder, y, x, sizes[y], sizes[x], None if stated is None else tuple(stated))
    if key not in cube.grids:
        cube.grids[key] = _grid(cube, folder, (y, sizes[y]), (x, sizes[x]), stated, where)
    grid: Grid = cube.grids[key]
    return grid


def _grid(
    cube: Cube,
    folder: str,
    down: tuple[str, int],
    across: tuple[str, int],
    stated: Sequence[float] | None,
    where: str,
) -> Grid:
    """Return the grid of dimensions (name, size) from coordinates and what attributes state."""
    (y, height), (x, width) = down, across
    centres = [_coordinate(cube, folder, *dim, where) for dim in (down, across)]
    if centres[0] is None or centres[1] is None:
        if stated is None:
            raise DataError(
                f"{where}: neither coordinate arrays {y!r} and {x!r} nor a transform "
                "(proj:transform, spatial:transform, GeoTransform) say where the pixels lie."
            )
        return Grid.of_transform(stated, height, width, where)
    ys, xs = centres
    if all(len(v) > 1 and np.array_equal(v, np.arange(len(v))) for v in (ys, xs)):
        if stated is None:
            raise DataError(
                f"{where}: the coordinates {y!r} and {x!r} count pixels (0, 1, 2 …) and do not say "
                "where they lie. Write coordinates, or a transform (GeoTransform)."
            )
        return Grid.of_transform(stated, height, width, where)
    lines = [_line(values, f"{where}: {name}") for values, name in ((xs, x), (ys, y))]
    places = []
    for (first, step, slack), at in zip(lines, (0, 4), strict=True):
        if step is None:
            if stated is None:
                raise DataError(f"{where}: one row or column needs a transform in the attributes.")
            step = float(stated[at])
        if stated is not None:
            edge = float(stated[2 if at == 0 else 5])
            shift = (first - edge) / step
            tolerance = _TOLERANCE + slack / abs(step)
            fits = abs(stated[at] - step) < tolerance * abs(step)
            # coordinates are centres, or edges that the transform tells apart
            if fits and any(abs(shift - s) < tolerance for s in (0.0, 0.5, 1.0)):
                places.append((edge, float(stated[at])))
                continue
            if fits or at == 4 or abs(stated[0]) > 0:
                logger.warning(
                    "%s: the transform %s does not fit the coordinates, which begin at %s; the "
                    "coordinates count", where, list(stated[:6]), first,
                )  # fmt: skip
        places.append((first - 0.5 * step, step))
    (left, right_step), (top, down_step) = places
    affine = (right_step, 0, left, 0, down_step, top)
    return Grid.of_transform(affine, height, width, where)


def _coordinate(cube: Cube, folder: str, name: str, size: int, where: str) -> Any:
    for above in _upwards(folder):
        path = f"{above}/{name}" if above else name
        info = cube.arrays.get(path)
        if info is not None and info.shape == (size,) and info.dtype.kind in "iuf":
            factor, offset = _units_of_coordinate(cube, folder, info, where)
            values = cube.read(path)
            if (factor, offset) == (1.0, 0.0):
                return values
            return values.astype(np.float64) * factor + offset
    return None


def _units_of_coordinate(
    cube: Cube, folder: str, info: ArrayInfo, where: str
) -> tuple[float, float]:
    """Return factor and offset that make stored coordinates numbers of the reference system.

    Raises:
        DataError: They are angles of a scan.
    """
    factor, offset = (
        number_of(info.attrs.get(name, default), info, f"{where}: {info.name}")
        for name, default in (("scale_factor", 1.0), ("add_offset", 0.0))
    )
    check_scaling(f"{where}: {info.name}", factor, offset)
    unit = str(info.attrs.get("units", "")).strip().lower()
    if unit in _RADIANS:
        raise DataError(
            f"{where}: coordinates {info.name!r} are in {unit}, as scan angles of geostationary "
            "satellites are; expected those of the reference system. Multiply them by its "
            "perspective_point_height, or reproject the cube."
        )
    if unit in _KILOMETRES and not _counts_kilometres(cube, folder):
        factor, offset = 1000 * factor, 1000 * offset
    return factor, offset


def _counts_kilometres(cube: Cube, folder: str) -> bool:
    """Tell whether the reference system itself is in kilometres."""
    known = [*_grid_mapping(cube, folder, {}), _field(cube.group_attrs(folder))]
    value = next((v for v in known if v is not None), None)
    if value is None:
        return False
    axes = require("pyproj", "geo").CRS.from_user_input(plain_crs(value, folder)).axis_info
    return bool(axes and axes[0].unit_conversion_factor == 1000.0)


def _line(values: np.ndarray[Any, Any], where: str) -> tuple[float, float | None, float]:
    """Return the first coordinate, the step (None of a single one), and how exact they are.

    Coordinates stored in float32 are rounded to half a metre in northings: both are taken as the
    plainest numbers within that rounding.
    """
    exact = values.astype(np.float64)
    if not np.isfinite(exact).all():
        raise DataError(f"{where}: coordinates are missing (NaN). Write them, or a transform.")
    slack = 0.0
    if values.dtype.kind == "f" and values.dtype.itemsize < 8:
        slack = float(np.finfo(values.dtype).eps * np.abs(exact).max())
    first = _plainest(float(exact[0]), slack)
    if len(exact) == 1:
        return first, None, slack
    step = _plainest(float(exact[-1] - exact[0]) / (len(exact) - 1), 2 * slack / (len(exact) - 1))
    uneven = np.abs(np.diff(exact) - step).max()
    if not (np.isfinite(step) and step != 0 and uneven <= 0.01 * abs(step) + 2 * slack):
        raise DataError(
            f"{where}: coordinates are not evenly spaced (steps differ by {uneven:g} from "
            f"{step:g}). Resample the cube to a regular grid."
        )
    return first, step, slack


def _plainest(value: float, slack: float) -> float:
    """Return the number with the fewest decimal places within `slack` of a value."""
    if not slack:
        return value
    rounded = (round(value, digits) for digits in range(16))
    return next((number for number in rounded if abs(number - value) <= slack), value)


def _transform(cube: Cube, folder: str, attrs: Mapping[str, Any]) -> Sequence[float] | None:
    """Return the affine map of outer corners that the attributes state, if any."""
    sources = (attrs, cube.group_attrs(folder))
    registration = [source.get("spatial:registration") for source in sources]
    for source in sources:
        for name in ("spatial:transform", "proj:transform", "transform"):
            value = _numbers(source.get(name))
            if len(value) < 6:
                continue
            a, b, c, d, e, f = value[:6]
            if not (a and e) and b and f:  # in GDAL's order
                a, b, c, d, e, f = b, c, a, e, f, d
            if not (a and e):
                continue
            if name == "spatial:transform" and "node" in registration:  # of centres of pixels
                c, f = c - (a + b) / 2, f - (d + e) / 2
            return [a, b, c, d, e, f]
    mapping = _mapping_name(attrs) or _mapping_name(cube.group_attrs(folder))
    for above in _upwards(folder):
        path = f"{above}/{mapping or 'spatial_ref'}".lstrip("/")
        told = cube.arrays[path].attrs.get("GeoTransform") if path in cube.arrays else None
        if told:
            c, a, b, f, d, e = _numbers(told)
            return [a, b, c, d, e, f]
    return None


def _numbers(value: Any) -> list[float]:
    """Return the numbers of a list, or of a text that separates them by blanks or commas."""
    if isinstance(value, str):
        value = re.split(r"[,;\s]+", value.strip("[]() "))
    elif not isinstance(value, Sequence):
        return []
    return [float(v) for v in value]
