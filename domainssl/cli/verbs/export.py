"""Write the backbone of a checkpoint as safetensors with a card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from domainssl.errors import ConfigError

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Export a Lightning checkpoint of ours, or a file in a reference layout."""
    parser = argparse.ArgumentParser(
        prog="python -m domainssl export",
        description="Write backbone.safetensors and backbone.json (the card: bands, units, "
        "statistics, origin) from a checkpoint. Load them with "
        "domainssl.load_backbone(FOLDER).",
    )
    parser.add_argument("--checkpoint", required=True, help="a .ckpt file, or the folder of a run")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--licence", default="unspecified", help="licence of the weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    options = parser.parse_args(argv)
    checkpoint = _checkpoint(Path(options.checkpoint).expanduser())
    output = Path(options.output).expanduser()
    _check_target(output, options.overwrite)

    from rich.markup import escape

    from domainssl import export_backbone, load_backbone
    from domainssl.cli.console import console

    backbone = load_backbone(checkpoint)
    provenance: dict[str, Any] = {"checkpoint": checkpoint.name, **_run_facts(checkpoint)}
    card = export_backbone(
        backbone,
        output,
        licence=options.licence,
        provenance=provenance,
        overwrite=options.overwrite,
    )
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
    screen.print(f"load it with  domainssl.load_backbone({str(output)!r})", markup=False)
    return 0


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


def _check_target(output: Path, overwrite: bool) -> None:
    if output.is_file():
        raise ConfigError(f"--output {str(output)!r} is a file; give a folder.")
    if (output / "backbone.json").exists() and not overwrite:
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
