"""Where the files of SSL4EO-S12 v1.1 lie: release, partner files, groups of locations.

Release A is one `.zarr.zip` of 64 locations per product; release B is tars of one `.zarr.zip`
per location. A `Group` is what both have in common: a run of locations that all products hold
in the same order, small enough to be read as one block.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Self

from domainssl.errors import DataError, UnreadableError, nearest
from domainssl.io.ssl4eo.facts import product as look_up
from domainssl.io.ssl4eo.opened import OpenedFiles
from domainssl.io.storage.archives import Member
from domainssl.io.storage.paths import (
    fetch_ranges,
    is_file,
    is_folder,
    join,
    list_folder,
    open_file,
    size_of,
)

__all__ = [
    "MEMBERS_PER_GROUP",
    "Catalogue",
    "Group",
    "member_stem",
    "scan",
    "shape_of_any",
    "with_sizes",
]

logger = logging.getLogger(__name__)

MEMBERS_PER_GROUP = 64
_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Group:
    """Locations that lie together in the files of every product, in the same order.

    Attributes:
        key: Unique within the catalogue, the file's name (and first member in release B).
        release: `A`, `B`, `TerraMesh`, or `1.0` and `1.0 LMDB`.
        products: Product of each modality key.
        files: File of each modality key.
        count: Number of locations.
        dates: Number of dates stored per location.
        size: Rows and columns of a tile.
        members: In tars: per modality key the (key, offset, size) of each location; None where
            the location lacks the product (TerraMesh).
        storage_options: fsspec options with which the files are opened.
    """

    key: str
    release: str
    products: Mapping[str, str]
    files: Mapping[str, str]
    count: int
    dates: int
    size: tuple[int, int]
    members: Mapping[str, tuple[Member | None, ...]] = field(default_factory=dict, repr=False)
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def stem(self, at: int) -> str:
        """Return the key of a location in tars: its member's name, without the ending."""
        found = (members[at] for members in self.members.values())
        return next(member_stem(member.key) for member in found if member is not None)


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """What a scan found."""

    root: str
    split: str
    release: str
    products: Mapping[str, str]
    groups: tuple[Group, ...]
    problems: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of locations."""
        return sum(group.count for group in self.groups)

    def locations(self) -> Iterator[str]:
        """Yield what locations are called in tars and folders; nothing where files hold many."""
        for group in self.groups:
            yield from (group.stem(at) for at in range(group.count) if group.members)

    @property
    def dates(self) -> int:
        """Dates per location, the least over all groups."""
        return min(group.dates for group in self.groups)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of a tile, the least over all groups."""
        sizes = [group.size for group in self.groups]
        return min(rows for rows, _ in sizes), min(columns for _, columns in sizes)

    def logged(self) -> Self:
        """Return it, with its problems in the log."""
        for problem in self.problems:
            logger.warning("%s", problem)
        return self

    def identity(self, hashed: int = 8) -> dict[str, Any]:
        """Return what tells these data from others.

        Args:
            hashed: How many files per modality, evenly spread, have their head and tail hashed
                (a zip's tail is its directory with the checksums of all members).

        Returns:
            Release, split, counts, total sizes and hashes, JSON-able.
        """
        out: dict[str, Any] = {
            "release": self.release, "split": self.split, "locations": self.count, "files": {},
            **({"first": self.groups[0].key} if self.release.startswith("1.0") else {}),
        }  # fmt: skip
        for modality, name in self.products.items():
            files = list(dict.fromkeys(g.files[modality] for g in self.groups if g.files[modality]))
            options = self.groups[0].storage_options
            if self.release.startswith("1.0"):  # folders of locations, of LMDB
                files = [path for path in files if not is_folder(path)]
            sizes = [size_of(path, options) for path in files]
            digest = hashlib.sha256()
            step = max(1, len(files) // max(1, hashed))
            for path, size in list(zip(files, sizes, strict=True))[::step][:hashed]:
                ends = [(0, min(size, 4096)), (max(0, size - 4096), min(size, 4096))]
                for part in fetch_ranges(path, ends, options):
                    digest.update(part)
            names = [path.rsplit("/", 1)[-1] for path in files]
            listing = "\n".join(f"{n} {s}" for n, s in zip(names, sizes, strict=True))
            out["files"][modality] = {
                "product": name,
                "count": len(files),
                "bytes": sum(sizes),
                "names_and_sizes": hashlib.sha256(listing.encode()).hexdigest(),
                "headers": digest.hexdigest(),
            }
        return out


def scan(
    root: str,
    split: str,
    products: Mapping[str, str],
    storage_options: Mapping[str, Any] | None = None,
) -> Catalogue:
    """Find the files of a split and pair them over products.

    Args:
        root: Folder or fsspec URL that holds `<split>/<product>/`, or `<product>/` directly.
        split: `train` or `val`.
        products: Product of each modality key, e.g. `{"s1": "S1GRD", "s2": "S2L2A"}`.
        storage_options: fsspec options for a URL.

    Raises:
        DataError: Nothing is there, releases are mixed, a partner file is missing, tars diverge.
    """
    root, options = str(root), dict(storage_options or {})
    if not products:
        raise DataError("SSL4EO-S12: no product asked for, e.g. {'s1': 'S1GRD', 's2': 'S2L2A'}")
    for name in products.values():
        look_up(name)
    folders = _folders(root, split, products, options)
    names = {  # `._` files are what macOS lays beside others
        m: [name for name in list_folder(folder, options) if not name.startswith(".")]
        for m, folder in folders.items()
    }
    release = _release(folders, names)
    ending = ".zarr.zip" if release == "A" else ".tar"
    names = {m: [n for n in found if n.endswith(ending)] for m, found in names.items()}
    names, listed = _listed(root, split, names, options) if release == "A" else (names, [])
    paired = _partners(folders, names)
    files = [{m: join(folders[m], name) for m in products} for name in paired]
    find = _release_a if release == "A" else _release_b
    opened = OpenedFiles(folders, release, options)
    opened.fill(dict.fromkeys(products, paired), next(iter(products)))
    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(pool.map(lambda f: find(f, dict(products), opened), files))
    groups = with_sizes(
        [group for found, _ in results for group in found],
        [problem for _, told in results for problem in told],
    )
    gone = " It is left out, with its partners." if len(products) > 1 else " It is left out."
    problems = (
        *listed,
        *(problem if found else problem + gone for found, told in results for problem in told),
    )
    return Catalogue(
        root=root,
        split=split,
        release=release,
        products=dict(products),
        groups=groups,
        problems=problems,
    ).logged()


def _folders(
    root: str, split: str, products: Mapping[str, str], options: Mapping[str, Any]
) -> dict[str, str]:
    if not is_folder(root, options):
        raise DataError(
            f"data.root: no folder at {root!r}. Give the folder that holds train/ and val/ of "
            "SSL4EO-S12 v1.1, or 'sample' for the embedded sample."
        )
    base = join(root, split) if is_folder(join(root, split), options) else root
    there = list_folder(base, options)
    missing = [name for name in products.values() if name not in there]
    if missing:
        raise DataError(
            f"data.root: {base!r} has no folder {missing[0]!r}; it holds: "
            f"{', '.join(there[:12]) or 'nothing'}. Expected <root>/{split}/<product>/ with the "
            "files of SSL4EO-S12 v1.1; set data.root to that root, or to 'sample' for the "
            f"embedded sample.{nearest(missing[0], there)}"
        )
    return {modality: join(base, name) for modality, name in products.items()}


def _release(folders: Mapping[str, str], names: Mapping[str, Sequence[str]]) -> str:
    kinds = {}
    for modality, found in names.items():
        zips = any(name.endswith(".zarr.zip") for name in found)
        tars = any(name.endswith(".tar") for name in found)
        if zips == tars:
            have, word = ("both", "and") if zips else ("neither", "nor")
            advice = "Keep each release in a folder of its own" if zips else "Download its files"
            raise DataError(
                f"{folders[modality]}: {have} .zarr.zip files (release A) {word} .tar files "
                f"(release B); one kind was expected. {advice}."
            )
        kinds[modality] = "A" if zips else "B"
    if len(set(kinds.values())) > 1:
        raise DataError(
            f"SSL4EO-S12: releases are mixed ({kinds}); their values and pairing differ. "
            "Take all products from one release."
        )
    return next(iter(kinds.values()))


def _listed(
    root: str, split: str, names: dict[str, list[str]], options: Mapping[str, Any]
) -> tuple[dict[str, list[str]], list[str]]:
    """Return the files that the list of a split names, and where the two differ."""
    path = join(root, "splits", f"ssl4eos12_{split}.txt")
    if not is_file(path, options):
        return names, []
    with open_file(path, options) as file:
        listed = {line.strip() for line in file.read().decode().splitlines() if line.strip()}
    kept = {m: [name for name in found if name in listed] for m, found in names.items()}
    for modality, found in kept.items():
        if not found:
            raise DataError(
                f"{path}: none of its {len(listed)} names is among the {len(names[modality])} "
                f"files of modality {modality!r}. Remove the list or correct it."
            )
    there = set().union(*names.values())
    problems = [
        f"{path}: {len(odd)} {text}, such as {min(odd)}; left out"
        for odd, text in (
            (listed - there, "of its files are not there"),
            (there - listed, "files that are there are not in the list"),
        )
        if odd
    ]
    return kept, problems


def _partners(folders: Mapping[str, str], names: Mapping[str, Sequence[str]]) -> list[str]:
    union = sorted(set().union(*names.values()))
    for modality, found in names.items():
        there = set(found)
        missing = [name for name in union if name not in there]
        if missing:
            others = [m for m, have in names.items() if missing[0] in have]
            raise DataError(
                f"missing partner file: {join(folders[modality], missing[0])!r} is not there, "
                f"but {others[0]!r} has {missing[0]!r}"
                + (f" ({len(missing)} such files)" if len(missing) > 1 else "")
                + ". Download it, or remove its partners."
            )
    return union


def shape_of_any(
    paths: Iterable[str], opened: OpenedFiles, problems: list[str]
) -> tuple[int, int, int, int]:
    """Return locations, dates, rows and columns by the first partner file that opens, else zeros.

    A damaged file must not hide its good partners: reading it will name it.
    """
    for path in paths:
        try:
            return opened.shape(path)
        except DataError as error:
            problems.append(str(error))
    return 0, 0, 0, 0


def _release_a(
    files: dict[str, str], products: dict[str, str], opened: OpenedFiles
) -> tuple[list[Group], list[str]]:
    problems: list[str] = []
    key = next(iter(files.values())).rsplit("/", 1)[-1].removesuffix(".zarr.zip")
    count, dates, rows, columns = shape_of_any(files.values(), opened, problems)
    return [
        Group(
            key=key,
            release="A",
            products=products,
            files=files,
            count=count,
            dates=dates,
            size=(rows, columns),
            members={},
            storage_options=opened.options,
        )
    ], problems


def with_sizes(groups: Sequence[Group], problems: Sequence[str]) -> tuple[Group, ...]:
    """Give groups of which nothing can be opened the size of the others; reading names them.

    Raises:
        DataError: There is no group of a known size: the first problem.
    """
    known = next((group for group in groups if group.count and group.size[0]), None)
    if known is None:
        raise DataError(problems[0] if problems else f"{groups[0].key}: holds no location")
    return tuple(
        group if group.size[0]
        else replace(
            group, count=group.count or known.count, dates=known.dates, size=known.size
        )
        for group in groups
    )  # fmt: skip


def _release_b(
    files: dict[str, str], products: dict[str, str], opened: OpenedFiles
) -> tuple[list[Group], list[str]]:
    try:
        members = {m: opened.members(path) for m, path in files.items()}
    except UnreadableError as error:
        return [], [str(error)]
    first, *others = members
    keys = [member_stem(entry.key) for entry in members[first]]
    for other in others:
        theirs = [member_stem(entry.key) for entry in members[other]]
        if theirs != keys:
            at = next(
                (i for i, (a, b) in enumerate(zip(keys, theirs, strict=False)) if a != b),
                min(len(keys), len(theirs)),
            )
            raise DataError(
                f"{files[other]}: its keys diverge from {files[first]} at member {at}: "
                f"{theirs[at] if at < len(theirs) else 'end of the tar'!r}, expected "
                f"{keys[at] if at < len(keys) else 'end of the tar'!r}. "
                "The shards are not from the same release, or one is incomplete."
            )
    groups, problems = [], list[str]()
    _, dates, rows, columns = shape_of_any(files.values(), opened, problems)
    stem = files[first].rsplit("/", 1)[-1].removesuffix(".tar")
    for low in range(0, len(keys), MEMBERS_PER_GROUP):
        run = {m: tuple(found[low : low + MEMBERS_PER_GROUP]) for m, found in members.items()}
        groups.append(
            Group(
                key=f"{stem}#{low}",
                release="B",
                products=products,
                files=files,
                count=len(run[first]),
                dates=dates,
                size=(rows, columns),
                members=run,
                storage_options=opened.options,
            )
        )
    return groups, problems


def member_stem(member: str) -> str:
    """Return the key of a location: the name of its member in the tar, without its ending."""
    return member.rsplit("/", 1)[-1].removesuffix(".zarr.zip")
