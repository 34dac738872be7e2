"""Help of the Lightning verbs, from the same signatures that the check reads."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from domainssl.cli.config import catalog
from domainssl.cli.config.schema import Parameter, dataclasses_in, in_words, parameters
from domainssl.errors import ConfigError, nearest

__all__ = ["wanted_help"]

_SECTIONS = ("trainer", "model", "data", "callbacks", "loggers")
_MOVED = ("callbacks", "logger", "default_root_dir", "use_distributed_sampler")


def wanted_help(verb: str, argv: list[str]) -> str | None:
    """Return the help that the words ask for, or None when they ask for none."""
    for position, word in enumerate(argv):
        if word in ("-h", "--help"):
            return _verb_help(verb)
        option, _, name = word.partition("=")
        section = option.removeprefix("--").removesuffix(".help")
        if option.endswith(".help") and section in _SECTIONS:
            following = argv[position + 1] if position + 1 < len(argv) else ""
            return _section_help(verb, section, name or following)
    return None


def _verb_help(verb: str) -> str:
    recipe = next(iter(catalog.recipes()), "recipes/NAME.yaml")
    lines = [
        f"usage: python -m domainssl {verb} --config RECIPE [--config OVERLAY ...] [--KEY=VALUE]",
        "",
        "A recipe (recipes/) is a complete run; overlays (configs/) are laid over it in the order",
        "given, and options of the command line come last. Files are looked up in the working",
        "directory, then in the installed package; `python -m domainssl recipes` lists them.",
        "",
        "examples:",
        f"  python -m domainssl {verb} --config {recipe}",
        f"  python -m domainssl {verb} --config {recipe} --data.root=/data --trainer.max_epochs=10",
    ]
    if verb != "fit":
        lines[-1] = f"  python -m domainssl {verb} --config RUN/config.yaml --ckpt_path FILE.ckpt"
    lines += [
        "",
        "keys of a configuration, each also an option --key.path=value:",
        "  trainer           Lightning's Trainer, e.g. trainer.max_epochs   (--trainer.help)",
        "  model             class_path and init_args; --model.context_size=96 is short for",
        "                    --model.init_args.context_size=96              (--model.help NAME)",
        "  data              class_path and init_args                       (--data.help NAME)",
        "  callbacks         by name: callbacks.timer; null removes it     (--callbacks.help NAME)",
        "  loggers           by name: csv and tensorboard are there         (--loggers.help NAME)",
        "  seed_everything   whole number, true for a random one, false for none",
        "  matmul_precision  highest, high (TF32) or medium",
        "  cpu_threads       threads per process of torch on the CPU; one for small models",
        "  name, run_dir     name of the run; its folder, by default runs/NAME/DATE_TIME",
        "  ckpt_path         a checkpoint to continue or to measure; last for the newest",
        "  auto_resume       fit only: go on with this run where it ended, else begin it",
        "",
        "switches: --print_config prints the resolved configuration, --debug shows tracebacks,",
        "  --plan (fit) says what a run needs and how long it takes, with --json as data",
    ]
    for section, title in (("model", "models"), ("data", "data")):
        lines += ["", f"{title}:"]
        lines += [f"  {name:<22}{text}" for name, text in catalog.summaries(section).items()]
    return "\n".join(lines) + "\n"


def _section_help(verb: str, section: str, name: str) -> str:
    if section == "trainer":
        from lightning.pytorch import Trainer

        known = {k: p for k, p in parameters(Trainer).items() if k not in _MOVED}
        return "trainer: Lightning's Trainer\n\n" + _table(Trainer, known, "trainer")
    names = sorted(catalog.find_classes(section))
    if not name or name.startswith("-"):
        return f"{section}: give a name, --{section}.help NAME\n\n  " + "\n  ".join(names) + "\n"
    dotted = catalog.full_name(section, name)
    module, _, class_name = (dotted or "").rpartition(".")
    if dotted is None:
        raise ConfigError(
            f"Unknown class {name!r} after --{section}.help.{nearest(name, names)} "
            f"Known: {', '.join(names)}"
        )
    try:
        cls = getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{dotted!r} after --{section}.help cannot be used: {error}") from error
    summary = (inspect.getdoc(cls) or "").partition("\n")[0]
    prefix = section if section in ("model", "data") else f"{section}.NAME"
    return f"{class_name}: {summary}\n\n" + _table(cls, parameters(cls), prefix)


def _table(cls: type, known: dict[str, Parameter], prefix: str) -> str:
    texts: dict[str, str] = {}
    for owner in reversed(inspect.getmro(cls)):
        texts.update(_documented(owner))
    defaults = _defaults(cls)
    lines = []
    for name, parameter in known.items():
        default = "required" if parameter.is_required else f"default {_shown(defaults.get(name))}"
        if name in ("modalities", "context_size") and prefix == "model":
            default += ", taken from the data"
        kind = in_words(parameter.hint) if parameter.hint is not Any else "any value"
        lines += [f"  --{prefix}.{name}", f"      {kind} ({default})"]
        if texts.get(name):
            lines.append(f"      {texts[name]}")
        for inner in dataclasses_in(parameter.hint)[:1]:
            if name != "modalities":
                fields = ", ".join(parameters(inner))
                lines.append(f"      keys of {inner.__name__}: {fields}")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}.get(value, repr(value))
        if (value is None or isinstance(value, bool))
        else repr(value)
    )


def _defaults(cls: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for owner in reversed(inspect.getmro(cls)):
        init = owner.__dict__.get("__init__")
        if init is not None and owner is not object:
            for item in inspect.signature(init).parameters.values():
                if item.default is not inspect.Parameter.empty:
                    found[item.name] = item.default
    return found


def _documented(owner: type) -> dict[str, str]:
    """Return the first sentence about each argument in Google-style docstrings."""
    found: dict[str, str] = {}
    for source in (owner, owner.__dict__.get("__init__")):
        text = inspect.getdoc(source) if source is not None and owner is not object else None
        match = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", text or "", re.MULTILINE)
        if not match:
            continue
        for item in re.split(r"\n(?=\s{4}\w+(?: \([^)]*\))?:)", "\n" + match.group(1)):
            head, _, body = item.strip().partition(":")
            sentence = re.sub(r"\s+", " ", body).strip()
            sentence = re.sub(r"``?([^`]*)``?", r"\1", sentence)
            found[head.split(" ")[0]] = re.split(r"(?<=[.])\s(?=[A-Z`])", sentence)[0]
    return found
