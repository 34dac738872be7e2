"""LightningCLI for one checked request, with data and model linked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from domainssl.cli.run.record import RunRecord
from domainssl.cli.run.request import Request, link_to_data, linked_from_data
from domainssl.training._lightning import CLIHooks

__all__ = ["DomainCLI"]

_METHOD_SKIP = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}


class DomainCLI(CLIHooks, LightningCLI):
    """Builds trainer, model and data of a request; `execute` runs its verb.

    LightningCLI's injection of hyperparameters is off: an objective records its own, as plain
    data, so that checkpoints load without unpickling.

    Attributes:
        resolved: The configuration with all defaults, as it is saved.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.verb = request.verb
        self.resolved: dict[str, Any] = {}
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunRecord,
            trainer_class=Trainer,
            parser_kwargs={"exit_on_error": False, self.verb: {"exit_on_error": False}},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args={"subcommand": request.verb, request.verb: request.arguments()},
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the verb and the arguments of its Trainer method that are not options."""
        return {self.verb: set(_METHOD_SKIP)}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the request; sys.argv, which may be that of a test runner, plays no part."""
        self.config = parser.parse_object(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the data decide what nobody should have to write twice."""
        link_to_data(parser, self._linked())

    def before_instantiate_classes(self) -> None:
        """Keep the resolved configuration for the record of the run."""
        self._dump_config()
        self.resolved = self.request.resolved(self.config_dump)
        self.save_config_kwargs = {
            "folder": self.request.run_dir,
            "resolved": self.resolved,
            "facts": {
                "verb": self.verb,
                "config_files": self.request.files,
                "ckpt_path": self.request.config.get("ckpt_path"),
            },
        }

    def _dump_config(self) -> None:
        """Read the parsed values; jsonargparse's own dump stops at defaults it cannot type."""
        section = self.config[self.verb]
        dumped = _values(section.as_dict() if hasattr(section, "as_dict") else dict(section))
        for name in self._linked():
            dumped["model"]["init_args"].pop(name, None)
        self.config_dump = dumped

    def _linked(self) -> dict[str, Callable[[Any], Any]]:
        return linked_from_data(self.request.classes, self.request.config)

    @property
    def record(self) -> RunRecord | None:
        """The callback that records the run, None where nothing is recorded."""
        callbacks: list[Any] = getattr(self.trainer, "callbacks", [])
        return next((c for c in callbacks if isinstance(c, RunRecord)), None)

    def execute(self) -> None:
        """Run the verb."""
        self.run_verb(self.verb)


def _values(value: Any) -> Any:
    """Return parsed values as plain data; what has no plain form is left to its default."""
    if isinstance(value, Mapping):
        items = {str(key): _values(item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not _NO_PLAIN_FORM}
    if isinstance(value, list | tuple | set | frozenset):
        return [_values(item) for item in value]
    if isinstance(value, Enum):
        return value.value if isinstance(value, str) else value.name
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path | timedelta):
        return str(value)
    if hasattr(value, "as_dict"):
        return _values(value.as_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _values(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return _NO_PLAIN_FORM


_NO_PLAIN_FORM = object()
