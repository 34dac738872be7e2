"""Read files of weights without running code of their author."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from domainssl.errors import WeightsError

__all__ = ["is_own_file", "read_tensors"]


def read_tensors(path: Path, *, inert_classes: bool = False) -> dict[str, Any]:
    """Read a weights file without unpickling any class.

    Args:
        path: The file.
        inert_classes: Put empty objects in place of classes that the file names besides tensors,
            instead of refusing it; none of their code is imported or run.

    Raises:
        WeightsError: The file is missing, damaged, or holds pickled objects.
    """
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; pass the path of a weights file.")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        stubs = _stubs(path) if inert_classes else []
        with torch.serialization.safe_globals(stubs):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds pickled objects besides tensors and is refused, because unpickling "
            "runs code of its author. Save its state_dict as safetensors where you trust it. "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, SafetensorError, ValueError, LookupError, TypeError,
            AttributeError, OSError, AssertionError, struct.error) as error:  # fmt: skip
        raise WeightsError(f"{path} cannot be read as weights: {error}.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected a dict of tensors.")
    return content


class _Inert:
    """Stands for an object of a class that is not imported; keeps nothing."""

    def __init__(self, *arguments: object) -> None:
        """Accept what the file would have passed on."""

    def __setstate__(self, state: object) -> None:
        """Forget the state."""


def _stubs(path: Path) -> list[Any]:
    """Return an empty class for every name that a checkpoint asks for besides tensors."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in names]


def is_own_file(path: Path) -> bool:
    """Tell exports and checkpoints of this library from files of others.

    Args:
        path: Folder or card of an export, its tensors beside the card, a checkpoint, or weights
            of any other origin.

    Raises:
        WeightsError: It is a checkpoint that is missing or cannot be read.
    """
    if path.suffix == ".ckpt":
        return isinstance(read_tensors(path, inert_classes=True).get("backbone"), dict)
    if path.suffix == ".safetensors":
        return path.with_suffix(".json").exists()
    return path.is_dir() or path.suffix == ".json"
