"""Check a composed configuration against the classes it names and collect all mistakes."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from domainssl.cli.config import catalog
from domainssl.cli.config.compose import CLASS_SECTIONS, NAMED_SECTIONS, Composition
from domainssl.cli.config.construct import refusals
from domainssl.cli.config.nodes import Mistake, Node, Where, shown
from domainssl.cli.config.renamed import new_name, new_value
from domainssl.cli.config.schema import (
    Parameter,
    alternatives,
    choices,
    dataclasses_in,
    in_words,
    mapping_values,
    parameters,
    rejects,
    takes_more,
)
from domainssl.cli.config.values import (
    members,
    misplaced_classes,
    trainer_refusal,
    value_refusal,
)
from domainssl.errors import nearest

__all__ = ["LINKED", "Checker", "needs_hardware", "trainer_refusals"]

OWN_KEYS: dict[str, Any] = {
    "seed_everything": bool | int,
    "name": str,
    "run_dir": str | None,
    "matmul_precision": typing.Literal["highest", "high", "medium"],
    "cpu_threads": int | None,
    "ckpt_path": str | None,
    "auto_resume": bool,  # of fit; overlays that say it are laid over other verbs, too
}
VERB_KEYS: dict[str, dict[str, Any]] = {
    "fit": {},
    "validate": {"verbose": bool},
    "test": {"verbose": bool},
    "predict": {"return_predictions": bool | None},
}
LINKED = ("modalities", "context_size", "classes", "reading")
"""Arguments of the model that are taken from the data when they are not written."""

_FILLED_IN = {"model": LINKED, "loggers": ("save_dir",), "callbacks": ("dirpath",)}

_MOVED = {
    "callbacks": "Write callbacks at the top level, by name: `callbacks: {timer: Timer}`.",
    "logger": "Write loggers at the top level, by name: `loggers: {wandb: WandbLogger}`.",
    "default_root_dir": "Write `run_dir` at the top level.",
    "use_distributed_sampler": "Our DataModules deal the samples to the ranks; it is always false.",
}
_CHECKPOINT_WORDS = ("last", "best", "hpc")
_HALF = ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")
_KIND_WORDS = {"model": "model", "data": "data", "callbacks": "callback", "loggers": "logger"}


class Checker:
    """Collects the mistakes of one configuration.

    After `run`, short class names in the tree are dotted paths and `classes` holds the
    imported classes by section.
    """

    def __init__(self, composition: Composition, verb: str) -> None:
        self.tree = composition.tree
        self.composition = composition
        self.verb = verb
        self.mistakes = list(composition.mistakes)
        self.classes: dict[str, type] = {}

    def run(self, needed: Sequence[str] = CLASS_SECTIONS) -> list[Mistake]:
        """Return all mistakes, file by file and line by line, then those of the command line.

        Args:
            needed: Sections that must name a class.
        """
        accepted = OWN_KEYS | VERB_KEYS[self.verb]
        sections = ("trainer", *CLASS_SECTIONS, *NAMED_SECTIONS)
        for key, node in self.tree.children.items():
            if key in accepted:
                self.value(node, key, accepted[key])
            elif key not in sections:
                self._unknown_top_level(key, node, [*sections, *accepted])
            elif not node.is_mapping:
                self.add(f"'{key}' holds {shown(node.plain())}, not a mapping", node.where)
            elif key == "trainer":
                self._trainer(node)
            elif key in CLASS_SECTIONS:
                self.spec(node, key, key)
            else:
                for name, member in node.children.items():
                    self.spec(member, f"{key}.{name}", key)
        self._missing_checkpoint()
        self._occupied_folder()
        self._missing_sections(needed)
        self._refusals()
        files = self.composition.files
        return sorted(self.mistakes, key=lambda mistake: _position(mistake.where, files))

    def _refusals(self) -> None:
        """Add what constructors refuse, of parts that are cheap to build and free of mistakes."""
        before = [mistake.found for mistake in self.mistakes]
        for path, cls in self.classes.items():
            if not _is_cheap(path) or any(path in found for found in before):
                continue
            node = self.tree.get(*path.split("."), "init_args")
            if node is not None and node.is_mapping:
                self.mistakes += refusals(node, f"{path}.init_args", cls, node.plain())
        named = {name for found in before for name in re.findall(r"trainer\.(\w+)", found)}
        if not needs_hardware(self.tree):
            self.mistakes += trainer_refusals(self.tree, without=named)

    def add(self, found: str, where: Where | None, advice: str = "") -> None:
        """Record one mistake."""
        self.mistakes.append(Mistake(found, where, advice))

    def _missing_checkpoint(self) -> None:
        node = self.tree.get("ckpt_path")
        path = node.value if node is not None else None
        if node is None or not isinstance(path, str):
            return
        if path in _CHECKPOINT_WORDS or "://" in path or path.startswith("registry"):
            return
        if not Path(path).expanduser().exists():
            advice = "Runs keep theirs in runs/NAME/DATE_TIME/checkpoints; `last` is the newest."
            self.add(f"'ckpt_path' is {path!r}, which does not exist", node.where, advice)

    def _occupied_folder(self) -> None:
        node = self.tree.get("run_dir")
        if node is None or not isinstance(node.value, str):
            return
        path = Path(node.value).expanduser()
        taken = [p for p in (path, *path.parents) if p.exists() and not p.is_dir()]
        if taken:
            advice = f"{str(taken[0])!r} is a file; give a folder."
            self.add(f"'run_dir' is {node.value!r}, which is no folder", node.where, advice)

    def _missing_sections(self, needed: Sequence[str]) -> None:
        if not self.composition.complete:
            return
        for section in needed:
            if self.tree.get(section, "class_path") is None:
                names = sorted(catalog.find_classes(section))
                advice = f"Start from a recipe: --config {_some_recipe()}"
                if self.composition.files:
                    advice += f" --config {' --config '.join(self.composition.files)}"
                advice += f"   or name a class: --{section} {'|'.join(names) or 'CLASS'}"
                self.add(f"No {section} is given", None, advice)

    def _unknown_top_level(self, key: str, node: Node, accepted: list[str]) -> None:
        options = ["config"] if node.where.file.startswith("command line") else []
        close = nearest(key, [*accepted, *options])
        advice = f"{close} Accepted: {', '.join(accepted)}"
        if key in parameters(_trainer_class()) and key not in _MOVED:
            advice = f"It belongs to the trainer: trainer.{key}"
        for section in CLASS_SECTIONS:
            known = self._known_arguments(section)
            if key in known:
                advice = f"It belongs to {self.classes_name(section)}: {section}.init_args.{key}"
        self.add(f"Unknown config key {key!r}", node.where, advice)

    def _known_arguments(self, section: str) -> dict[str, Parameter]:
        node = self.tree.get(section, "class_path")
        if node is None or not isinstance(node.value, str):
            return {}
        cls = self._import(node, section, section, quiet=True)
        return parameters(cls) if cls is not None else {}

    def classes_name(self, section: str) -> str:
        """Return the class name that the section gives."""
        node = self.tree.get(section, "class_path")
        return str(node.value).rpartition(".")[2] if node is not None else section

    def _trainer(self, node: Node) -> None:
        known = {k: p for k, p in parameters(_trainer_class()).items() if k not in _MOVED}
        for key, child in node.children.items():
            if key in _MOVED:
                self.add(f"'trainer.{key}' is not set here", child.where, _MOVED[key])
            elif key == "precision" and child.value in _HALF:
                advice = (
                    "It would round digital numbers and statistics before they are normalised. "
                    "Use 'bf16-mixed', '16-mixed' or '32-true'."
                )
                self.add(f"trainer.precision {child.value!r} is refused", child.where, advice)
            elif key not in known:
                self._unknown_key(f"trainer.{key}", child.where, "Trainer", list(known))
            else:
                self.value(child, f"trainer.{key}", known[key].hint)
                accepted = trainer_refusal(key, child.value, self.verb)
                if accepted is not None:
                    found = f"'trainer.{key}' is {shown(child.value)}, which is not accepted"
                    self.add(found, child.where, accepted)

    def _unknown_key(
        self, path: str, where: Where, owner: str, accepted: list[str], more: str = ""
    ) -> None:
        key = path.rpartition(".")[2]
        renamed = new_name(owner, key)
        if renamed:
            self.add(f"Unknown config key {path!r}", where, renamed)
            return
        close = nearest(key, accepted)
        listed = ", ".join(accepted) or "no arguments"
        self.add(f"Unknown config key {path!r}", where, f"{close} {owner} accepts: {listed}{more}")

    def spec(self, node: Node, path: str, kind: str, hint: Any = None) -> None:
        """Check `{class_path: …, init_args: {…}}`."""
        if not node.is_mapping:
            advice = "Write the name of a class, or a mapping with class_path and init_args."
            self.add(f"{path!r} holds {shown(node.plain())}, not a class", node.where, advice)
            return
        named = node.get("class_path")
        cls = self._import(named, path, kind, hint) if named is not None else None
        known = parameters(cls) if cls is not None else {}
        for key, child in node.children.items():
            if key in ("class_path", "init_args"):
                continue
            if key == "dict_kwargs" and cls is not None and takes_more(cls):
                if not child.is_mapping:
                    self.add(f"'{path}.{key}' holds {child.value!r}, not a mapping", child.where)
                continue
            advice = "A class is given by class_path and init_args."
            if key in known:
                advice = f"Arguments of the class stand one level deeper: {path}.init_args.{key}"
            self.add(f"Unknown config key '{path}.{key}'", child.where, advice)
        if named is None and kind not in CLASS_SECTIONS:
            advice = "Give class_path, or write null to remove an entry of the recipe."
            self.add(f"{path!r} names no class", node.where, advice)
        if cls is None:
            return
        arguments = node.get("init_args")
        if arguments is not None and arguments.value is None:
            node.children["init_args"] = arguments = Node({}, arguments.where)
        if arguments is not None and not arguments.is_mapping:
            self.add(
                f"'{path}.init_args' holds {shown(arguments.plain())}",
                arguments.where,
                "It is a mapping of argument names to values.",
            )
            return
        filled = _FILLED_IN.get(kind, ())
        more = ""
        if takes_more(cls):
            more = f". It passes others on: write those in {path}.dict_kwargs"
        self._arguments(
            arguments, node.where, f"{path}.init_args", cls.__name__, known, filled, more
        )

    def _arguments(
        self,
        node: Node | None,
        where: Where,
        path: str,
        owner: str,
        known: dict[str, Parameter],
        filled: tuple[str, ...] = (),
        more: str = "",
    ) -> None:
        given = node.children if node is not None else {}
        for key, child in given.items():
            if key in known and known[key].may_be_empty and child.value == "":
                continue  # the configuration of a run holds all defaults
            if key in known:
                self.value(child, f"{path}.{key}", known[key].hint)
            else:
                self._unknown_key(f"{path}.{key}", child.where, owner, list(known), more)
        for name, parameter in known.items():
            if parameter.is_required and name not in given and name not in filled:
                advice = f"Write {path}.{name}: {in_words(parameter.hint)}"
                self.add(f"{owner} needs {name!r}", where, advice)

    def value(self, node: Node, path: str, hint: Any) -> None:
        """Check one value against an annotation, inside dataclasses and classes too."""
        for child, place in misplaced_classes(node, path, hint):
            advice = "Plain values belong there; nothing is built from them."
            self.add(f"{place!r} names a class, {shown(child.value)}", child.where, advice)
            return
        if node.is_mapping:
            inner = dataclasses_in(hint)
            if "class_path" in node.children:
                self.spec(node, path, "nested", hint)
                return
            if len(inner) == 1:
                hints = typing.get_type_hints(inner[0])
                known = {
                    name: dataclasses.replace(parameter, hint=hints.get(name, Any))
                    for name, parameter in parameters(inner[0]).items()
                }
                self._arguments(node, node.where, path, inner[0].__name__, known)
                return
            values = mapping_values(hint)
            if values is not None and dataclasses_in(values):
                for key, child in node.children.items():
                    self.value(child, f"{path}.{key}", values)
                return
        if node.is_mapping or node.is_list:
            before = len(self.mistakes)
            for child, place, inner_hint in members(node, path, hint):
                self._refused(child, place, inner_hint)
            if len(self.mistakes) > before:
                return
        plain = node.plain()
        if self._refused(node, path, hint):
            return
        if rejects(hint, plain):
            close = nearest(plain, choices(hint)) if isinstance(plain, str) else ""
            moved = new_value(path.rpartition(".")[2], plain)
            advice = moved or f"{close} Accepted: {in_words(hint)}."
            self.add(f"{path!r} is {shown(plain)}, which is not accepted", node.where, advice)

    def _refused(self, node: Node, path: str, hint: Any) -> bool:
        """Record a plain value that cannot be meant; containers pass."""
        if node.is_mapping or node.is_list:
            return False
        plain = node.plain()
        why = value_refusal(path, plain, hint)
        if why is not None:
            advice = f"It is not accepted: {why}. Accepted: {in_words(hint)}."
            self.add(f"{path!r} is {shown(plain)}", node.where, advice)
        return why is not None

    def _import(
        self, node: Node, path: str, kind: str, hint: Any = None, quiet: bool = False
    ) -> type | None:
        """Return the class a node names and write its dotted path into the node."""
        count = len(self.mistakes)
        cls = self._import_class(node, f"{path}.class_path", kind, hint)
        if quiet:
            del self.mistakes[count:]
        elif cls is not None:
            self.classes[path] = cls
        return cls

    def _import_class(self, node: Node, path: str, kind: str, hint: Any) -> type | None:
        name = node.value
        if not isinstance(name, str) or not name:
            self.add(f"{path!r} is {name!r}, not the name of a class", node.where)
            return None
        if kind in _KIND_WORDS:
            dotted, names = catalog.full_name(kind, name), sorted(catalog.find_classes(kind))
        else:
            table = _subclasses(hint)
            dotted, names = name if "." in name else table.get(name), sorted(table)
        if dotted is None:
            advice = f"{nearest(name, names)} Known: {', '.join(names)}. Others by dotted path."
            self.add(
                f"Unknown {_KIND_WORDS.get(kind, 'class')} class {name!r} in {path!r}",
                node.where,
                advice,
            )
            return None
        module_name, _, class_name = dotted.rpartition(".")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            advice = _near_class(class_name, kind) or "Check the dotted path and the installation."
            self.add(f"{path!r}: {module_name!r} cannot be imported: {error}", node.where, advice)
            return None
        cls = getattr(module, class_name, None)
        if not inspect.isclass(cls):
            options = [k for k, v in vars(module).items() if inspect.isclass(v)]
            advice = nearest(class_name, options) or f"Its classes: {', '.join(options)}"
            self.add(f"{path!r}: {module_name!r} has no class {class_name!r}", node.where, advice)
            return None
        base = _base_class(kind)
        if base is not None and not issubclass(cls, base):
            self.add(
                f"{path!r}: {class_name!r} is no {_KIND_WORDS[kind]}",
                node.where,
                f"Expected a subclass of {base.__name__}.",
            )
            return None
        node.value = dotted
        return cls


def _position(where: Where | None, files: list[str]) -> tuple[int, int]:
    if where is None or where.file not in files:
        return len(files), 0
    return files.index(where.file), where.line or 0


def _near_class(name: str, kind: str) -> str:
    return nearest(name, catalog.find_classes(kind)) if kind in _KIND_WORDS else ""


def _some_recipe() -> str:
    return next(iter(catalog.recipes()), "recipes/NAME.yaml")


def _is_cheap(path: str) -> bool:
    """Tell whether a part is built without reading or computing anything."""
    return path == "data" or (path.count(".") == 1 and path.startswith("callbacks."))


def needs_hardware(tree: Node) -> bool:
    """Tell whether the trainer asks for devices that may not be here."""
    node = tree.get("trainer", "accelerator")
    return node is not None and node.value in ("gpu", "cuda", "mps", "tpu")


def trainer_refusals(tree: Node, *, without: Collection[str] = ()) -> list[Mistake]:
    """Return what Lightning's Trainer refuses, devices included that are not here.

    A job of SLURM is left out: what its environment says belongs to no line.

    Args:
        tree: The configuration.
        without: Arguments that are known to be wrong.
    """
    node = tree.get("trainer")
    if node is None or not node.is_mapping or any(key.startswith("SLURM_") for key in os.environ):
        return []
    arguments = {key: child.plain() for key, child in node.children.items() if key not in without}
    if "SLURM" in str(arguments.get("plugins")):
        return []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return refusals(node, "trainer", _trainer_class(), arguments | quiet)


def _trainer_class() -> type:
    from lightning.pytorch import Trainer

    return Trainer


def _base_class(kind: str) -> type | None:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import Logger

    bases: dict[str, type] = {
        "model": pl.LightningModule,
        "data": pl.LightningDataModule,
        "callbacks": pl.Callback,
        "loggers": Logger,
    }
    return bases.get(kind)


def _subclasses(hint: Any) -> dict[str, str]:
    """Return short name -> dotted path of the imported classes that fit an annotation."""
    found: dict[str, str] = {}
    waiting = [m for m in alternatives(hint) if inspect.isclass(m) and m.__module__ != "builtins"]
    while waiting:
        cls = waiting.pop()
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found.setdefault(cls.__name__, f"{cls.__module__}.{cls.__qualname__}")
        waiting += cls.__subclasses__()
    return found
