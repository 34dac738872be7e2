"""What users share of a fine-tuned model: `task.safetensors` and, beside it, `task.json`."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from domainssl import tasks
from domainssl.arguments import class_name, class_of, plain
from domainssl.backbones.card import (
    card_at,
    describe_modalities,
    refuse_earlier,
    tensors_of,
    write_export,
)
from domainssl.backbones.hub import HubAddress, check_sha256, fetch_weights
from domainssl.backbones.tensors import read_tensors
from domainssl.errors import WeightsError, nearest, parsing
from domainssl.tasks.base import Task
from domainssl.tasks.tuning import merge_adapters

__all__ = ["TaskCard", "export_task", "is_task", "load_task", "whole_task"]

FORMAT = "domainssl.task/1"
CARD_NAME, TENSORS_NAME = "task.json", "task.safetensors"


@dataclass(frozen=True, kw_only=True)
class TaskCard:
    """What a fine-tuned model takes and says, and where it comes from.

    Attributes:
        name: Class of the task with its module.
        kind: `classification`, `segmentation`, `regression` or `change`.
        classes: Names by number; empty where it predicts numbers.
        arguments: Constructor arguments; the backbone is given by class and arguments.
        modalities: Bands in order, unit, resolution and the statistics that normalise, by name.
        sha256: Of the tensors file.
        licence: Licence of the weights, as an SPDX name where there is one.
        provenance: Free facts: data identity, run, versions, the weights it started from.
        format: Version of this file's layout.
    """

    name: str
    kind: str
    classes: list[str]
    arguments: dict[str, Any]
    modalities: dict[str, dict[str, Any]]
    sha256: str
    licence: str = "unspecified"
    provenance: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT


def whole_task(task: Task) -> Task:
    """Return a copy on the CPU in evaluation mode, its tensors whole and its adapters merged.

    Where the tensors are sharded, all ranks call it.
    """
    state = {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().cpu()
        for name, t in task.state_dict().items()
    }
    arguments = {**task.arguments, "backbone": task.backbone.to_dict()}
    return _built(class_of(task), arguments, state)


def _built(cls: type, arguments: Mapping[str, Any], state: Mapping[str, Any]) -> Task:
    with torch.random.fork_rng(devices=[]):
        task: Task = cls(**arguments)
    task.load_state_dict(dict(state), strict=True)
    if task.tuning.mode == "lora":
        merge_adapters(task.backbone)
    task.arguments = {**plain(task.arguments), "tuning": {"mode": "full"}}
    return task.eval()


def export_task(
    task: Task,
    folder: str | Path,
    *,
    licence: str = "unspecified",
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a task, its backbone and normalisation included, and its card.

    Both files appear complete or not at all. Adapters of `lora` are merged.

    Args:
        task: What to write.
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
    whole = whole_task(task)
    content = save({name: t.contiguous() for name, t in whole.state_dict().items()})
    modalities = describe_modalities(whole.backbone)
    backbone = whole.backbone.to_dict()
    backbone["arguments"]["modalities"] = modalities
    card = TaskCard(
        name=class_name(class_of(task)),
        kind=task.kind,
        classes=list(task.classes),
        arguments={**whole.arguments, "backbone": backbone},
        modalities={name: facts for name, facts in modalities.items() if name in task.modalities},
        sha256=hashlib.sha256(content).hexdigest(),
        licence=licence,
        provenance=plain(
            {
                "torch": torch.__version__,
                "started_from": task.arguments["backbone"],
                "tuning": task.arguments["tuning"],
                **(provenance or {}),
            }
        ),
    )
    write_export("task", card, target, folder / TENSORS_NAME, content)
    return target


def is_task(path: str | Path) -> bool:
    """Tell whether there is a task at a path: an export, a run or a checkpoint of one.

    Raises:
        WeightsError: It is a checkpoint that cannot be read.
    """
    path = Path(path)
    if path.suffix == ".ckpt":
        return path.is_file() and isinstance(read_tensors(path).get("task"), dict)
    return _files(path)[0].is_file()


def load_task(path: str | Path, *, sha256: str | None = None) -> Task:
    """Load a fine-tuned model that takes raw physical values and normalises them itself.

        task = load_task("runs/finetune_tiles/task")
        probabilities = task.logits({"he": tiles}).softmax(1)    # (B, K); task.classes names them

    Args:
        path: The folder of an export or of a run, the card or the tensors file, or a checkpoint;
            or one of these on the Hugging Face Hub (`hf://owner/repository[/path][@revision]`).
        sha256: Of the file of the weights, compared before anything in it is parsed.

    Returns:
        The task in evaluation mode, on the CPU; its `classes` are those of the card.

    Raises:
        WeightsError: There is no task, its files are damaged, of another version or of another
            hash, or they cannot be fetched.
        MissingExtraError: An address on the hub is given and huggingface_hub is not installed.
    """
    source = path
    if HubAddress.matches(path):
        address = HubAddress.parse(path)
        path = fetch_weights(address, with_card=True, tensors_name=TENSORS_NAME)
    path = Path(path).expanduser()
    card_path, tensors_path = _files(path)
    is_checkpoint = path.suffix == ".ckpt"
    if sha256 is not None:
        check_sha256(path if is_checkpoint else tensors_path, sha256, source, "sha256=…")
    if is_checkpoint:
        return _of_checkpoint(path)
    for needed in (card_path, tensors_path):
        if not needed.is_file():
            raise WeightsError(
                f"{needed} does not exist; an exported task is the pair {CARD_NAME} and "
                f"{TENSORS_NAME}. {_advice(path)}"
            )
    card = card_at(card_path, TaskCard)
    content = tensors_of(card, card_path, tensors_path)
    with parsing(
        f"{card_path}: card and tensors do not fit this version; the task",
        kind=WeightsError,
        advice="Export it again, or install the version that its card names under provenance.",
        also=(SafetensorError,),
    ):
        return _watched(_built(_task_class(card.name), card.arguments, load(content)))


def _watched(task: Task) -> Task:
    task.backbone.watch_units()
    return task


def _files(path: Path) -> tuple[Path, Path]:
    """Return where card and tensors are, whether or not they exist."""
    if path.suffix in (".json", ".safetensors") and not path.is_dir():
        return path.with_suffix(".json"), path.with_suffix(".safetensors")
    if not (path / CARD_NAME).exists() and (path / "task").is_dir():
        path = path / "task"  # the folder of a run
    return path / CARD_NAME, path / TENSORS_NAME


def _advice(path: Path) -> str:
    if (path / "backbone.json").exists() or (path / "backbone").is_dir():
        return "There is a backbone, which predicts nothing: see load_backbone, or fine-tune it."
    return (
        "Copy both files, or export again: python -m domainssl export --checkpoint RUN --output "
        "FOLDER."
    )


def _of_checkpoint(path: Path) -> Task:
    content = read_tensors(path)
    facts, arguments = content.get("task"), content.get("hyper_parameters")
    if not isinstance(facts, dict) or not isinstance(arguments, dict):
        raise WeightsError(
            f"{path} is no checkpoint of a task (it has no 'task' entry). Load the backbone of a "
            "pretraining run with load_backbone."
        )
    with parsing(
        f"{path}: does not fit this version; the task",
        kind=WeightsError,
        advice="Use the version that wrote the checkpoint, or another checkpoint.",
    ):
        given = {**arguments, "backbone": facts["backbone"]}
        return _watched(_built(_task_class(str(facts["name"])), given, content["state_dict"]))


def _task_class(name: str) -> type[Task]:
    """Return a task by name with module; classes of others must be imported first.

    Raises:
        WeightsError: There is no such task.
    """
    for module in pkgutil.iter_modules(tasks.__path__, f"{tasks.__name__}."):
        importlib.import_module(module.name)

    def below(cls: type[Task]) -> list[type[Task]]:
        return [c for child in cls.__subclasses__() for c in (child, *below(child))]

    known = {class_name(cls): cls for cls in below(Task)}
    if name not in known:
        raise WeightsError(
            f"There is no task {name!r}.{nearest(name, known)} Known: {', '.join(sorted(known))}. "
            "A class of your own must be imported before its export is loaded."
        )
    return known[name]
