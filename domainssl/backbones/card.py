"""What users share: `backbone.safetensors` and, beside it, `backbone.json`, the card."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch
from safetensors.torch import save
from torch import nn

from domainssl.arguments import class_name, class_of, plain
from domainssl.backbones.base import Backbone
from domainssl.errors import DomainSSLError, WeightsError, parsing
from domainssl.files import open_regular, read_json

__all__ = [
    "Card", "ExportError", "card_at", "describe_modalities", "export_backbone", "export_files",
    "read_card", "refuse_earlier", "tensors_of", "weights_digest", "write_export",
]  # fmt: skip

FORMAT = "domainssl.backbone/1"
CARD_NAME, TENSORS_NAME = "backbone.json", "backbone.safetensors"
C = TypeVar("C")
_KINDS: dict[str, type] = {"str": str, "list": list, "dict": dict}  # of the fields of cards


class ExportError(DomainSSLError, OSError):
    """A backbone could not be written."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What goes into a backbone, in which units, and where it comes from.

    Attributes:
        name: Class of the backbone with its module; exports before 0.2 hold the class alone.
        arguments: Constructor arguments.
        modalities: Bands in order, unit, resolution and statistics, by modality name.
        normalization: Form per modality.
        embed_dim: Feature width per name.
        sha256: Of the tensors file.
        licence: Licence of the weights, as an SPDX name where there is one.
        provenance: Free facts: objective, data identity, run, versions, sources.
        format: Version of this file's layout.
    """

    name: str
    arguments: dict[str, Any]
    modalities: dict[str, dict[str, Any]]
    normalization: dict[str, str]
    embed_dim: dict[str, int]
    sha256: str
    licence: str = "unspecified"
    provenance: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT


def weights_digest(module: nn.Module) -> str:
    """Return a hash of names, shapes and values of the weights of a backbone or task."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def describe_modalities(backbone: Backbone) -> dict[str, dict[str, Any]]:
    """Return the modalities with the statistics that really normalise."""
    described = {}
    for name, modality in backbone.modalities.items():
        facts = modality.to_dict()
        statistics = backbone.normalizer.statistics(name)
        if statistics is not None:
            facts["mean"], facts["std"] = (s.double().tolist() for s in statistics)
        described[name] = facts
    return described


def _changes(backbone: Backbone) -> dict[str, Any]:
    """Return how weights were fitted to other bands, where they were."""
    changes = [
        {name: value for name, value in vars(change).items() if value is not None}
        for change in backbone.band_changes
    ]
    return {"bands": changes} if changes else {}


def _write_pair(contents: dict[Path, bytes]) -> None:
    """Write files under hidden names and rename them, in order, once all are on the disk.

    Of an earlier export in their place everything stays until then; the last name, that of the
    card, is taken away for the moment in which the others change.
    """
    hidden = {path: path.with_name(f".{path.name}.{uuid4().hex}.tmp") for path in contents}
    for path in contents:  # what a killed export has left
        for stale in path.parent.glob(f".{path.name}.*.tmp"):
            stale.unlink(missing_ok=True)
    try:
        for path, content in contents.items():
            with hidden[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        list(contents)[-1].unlink(missing_ok=True)
        for path in contents:
            hidden[path].replace(path)
    finally:
        for temporary in hidden.values():
            temporary.unlink(missing_ok=True)


def export_backbone(
    backbone: Backbone,
    folder: str | Path,
    *,
    licence: str = "unspecified",
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a backbone and its card.

    Both files appear complete or not at all, and an earlier export stays until then; the card
    names the hash of the tensors, so that a pair of different exports is noticed.

    Args:
        backbone: What to write.
        folder: Created where it does not exist.
        licence: Licence of the weights.
        provenance: Plain facts about their origin.
        overwrite: Replace an earlier export.

    Returns:
        Path of the card.

    Raises:
        WeightsError: The folder already holds an export.
        ExportError: The disk is full or not writable.
    """
    folder = Path(folder)
    target = folder / CARD_NAME
    refuse_earlier(target, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in backbone.state_dict().items()}
    content = save(tensors)
    modalities = describe_modalities(backbone)
    card = Card(
        name=class_name(class_of(backbone)),
        arguments={**backbone.arguments, "modalities": modalities},
        modalities=modalities,
        normalization={name: str(form) for name, form in backbone.normalizer.forms.items()},
        embed_dim=dict(backbone.embed_dim),
        sha256=hashlib.sha256(content).hexdigest(),
        licence=licence,
        provenance=plain({"torch": torch.__version__, **_changes(backbone), **(provenance or {})}),
    )
    write_export("backbone", card, target, folder / TENSORS_NAME, content)
    return target


def refuse_earlier(target: Path, *, overwrite: bool) -> None:
    """Refuse to write over an export.

    Raises:
        WeightsError: There is one, and it is not to be replaced.
    """
    if target.exists() and not overwrite:
        raise WeightsError(f"{target} exists already; pass overwrite=True (--overwrite).")


def write_export(noun: str, card: Any, target: Path, tensors: Path, content: bytes) -> None:
    """Write a card and its tensors file, both or none.

    Args:
        noun: What is exported, for the message.
        card: A dataclass.
        target: Path of the card; its folder is made where it does not exist.
        tensors: Path of the tensors file.
        content: Of that file.

    Raises:
        ExportError: The disk is full or not writable.
    """
    text = json.dumps(asdict(card), indent=1, allow_nan=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_pair({tensors: content, target: text.encode()})
    except OSError as error:
        raise ExportError(
            f"The {noun} was not exported to {str(target.parent)!r}: {error}. Nothing of it is "
            "left there, and an earlier export is as it was. Make room and export again out of "
            "the run's checkpoint: python -m domainssl export --checkpoint RUN --output FOLDER"
        ) from error


def export_files(path: Path) -> tuple[Path, Path]:
    """Return where the card and the tensors of an export are, whether or not they exist.

    Args:
        path: The folder of the export or of its run, the card or the tensors file.
    """
    if path.suffix in (".json", ".safetensors") and not path.is_dir():
        return path.with_suffix(".json"), path.with_suffix(".safetensors")
    if path.is_dir() and not (path / CARD_NAME).exists() and (path / "backbone").is_dir():
        path = path / "backbone"  # the folder of a run
    folder = path if path.is_dir() else path.parent
    return folder / CARD_NAME, folder / TENSORS_NAME


def read_card(path: Path) -> tuple[Card, bytes]:
    """Read a card and the bytes of its tensors file, and compare their hash.

    Args:
        path: The folder of the export or of its run, the card or the tensors file.

    Raises:
        WeightsError: A file is missing, damaged, or of another export.
    """
    card_path, tensors_path = export_files(path)
    for needed in (card_path, tensors_path):
        if not needed.is_file():
            raise WeightsError(
                f"{needed} does not exist; an exported backbone is the pair {CARD_NAME} and "
                f"{TENSORS_NAME}. {_task_advice(path)}"
            )
    card = card_at(card_path, Card)
    return card, tensors_of(card, card_path, tensors_path)


def _task_advice(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    there = [place for place in (folder, folder / "task") if (place / "task.json").is_file()]
    if there:
        return (
            f"In {there[0]} lies a task, a backbone with its head: load_task({str(there[0])!r}) "
            f"loads it, python -m domainssl predict {there[0]} INPUT uses it."
        )
    return "Copy both files, or export again."


def tensors_of(card: Any, card_path: Path, tensors_path: Path) -> bytes:
    """Return the bytes of the tensors file that belongs to a card.

    Raises:
        WeightsError: It cannot be read, is damaged or of another export.
    """
    with parsing(f"{tensors_path}:", kind=WeightsError, advice="Check its permissions."):
        with open_regular(tensors_path) as file:
            content = file.read()
    digest = hashlib.sha256(content).hexdigest()
    if digest != card.sha256:
        raise WeightsError(
            f"{tensors_path} has sha256 {digest[:16]}…, but {card_path.name} belongs to "
            f"{card.sha256[:16]}…: the file is damaged or of another export. Copy both again."
        )
    return content


def card_at(path: Path, cls: type[C]) -> C:
    """Read a card whose fields are there and of their types.

    Args:
        path: The JSON file.
        cls: A dataclass whose field `format` has the version as default.

    Raises:
        WeightsError: It is no card of this version, or damaged.
    """
    facts = read_json(path, kind=WeightsError)
    known = {entry.name: entry for entry in fields(cast(Any, cls))}
    version = known["format"].default
    if (
        not isinstance(facts, dict)
        or facts.get("format") != version
        or not known.keys() >= set(facts)
    ):
        found = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
        raise WeightsError(
            f"{path} is no card of this version: expected 'format': {version!r}, found {found!r}."
        )
    for name, entry in known.items():
        if name not in facts:
            if entry.default is MISSING and entry.default_factory is MISSING:
                raise WeightsError(f"{path} has no field {name!r}; export or copy it again.")
            continue
        value, wanted = facts[name], _KINDS[str(entry.type).partition("[")[0]]
        if not isinstance(value, wanted):
            raise WeightsError(
                f"{path}: {name!r} is a {type(value).__name__}, expected a "
                f"{wanted.__name__}; the card was changed or is damaged. Export or copy it again."
            )
    return cls(**facts)
