"""Where the files of TerraMesh lie: shards of one `.zarr.zip` per location, products missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from domainssl.errors import DataError, nearest
from domainssl.io.raster.zarr import Cube
from domainssl.io.ssl4eo.facts import TERRAMESH
from domainssl.io.ssl4eo.layout import (
    MEMBERS_PER_GROUP,
    Catalogue,
    Group,
    member_stem,
)
from domainssl.io.ssl4eo.opened import OpenedFiles, tile_facts
from domainssl.io.storage.archives import Member, ZipFileStore
from domainssl.io.storage.paths import fetch_ranges, is_folder, join, list_folder

__all__ = ["RELEASE", "is_terramesh", "products_at", "scan_terramesh"]

RELEASE = "TerraMesh"
_SPLITS = ("train", "val")
_THREADS = 8
_TRIES = 4  # locations that are opened for the size of a shard's
_Members = dict[str, dict[str, Member]]  # modality -> key -> member


def products_at(root: str, options: Mapping[str, Any] | None = None) -> dict[str, list[str]]:
    """Return the products that have shards in each split that has any."""
    found = {}
    for split in _SPLITS:
        names = [name for name in TERRAMESH if _tars(join(root, split, name), options)]
        if names:
            found[split] = names
    return found


def is_terramesh(root: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether a folder holds TerraMesh: a product, or shards by a name, that it alone has."""
    return any(
        name == "S1RTC" or _tars(join(root, split, name), options)[0].startswith("majortom_")
        for split, products in products_at(root, options).items()
        for name in products
    )


def _tars(folder: str, options: Mapping[str, Any] | None) -> list[str]:
    return [name for name in list_folder(folder, options) if name.endswith(".tar")]


def scan_terramesh(
    root: str,
    split: str,
    products: Mapping[str, str],
    storage_options: Mapping[str, Any] | None = None,
    beside: Mapping[str, str] | None = None,
) -> Catalogue:
    """Find the shards of a split and pair their members by key.

    A location belongs to the catalogue if it has one of the products; shards and members of the
    others may be missing.

    Args:
        root: Folder or fsspec URL that holds `<split>/<product>/`.
        split: `train` or `val`.
        products: Product of each modality key, e.g. `{"s1": "S1RTC", "dem": "DEM"}`.
        storage_options: fsspec options for a URL.
        beside: Further products, taken where locations have them, that make no location.

    Raises:
        DataError: Nothing is there, or a tar cannot be read.
    """
    options = dict(storage_options or {})
    every = {**products, **(beside or {})}
    folders = _folders(root, split, every, options)
    tars = {m: set(_tars(folder, options)) for m, folder in folders.items()}
    names = sorted(set().union(*(found for m, found in tars.items() if m in products)))
    if not names:
        raise DataError(
            f"data.root: {join(root, split)!r} holds no .tar in {', '.join(products.values())}. "
            "TerraMesh is <root>/<split>/<product>/*_shard_*.tar; do not unpack the shards, but "
            "their compression if they have one (.tar.gz)."
        )

    opened = OpenedFiles(folders, RELEASE, options)
    opened.fill({m: found & set(names) for m, found in tars.items()}, None)

    def find(name: str) -> list[Group]:
        files = {m: join(folders[m], name) if name in tars.get(m, ()) else "" for m in every}
        return _groups(name, files, every, products, opened)

    with ThreadPoolExecutor(_THREADS) as pool:
        groups = tuple(group for found in pool.map(find, names) for group in found)
    if not groups:
        raise DataError(f"{join(root, split)}: no tar holds a .zarr.zip member")
    return Catalogue(
        root=root,
        split=split,
        release=RELEASE,
        products=dict(products),
        groups=groups,
        problems=tuple(_problems(names, tars, every, join(root, split))),
    ).logged()


def _folders(
    root: str, split: str, products: Mapping[str, str], options: Mapping[str, Any]
) -> dict[str, str]:
    """Return the folders that are there; a product may be missing in one split, not in all."""
    if not is_folder(root, options):
        raise DataError(
            f"data.root: no folder at {root!r}. Give the folder that holds train/ and val/ of "
            "TerraMesh, or 'sample' for the embedded sample."
        )
    there = {s: list_folder(join(root, s), options) for s in _SPLITS}
    if not any(there.values()):
        there = {split: list_folder(root, options)}
    every = sorted({name for found in there.values() for name in found})
    missing = [name for name in products.values() if name not in every]
    if missing:
        raise DataError(
            f"data.root: {root!r} has no folder {missing[0]!r} in any split; it holds: "
            f"{', '.join(every[:12]) or 'nothing'}. Expected <root>/<split>/<product>/ with the "
            f"shards of TerraMesh.{nearest(missing[0], every)}"
        )
    base = join(root, split) if is_folder(join(root, split), options) else root
    own = there.get(split, there.get(next(iter(there)), []))
    return {m: join(base, name) for m, name in products.items() if name in own}


def _problems(
    names: Sequence[str], tars: Mapping[str, set[str]], products: Mapping[str, str], where: str
) -> list[str]:
    """Say which products have no shard at all of a split."""
    return [
        f"{where}: no shard of {products[m]}; items lack {m!r}"
        for m in products
        if not tars.get(m, set()) & set(names)
    ]


def _groups(
    name: str,
    files: Mapping[str, str],
    every: Mapping[str, str],
    products: Mapping[str, str],
    opened: OpenedFiles,
) -> list[Group]:
    """Return the runs of locations of one shard."""
    members: _Members = {m: {} for m in every}
    for m, path in files.items():
        if not path:
            continue
        for entry in opened.members(path):
            stem = member_stem(entry.key)
            if stem in members[m]:
                raise DataError(f"{path}: holds the key {stem!r} twice; get the shard again.")
            members[m][stem] = entry
    keys = list(dict.fromkeys(key for m in products for key in members[m]))
    if not keys:
        return []
    size = _size(files, members, products, keys, opened.options)
    return [
        Group(
            key=f"{name.removesuffix('.tar')}#{low}",
            release=RELEASE,
            products=dict(products),
            files=dict(files),
            count=len(run),
            dates=1,
            size=size,
            members={m: tuple(members[m].get(key) for key in run) for m in every},
            storage_options=opened.options,
        )
        for low in range(0, len(keys), MEMBERS_PER_GROUP)
        for run in [keys[low : low + MEMBERS_PER_GROUP]]
    ]


def _size(
    files: Mapping[str, str],
    members: _Members,
    products: Mapping[str, str],
    keys: Sequence[str],
    options: Mapping[str, Any],
) -> tuple[int, int]:
    """Return rows and columns of the first location that can be opened; reading names others.

    Raises:
        DataError: None of the first ones can be opened.
    """
    problem: DataError | None = None
    for key in keys[:_TRIES]:
        m = next(m for m in products if key in members[m])
        entry = members[m][key]
        where = f"{files[m]}:{entry.key}"
        try:
            [raw] = fetch_ranges(files[m], [(entry.offset, entry.size)], options)
            _, _, rows, columns = tile_facts(Cube(ZipFileStore(raw, where), where), 4)
            return rows, columns
        except DataError as error:
            problem = problem or error
    assert problem is not None
    raise problem
