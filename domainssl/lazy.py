"""Packages that offer what their files list in `__all__`, imported on first use.

A new file needs no entry anywhere: the files are read, not imported, when a name is asked for.
"""

from __future__ import annotations

import ast
import importlib
import sys
from functools import cache
from pathlib import Path

__all__ = ["exported", "lazily"]


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

    A function that is called like its file, such as `nn.attention.attention`, is left out: that
    name is the file's.
    """
    file = sys.modules[package].__file__
    assert file is not None
    root = Path(file).parent
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: (len(path.parts), path)):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part.startswith("_") for part in parts):
            continue
        for name in _listed(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault(name, ".".join((package, *parts)))
    modules = {path.stem for path in root.glob("*.py")} | {path.name for path in root.iterdir()}
    return {name: home for name, home in sorted(found.items()) if name not in modules}


def _listed(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    return []
