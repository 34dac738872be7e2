"""Checkpoints in a folder, one file per rank: looked through before torch reads them.

torch reads the folder's `.metadata` with pickle, and what is no tensor with `weights_only=False`;
either runs what the file says. Both are read here first, by parsers that admit only what
`torch.distributed.checkpoint` writes.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from domainssl.errors import WeightsError, parsing

__all__ = ["check_sharded_folder"]

_LIMIT = 2**28  # bytes of `.metadata`
_PATHS = {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}
_NAMES = {
    "collections": {"OrderedDict"},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,  # where Python 3.13 has them
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Knows the names that a checkpoint's metadata have, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a known class."""
        is_known = name in _NAMES.get(module, ())
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_known and not is_dtype:
            raise pickle.UnpicklingError(f"names {module}.{name}")
        return super().find_class(module, name)


def check_sharded_folder(folder: Path) -> None:
    """Refuse a folder that holds more than tensors and plain values.

    Args:
        folder: What a strategy with `save_distributed_checkpoint` has written.

    Raises:
        WeightsError: It is incomplete, damaged, names code, or names files outside of it.
    """
    for needed in (".metadata", "meta.pt"):
        if not (folder / needed).is_file():
            raise WeightsError(
                f"Checkpoint {str(folder)!r} is a folder without {needed!r}: it was cut off while "
                "it was written, or is no checkpoint. Name another one with --ckpt_path."
            )
    with parsing(
        f"Checkpoint {str(folder)!r}: its metadata",
        kind=WeightsError,
        advice="Checkpoints of domainssl hold plain data only; another one was refused, because "
        "reading it would run whatever code it brings.",
        also=(pickle.UnpicklingError,),
    ):
        with open(folder / ".metadata", "rb") as file:
            metadata = _Unpickler(io.BytesIO(file.read(_LIMIT))).load()
        for place in metadata.storage_data.values():
            name = place.relative_path
            if not isinstance(name, str) or Path(name).name != name or name == "..":
                raise ValueError(f"a file outside the folder is named, {name!r}")
        torch.load(folder / "meta.pt", map_location="cpu", weights_only=True)
        for index, place in metadata.storage_data.items():
            if _is_plain(metadata.state_dict_metadata[index.fqn]):
                with open(folder / place.relative_path, "rb") as file:
                    file.seek(place.offset)
                    torch.load(io.BytesIO(file.read(place.length)), weights_only=True)


def _is_plain(entry: Any) -> bool:
    """Return whether an entry is no tensor, so that torch would unpickle it."""
    return type(entry).__name__ != "TensorStorageMetadata"
