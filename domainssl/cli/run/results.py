"""What this library has written at a path, for `inspect`: what it is, and the next command."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainssl.errors import DomainSSLError, WeightsError, counted, parsing, require
from domainssl.files import read_json
from domainssl.inference.outputs import beside
from domainssl.io.slide.bag_folders import find_bags
from domainssl.io.slide.features import read_bag
from domainssl.screen import COMMAND

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["is_folder_of_runs", "render_result", "result_at", "runs_below"]

_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
_VECTORS = (".zarr", ".tif", ".nii.gz", ".nii", ".parquet")
_SHOWN_RUNS = 20
_DEPTH = 3  # folders between a folder of runs and a run: runs/matrix/CELL/seed_0
_Report = dict[str, Any]


def result_at(path: str) -> _Report | None:
    """Describe a run, backbone, task, checkpoint, embedding, predictions or report.

    Args:
        path: File or folder.

    Returns:
        Plain data: `path`, `kind`, `what` in words, `facts`, `next` commands, `problems`; None
        where something else lies there, or nothing.
    """
    place = Path(path).expanduser()
    for find in _FINDERS:
        found = find(place)
        if found is not None:
            return {"path": str(path), "problems": [], **found}
    return None


def _find_runs(place: Path) -> list[Path]:
    """Return the folders of runs at most three folders below."""
    if not os.path.isdir(place):  # also of a name that no file can have, at which 3.13's glob stops
        return []
    patterns = ("/".join(["*"] * depth) for depth in range(1, _DEPTH + 1))
    places = (p.parent for s in patterns for p in sorted(place.glob(f"{s}/run.json")))
    return [each for each in places if _is_run(each)]


def is_folder_of_runs(path: str) -> bool:
    """Tell whether a folder holds runs and nothing else: pictures in it are those of the runs."""
    place = Path(path).expanduser()
    runs = _find_runs(place)
    above = {each for run in runs for each in (run, *run.parents)}
    return bool(runs) and all(p in above or p.name.startswith(".") for p in place.iterdir())


def runs_below(path: str) -> _Report | None:
    """Describe a folder of runs, None where there is none at most three folders below."""
    place = Path(path).expanduser()
    runs = _find_runs(place)
    if not runs:
        return None
    newest_first = sorted(runs, key=lambda run: (run / "run.json").stat().st_mtime, reverse=True)
    shown = {str(run.relative_to(place)): _state(run) for run in newest_first[:_SHOWN_RUNS]}
    return {
        "path": str(path), "kind": "runs", "what": f"a folder of {counted(len(runs), 'run')}",
        "facts": {"runs": len(runs)}, "runs": shown, "problems": [],
        "next": [f"{COMMAND} inspect {newest_first[0]}"],
    }  # fmt: skip


def render_result(report: Mapping[str, Any]) -> RenderableType:
    """Return a report of `result_at` as tables for `rich`."""
    from rich.console import Group as Lines
    from rich.text import Text

    from domainssl.inspection.tables import add_row, facts_table, new_table, next_lines

    parts: list[Any] = [Text(f"{report['path']}: {report['what']}", style="bold")]
    parts.append(facts_table("", report["facts"]))
    if "runs" in report:
        table = new_table("newest first", "run", "state")
        for name, state in report["runs"].items():
            add_row(table, name, state)
        parts.append(table)
    for name, facts in report.get("modalities", {}).items():
        parts.append(facts_table(f"takes {name}", facts))
    parts += [Text(f"problem: {text}", style="bold red") for text in report["problems"]]
    return Lines(*parts, *next_lines(report))


def _facts_in(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file, {} where it is something else."""
    try:
        found = read_json(path) if path.is_file() else None
    except DomainSSLError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and "verb" in _facts_in(folder / "run.json")


def _state(run: Path) -> str:
    """Say in a few words what has become of a run."""
    record = _facts_in(run / "run.json")
    done = [name for name in ("backbone", "task") if _card(run / name) is not None]
    saved = (run / "checkpoints" / "last.ckpt").is_file()
    ended = f"finished: {' and '.join(done)}" if done else "not finished"
    begun = f"{record['verb']}, {str(record.get('started', ''))[:16]}"
    return f"{begun}, {ended}{'' if done or not saved else ', can be continued'}"


def _run(path: Path) -> _Report | None:
    if not _is_run(path):
        return None
    record = _facts_in(path / "run.json")
    last = path / "checkpoints" / "last.ckpt"
    data = record.get("data") or {}
    facts = {
        "recipe": record.get("config_files"),
        "started": record.get("started"),
        "state": _state(path),
        "steps": None,
        "data": {key: data[key] for key in ("format", "root") if key in data},
        "device": record.get("device"),
        **{name: str(path / name) for name in ("backbone", "task") if (path / name).is_dir()},
        "checkpoints": sorted(p.name for p in path.glob("checkpoints/*.ckpt")),
        **_metrics(path / "metrics.csv"),
    }
    after = []
    if _card(path / "task") is not None:
        after += [f"{COMMAND} predict {path} INPUT --output DIR"]
    if _card(path / "backbone") is not None:
        after += [
            f"{COMMAND} evaluate {path} --output evaluation",
            f"{COMMAND} embed {path / 'backbone'} INPUT --output PATH",
        ]
    if not after and last.is_file():
        again = f"{COMMAND} fit --config {path / 'config.yaml'} --run_dir={path} --ckpt_path={last}"
        after = [again, f"{COMMAND} export --checkpoint {path} --output FOLDER"]
    if not after:
        after = [f"{COMMAND} {record['verb']} --config {path / 'config.yaml'} --run_dir=NEW_FOLDER"]
    what = f"the folder of a run of {record['verb']}"
    return {"kind": "run", "what": what, "facts": facts, "next": after}


def _metrics(path: Path) -> dict[str, Any]:
    """Return the last step and the last scores of a run's metrics, without those of baselines."""
    last: dict[str, str] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                last |= {key: value for key, value in row.items() if key and value}
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    kept = ("val/loss", "val/probe/", "val/knn/", "val/retrieval/", "val/metric")
    scores = {k: v for k, v in last.items() if k.startswith(kept)}
    try:
        return {
            "steps": int(last["step"]) + 1 if "step" in last else None,
            "last metrics": {k: round(float(v), 4) for k, v in scores.items()},
        }
    except ValueError:
        return {}


def _card(folder: Path) -> Path | None:
    """Return the card of an exported backbone or task in a folder."""
    names = [folder / "backbone.json", folder / "task.json"]
    return next((name for name in names if name.is_file()), None)


def _export(path: Path) -> _Report | None:
    """Describe an export: its folder, its card or its tensors."""
    if path.is_dir():
        card = _card(path)
    elif path.suffix in (".json", ".safetensors"):
        card = path.with_suffix(".json")
    else:
        return None
    form = str(_facts_in(card).get("format", "")) if card is not None else ""
    if card is None or not form.startswith(("domainssl.backbone/", "domainssl.task/")):
        return None
    return _of_card(path, card, is_task=form.startswith("domainssl.task/"))


def _of_card(path: Path, card_path: Path, *, is_task: bool) -> _Report:
    from domainssl.backbones.card import Card, card_at, tensors_of
    from domainssl.tasks.export import TaskCard

    tensors, problems = card_path.with_suffix(".safetensors"), []
    facts: dict[str, Any] = {}
    modalities: Mapping[str, Any] = {}
    kind = "task" if is_task else "backbone"
    try:
        card = card_at(card_path, TaskCard) if is_task else card_at(card_path, Card)
        modalities = card.modalities
        facts = {"class": card.name.rpartition(".")[2], **_own_facts(card), "licence": card.licence}
        facts |= {k: v for k, v in card.provenance.items() if isinstance(v, str | int | float)}
        tensors_of(card, card_path, tensors)
        facts["MB"] = _megabytes(tensors)
    except WeightsError as error:
        problems.append(str(error))
    if is_task:
        after = [
            f"{COMMAND} predict {path} INPUT --output DIR",
            f"domainssl.load_task({str(path)!r})",
        ]
    else:
        after = [
            f"{COMMAND} evaluate {path} --config RECIPE --output evaluation",
            f"{COMMAND} embed {path} INPUT --output PATH",
            f"domainssl.load_backbone({str(path)!r})",
        ]
    what = "a fine-tuned task" if is_task else "an exported backbone"
    return {
        "kind": kind, "what": what, "facts": facts, "next": [] if problems else after,
        "modalities": {name: _modality(entry) for name, entry in modalities.items()},
        "problems": problems,
    }  # fmt: skip


def _megabytes(path: Path) -> float:
    return float(f"{path.stat().st_size / 1e6:.3g}")


def _own_facts(card: Any) -> dict[str, Any]:
    if hasattr(card, "kind"):
        return {"answers": card.kind, "classes": list(card.classes)}
    return {"features": dict(card.embed_dim), "normalization": dict(card.normalization)}


def _modality(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a person has to know to feed a modality."""
    kept = ("kind", "channels", "value_unit", "size", "gsd_m", "spacing_mm", "mpp_um")
    return {name: entry[name] for name in kept if entry.get(name)}


def _checkpoint(path: Path) -> _Report | None:
    """Describe a checkpoint of Lightning, or the newest of their folder."""
    kept = sorted(path.glob("*.ckpt"), key=lambda p: p.stat().st_mtime) if path.is_dir() else []
    if kept:
        last = path / "last.ckpt"
        found = _checkpoint(last if last.is_file() else kept[-1])
        names = {"checkpoints": [p.name for p in kept]}
        return found and {**found, "facts": {**names, **found["facts"]}}
    if path.suffix != ".ckpt" or not path.is_file():
        return None
    from domainssl.backbones.tensors import read_tensors

    content = read_tensors(path, inert_classes=True)
    backbone, task = content.get("backbone"), content.get("task")
    facts = {
        "task": str(task.get("name", "")).rpartition(".")[2] if isinstance(task, dict) else None,
        "backbone": str(backbone.get("name")) if isinstance(backbone, dict) else None,
        "epoch": content.get("epoch"),
        "steps": content.get("global_step"),
        "MB": _megabytes(path),
    }
    if not isinstance(backbone, dict) and not isinstance(task, dict):
        raise WeightsError(
            f"{path} is no checkpoint of this library: it has neither a 'backbone' nor a 'task' "
            "entry. Weights of other libraries load by name: domainssl.load_backbone(NAME, "
            f"weights={str(path)!r}); domainssl.list_backbones() lists the names."
        )
    after = [f"{COMMAND} export --checkpoint {path} --output FOLDER"]
    config = path.parent.parent / "config.yaml"
    if config.is_file():
        after.append(
            f"{COMMAND} fit --config {config} --ckpt_path={path} --run_dir={config.parent}"
        )
    what = "a checkpoint of a " + ("fine-tuning run" if facts["task"] else "pretraining run")
    return {"kind": "checkpoint", "what": what, "facts": facts, "next": after}


def _graph(path: Path) -> _Report | None:
    """Describe a graph: the file, its card, or the folder of both."""
    cards = [beside(path, "json"), path]
    if path.is_dir():
        cards = sorted(card for what in ("encoder", "task") for card in path.glob(f"{what}.*.json"))
    for card in cards:
        facts = _facts_in(card) if card.suffix == ".json" else {}
        if str(facts.get("format", "")).startswith("domainssl.graph/"):
            break
    else:
        return None
    kept = ("backbone", "file", "licence")
    after = [
        f"onnxruntime.InferenceSession({str(card.with_suffix(''))!r})"
        if card.name.endswith(".onnx.json")
        else f"torch.export.load({str(card.with_suffix(''))!r}).module()"
    ]
    more = {
        "outputs": [f"{out['name']} ({out['axes']})" for out in facts.get("outputs", ())],
        "classes": facts.get("task", {}).get("names"),
    }
    return {
        "kind": "graph", "what": "a graph that runs without this library",
        "facts": {k: facts[k] for k in kept if k in facts} | {k: v for k, v in more.items() if v},
        "next": after,
        "modalities": {
            entry["name"]: {k: entry.get(k) for k in ("axes", "bands", "unit", "dtype")}
            for entry in facts.get("inputs", ())
        },
    }  # fmt: skip


def _weights(path: Path) -> _Report | None:
    """Describe weights without a card."""
    if path.suffix not in _WEIGHTS or not path.is_file():
        return None
    from domainssl.backbones.tensors import read_tensors

    content = read_tensors(path)
    inner = content.get("state_dict", content.get("model", content))
    tensors = {k: v for k, v in inner.items() if hasattr(v, "shape")} if inner else {}
    facts = {
        "tensors": len(tensors),
        "parameters": f"{sum(v.numel() for v in tensors.values()):,}",
        "first": {k: list(v.shape) for k, v in islice(tensors.items(), 4)},
        "MB": _megabytes(path),
    }
    after = [
        f"domainssl.load_backbone(NAME, weights={str(path)!r})  # NAME: domainssl.list_backbones()"
    ]
    return {"kind": "weights", "what": "weights without a card of this library",
            "facts": facts, "next": after}  # fmt: skip


def _embedding(path: Path) -> _Report | None:
    """Describe what `embed` has written: a store, a map, a volume or a table."""
    if not path.name.lower().endswith(_VECTORS):
        return None
    record = _facts_in(beside(path, "json"))
    is_own = "weights_sha256" in record or "weights_sha256" in record.get("request", {})
    if path.suffix == ".parquet" and path.is_file():
        found = _table(path)
        return (
            None if found is None and not is_own else _of_vectors(path, {**record, **(found or {})})
        )
    attributes = _facts_in(path / "zarr.json").get("attributes") or {}
    if attributes.get("format") == "domainssl embedding 1":
        record = {**attributes, **record}
    elif not is_own:
        return None
    return _of_vectors(path, record) if path.exists() else None


def _of_vectors(path: Path, record: Mapping[str, Any]) -> _Report:
    plain = {k: v for k, v in record.items() if isinstance(v, str | int | float | bool)}
    lists = {k: v for k, v in record.items() if isinstance(v, list) and len(v) <= 8}
    after = []
    pictures = (beside(path, "png"), path.with_suffix(".png"))
    after += [f"look at {picture}" for picture in pictures if picture.is_file()][:1]
    opened = {
        ".zarr": f"xarray.open_zarr({str(path)!r}, consolidated=False)",
        ".tif": f"rioxarray.open_rasterio({str(path)!r})",
        ".gz": f"nibabel.load({str(path)!r})",
        ".nii": f"nibabel.load({str(path)!r})",
        ".parquet": f"geopandas.read_parquet({str(path)!r}) or pandas.read_parquet",
    }
    after.append(opened[path.suffix.lower()])
    left_out = record.get("left_out") or {}
    problems = [f"left out: {reason}" for reason in left_out.values()]
    return {"kind": "embedding", "what": "an embedding", "facts": {**plain, **lists},
            "next": after, "problems": problems}  # fmt: skip


def _table(path: Path) -> dict[str, Any] | None:
    """Return the facts of a table of vectors, None for other tables."""
    parquet = require("pyarrow.parquet", "geo")
    arrow = require("pyarrow", "geo")
    with parsing(f"{path}: the table", also=(arrow.ArrowException,)):
        file = parquet.ParquetFile(path)
        metadata = (file.schema_arrow.metadata or {}).get(b"domainssl")
        if metadata is None:
            return None
        columns = {field.name: str(field.type) for field in file.schema_arrow}
        facts = dict(json.loads(metadata))
        return {"items": file.metadata.num_rows, **facts, "columns": [*columns],
                "vectors": columns.get("embedding")}  # fmt: skip


def _embeddings(path: Path) -> _Report | None:
    """Describe a folder of embeddings."""
    if not path.is_dir() or (path / "zarr.json").is_file():
        return None
    records = (p for p in sorted(path.glob("*.json")) if p.name[:-5].lower().endswith(_VECTORS))
    found = [p.with_name(p.name[:-5]) for p in records if "weights_sha256" in _facts_in(p)]
    found = [p for p in found if p.exists()]
    if not found:
        return None
    first = _embedding(found[0])
    assert first is not None
    facts = {"embeddings": len(found), "first": found[0].name, **first["facts"]}
    after = [f"{COMMAND} inspect {found[0]}", *first["next"]]
    return {"kind": "embeddings", "what": "a folder of embeddings", "facts": facts, "next": after}


def _predictions(path: Path) -> _Report | None:
    """Describe the output of `predict`."""
    record = _facts_in(path / "predict.json") if path.is_dir() else {}
    if "weights" not in record:
        return None
    made = list(_outputs(path))
    facts = {**record, "files": len(made), "first": [p.name for p in made[:3]]}
    seen = next((p for p in made if p.suffix == ".png"), made[0] if made else None)
    after = [f"look at {seen}"] if seen else []
    if seen is not None and seen.suffix == ".geojson":
        after = [f"open {seen} in QuPath (File, Import objects)"]
    return {"kind": "predictions", "what": "predictions of a task", "facts": facts, "next": after}


def _outputs(path: Path) -> Iterator[Path]:
    for file in sorted(path.iterdir()):
        if file.name != "predict.json" and file.name[0] != "." and file.is_file():
            yield file


def _evaluation(path: Path) -> _Report | None:
    """Describe the output of `evaluate`."""
    found = _facts_in(path / "evaluation.json") if path.is_dir() else {}
    if "rows" not in found:
        return None
    data = found.get("data") or {}
    names = dict.fromkeys(str(row.get("backbone")) for row in found["rows"])
    facts = {
        "backbones": [*names], "classes": found.get("classes"),
        "test items": data.get("test_items"), "rows": len(found["rows"]),
    }  # fmt: skip
    after = [f"open {path / 'report.html'} in a browser"]
    return {"kind": "evaluation", "what": "an evaluation", "facts": facts, "next": after}


def _grids(path: Path) -> _Report | None:
    """Describe the output of `tile`, and features of its tiles."""
    record = _facts_in(path / "tiling.json") if path.is_dir() else {}
    if "options" not in record:
        return None
    encoders = sorted(p.stem for p in path.glob("encoders/*.json"))
    facts = {
        "slides": sum(1 for _ in path.glob("tiles/*.parquet")),
        **{k: v for k, v in record["options"].items() if v is not None},
        "features": encoders,
    }
    after = [f"look at the pictures in {path / 'thumbnails'}"]
    if encoders:
        chosen = f"--data.root={path}{_of_features(path, encoders[0])}"
        after += [
            f"{COMMAND} fit --config recipes/slides_titan.yaml {chosen}",
            f"{COMMAND} fit --config recipes/finetune_slides.yaml {chosen}",
        ]
    else:
        after.append("the same `tile` command with --features BACKBONE writes features of tiles")
    return {"kind": "grids", "what": "grids of tiles over slides", "facts": facts, "next": after}


def _of_features(path: Path, encoder: str) -> str:
    """Return the options that tell a recipe width and resolution of features; empty of none."""
    try:
        bag = read_bag(find_bags(path, encoder=encoder).files[0].path)
    except DomainSSLError:
        return ""
    own = "--data.modalities.tile_features"
    return f" {own}.dim={bag.dim}" + (f" {own}.mpp_um={bag.mpp_um:g}" if bag.mpp_um else "")


_FINDERS: tuple[Callable[[Path], _Report | None], ...] = (
    _run, _export, _graph, _checkpoint, _embedding, _embeddings, _predictions, _evaluation, _grids,
    _weights,
)  # fmt: skip
