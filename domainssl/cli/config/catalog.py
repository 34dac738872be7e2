"""Find classes by their short names without importing the modules that define them."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

from domainssl.errors import ConfigError
from domainssl.lazy import parsed

__all__ = ["configs", "find_classes", "full_name", "package_folder", "recipes", "summaries"]

_FOLDERS = {
    "model": ("objectives", "tasks"),
    "data": ("datamodules",),
    "callbacks": ("callbacks",),
    "loggers": (),
}
_ROOTS = {
    "model": {"Objective", "Task", "TrainingModule", "LightningModule"},
    "data": {"DomainDataModule", "LightningDataModule"},
    "callbacks": {"Callback", "CheckpointHooks"},
    "loggers": set(),
}


def package_folder() -> Path:
    """Return the folder of the installed package."""
    return Path(__file__).resolve().parents[2]


@cache
def find_classes(kind: str) -> dict[str, str]:
    """Return short name -> dotted path for `model`, `data`, `callbacks` or `loggers`.

    Ours win over Lightning's of the same name. The files are read, not imported.

    Raises:
        ConfigError: Two files define a class of one name.
    """
    found = _lightning_names(kind) if kind in ("callbacks", "loggers") else {}
    bases: dict[str, set[str]] = {}
    homes: dict[str, list[str]] = {}
    for folder in _FOLDERS[kind]:
        for path in _sources(folder):
            body = parsed(path).body
            renamed = _renamed_imports(body)
            for node in body:
                if isinstance(node, ast.ClassDef):
                    parents = {_last_name(base) for base in node.bases}
                    bases[node.name] = {renamed.get(name, name) for name in parents}
                    homes.setdefault(node.name, []).append(f"{_module(path)}.{node.name}")
    roots = _ROOTS[kind] | set(found)
    known = {name for name, parents in bases.items() if parents & roots}
    while True:
        more = {name for name, parents in bases.items() if parents & known} - known
        if not more:
            break
        known |= more
    for name in sorted(known - _ROOTS[kind]):
        if len(homes[name]) > 1:
            raise ConfigError(f"{name!r} is defined twice: {homes[name]}. Rename one of them.")
        if not name.startswith("_"):
            found[name] = homes[name][0]
    return found


@cache
def summaries(kind: str) -> dict[str, str]:
    """Return short name -> first line of the docstring, for the classes of this package."""
    found: dict[str, str] = {}
    for folder in _FOLDERS[kind]:
        for path in _sources(folder):
            for node in parsed(path).body:
                if isinstance(node, ast.ClassDef) and node.name in find_classes(kind):
                    found[node.name] = (ast.get_docstring(node) or "").partition("\n")[0]
    return found


def _sources(folder: str) -> list[Path]:
    """Return the files of a part of the package, those in subfolders included."""
    return sorted((package_folder() / folder).rglob("*.py"))


def _module(path: Path) -> str:
    return ".".join(("domainssl", *path.relative_to(package_folder()).with_suffix("").parts))


def full_name(kind: str, name: str) -> str | None:
    """Return the dotted path of a class, or None when a short name is unknown."""
    return name if "." in name else find_classes(kind).get(name)


def recipes() -> dict[str, Path]:
    """Return the recipes of the working directory and of the package, by relative path."""
    return _files("recipes")


def configs() -> dict[str, Path]:
    """Return the overlays of the working directory and of the package, by relative path."""
    return _files("configs")


def _files(folder: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for base in (package_folder(), Path.cwd()):
        root = base / folder
        for path in sorted(root.rglob("*.yaml")):
            found[str(Path(folder) / path.relative_to(root))] = path
    return dict(sorted(found.items()))


def _last_name(base: ast.expr) -> str:
    if isinstance(base, ast.Subscript):
        base = base.value
    return base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")


def _renamed_imports(body: list[ast.stmt]) -> dict[str, str]:
    """Return the names given by `from x import A as B`, B -> A."""
    return {
        alias.asname: alias.name
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }


def _lightning_names(kind: str) -> dict[str, str]:
    spec = importlib.util.find_spec("lightning")
    if spec is None or not spec.submodule_search_locations:
        return {}
    init = Path(spec.submodule_search_locations[0]) / "pytorch" / kind / "__init__.py"
    names: list[str] = []
    for node in ast.walk(parsed(init)):
        if isinstance(node, ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
    skip = {"Callback", "Logger"}
    return {
        name: f"lightning.pytorch.{kind}.{name}"
        for name in sorted(names)
        if name[:1].isupper() and name not in skip
    }
