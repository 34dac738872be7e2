"""Find what belongs together below a root: files per site, by folders or by a pattern.

`{site}` and `{date}` in a pattern stand for parts of file names; equal sites of different layers
are partners.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from domainssl.errors import DataError, nearest
from domainssl.io.raster.bands import is_store
from domainssl.io.raster.geotiff import GEOTIFF_ENDINGS
from domainssl.io.storage.paths import Options, is_file, join, list_folder

__all__ = ["Found", "find_files"]

_ENDINGS = (".zarr.zip", ".zarr", *GEOTIFF_ENDINGS)
_DATE = r"\d{4}-?\d{2}-?\d{2}(?:T\d{6})?"


class Found(NamedTuple):
    """One file of a site.

    Attributes:
        path: File or store.
        date: Date in its name, if the pattern has one.
        group: Folder inside the store.
    """

    path: str
    date: str
    group: str


def find_files(
    root: str, path: str, group: str, options: Options | None = None
) -> dict[str, list[Found]]:
    """Return the files of one layer, by site.

    Args:
        root: Folder, URL, or a single store.
        path: Store, folder or pattern below the root; inside the root if that is a store.
        group: Folder inside the stores.
        options: fsspec options of a URL.

    Raises:
        DataError: There is none.
    """
    if any(sign in path for sign in "{*?"):
        found = _match(root, path, group, options)
        if not found:
            top = ", ".join(list_folder(root, options)[:8]) or "nothing"
            raise DataError(
                f"{root}: no file fits the pattern {path!r}. {root} holds: {top}. "
                "{site} and {date} stand for parts of names, * and ? for anything inside one name."
            )
        return found
    full = join(root, path) if path else root
    single = _single(full, options)
    if single:
        return {_stem(full): [Found(full, "", group)]}
    names = list_folder(full, options)
    inside = [n for n in names if n.lower().endswith(_ENDINGS) and _single(join(full, n), options)]
    if inside:
        return {_stem(n): [Found(join(full, n), "", group)] for n in inside}
    if _single(root, options):  # the layers are folders or variables of one store
        return {_stem(root): [Found(root, "", group or path)]}
    have = list_folder(root, options)
    raise DataError(
        f"{full}: no zarr store (.zarr, .zarr.zip), GeoTIFF, or folder of them. {root} holds: "
        f"{', '.join(have[:12]) or 'nothing'}.{nearest(path, have)} Set data.init_args.layers."
        "<name>.path to a store, a folder, or a pattern such as '{site}/s2_{date}.tif'; root "
        "'sample' makes the embedded sample."
    )


def _single(path: str, options: Options | None) -> bool:
    if path.lower().endswith(GEOTIFF_ENDINGS):
        return "://" in path or is_file(path, options)
    return is_store(path, options)


def _stem(path: str) -> str:
    name = path.rstrip("/").replace("\\", "/").rpartition("/")[2]
    ending = next((e for e in _ENDINGS if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)] or name


def _match(root: str, path: str, group: str, options: Options | None) -> dict[str, list[Found]]:
    """Walk the parts of a pattern, folder by folder."""
    open_: list[tuple[str, dict[str, str]]] = [(root, {})]
    for part in path.strip("/").split("/"):
        further = []
        for folder, known in open_:
            pattern = re.compile(_expression(part, known))
            for name in list_folder(folder, options):
                fit = pattern.fullmatch(name)
                if fit:
                    further.append((join(folder, name), {**known, **fit.groupdict()}))
        open_ = further
    found: dict[str, list[Found]] = {}
    for full, known in open_:
        if full.lower().endswith(_ENDINGS) or _single(full, options):
            site = known.get("site", _stem(root))
            found.setdefault(site, []).append(Found(full, known.get("date", ""), group))
    return found


def _expression(part: str, known: dict[str, str]) -> str:
    text = ""
    seen: set[str] = set()
    for token in re.split(r"(\{site\}|\{date\}|\*|\?)", part):
        if token in ("{site}", "{date}"):
            name = token[1:-1]
            if name in known:
                text += re.escape(known[name])
            elif name in seen:
                text += f"(?P={name})"
            else:
                text += f"(?P<{name}>{_DATE if name == 'date' else '[^/]+?'})"
            seen.add(name)
        else:
            text += {"*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token))
    return text
