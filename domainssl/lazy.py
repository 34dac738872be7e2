"""Packages that offer what their files list in `__all__`, imported on first use.

A new file needs no entry anywhere: the files are read, not imported, when a name is asked for.
"""

from __future__ import annotations

import ast
import importlib
import sys
from functools import cache
from pathlib import Path

__all__ = ["exported", "lazily", "parsed"]


def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of one of the package's files."""
    text = path.read_text(encoding="utf-8")
    try:
        return ast.parse(text)
    except SystemError:
        # CPython 3.11: a finalizer that parses while the tree is built upsets the counter of both
        return ast.parse(text)


def lazily(package: str, name: str) -> object:
    """Return what a package offers under a name; called by its `__getattr__`.

    Raises:
        AttributeError: No file of the package lists the name.
    """
    if name == "__all__":
        return list(exported(package))
    home = None if name.startswith("_") else exported(package).get(name)
    if home is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


@cache
def exported(package: str) -> dict[str, str]:
    """Return name -> module of everything that the files of a package list in `__all__`.

    Left out are names that several files define, generators of samples, and a function that is
    called like its file, such as `nn.attention.attention`: that name is the file's.
    """
    file = sys.modules[package].__file__
    assert file is not None
    root = Path(file).parent
    homes: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not any(part.startswith("_") or part == "samples" for part in parts):
            for name in _defined(parsed(path)):
                homes.setdefault(name, []).append(".".join((package, *parts)))
    modules = {path.stem for path in root.iterdir()}
    return {n: h[0] for n, h in sorted(homes.items()) if len(h) == 1 and n not in modules}


def _defined(tree: ast.Module) -> list[str]:
    """Return the names in a file's `__all__` that it does not import from another file."""
    listed: list[str] = []
    imported: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            listed = [str(name) for name in ast.literal_eval(node.value)]
        elif isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name for alias in node.names}
    return [name for name in listed if name not in imported]
