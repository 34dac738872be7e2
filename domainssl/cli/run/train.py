"""The Lightning verbs: compose, check, build, run.

`build` gives the objects of a configuration to plain Python:

    run = build("fit", ["--config", "recipes/ssl4eo_croma.yaml"])
    run.trainer.fit(run.model, run.datamodule)
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from domainssl.cli.config.check import Checker, needs_hardware, trainer_refusals
from domainssl.cli.config.compose import compose
from domainssl.cli.config.construct import placed, said_for_the_user
from domainssl.cli.config.nodes import ConfigMistakes, Node, dump
from domainssl.cli.console import console
from domainssl.cli.run.execute import execute
from domainssl.cli.run.request import Request, link_to_data, linked_from_data
from domainssl.cli.run.rundir import RUN_DIR_VARIABLE, is_first_process, sole_writer
from domainssl.errors import ConfigError, DomainSSLError

__all__ = ["build", "build_data", "build_model", "prepare", "run_verb"]


def prepare(verb: str, argv: list[str]) -> Request:
    """Compose and check a configuration.

    Raises:
        ConfigMistakes: Listing every mistake with its place.
    """
    return Request(verb, argv)


def build(verb: str, argv: list[str]) -> Any:
    """Return an object with `trainer`, `model` and `datamodule` of a configuration.

    Raises:
        ConfigError: The configuration cannot be used.
    """
    return _instantiate(prepare(verb, argv))


def run_verb(verb: str, argv: list[str]) -> int:
    """Run `fit`, `validate`, `test` or `predict`; returns the exit status."""
    from domainssl.cli.help import wanted_help

    text = wanted_help(verb, argv)
    if text is not None:
        console().print(text, markup=False, end="")
        return 0
    request = prepare(verb, argv)
    threads = _cpu_threads(request.config.get("cpu_threads"))
    if request.flags & {"--plan", "--json"}:
        return _plan(request, threads)
    with _quiet(), _shared_run_dir(request.run_dir), threads:
        run = _instantiate(request)
        if "--print_config" in request.flags:
            console().print(dump(run.resolved), end="", markup=False)
            return 0
        writes = verb == "fit" and is_first_process()
        with sole_writer(request.run_dir) if writes else nullcontext():
            try:
                execute(run, request.config.get("ckpt_path"))
            except ConfigError as error:
                if run.record is not None and run.record.has_begun:
                    raise
                raise _with_place(request.tree, error) from error
    return 0


def _plan(request: Request, threads: AbstractContextManager[None]) -> int:
    """Say what a run needs, without it; returns the exit status, 2 where it is not possible."""
    from domainssl.cli.run.plan import for_planning, show_plan

    if request.verb != "fit" or "--plan" not in request.flags:
        raise ConfigError(
            "--plan is for fit, and --json for --plan: python -m domainssl fit --config RECIPE "
            "--plan [--json]."
        )
    asked = for_planning(request)
    with _quiet(), threads:
        run = _instantiate(request, is_planned=True)
        with _said_plainly(request.tree):
            return show_plan(run, asked, as_json="--json" in request.flags)


def build_data(argv: list[str]) -> Any:
    """Return the DataModule of a configuration, of which nothing else has to be there.

    Raises:
        ConfigError: The configuration cannot be used.
    """
    from domainssl.datamodules.base import DomainDataModule

    data = _built(argv, ("data",)).data
    if not isinstance(data, DomainDataModule):
        raise ConfigError(
            f"data: {type(data).__name__} is not one of this project's DataModules, whose items "
            "can be looked at one by one. Derive it from DomainDataModule (datamodules/base.py)."
        )
    return data


def build_model(argv: list[str]) -> Any:
    """Return the model of a configuration, built for its data, without a trainer.

    Raises:
        ConfigError: The configuration cannot be used.
    """
    return _built(argv, ("data", "model")).model


def _built(argv: list[str], sections: tuple[str, ...]) -> Any:
    """Return an object with the data, or data and model, of a configuration."""
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningArgumentParser

    composition = compose(argv)
    checker = Checker(composition, "fit")
    mistakes = checker.run(needed=sections)
    if mistakes:
        raise ConfigMistakes(mistakes)
    kinds: dict[str, Any] = {"data": LightningDataModule, "model": LightningModule}
    parser = LightningArgumentParser(exit_on_error=False)
    for section in sections:
        parser.add_lightning_class_args(kinds[section], section, subclass_mode=True)
    config = composition.tree.plain()
    if "model" in sections:
        link_to_data(parser, linked_from_data(checker.classes, config))
    specs = {section: config[section] for section in sections}
    with _said_plainly(composition.tree):
        return parser.instantiate_classes(parser.parse_object(specs))


def _instantiate(request: Request, *, is_planned: bool = False) -> Any:
    from domainssl.cli.run.lightning_cli import DomainCLI

    _refuse_slurm_elsewhere(request.config)
    _set_matmul_precision(request.config.get("matmul_precision"))
    if not is_planned and needs_hardware(request.tree):  # checked with the rest otherwise
        mistakes = trainer_refusals(request.tree)
        if mistakes:
            raise ConfigMistakes(mistakes)
    with _said_plainly(request.tree):
        return DomainCLI(request)


@contextmanager
def _said_plainly(tree: Node | None = None) -> Iterator[None]:
    """Raise what was raised for the user, which libraries wrap or stumble over."""
    from jsonargparse import ArgumentError

    try:
        with _quiet():
            yield
    except Exception as error:
        said = said_for_the_user(error)
        if said is None and isinstance(error, ArgumentError):
            raise ConfigError(f"The configuration cannot be used: {error}") from error
        if said is None:
            raise
        raise _with_place(tree, said) from error


def _with_place(tree: Node | None, error: Exception) -> Exception:
    """Return an error that names a key as a mistake of the configuration, with its place."""
    mistake = placed(tree, error) if tree is not None else None
    if mistake is not None:
        return ConfigMistakes([mistake])
    if isinstance(error, DomainSSLError):
        return error
    return ConfigError(f"The configuration cannot be used: {error}")


def _refuse_slurm_elsewhere(config: dict[str, Any]) -> None:
    plugins = (config.get("trainer") or {}).get("plugins")
    name = plugins.get("class_path", "") if isinstance(plugins, dict) else str(plugins)
    if name.endswith("SLURMEnvironment") and "SLURM_NODEID" not in os.environ:
        raise ConfigError(
            "trainer.plugins is SLURMEnvironment, but this process was not started by srun "
            "(SLURM_NODEID is not set). Submit the run with sbatch configs/trainer/slurm.sh, or "
            "leave configs/trainer/slurm.yaml out."
        )


def _set_matmul_precision(precision: str | None) -> None:
    if precision is not None:
        import torch

        torch.set_float32_matmul_precision(precision)


@contextmanager
def _cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch compute with this many threads, and as before afterwards."""
    if count is None:
        yield
        return
    if count < 1:
        raise ConfigError(f"cpu_threads is {count}; expected 1 or more.")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _shared_run_dir(folder: Path) -> Iterator[None]:
    before = os.environ.get(RUN_DIR_VARIABLE)
    os.environ[RUN_DIR_VARIABLE] = str(folder.absolute())
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(RUN_DIR_VARIABLE, None)
        else:
            os.environ[RUN_DIR_VARIABLE] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's notes about things that are on purpose here."""
    talk = [logging.getLogger(name) for name in _TALKATIVE]
    talk = [source for source in talk if _is_news not in source.filters]  # may be nested
    for source in talk:
        source.addFilter(_is_news)
    with warnings.catch_warnings():
        for text in (
            ".*Experiment logs directory .* exists and is not empty.*",
            ".*does not have many workers.*",
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*`IterableDataset` has `__len__` defined.*",
            ".*Trying to infer the `batch_size`.*",
            ".*The dirpath has changed from.*",
            ".*module.s. in eval mode at the start of training.*",  # teachers, frozen backbones
            "(?s).*(instantiate_classes|JsonargparseDeprecationWarning).*",
            ".*isinstance.treespec, LeafSpec.*",
        ):
            warnings.filterwarnings("ignore", message=text)
        try:
            yield
        finally:
            for source in talk:
                source.removeFilter(_is_news)


_NO_NEWS = ("litlogger", "litmodels", "TPU available", "`Trainer.fit` stopped: `max_")
_TALKATIVE = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")


def _is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(part in text for part in _NO_NEWS)
