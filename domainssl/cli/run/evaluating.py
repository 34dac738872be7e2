"""Evaluate backbones on the labelled items of a DataModule, for the verb and for Python."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from domainssl.arguments import class_name, plain
from domainssl.backbones.base import Backbone
from domainssl.backbones.card import weights_digest
from domainssl.backbones.hub import HubAddress
from domainssl.backbones.registry import load_backbone
from domainssl.cli.run.device import chosen_device
from domainssl.cli.run.rundir import versions
from domainssl.cli.run.train import build_data
from domainssl.errors import ConfigError, DataError, WeightsError
from domainssl.evaluation.comparison import (
    Protocol,
    Row,
    Sides,
    add_gains,
    compare,
    kept_classes,
)
from domainssl.evaluation.features import Items, extract, load_items, save_items
from domainssl.evaluation.gallery import Gallery, look, panels_of
from domainssl.evaluation.html import Page, html_report, short_hash
from domainssl.evaluation.multilabel import kept_labels
from domainssl.evaluation.report import subsets
from domainssl.evaluation.single_dates import as_series, single_dates, take_single_dates
from domainssl.evaluation.tables import csv_text, json_content
from domainssl.files import write_json, write_text
from domainssl.modality import Modality

__all__ = ["Evaluation", "Request", "evaluate_backbones"]

_FORMAT = 4  # of kept features; raise it when the same request gives others


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is evaluated, and how.

    Attributes:
        backbones: Run folders, exports, checkpoints or `hf://…`, each perhaps as `LABEL=PLACE`.
        config: Files with a data section, or none: then that of the first run folder.
        more: Words such as `--data.root=/data`.
        output: Folder to write.
        split: Where is measured; None takes `test`, else `val`.
        protocol: How is measured.
        max_items: Items of a split at most.
        baselines: Add the untrained backbones and raw statistics.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        thumbnails: Show pictures of items whose ids are protected, too.
    """

    backbones: tuple[str, ...]
    config: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    output: Path
    split: str | None = None
    protocol: Protocol = field(default_factory=Protocol)
    max_items: int | None = None
    baselines: bool = True
    device: str = "auto"
    thumbnails: bool = False


@dataclass(kw_only=True)
class Subject:
    """One backbone and where it comes from.

    Attributes:
        label: In tables.
        backbone: In evaluation mode.
        modalities: Those that the data have too.
        run: Folder of its run, where it is one.
        baseline: Label of its untrained twin; empty for a twin.
    """

    label: str
    backbone: Backbone
    modalities: dict[str, Modality]
    run: Path | None = None
    baseline: str = ""


@dataclass(kw_only=True)
class Evaluation:
    """What was found.

    Attributes:
        rows: One per backbone, representation, protocol and metric.
        classes: Names of the classes.
        notes: What was left out, and why.
        facts: Data, backbones and settings as plain data.
        output: Folder with `evaluation.csv`, `evaluation.json` and `report.html`.
    """

    rows: list[Row]
    classes: list[str]
    notes: list[str]
    facts: dict[str, Any]
    output: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """What was written, besides kept features."""
        names = ("evaluation.csv", "evaluation.json", "report.html")
        return tuple(p for p in (self.output / name for name in names) if p.is_file())

    def value(self, backbone: str, features: str, protocol: str, metric: str) -> float:
        """Return one figure.

        Raises:
            KeyError: There is no such row.
        """
        for row in self.rows:
            if (row.backbone, row.features, row.protocol, row.metric) == (
                backbone, features, protocol, metric,
            ):  # fmt: skip
                return row.value
        raise KeyError((backbone, features, protocol, metric))


def evaluate_backbones(
    request: Request, step: Callable[[str], None] = lambda text: None
) -> Evaluation:
    """Extract features (or take those that are kept), measure them and write the results.

    Args:
        request: What is asked for.
        step: Called with a line before every step.

    Raises:
        ConfigError: The request cannot be used.
        DataError: The data have no labels to evaluate by, too few, or one person in two splits.
        WeightsError: A backbone cannot be loaded, or does not fit the data.
    """
    places = [_place(word) for word in request.backbones]
    for _, place in places:
        if "/" in place and not HubAddress.matches(place) and not Path(place).exists():
            raise WeightsError(f"evaluate: {place!r} does not exist. Give a run or an export.")
    data = _data(request, [place for _, place in places])
    split = _split(data, request.split)
    device = chosen_device(request.device, "evaluate")
    notes: list[str] = []
    subjects = _subjects(places, data, notes)
    twins = _twins(subjects) if request.baselines else []
    sides: dict[str, Sides] = {}
    wanted: dict[str, list[tuple[str, ...]]] = {}
    for subject in (*subjects, *twins):
        step(f"features of {subject.label}")
        wanted[subject.label] = subsets(tuple(subject.modalities))
        sides[subject.label] = _features(subject, data, split, request, device)
    if request.baselines:
        step("raw statistics")
        used = {n for s in subjects for n in s.modalities}
        shared = {n: m for n, m in data.modalities.items() if n in used}
        wanted["raw"] = list(dict.fromkeys(w for own in wanted.values() for w in own))
        sides["raw"] = _features(None, data, split, request, device, shared, wanted["raw"])
    first = sides[subjects[0].label]
    _refuse_shared_persons(first)
    classes, names = _classes(first, data, notes)
    labels, label_names = _labels(first, data, notes)
    rows = compare(
        sides, wanted, classes, request.protocol, notes, step,
        labels=labels, source_names=data.source_names,
    )  # fmt: skip
    add_gains(rows, {s.label: s.baseline for s in subjects if s.baseline})
    if not rows:
        raise DataError(f"evaluate: nothing could be measured: {'; '.join(notes)}.")
    notes += [text for side in sides.values() for text in side.test.notes if text not in notes]
    step("pictures")
    gallery, named = _pictures(request, data, split, subjects, device, notes)
    found = Evaluation(
        rows=rows,
        classes=names,
        notes=list(dict.fromkeys(notes)),
        facts=_facts(request, data, split, subjects, first) | {"labels": label_names},
        output=request.output,
    )
    page = Page(
        rows=found.rows, sides=sides, classes=names, numbers=classes or [], gallery=gallery,
        facts=found.facts, notes=found.notes, named=named,
    )  # fmt: skip
    _write(found, html_report(page))
    return found


def _pictures(
    request: Request,
    data: Any,
    split: str,
    subjects: Sequence[Subject],
    device: torch.device,
    notes: list[str],
) -> tuple[Gallery, Callable[[str], str]]:
    """Return what the report shows of items, and how it calls them.

    Where the DataModule withholds names, pictures need `thumbnails`, and ids are hashed once more.
    """
    is_private = bool(data.withheld)
    if is_private and not request.thumbnails:
        notes.append(
            "the report shows no picture of an item, because the data protect who they are of; "
            "--thumbnails shows them"
        )
        return Gallery(), short_hash
    loader = data.ordered_dataloader(split)
    try:
        backbones = {s.label: (s.backbone.to(device), s.modalities) for s in subjects}
        gallery = look(backbones, loader, data.modalities, device)
    finally:
        loader.close()
    for subject in subjects:
        if subject.run is not None:
            gallery.panels += panels_of(subject.run, subject.label)
    return gallery, short_hash if is_private else str


def _write(found: Evaluation, page: str) -> None:
    found.output.mkdir(parents=True, exist_ok=True)
    write_text(found.output / "evaluation.csv", csv_text(found.rows))
    content = json_content(found.rows, found.classes, found.facts, found.notes)
    write_json(found.output / "evaluation.json", content)
    write_text(found.output / "report.html", page)


def _place(word: str) -> tuple[str, str]:
    """Return label and place of `LABEL=PLACE`, or of a place alone."""
    label, sign, place = word.partition("=")
    if sign and place and "/" not in label and not Path(word).exists():
        return label, place
    return "", word


def _data(request: Request, places: Sequence[str]) -> Any:
    """Build and set up the DataModule: of the configuration, else of the first run folder."""
    files = list(request.config)
    if not files:
        own = [Path(place) / "config.yaml" for place in places]
        files = [str(path) for path in own if path.is_file()][:1]
    if not files:
        raise ConfigError(
            "evaluate: which data? None of the backbones is the folder of a run, which knows its "
            "own. Add --config RECIPE, or a YAML file with a data section."
        )
    data = build_data([*(f"--config={file}" for file in files), *request.more])
    data.prepare_data()
    data.setup("fit")
    data.setup("test")  # a LightningDataModule of others makes its test data for this stage alone
    return data


def _split(data: Any, asked: str | None) -> str:
    known = [name for name in ("test", "val", "predict") if _has(data, name)]
    if not _has(data, "train"):
        raise DataError("evaluate: the data have no train split, which probes are fitted on.")
    if asked is not None and asked not in known:
        raise ConfigError(
            f"evaluate --split: got {asked!r}, expected one of {', '.join(known) or 'none'}."
        )
    held_out = [name for name in known if name != "predict"]
    if asked is None and not held_out:
        raise DataError(
            "evaluate: nothing is held out, so there is nothing to measure on. State a split in "
            "the data, or set data.init_args.held_out.val_fraction."
        )
    own = getattr(data, "tested_split", None)
    return asked or (own if own in held_out else held_out[0])


def _has(data: Any, split: str) -> bool:
    try:
        return sum(data.source(split).sizes) > 0
    except ConfigError:
        return False


def _subjects(places: Sequence[tuple[str, str]], data: Any, notes: list[str]) -> list[Subject]:
    found: list[Subject] = []
    for given, place in places:
        folder = Path(place)
        is_run = (folder / "config.yaml").is_file()
        source: str | Path = place
        last = folder / "checkpoints" / "last.ckpt"
        if is_run and not (folder / "backbone" / "backbone.json").exists() and last.is_file():
            source = last
        backbone = load_backbone(source)
        shared = {n: m for n, m in data.modalities.items() if n in backbone.modalities}
        if not shared:
            raise WeightsError(
                f"{place} knows {', '.join(backbone.modalities)}, and the data have "
                f"{', '.join(data.modalities)}: no modality in common. Choose data of the "
                "backbone's kind, or name their modalities as the backbone does."
            )
        label = given or _label(folder, is_run)
        dated = single_dates(backbone, shared)
        try:
            backbone.check(as_series(shared, dated))
        except WeightsError as error:
            raise WeightsError(f"{place}: {error}") from error
        take_single_dates(backbone, dated)
        if dated:
            notes.append(f"{label}: images of {', '.join(dated)} are taken as series of one date")
        for other in (n for n in data.modalities if n not in shared):
            notes.append(f"{label}: has no {other}, which the data have; left out")
        taken = {s.label for s in found} | {"raw"}
        unique = label
        for number in range(2, len(places) + 3):
            if unique not in taken:
                break
            unique = f"{label} {number}"
        found.append(
            Subject(
                label=unique, backbone=backbone, modalities=shared, run=folder if is_run else None
            )
        )
    return found


def _label(folder: Path, is_run: bool) -> str:
    """Return the name of a run, else the last part of the place."""
    if is_run:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        named = re.search(r"^name: *['\"]?([^'\"\n]+)", text, re.MULTILINE)
        if named:
            return named[1].strip()
    name = folder.parent.name if folder.name in ("backbone", "backbone.json") else folder.stem
    return name or str(folder)


def _twins(subjects: Sequence[Subject]) -> list[Subject]:
    """Return an untrained backbone for every architecture, with the same normalisation."""
    twins: dict[str, Subject] = {}
    for subject in subjects:
        kind = type(subject.backbone)
        arguments = kind.current_arguments(subject.backbone.arguments)
        key = json.dumps([class_name(kind), plain(arguments)], sort_keys=True)
        if key not in twins:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                untrained = kind(**arguments)
            untrained.normalizer.load_state_dict(subject.backbone.normalizer.state_dict())
            take_single_dates(untrained, single_dates(untrained, subject.modalities))
            twins[key] = Subject(
                label="untrained", backbone=untrained.eval(), modalities=subject.modalities
            )
        subject.baseline = key
    if len(twins) > 1:
        for key, twin in twins.items():
            first = next(s for s in subjects if s.baseline == key)
            twin.label = f"untrained ({first.label})"
    for subject in subjects:
        subject.baseline = twins[subject.baseline].label
    return list(twins.values())


def _features(
    subject: Subject | None,
    data: Any,
    split: str,
    request: Request,
    device: torch.device,
    modalities: Mapping[str, Modality] | None = None,
    wanted: Sequence[tuple[str, ...]] | None = None,
) -> Sides:
    """Return the features of both splits: those kept by an earlier call, or new ones."""
    known = dict(modalities or (subject.modalities if subject else {}))
    asked = list(wanted or subsets(tuple(known)))
    backbone = subject.backbone if subject is not None else None
    parts: dict[str, Items] = {}
    for name in ("train", split):
        key = _key(backbone, data, name, request.max_items, asked)
        path = request.output / "features" / f"{key[:24]}.safetensors"
        found = load_items(path, key)
        if found is None:
            loader = data.ordered_dataloader(name)
            try:
                found = extract(
                    backbone.to(device) if backbone is not None else None,
                    loader,
                    known,
                    asked,
                    persons=data.persons,
                    device=device,
                    most=request.max_items,
                )
            finally:
                loader.close()
            save_items(path, found, key)
        parts[name] = found
    return Sides(train=parts["train"], test=parts[split])


def _key(
    backbone: Backbone | None, data: Any, split: str, most: int | None, asked: Sequence[Any]
) -> str:
    """Return a hash of the weights and of the data, which features are kept under."""
    digest = hashlib.sha256()
    if backbone is not None:
        digest.update(class_name(type(backbone)).encode())
        digest.update(json.dumps(plain(backbone.arguments), sort_keys=True).encode())
        digest.update(weights_digest(backbone).encode())
    facts = [_FORMAT, class_name(type(data)), split, most, plain(asked)]
    arguments = {k: v for k, v in data.arguments.items() if k not in ("loading",)}
    facts += [plain(arguments), plain(data.identity())]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _refuse_shared_persons(sides: Sides) -> None:
    """Refuse splits that share a person, by number (known ones are not negative), or an item."""
    both = set(sides.train.persons.tolist()) & set(sides.test.persons.tolist())
    count = len({n for n in both if n >= 0})
    if count:
        raise DataError(
            f"evaluate: {count} persons have items in both splits, so a probe would be measured "
            "on persons it was fitted on. Divide the splits by person."
        )
    items = set(sides.train.ids) & set(sides.test.ids)
    if items:
        raise DataError(
            f"evaluate: {len(items)} items are in both splits, so a probe would be measured on "
            "items it was fitted on. Mend the splits."
        )


def _classes(sides: Sides, data: Any, notes: list[str]) -> tuple[list[int] | None, list[str]]:
    """Return the classes of items and their names; None where items have none, or several."""
    named = getattr(data, "classes", None) or getattr(data, "label_names", None)
    if sides.train.labels is None and sides.train.multi is not None:
        return None, []
    if sides.train.labels is None and sides.train.patches:
        notes.append("items have no label; only maps are evaluated")
        return None, []
    kept, left_out = kept_classes(sides.train, sides.test, type(data).__name__)
    notes += left_out
    names = [str(named[c]) if named and c < len(named) else f"class {c}" for c in kept]
    return kept, names


def _labels(sides: Sides, data: Any, notes: list[str]) -> tuple[list[int], list[str]]:
    """Return the labels of items with any number of them, and their names; empty without any."""
    if sides.train.multi is None or sides.test.multi is None:
        return [], []
    kept, left_out = kept_labels(sides.train, sides.test, type(data).__name__)
    notes += left_out
    named = getattr(data, "label_names", None) or getattr(data, "classes", None) or ()
    fits = len(named) == sides.train.multi.shape[1]
    return kept, [str(named[k]) if fits else f"label {k}" for k in kept]


def _data_name(data: Any) -> str:
    """Return what the data are called in titles: their format, and whether they are a sample."""
    facts = data.identity() if hasattr(data, "identity") else {}
    name = str(facts.get("format") or type(data).__name__)
    is_sample = str(getattr(data, "root", "")).partition(":")[0] == "sample"
    return f"{name} (embedded sample)" if is_sample else name


def _facts(
    request: Request, data: Any, split: str, subjects: Sequence[Subject], sides: Sides
) -> dict[str, Any]:
    return {
        "data": {
            "kind": type(data).__name__,
            "name": _data_name(data),
            "modalities": {n: list(m.channels) for n, m in data.modalities.items()},
            "train_items": len(sides.train.ids),
            "test_items": len(sides.test.ids),
            "test_split": split,
            "persons": len(set(sides.test.persons.tolist())),
        },
        "backbones": [
            {
                "label": s.label,
                "class": type(s.backbone).__name__,
                "parameters": sum(p.numel() for p in s.backbone.parameters()),
                "modalities": list(s.modalities),
                "untrained": s.baseline or None,
            }
            for s in subjects
        ],
        "protocols": list(request.protocol.names),
        "seeds": list(request.protocol.seeds),
        "resamples": request.protocol.resamples,
        "versions": versions(),
    }
