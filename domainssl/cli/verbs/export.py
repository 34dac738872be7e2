"""Write backbone or task of a checkpoint with a card: as safetensors, or as a graph."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from domainssl.cli.words import Parser
from domainssl.errors import ConfigError

__all__ = ["run"]

_OF = {False: "classes", True: "numbers"}


def run(argv: list[str]) -> int:
    """Export a Lightning checkpoint of ours, or a file in a reference layout."""
    options = _parser().parse_args(argv)
    is_graph = options.format in ("onnx", "torch_export")
    if (options.size and not is_graph) or (options.modalities and options.format == "safetensors"):
        raise ConfigError(
            "--modalities and --size belong to graphs; add --format onnx or --format torch_export "
            "(--modalities also goes with --format timm)."
        )
    if options.format == "timm" and len(options.modalities or []) > 1:
        raise ConfigError(
            f"--modalities {' '.join(options.modalities)}: models of timm take one; name one."
        )
    checkpoint = _checkpoint(Path(options.checkpoint).expanduser())
    output = Path(options.output).expanduser()
    _check_target(output, options.overwrite, is_graph)
    if is_graph:
        return _graph(options, checkpoint, output)

    from rich.markup import escape

    from domainssl import export_backbone, export_timm
    from domainssl.cli.console import console
    from domainssl.tasks.export import is_task

    is_of_task = checkpoint.suffix == ".ckpt" and is_task(checkpoint)
    if is_of_task and options.format == "safetensors" and not options.backbone:
        return _task(options, checkpoint, output)
    backbone = _backbone(checkpoint)
    facts: dict[str, Any] = {
        "licence": options.licence,
        "provenance": {"checkpoint": checkpoint.name, **_run_facts(checkpoint)},
        "overwrite": options.overwrite,
    }
    if options.format == "timm":
        sensor = options.modalities[0] if options.modalities else None
        card = export_timm(backbone, output, modality=sensor, **facts)
    else:
        card = export_backbone(backbone, output, **facts)
    size = (output / "backbone.safetensors").stat().st_size / 1e6
    screen = console()
    screen.print(
        f"[bold]exported[/] {type(backbone).__name__} ({size:.1f} MB) to {escape(str(output))}"
    )
    for name, modality in backbone.modalities.items():
        bands = " ".join(modality.channels)
        screen.print(
            f"  {name}: {modality.num_channels} bands {bands} ({modality.value_unit})", markup=False
        )
    screen.print(f"  card: {card}", markup=False)
    call = f"domainssl.load_backbone({str(output)!r})"
    if options.format == "timm":
        call = (
            f"domainssl.register_timm(); timm.create_model('local-dir:{output}', pretrained=True)"
        )
    screen.print(f"load it with  {call}", markup=False)
    return 0


def _task(options: argparse.Namespace, checkpoint: Path, output: Path) -> int:
    """Write a fine-tuned model, and say what it takes and predicts."""
    from domainssl.cli.console import console
    from domainssl.tasks.export import export_task, load_task

    task = load_task(checkpoint)
    facts = {"checkpoint": checkpoint.name, **_run_facts(checkpoint)}
    card = export_task(
        task, output, licence=options.licence, provenance=facts, overwrite=options.overwrite
    )
    screen = console()
    size = (output / "task.safetensors").stat().st_size / 1e6
    screen.print(f"exported {type(task).__name__} ({size:.1f} MB) to {output}", markup=False)
    for name, modality in task.modalities.items():
        bands = " ".join(modality.channels)
        screen.print(
            f"  {name}: {modality.num_channels} bands {bands} ({modality.value_unit})", markup=False
        )
    if task.classes:
        screen.print(f"  classes: {', '.join(task.classes)}", markup=False)
    screen.print(f"  card: {card}", markup=False)
    screen.print(f"load it with  domainssl.load_task({str(output)!r})", markup=False)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m domainssl export",
        description="Write backbone.safetensors and backbone.json (the card: bands, units, "
        "statistics, origin) from a checkpoint; of a fine-tuning run task.safetensors and "
        "task.json. Load them with domainssl.load_backbone(FOLDER) and load_task(FOLDER). With "
        "--format onnx or torch_export: a graph that takes raw values and runs without this "
        "library, of a fine-tuning run with its head.",
    )
    parser.add_argument("--checkpoint", required=True, help="a .ckpt file, or the folder of a run")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--licence", default="unspecified", help="licence of the weights")
    parser.add_argument(
        "--backbone", action="store_true", help="of a fine-tuning run, write the backbone alone"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--format", choices=("safetensors", "timm", "onnx", "torch_export"), default="safetensors",
        help="timm: for timm.create_model('local-dir:FOLDER') after domainssl.register_timm(); "
        "onnx and torch_export (.pt2) are checked against PyTorch before they are kept",
    )  # fmt: skip
    parser.add_argument("--modalities", nargs="+", metavar="NAME", help="inputs (graphs, timm)")
    parser.add_argument(
        "--size", nargs="+", type=int, metavar="N",
        help="size that the graph is traced with, one number or one per axis (default: the data's)",
    )  # fmt: skip
    return parser


def _graph(options: argparse.Namespace, checkpoint: Path, output: Path) -> int:
    """Write ONNX or a program of torch.export, and say what was measured."""
    from domainssl.backbones.graph import export_graph
    from domainssl.cli.console import console

    size = options.size
    card = export_graph(
        _backbone(checkpoint) if options.backbone else _whole(checkpoint),
        output,
        format=options.format,
        modalities=options.modalities,
        size=size[0] if size and len(size) == 1 else size,
        licence=options.licence,
        provenance={"checkpoint": checkpoint.name, **_run_facts(checkpoint)},
        overwrite=options.overwrite,
    )
    facts = json.loads(card.read_text(encoding="utf-8"))
    screen = console()
    task = facts.get("task")
    what = f"{task['name']} over {facts['backbone']}" if task else facts["backbone"]
    screen.print(f"exported {what} to {output / facts['file']}", markup=False)
    for entry in facts["inputs"]:
        free = "any size" if entry["size_is_free"] else f"size {entry['size']} only"
        screen.print(
            f"  in   {entry['name']}: {entry['axes']}, {' '.join(entry['bands'])} "
            f"({entry['unit']}), {entry['dtype']}, {free}",
            markup=False,
        )
    for entry in facts["outputs"]:
        letter = "K" if task else "E"
        screen.print(
            f"  out  {entry['name']}: {entry['axes']}, {letter}={entry['width']}", markup=False
        )
    if task:
        screen.print(f"  {_OF[task['kind'] == 'regression']}: {', '.join(task['names'])}",
                     markup=False)  # fmt: skip
    check = facts["check"]
    screen.print(
        f"  largest difference from PyTorch {check['largest_difference']:.2g}, at values up to "
        f"{check['largest_value']:.2g}",
        markup=False,
    )
    screen.print(f"  card: {card}", markup=False)
    return 0


def _whole(checkpoint: Path) -> Any:
    """Return the task of a checkpoint, with LoRA merged, or its backbone where it holds no task."""
    from domainssl import load_backbone
    from domainssl.tasks.export import is_task, load_task, whole_task

    if checkpoint.suffix == ".ckpt" and is_task(checkpoint):
        return whole_task(load_task(checkpoint))
    return load_backbone(checkpoint)


def _backbone(checkpoint: Path) -> Any:
    """Return the backbone of a checkpoint, with LoRA merged."""
    from domainssl.tasks.base import Task

    found = _whole(checkpoint)
    return found.backbone if isinstance(found, Task) else found


def _checkpoint(path: Path) -> Path:
    """Return the file to read; for the folder of a run its last checkpoint."""
    if path.is_file():
        return path
    if not path.exists():
        raise ConfigError(
            f"--checkpoint {str(path)!r} does not exist. Runs keep their checkpoints in "
            "runs/NAME/DATE_TIME/checkpoints."
        )
    found = sorted([*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt")])
    last = [p for p in found if p.name == "last.ckpt"]
    if last or len(found) == 1:
        return (last or found)[0]
    listed = ", ".join(str(p.relative_to(path)) for p in found) or "none"
    raise ConfigError(
        f"--checkpoint {str(path)!r} is a folder without one clear checkpoint (last.ckpt); "
        f"name the file. Found: {listed}"
    )


def _check_target(output: Path, overwrite: bool, is_graph: bool) -> None:
    if output.is_file():
        raise ConfigError(f"--output {str(output)!r} is a file; give a folder.")
    cards = [output / "backbone.json", output / "task.json"]
    if not is_graph and any(card.exists() for card in cards) and not overwrite:
        raise ConfigError(
            f"--output {str(output)!r} holds an export already. Choose another folder, or add "
            "--overwrite."
        )


def _run_facts(checkpoint: Path) -> dict[str, Any]:
    """Return what `run.json` of the run says about data, versions and revision."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        record = folder / "run.json"
        if record.is_file():
            facts = json.loads(record.read_text(encoding="utf-8"))
            kept = ("started", "config_files", "versions", "git", "data")
            return {"run": {key: facts.get(key) for key in kept}}
    return {}
