"""Sites: places with one file or more per layer, opened, checked against each other, and dated."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from domainssl.errors import DataError, UnreadableError, require
from domainssl.io.leaks import equal_files
from domainssl.io.raster.describe import LayerFiles, Sought
from domainssl.io.raster.grid import METRES_PER_DEGREE, Bounds
from domainssl.io.raster.layer import OFFSET_BASELINE, LayerFile
from domainssl.io.raster.read import conversion
from domainssl.io.raster.sites import Found, find_files
from domainssl.io.storage.paths import Options
from domainssl.sensors import canonical_band
from domainssl.sources.cube_options import Layer, snap_m
from domainssl.sources.dates import Dates
from domainssl.sources.windows import Window

__all__ = ["Site", "SiteLayer", "anchors", "open_sites"]

_log = logging.getLogger(__name__)

_SHOWN = 5
_LEVEL = re.compile(r"S2[A-D]_MSIL(1C|2A)_", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SiteLayer:
    """One layer of a site: its files, and its dates in order.

    Attributes:
        files: The files.
        places: Files of each date and positions in them: several where acquisitions have one time.
        times: datetime64[s] per date, ascending.
    """

    files: tuple[LayerFile, ...]
    places: tuple[tuple[tuple[int, int], ...], ...]
    times: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A place with one file or more per layer, all in one coordinate reference system.

    Attributes:
        name: What the files are called.
        layers: The layers by name.
        labels: The map of classes, if there is one.
        crs: Coordinate reference system.
        bounds: What all layers cover.
        metres: Metres per unit of the coordinate reference system.
    """

    name: str
    layers: dict[str, SiteLayer]
    labels: LayerFile | None
    crs: str
    bounds: Bounds
    metres: float

    def digest(self) -> str:
        """Return a hash of what the headers say."""
        facts = [
            (name, f.path, f.bands, [str(t) for t in f.times])
            for name, layer in self.layers.items()
            for f in layer.files
        ]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def open_sites(
    root: str,
    layers: Mapping[str, Layer],
    dates: Dates,
    window: Window,
    labels: Layer | None,
    options: Options | None = None,
) -> tuple[list[Site], list[str]]:
    """Find and describe the sites that every layer has.

    Returns:
        The sites by name, and what is wrong with those that are left out.

    Raises:
        DataError: No site is left, or a file contradicts its partners.
    """
    found = {
        name: find_files(root, layer.path or name, layer.group, options)
        for name, layer in layers.items()
    }
    _share_single_names(found)
    names = sorted(set.intersection(*(set(files) for files in found.values())))
    problems = [
        f"layer {layer}: {len(lonely)} sites without a partner in every layer, such as "
        + ", ".join(lonely[:_SHOWN])
        for layer, files in found.items()
        if (lonely := sorted(set(files) - set(names)))
    ]
    if not names:
        shown = "; ".join(f"{n}: {', '.join(sorted(f)[:_SHOWN])}" for n, f in found.items())
        raise DataError(
            f"{root}: no site has all layers. Sites found: {shown}. Names must be equal, or be "
            "told apart by a pattern such as path: '{site}_S2.tif'."
        )
    maps = find_files(root, labels.path, labels.group, options) if labels else {}
    if len(maps) == len(names) == 1:
        maps = {names[0]: next(iter(maps.values()))}
    sides = [cells * snap_m(layers) for cells in window.shape]
    files = LayerFiles(root, options)
    files.fill(_wanted(layers, found, names, labels, maps))
    _check_levels(found, names)
    sites = []
    for name in names:
        parts = {n: found[n][name] for n in layers}
        try:
            site, left_out = _site(name, layers, parts, labels, maps.get(name, []), files)
        except UnreadableError as error:
            problems.append(f"site {name} is left out: {error}")
            continue
        problems += [f"site {name}, a date is left out: {text}" for text in left_out]
        reason = _reason_against(site, sides, dates)
        if reason:
            problems.append(f"site {name}: {reason}")
        else:
            sites.append(site)
    if not sites:
        raise DataError(f"{root}: no site can be used: {'; '.join(problems[:_SHOWN])}")
    return sites, problems + _copies(root, sites)


def _check_levels(found: Mapping[str, Mapping[str, list[Found]]], names: Sequence[str]) -> None:
    """Check that products of one layer are of one level: what satellite or ground reflects.

    Raises:
        DataError: Both are there.
    """
    for layer, files in found.items():
        of_level: dict[str, str] = {}
        for each in (each for name in names for each in files[name]):
            if match := _LEVEL.match(os.path.basename(each.path.rstrip("/"))):
                of_level.setdefault(match[1].upper(), each.path)
        if len(of_level) > 1:
            raise DataError(
                f"layer {layer!r}: products of level 1C (top of the atmosphere) and 2A (surface) "
                f"would be mixed: {of_level['1C']} and {of_level['2A']}. Set data.init_args."
                f"modalities.{layer}.path to a pattern that fits one level, such as "
                "'S2?_MSIL2A_*_{site}_*', or to a folder that holds one."
            )


def _copies(root: str, sites: Sequence[Site]) -> list[str]:
    """Say which sites are the same, under two names: by place and dates, or by their files."""
    seen: dict[Any, str] = {}
    alike = []
    for site in sites:
        times = {n: tuple(layer.times.tolist()) for n, layer in site.layers.items()}
        if any(time is None for dates in times.values() for time in dates):
            continue  # unknown dates: other files of the same place
        first = seen.setdefault((site.crs, site.bounds, *times.items()), site.name)
        if first != site.name:
            alike.append(f"{site.name} (as {first})")
    problems = [
        f"{root}: {len(alike)} sites have the place and the dates of another one and count as "
        f"often, such as {', '.join(alike[:_SHOWN])}; remove what is there twice"
    ] * bool(alike)
    layer = next(iter(sites[0].layers))
    files = (file.path for site in sites for file in site.layers[layer].files)
    return problems or equal_files({"all sites": files}, root)


def _wanted(
    layers: Mapping[str, Layer],
    found: Mapping[str, Mapping[str, list[Found]]],
    names: Sequence[str],
    labels: Layer | None,
    maps: Mapping[str, list[Found]],
) -> dict[Sought, list[Found]]:
    """Return all files that will be described, by what is asked of them."""
    wanted: dict[Sought, list[Found]] = {}
    for key, layer in layers.items():
        whole = _sought(layer)
        single = {canonical_band(b): _sought(replace(layer, bands=(b,))) for b in layer.bands}
        for name in names:
            for each in found[key][name]:
                sought = single.get(canonical_band(each.band)) if each.band else whole
                if sought is not None:
                    wanted.setdefault(sought, []).append(each)
    if labels is not None:
        wanted.setdefault(_sought(labels), []).extend(maps[n][0] for n in names if n in maps)
    return wanted


def _share_single_names(found: dict[str, dict[str, list[Found]]]) -> None:
    """Call the only site of each layer the same, whatever their stores are called."""
    if all(len(files) == 1 for files in found.values()):
        first = next(iter(next(iter(found.values()))))
        for layer, files in found.items():
            found[layer] = {first: next(iter(files.values()))}


def _site(
    name: str,
    layers: Mapping[str, Layer],
    parts: Mapping[str, list[Found]],
    labels: Layer | None,
    maps: list[Found],
    files: LayerFiles,
) -> tuple[Site, list[str]]:
    """Return a site, and why files of it cannot be read where its other dates can."""
    left_out: list[str] = []
    opened = {n: _layer(n, layer, parts[n], files, left_out) for n, layer in layers.items()}
    firsts = {n: layer.files[0] for n, layer in opened.items()}
    crs = next(iter(firsts.values())).crs
    for layer, file in firsts.items():
        if file.crs != crs:
            first = next(iter(firsts))
            raise DataError(
                f"site {name}: layer {first!r} is in {crs[:60]}, layer {layer!r} in "
                f"{file.crs[:60]} ({file.path}). Reproject one of them: windows are cut, not "
                "warped."
            )
    bounds = None
    for part in opened.values():
        for file in part.files:
            bounds = file.bounds if bounds is None else bounds.shared(file.bounds)
    assert bounds is not None
    cover = None
    if labels is not None and maps:
        cover = _describe(labels, maps[0], files)
        bounds = bounds.shared(cover.bands[0].grid.bounds)
    site = Site(name=name, layers=opened, labels=cover, crs=crs, bounds=bounds, metres=_metres(crs))
    return site, left_out


def _metres(crs: str) -> float:
    """Return the metres of a unit; degrees count as at the equator."""
    if crs.startswith(("EPSG:326", "EPSG:327")):
        return 1.0
    pyproj = require("pyproj", "geo")
    known = pyproj.CRS.from_user_input(crs)
    if known.is_geographic:
        return METRES_PER_DEGREE
    return float(known.axis_info[0].unit_conversion_factor) if known.axis_info else 1.0


def _layer(
    name: str, layer: Layer, found: list[Found], known: LayerFiles, left_out: list[str]
) -> SiteLayer:
    files = tuple(_joined(layer, found, known, left_out))
    first = files[0]
    for file in files[1:]:
        if file.crs != first.crs:
            raise DataError(
                f"{file.path} is in {file.crs[:60]}, {first.path} in {first.crs[:60]}; files of "
                f"layer {name!r} of one site have one reference system. Check the pattern's "
                "{site}."
            )
    _check_baselines(name, layer, files)
    pairs = [(t, f, d) for f, file in enumerate(files) for d, t in enumerate(file.times)]
    times = np.array([t for t, _, _ in pairs], "datetime64[s]")
    order = np.argsort(times, kind="stable")  # unknown dates last
    for i, j in pairwise(order):
        (_, a, _), (_, b, _) = pairs[i], pairs[j]
        if a != b and np.isnat(times[i]):
            _refuse_equal_dates(name, files[a], files[b], times[i])
        if a != b and times[i] == times[j] and not (files[a].has_names and files[b].has_names):
            _refuse_equal_dates(name, files[a], files[b], times[i])  # they may be other bands
    places: list[tuple[tuple[int, int], ...]] = []
    starts: list[Any] = []
    for i in order:
        _, file_number, date = pairs[i]
        if starts and times[i] == times[starts[-1]]:
            _tell_processings(files[places[-1][0][0]], files[file_number])
            places[-1] = (*places[-1], (file_number, date))
        else:
            places.append(((file_number, date),))
            starts.append(i)
    return SiteLayer(files, tuple(places), times[starts])


def _tell_processings(first: LayerFile, second: LayerFile) -> None:
    """Say that an acquisition is there in two processings, of which the first one counts."""
    both = first.baselines[:1], second.baselines[:1]
    if first.kind == "safe" and both[0] != both[1]:
        _log.warning(
            "%s and %s are one acquisition in two processings; where the first has data, it counts "
            "alone. Keep the one that is meant.", first.path, second.path,
        )  # fmt: skip


def _check_baselines(name: str, layer: Layer, files: Sequence[LayerFile]) -> None:
    """Check that all values can be converted, and that dates of 04.00 are not read as those before.

    Raises:
        DataError: There is no conversion, or dates of both kinds have the same one.
    """
    kinds: dict[bool, dict[Any, str]] = {False: {}, True: {}}
    for file in files:
        for date in range(len(file.times)):
            unit = file.stored_unit(layer.stored_unit, date)
            baseline = file.baselines[date]
            for band in file.bands:
                how = conversion(band, layer.value_unit, unit, file.path)
                if baseline is not None:
                    kinds[baseline >= OFFSET_BASELINE][band.name, how] = file.path
    both = kinds[False].keys() & kinds[True].keys()
    if both and layer.stored_unit in ("auto", "dn+1000"):
        alike = next(iter(both))
        raise DataError(
            f"layer {name!r}: dates of Sentinel-2 processing baseline 04.00 and later, which store "
            f"1000 more, and earlier dates are in one series, and nothing tells them apart: "
            f"{kinds[False][alike]} and {kinds[True][alike]}. Set data.init_args.modalities.{name}."
            "stored_unit to baseline (1000 is taken off from 04.00 on), or to dn where the files "
            "have no offset any more."
        )


def _refuse_equal_dates(name: str, first: LayerFile, second: LayerFile, time: Any) -> None:
    """Raise: two files of a layer and site must not be taken for two dates."""
    date = "no date" if np.isnat(time) else f"the date {time}"
    raise DataError(
        f"layer {name!r}: several files of one site have {date}: {first.path} and {second.path}. "
        f"Set data.init_args.modalities.{name}.path to a pattern that tells them apart: {{band}} "
        "where each file holds one band, {date} where their names have dates, {site} where they "
        "show different places; or one that fits one of them only."
    )


def _joined(
    layer: Layer, found: Sequence[Found], known: LayerFiles, left_out: list[str]
) -> Iterator[LayerFile]:
    """Describe files; those of one date that hold a band each become one.

    Dates whose files cannot be read are left out, and `left_out` takes why.

    Raises:
        DataError: A date lacks a band, or has it twice.
        UnreadableError: No date can be read.
    """
    damaged: list[UnreadableError] = []
    count = 0
    for described in _dates_of(layer, found, known):
        try:
            file = described()
        except UnreadableError as error:
            damaged.append(error)
        else:
            count += 1
            yield file
    if damaged and not count:
        raise damaged[0]
    left_out += map(str, damaged)


def _dates_of(
    layer: Layer, found: Sequence[Found], known: LayerFiles
) -> Iterator[Callable[[], LayerFile]]:
    """Yield what describes the file of a date, or the files of its bands together."""
    if not found[0].band:
        yield from (partial(_describe, layer, each, known) for each in found)
        return
    dates: dict[tuple[str, str], dict[str, Found]] = {}
    for each in found:
        several = dates.setdefault((each.date, each.group), {})
        first = several.setdefault(canonical_band(each.band), each)
        if first is not each:
            raise DataError(
                f"band {each.band!r} of one site and date is in {first.path} and {each.path}. Tell "
                "them apart in the pattern of data.init_args.modalities.<name>.path by {date} or "
                "{site}, or let it fit one of them only."
            )
    for several in dates.values():
        lacking = [band for band in layer.bands if canonical_band(band) not in several]
        if lacking:
            raise DataError(
                f"{next(iter(several.values())).path}: no file of this site and date holds band "
                f"{lacking[0]!r}; there are: {', '.join(sorted(several))}."
            )
        yield partial(_of_bands, layer, several, known)


def _of_bands(layer: Layer, several: Mapping[str, Found], known: LayerFiles) -> LayerFile:
    """Describe the files of one date that hold a band each, as one."""
    files: list[LayerFile] = []
    for band in layer.bands:
        file = _describe(replace(layer, bands=(band,)), several[canonical_band(band)], known)
        files.append(file)
        if file.crs != files[0].crs or not np.array_equal(file.times, files[0].times, True):
            raise DataError(
                f"{file.path} and {files[0].path} hold bands of one site and date, but differ "
                "in reference system or dates."
            )
    return replace(files[0], bands=tuple(replace(f.bands[0], path=f.path) for f in files))


def _sought(layer: Layer) -> Sought:
    return Sought(
        bands=layer.bands,
        step_hint=layer.gsd_m,
        mask=layer.mask.variable if layer.mask else None,
        crs=layer.crs,
    )


def _describe(layer: Layer, found: Found, files: LayerFiles) -> LayerFile:
    file = files.get(_sought(layer), found)
    if layer.nodata is None:
        return file
    more = layer.nodata if isinstance(layer.nodata, tuple | list) else (layer.nodata,)
    bands = tuple(replace(band, nodata=(*band.nodata, *more)) for band in file.bands)
    return replace(file, bands=bands)


def _reason_against(site: Site, sides: Sequence[float], dates: Dates) -> str:
    shared = site.bounds.height * site.metres, site.bounds.width * site.metres
    for has, needs in zip(shared, sides, strict=True):
        if has < needs * (1 - 1e-6):
            return (
                f"the layers share {max(has, 0):g} m, less than the windows' {needs:g} m "
                "(data.init_args.window.size)"
            )
    for name, layer in site.layers.items():
        usable, needed = len(dates.usable(layer.times)), max(1, dates.drawn(name))
        if usable < needed:
            return f"layer {name} has {usable} dates in the period, {needed} are needed"
    if not dates.is_series and not len(anchors(site, dates)):
        return f"no two dates of its layers lie within {dates.max_gap_days} days"
    return ""


def anchors(site: Site, dates: Dates) -> list[dict[str, int]]:
    """Return each date of the layer with the fewest, with the nearest one of every other layer.

    Combinations that are further apart than `max_gap_days` are left out; unknown dates fit all.
    """
    usable = {n: dates.usable(layer.times) for n, layer in site.layers.items()}
    timed = [n for n, layer in site.layers.items() if not np.isnat(layer.times[usable[n]]).all()]
    if not timed:
        first = min(usable, key=lambda n: len(usable[n]))
        return [
            {n: int(places[min(i, len(places) - 1)]) for n, places in usable.items()}
            for i in range(len(usable[first]))
        ]
    anchor = min(timed, key=lambda n: len(usable[n]))
    combinations = []
    for place in usable[anchor]:
        time = site.layers[anchor].times[place]
        chosen = {anchor: int(place)}
        for name, places in usable.items():
            if name == anchor:
                continue
            times = site.layers[name].times[places]
            if name not in timed:
                chosen[name] = int(places[0])
                continue
            gaps = np.where(np.isnat(times), np.iinfo(np.int64).max, abs(times - time).astype(int))
            best = int(gaps.argmin())
            if gaps[best] <= dates.max_gap_days * 86_400:
                chosen[name] = int(places[best])
        if len(chosen) == len(usable):
            combinations.append(chosen)
    return combinations
