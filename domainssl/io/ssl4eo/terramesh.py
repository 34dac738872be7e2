"""Where the files of TerraMesh lie: shards of one `.zarr.zip` per location, products missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from domainssl.errors import DataError, UnreadableError, counted, nearest
from domainssl.io.ssl4eo.facts import TERRAMESH
from domainssl.io.ssl4eo.layout import (
    MEMBERS_PER_GROUP,
    Catalogue,
    Group,
    member_stem,
    shape_of_any,
    with_sizes,
)
from domainssl.io.ssl4eo.opened import OpenedFiles
from domainssl.io.storage.archives import Member
from domainssl.io.storage.paths import is_folder, join, list_folder

__all__ = ["RELEASE", "is_terramesh", "products_at", "scan_terramesh"]

RELEASE = "TerraMesh"
_SPLITS = ("train", "val")
_THREADS = 8
_SHOWN = 5
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
    names = list_folder(folder, options)
    return [n for n in names if n.endswith(".tar") and not n.startswith(".")]


def scan_terramesh(
    root: str,
    split: str,
    products: Mapping[str, str],
    storage_options: Mapping[str, Any] | None = None,
    beside: Mapping[str, str] | None = None,
) -> Catalogue:
    """Find the shards of a split and pair their members by key.

    A location belongs to the catalogue if it has one of the products; shards and members of the
    others may be missing. A shard that cannot be read counts as missing and is named.

    Args:
        root: Folder or fsspec URL that holds `<split>/<product>/`.
        split: `train` or `val`.
        products: Product of each modality key, e.g. `{"s1": "S1RTC", "dem": "DEM"}`.
        storage_options: fsspec options for a URL.
        beside: Further products, taken where locations have them, that make no location.

    Raises:
        DataError: Nothing is there, or no tar can be read.
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
    opened.fill({m: found & set(names) for m, found in tars.items()}, next(iter(products)))

    def find(name: str) -> tuple[list[Group], list[str], dict[str, str]]:
        files = {m: join(folders[m], name) if name in tars.get(m, ()) else "" for m in every}
        members, damaged = _members(files, opened)
        return *_groups(name, files, members, products, opened), damaged

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(find, names))
    damaged = {m: [texts[m] for *_, texts in found if m in texts] for m in every}
    unsized = [text for _, own, _ in found for text in own]
    groups = with_sizes(
        [group for own, *_ in found for group in own],
        [*(text for texts in damaged.values() for text in texts), *unsized],
    )
    return Catalogue(
        root=root,
        split=split,
        release=RELEASE,
        products=dict(products),
        groups=groups,
        problems=(
            *_problems(names, tars, every, join(root, split)),
            *_left_out(damaged, folders, tars),
            *unsized,
        ),
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


def _left_out(
    damaged: Mapping[str, Sequence[str]],
    folders: Mapping[str, str],
    tars: Mapping[str, set[str]],
) -> list[str]:
    """Say which shards of a product cannot be read, and what that means for their locations."""
    return [
        f"{folders[m]}: {len(texts)} of {counted(len(tars[m]), 'shard')} cannot be read; their "
        f"locations lack {m!r}, and those that have no other product are left out. "
        + " ".join(texts[:_SHOWN])
        + (" …" if len(texts) > _SHOWN else "")
        for m, texts in damaged.items()
        if texts
    ]


def _members(files: Mapping[str, str], opened: OpenedFiles) -> tuple[_Members, dict[str, str]]:
    """Return the members of a shard, and why files of it cannot be read."""
    members: _Members = {m: {} for m in files}
    damaged = {}
    for m, path in files.items():
        try:
            members[m] = _by_key(opened.members(path), path) if path else {}
        except UnreadableError as error:
            damaged[m] = str(error)
    return members, damaged


def _by_key(entries: Sequence[Member], path: str) -> dict[str, Member]:
    found: dict[str, Member] = {}
    for entry in entries:
        stem = member_stem(entry.key)
        if found.setdefault(stem, entry) is not entry:
            raise UnreadableError(f"{path}: holds the key {stem!r} twice; get the shard again.")
    return found


def _groups(
    name: str,
    files: Mapping[str, str],
    members: _Members,
    products: Mapping[str, str],
    opened: OpenedFiles,
) -> tuple[list[Group], list[str]]:
    """Return the runs of locations of one shard, and why no size of theirs is known."""
    keys = list(dict.fromkeys(key for m in products for key in members[m]))
    if not keys:
        return [], []
    problems: list[str] = []
    files = {m: path if members[m] else "" for m, path in files.items()}
    own = (files[m] for m in products if files[m])
    _, _, rows, columns = shape_of_any(own, opened, problems)
    return [
        Group(
            key=f"{name.removesuffix('.tar')}#{low}",
            release=RELEASE,
            products=dict(products),
            files=files,
            count=len(run),
            dates=1,
            size=(rows, columns),
            members={m: tuple(found.get(key) for key in run) for m, found in members.items()},
            storage_options=opened.options,
        )
        for low in range(0, len(keys), MEMBERS_PER_GROUP)
        for run in [keys[low : low + MEMBERS_PER_GROUP]]
    ], problems
