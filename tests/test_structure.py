"""The layout rules that keep data, methods and tools independent of each other."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "domainssl"

COMMON = {
    "modality", "missing", "sensors", "units", "errors", "arguments", "options", "files", "screen",
    "cache", "distributed", "pieces", "lazy", "_torch",
}  # fmt: skip
NETWORK = COMMON | {"nn", "losses"}
LEARNERS = NETWORK | {"backbones", "training"}
# What each part may import, besides itself; HOUSE: bytes, arrays, items, batches, training, use.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "lazy": set(),
    "_torch": set(),
    "arguments": {"errors"},
    "options": {"errors"},
    "files": {"errors"},
    "screen": set(),
    "sensors": {"errors"},
    "missing": set(),
    "modality": {"errors", "arguments", "sensors"},
    "units": {"errors", "missing", "modality", "sensors"},
    "distributed": {"errors"},
    "cache": {"errors", "files"},
    "cluster": {"errors"},
    "pieces": {"errors", "files", "cache", "arguments", "cluster"},
    "io": COMMON,
    "loading": COMMON,
    "sources": COMMON | {"io", "loading"},
    "datamodules": COMMON | {"io", "loading", "sources"},
    "nn": COMMON,
    "losses": COMMON | {"nn"},
    "backbones": NETWORK,
    "training": NETWORK | {"backbones"},
    "objectives": LEARNERS,
    "tasks": LEARNERS,
    "evaluation": NETWORK | {"backbones"},
    "callbacks": LEARNERS | {"evaluation", "tasks"},
    "inference": LEARNERS | {"io", "loading", "sources", "tasks"},
    "inspection": COMMON | {"io", "loading", "sources", "datamodules"},
}
TOP = {"matrix", "bench", "cli", "api"}  # nothing else imports these
EVERYTHING = {*ALLOWED, *TOP}
ALLOWED |= {
    "matrix": EVERYTHING - {"cli"},
    "bench": EVERYTHING - {"cli"},
    "cli": EVERYTHING - {"api"},
    "api": EVERYTHING,
}
ALLOWED["__main__"] = {"cli"}
ALLOWED["__init__"] = {"modality", "backbones", "errors"}


@cache
def sources() -> list[Path]:
    """All Python files of the package, links followed, relative to it."""
    found = []
    for folder, folders, files in os.walk(PACKAGE, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found += [Path(folder, f).relative_to(PACKAGE) for f in files if f.endswith(".py")]
    return sorted(found)


def part(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, lazily or not, except for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if _is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        else:
            yield from imports(node)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text(encoding="utf-8"), filename=str(path))


def test_the_scan_follows_the_links_into_the_package() -> None:
    parts = {part(path) for path in sources()}
    assert {"datamodules", "objectives", "backbones", "nn", "cli"} <= parts
    for link in ("datamodules", "recipes", "configs"):
        assert os.readlink(PACKAGE / link) == f"../{link}"


def test_every_part_of_the_package_has_a_rule() -> None:
    assert {part(path) for path in sources()} <= set(ALLOWED)


def test_imports_point_in_the_allowed_direction() -> None:
    wrong = []
    for path in sources():
        own = part(path)
        for line, name in imports(parse(path)):
            parts = name.split(".")
            where = f"{path}:{line}: {name}"
            if parts[0] in ("datamodules", "recipes", "configs"):
                wrong.append(f"{where}; import domainssl.{parts[0]}")
            if parts[0] == "domainssl" and parts[1] in EVERYTHING - ALLOWED[own] - {own}:
                wrong.append(f"{where}; {own} must not import it")
            if name.startswith("torch.distributed") and own != "distributed" and _collective(name):
                wrong.append(f"{where}; only domainssl.distributed calls collectives")
    assert not wrong, "\n".join(wrong)


def test_no_two_files_import_each_other() -> None:
    """Imports inside functions count too: they hide a circle, they do not open it."""
    known = {_module(path): path for path in sources()}
    arrows: dict[str, set[str]] = {}
    for own, path in known.items():
        targets = set()
        for _, name in imports(parse(path)):
            target = name if name in known else name.rpartition(".")[0]
            if target in known and target != own and known[target].name != "__init__.py":
                targets.add(target)
        arrows[own] = targets
    circles = [" <-> ".join(circle) for circle in _circles(arrows)]
    assert not circles, "\n".join(circles)


def _module(path: Path) -> str:
    return ".".join(("domainssl", *path.with_suffix("").parts)).removesuffix(".__init__")


def _circles(arrows: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Groups of files each of which reaches the others (Tarjan)."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[tuple[str, ...]] = []

    def visit(name: str) -> None:
        numbers[name] = lowest[name] = len(numbers)
        stack.append(name)
        for target in sorted(arrows[name]):
            if target not in numbers:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], numbers[target])
        if lowest[name] == numbers[name]:
            at = stack.index(name)
            group, stack[at:] = tuple(sorted(stack[at:])), []
            if len(group) > 1:
                found.append(group)

    for name in sorted(arrows):
        if name not in numbers:
            visit(name)
    return found


def _collective(name: str) -> bool:
    """Whether the import gives access to collectives; sharding classes and types do not."""
    return not name.startswith(
        (
            "torch.distributed.fsdp",
            "torch.distributed.tensor",
            "torch.distributed.device_mesh",
            "torch.distributed.checkpoint",
            "torch.distributed._composable",
        )
    )


def test_every_file_opens_with_a_docstring_and_names_what_it_offers() -> None:
    wrong = []
    for path in sources():
        tree = parse(path)
        if tree.body and not ast.get_docstring(tree):
            wrong.append(f"{path}: no module docstring")
        names = [
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        ]
        if "__all__" not in names and path.name not in ("__init__.py", "__main__.py"):
            wrong.append(f"{path}: no __all__")
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_stay_short() -> None:
    wrong = []
    for path in sources():
        tree = parse(path)
        count = _code_lines(path, tree)
        if count > 400:
            wrong.append(f"{path}: {count} lines of code, wanted at most 400")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                if length > 60:
                    wrong.append(f"{path}: {node.name} has {length} lines, wanted at most 60")
    assert not wrong, "\n".join(wrong)


def _code_lines(path: Path, tree: ast.Module) -> int:
    """Lines that are neither blank, nor comment, nor docstring."""
    documented: set[int] = set()
    for node in ast.walk(tree):
        holders = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, holders) and ast.get_docstring(node):
            text = node.body[0]
            documented |= set(range(text.lineno, (text.end_lineno or 0) + 1))
    lines = (PACKAGE / path).read_text(encoding="utf-8").splitlines()
    return sum(
        number not in documented and bool(line.strip()) and not line.strip().startswith("#")
        for number, line in enumerate(lines, 1)
    )


IMPORT_EVERYTHING = """
import importlib, pkgutil, sys

EXTRAS = {"zarr", "numcodecs", "xarray", "rasterio", "pyproj", "torchgeo", "monai", "nibabel",
          "pydicom", "openslide", "tifffile", "pandas", "geopandas", "matplotlib"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"{name!r} belongs to an extra", name=name)

import domainssl
assert "torch" not in sys.modules, "import domainssl must not import torch"
import torch
import lightning.pytorch  # its own imports are not ours to forbid
sys.meta_path.insert(0, Block())
before = (torch.initial_seed(), torch.get_default_dtype(), torch.get_num_threads(),
          torch.get_float32_matmul_precision(), torch.get_rng_state().sum().item(),
          torch.are_deterministic_algorithms_enabled())
count = 0
for module in pkgutil.walk_packages(domainssl.__path__, "domainssl."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        count += 1
after = (torch.initial_seed(), torch.get_default_dtype(), torch.get_num_threads(),
         torch.get_float32_matmul_precision(), torch.get_rng_state().sum().item(),
         torch.are_deterministic_algorithms_enabled())
assert before == after, (before, after)
print("imported", count)
"""


def test_every_module_imports_without_the_extras_and_without_side_effects(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DOMAINSSL_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_EVERYTHING],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 20
    assert not list(tmp_path.iterdir()), "importing wrote files"


def test_constructors_take_twelve_arguments_at_most() -> None:
    long = []
    for path in sources():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                count = len(node.args.args) + len(node.args.kwonlyargs) - 1
                if count > 12:
                    long.append(f"{path}:{node.lineno}: {count} arguments; put some into a group")
    assert not long


def test_large_dataclasses_are_built_by_keyword() -> None:
    """More than four fields, inherited ones counted, are never told apart by their order."""
    known: dict[tuple[str, str], tuple[str, ast.ClassDef, dict[str, tuple[str, str]]]] = {}
    for path in sources():
        tree, module = parse(path), _module(path)
        names = {name.rpartition(".")[2]: name.rpartition(".")[::2] for _, name in imports(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and _dataclass_line(node):
                known[module, node.name] = (f"{path}:{node.lineno}", node, names)

    def with_bases(key: tuple[str, str]) -> Iterator[tuple[str, str]]:
        yield key
        for base in known[key][1].bases:
            name = ast.unparse(base)
            found = known[key][2].get(name, (key[0], name))
            if found in known:
                yield from with_bases(found)

    wrong = []
    for key in known:
        line = list(with_bases(key))
        count = sum(_fields_to_give(known[one][1]) for one in line)
        positional = [one for one in line if "kw_only=True" not in _dataclass_line(known[one][1])]
        if count > 4 and positional:
            wrong.append(f"{known[key][0]}: {key[1]} has {count} fields; kw_only=True is wanted")
    assert len(known) > 50
    assert not wrong, "\n".join(wrong)


def _dataclass_line(node: ast.ClassDef) -> str:
    """The decorator that makes a dataclass of it, or nothing."""
    lines = [ast.unparse(one) for one in node.decorator_list]
    return next((line for line in lines if line.split("(")[0].endswith("dataclass")), "")


def _fields_to_give(node: ast.ClassDef) -> int:
    fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
    return sum(
        "ClassVar" not in ast.unparse(one.annotation)
        and not (one.value and "init=False" in ast.unparse(one.value))
        for one in fields
    )
