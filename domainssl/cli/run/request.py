"""A configuration that was checked: what the command line asks for, ready to be built."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from domainssl.cli.config.check import LINKED, Checker
from domainssl.cli.config.compose import DEFAULT_LOGGERS, compose
from domainssl.cli.config.nodes import ConfigMistakes, Node
from domainssl.cli.config.schema import parameters
from domainssl.cli.run.rundir import (
    free_metrics_folder,
    last_checkpoint,
    new_run_dir,
    own_checkpoint,
    refuse_used_folder,
)
from domainssl.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["Request", "link_to_data", "linked_from_data"]

_OWN = ("name", "run_dir", "matmul_precision", "cpu_threads", "loggers", "callbacks", "auto_resume")
_NOT_SAVED = ("ckpt_path", "weights_only", "verbose", "return_predictions", "config")
_NOT_SAVED_TRAINER = ("callbacks", "logger", "default_root_dir", "use_distributed_sampler")


class Request:
    """A configuration without mistakes, ready to be built.

    Attributes:
        verb: fit, validate, test or predict.
        config: Plain data in the shape of a recipe, class names resolved.
        classes: The imported classes by section.
        files: The configuration files, in order.
        name: Name of the run: that of the recipe.
        run_dir: Folder of the run.
        flags: Switches of the command line.
    """

    def __init__(self, verb: str, argv: list[str]) -> None:
        composition = compose(argv)
        checker = Checker(composition, verb)
        mistakes = checker.run()
        if mistakes:
            raise ConfigMistakes(mistakes)
        self.verb = verb
        self.tree = composition.tree
        self.config: dict[str, Any] = composition.tree.plain()
        self.classes = checker.classes
        self.files = composition.files
        self.flags = composition.flags
        self.name = str(self.config.get("name") or composition.name or _class_stem(checker.tree))
        self.run_dir = new_run_dir(
            self.name,
            verb,
            self.config.get("run_dir"),
            auto_resume=bool(self.config.get("auto_resume")),
        )
        self._choose_checkpoint()
        if verb == "fit" and not (self.config.get("ckpt_path") or self.config.get("auto_resume")):
            refuse_used_folder(self.run_dir)
        self.loggers: dict[str, Any] = self.config.get("loggers") or {}
        self.callbacks: dict[str, Any] = self.config.get("callbacks") or {}

    def _choose_checkpoint(self) -> None:
        """Put a path in the place of `last`, or where `auto_resume` asks for one."""
        given = self.config.get("ckpt_path")
        if given == "last":
            is_named = self.verb == "fit" and bool(self.config.get("run_dir"))
            found_last = last_checkpoint(self.run_dir, None if is_named else self.name)
            self.config["ckpt_path"] = str(found_last)
        elif self.verb != "fit" or not self.config.get("auto_resume"):
            return
        elif given:
            raise ConfigError(
                f"auto_resume and ckpt_path={given!r} are both given. auto_resume looks for the "
                "run's own last checkpoint; leave one of the two out."
            )
        else:
            is_named = bool(self.config.get("run_dir")) or "SLURM_JOB_ID" in os.environ
            found = own_checkpoint(self.run_dir, None if is_named else self.name)
            if found is not None:
                self.run_dir, path = found
                self.config["ckpt_path"] = str(path)

    def arguments(self) -> dict[str, Any]:
        """Return the configuration in the shape that LightningCLI parses."""
        config = {key: value for key, value in self.config.items() if key not in _OWN}
        trainer = dict(config.get("trainer") or {})
        trainer["callbacks"] = [self._placed(n, s, "callbacks") for n, s in self.callbacks.items()]
        loggers = [self._placed(n, s, "loggers") for n, s in self.loggers.items()]
        trainer["logger"] = loggers or False
        trainer["default_root_dir"] = str(self.run_dir)
        trainer["use_distributed_sampler"] = False
        has_bar = any(s["class_path"].endswith("ProgressBar") for s in self.callbacks.values())
        if not has_bar and trainer.get("enable_progress_bar") is None:
            trainer["enable_progress_bar"] = False  # no bar means none, not Lightning's own
        config["trainer"] = trainer
        config["weights_only"] = True
        return config

    def _placed(self, name: str, spec: dict[str, Any], section: str) -> dict[str, Any]:
        """Fill in where a logger or callback writes, unless the configuration says so."""
        arguments = dict(spec.get("init_args") or {})
        for key, value in self._places(name, spec, section).items():
            arguments.setdefault(key, value)
        return {"class_path": spec["class_path"], "init_args": arguments}

    def _places(self, name: str, spec: dict[str, Any], section: str) -> dict[str, Any]:
        folder = str(self.run_dir)
        short = spec["class_path"].rpartition(".")[2]
        if short == "CSVLogger":
            return {"save_dir": folder, "name": "", "version": free_metrics_folder(self.run_dir)}
        if short == "TensorBoardLogger":
            return {"save_dir": folder, "name": "tensorboard", "version": ""}
        cls = self.classes.get(f"{section}.{name}")
        known = parameters(cls) if cls is not None else {}
        if section == "loggers":
            label = "run_name" if "run_name" in known else "name"
            return {k: v for k, v in {"save_dir": folder, label: self.name}.items() if k in known}
        if "dirpath" in known:
            return {"dirpath": str(self.run_dir / "checkpoints")}
        return {}

    def resolved(self, dumped: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration to save: `dumped` by the parser, in the shape of a recipe."""
        trainer = {k: v for k, v in dumped["trainer"].items() if k not in _NOT_SAVED_TRAINER}
        given = self.config.get("trainer") or {}
        trainer["enable_progress_bar"] = given.get("enable_progress_bar")
        saved: dict[str, Any] = {"name": self.name}
        for key in ("seed_everything",):
            saved[key] = dumped.get(key)
        for key in ("matmul_precision", "cpu_threads"):
            if key in self.config:
                saved[key] = self.config[key]
        saved["trainer"] = trainer
        full = dumped["trainer"].get("callbacks") or []
        saved["callbacks"] = {
            name: self._without_place(name, spec, given)
            for (name, given), spec in zip(self.callbacks.items(), full, strict=True)
        }
        saved["loggers"] = {
            **{name: None for name in DEFAULT_LOGGERS if name not in self.loggers},
            **self.loggers,
        }
        skip = {*_OWN, *_NOT_SAVED, "trainer", "seed_everything"}
        saved.update({key: value for key, value in dumped.items() if key not in skip})
        return saved

    def _without_place(
        self, name: str, spec: dict[str, Any], given: dict[str, Any]
    ) -> dict[str, Any]:
        injected = set(self._places(name, given, "callbacks")) - set(given.get("init_args") or {})
        arguments = {k: v for k, v in spec.get("init_args", {}).items() if k not in injected}
        return {"class_path": spec["class_path"], "init_args": arguments}


def _class_stem(tree: Node) -> str:
    node = tree.get("model", "class_path")
    return str(node.value).rpartition(".")[2].lower() if node is not None else "run"


def link_to_data(parser: ArgumentParser, readers: Mapping[str, Callable[[Any], Any]]) -> None:
    """Let the data decide arguments of the model, once they are built."""
    for name, read in readers.items():
        parser.link_arguments(
            "data", f"model.init_args.{name}", compute_fn=read, apply_on="instantiate"
        )


def linked_from_data(
    classes: Mapping[str, type], config: Mapping[str, Any]
) -> dict[str, Callable[[Any], Any]]:
    """Return the arguments of the model that the data decide, with how to read them.

    An argument that the configuration gives, or that the class does not have, is left out.

    Args:
        classes: The imported classes by section.
        config: The configuration in the shape of a recipe.
    """
    model, data = classes["model"], classes["data"]
    given = (config["model"].get("init_args") or {}).keys()
    known = parameters(model)
    readers: dict[str, Callable[[Any], Any]] = {}
    for name in LINKED:
        if name not in known or name in given:
            continue
        if name == "modalities":
            readers[name] = _modalities_of
        elif name == "classes":
            readers[name] = partial(_classes_of, getattr(model, "classes_from", "classes"))
        elif name == "reading":
            readers[name] = _reading_of
        elif hasattr(data, "context_size"):
            readers[name] = _context_size_of
    return readers


def _modalities_of(datamodule: Any) -> dict[str, Any]:
    modalities = getattr(datamodule, "modalities", None)
    if modalities is None:
        kind = type(datamodule).__name__
        raise ConfigError(
            f"{kind} does not say which modalities it yields, and the model needs to know. "
            "Describe them in model.init_args.modalities, for example\n"
            "  modalities: {s2: {name: s2, kind: image, channels: [B02, B03, B04], value_unit: dn, "
            "size: [120, 120], gsd_m: 10}}\n"
            "or give the DataModule a property `modalities` (see domainssl.modality.Modality)."
        )
    return {
        name: item if isinstance(item, dict) else item.to_dict()
        for name, item in modalities.items()
    }


def _classes_of(name: str, datamodule: Any) -> list[str]:
    """Return the names of the classes; data that tell them by their files are looked at.

    Args:
        name: Property that has them, `classes` of items or `mask_classes` of pixels.
        datamodule: The data.
    """
    name = name if hasattr(datamodule, name) else "classes"
    if getattr(datamodule, name, None) is None and hasattr(datamodule, "open_sources"):
        datamodule.prepare_data()
        datamodule.setup("fit")
    names = getattr(datamodule, name, None)
    if not names:
        raise ConfigError(
            f"{type(datamodule).__name__} knows no names of classes, and the model learns some. "
            "Set data.init_args.labels, or name them by their numbers: "
            "model.init_args.classes: [forest, water]."
        )
    return [str(name) for name in names]


def _reading_of(datamodule: Any) -> dict[str, Any] | None:
    return getattr(datamodule, "reading", None)


def _context_size_of(datamodule: Any) -> Any:
    return datamodule.context_size
