"""Lay recipe, overlays and command line over each other, keeping every value's place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domainssl.cli.config import catalog
from domainssl.cli.config.nodes import MAX_TEXT, Mistake, Node, Where, mapping, parse
from domainssl.cli.words import ALWAYS
from domainssl.errors import nearest

__all__ = ["CLASS_SECTIONS", "DEFAULT_LOGGERS", "NAMED_SECTIONS", "Composition", "compose"]

CLASS_SECTIONS = ("model", "data")
NAMED_SECTIONS = ("callbacks", "loggers")
DEFAULT_LOGGERS = {"csv": "CSVLogger", "tensorboard": "TensorBoardLogger"}
"""Loggers of every run; `loggers: {tensorboard: null}` removes one."""

_COMMAND_LINE = "command line"
_SPEC_KEYS = ("class_path", "init_args", "dict_kwargs")
_FLAGS = ("--print_config", "--plan", "--json")
_SWITCHES = ("--auto_resume",)  # `--auto_resume` alone means true
_WORDS = (*_FLAGS, *_SWITCHES, *ALWAYS, "--config", "--ckpt_path", "--run_dir")


@dataclass(kw_only=True)
class Composition:
    """What the configuration files and the command line add up to.

    Attributes:
        tree: The merged mapping.
        mistakes: What is wrong with the files themselves and with their order.
        files: Paths in the order given.
        name: Stem of the recipe's file, or None without a recipe.
        flags: Switches without a value, such as `--print_config`.
        complete: False when a file could not be read, so that nothing can be said to be missing.
    """

    tree: Node
    mistakes: list[Mistake] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    name: str | None = None
    flags: set[str] = field(default_factory=set)
    complete: bool = True


def compose(argv: list[str]) -> Composition:
    """Read the words of a Lightning verb.

    Args:
        argv: The words after the verb: `--config FILE` any number of times, and
            `--key.path=value` or `--key.path value`.
    """
    result = Composition(tree=mapping(Where(_COMMAND_LINE)))
    defaults = {
        name: mapping(Where("defaults"), {"class_path": Node(class_name, Where("defaults"))})
        for name, class_name in DEFAULT_LOGGERS.items()
    }
    result.tree.children["loggers"] = mapping(Where("defaults"), defaults)
    files, overrides = _split(argv, result)
    loaded = [(name, _load(name, result)) for name in files]
    _check_order([(name, tree) for name, tree in loaded if tree is not None], result)
    for name, tree in loaded:
        if tree is not None:
            merge(result.tree, tree)
            if is_recipe(tree):
                result.name = Path(name).stem
    for key, text in overrides:
        _override(result, key, text)
    _drop_removed(result.tree)
    return result


def is_recipe(tree: Node) -> bool:
    """Return True for a full run: it names the class of model and of data."""
    return all(tree.get(section, "class_path") is not None for section in CLASS_SECTIONS)


def _split(argv: list[str], result: Composition) -> tuple[list[str], list[tuple[str, str]]]:
    files: list[str] = []
    overrides: list[tuple[str, str]] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in _FLAGS:
            result.flags.add(word)
            continue
        if not word.startswith("-"):
            advice = "Options have the form --key.path=value; files come after --config."
            if word.endswith((".yaml", ".yml")):
                advice = f"Write --config {word}"
            result.mistakes.append(Mistake(f"Stray word {word!r}", Where(_COMMAND_LINE), advice))
            continue
        key, equals, text = word.partition("=")
        if not equals:
            if key in _SWITCHES and not (words and words[0].lower() in ("true", "false")):
                overrides.append((key.lstrip("-"), "true"))
                continue
            if not words or words[0].startswith("--"):
                close = "" if "." in key else nearest(key, _WORDS)
                advice = f"{close} Write {key}=VALUE, for a switch {key}=true."
                found = f"Option {key!r} has no value"
                result.mistakes.append(Mistake(found, Where(_COMMAND_LINE), advice))
                continue
            text = words.pop(0)
        if key in ("--config", "-c"):
            files.append(text)
        elif key in _FLAGS:
            found = f"Option {key!r} is a switch and takes no value, got {text!r}"
            result.mistakes.append(Mistake(found, Where(_COMMAND_LINE), f"Write {key} alone."))
        else:
            overrides.append((key.lstrip("-"), text))
    return files, overrides


def locate(name: str) -> Path | None:
    """Find a configuration file in the working directory, then in the installed package."""
    for path in (Path(name).expanduser(), catalog.package_folder() / name):
        if path.is_file():
            return path
    return None


def _load(name: str, result: Composition) -> Node | None:
    result.files.append(name)
    path = locate(name)
    if path is None:
        result.complete = False
        known = [*catalog.recipes(), *catalog.configs()]
        by_stem = {Path(k).stem: k for k in known}
        stem = by_stem.get(Path(name).stem)
        close = f" Did you mean {stem!r}?" if stem else ""
        close = close or nearest(name, known) or nearest(Path(name).stem, by_stem)
        advice = f"{close} `python -m domainssl recipes` lists what there is."
        where = Where(_COMMAND_LINE)
        found = f"No configuration file {name!r} here or in the installed package"
        result.mistakes.append(Mistake(found, where, advice))
        return None
    before = len(result.mistakes)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_TEXT + 1)
    except (OSError, UnicodeDecodeError) as error:
        result.complete = False
        result.mistakes.append(Mistake(f"{name!r} cannot be read: {error}", Where(_COMMAND_LINE)))
        return None
    tree = parse(text, name, result.mistakes)
    if tree is None:
        result.complete = result.complete and len(result.mistakes) == before
        return None
    if not tree.is_mapping:
        result.complete = False
        found = "A configuration is a mapping of keys such as model, data and trainer"
        result.mistakes.append(Mistake(found, tree.where))
        return None
    return normalise(tree)


def normalise(tree: Node) -> Node:
    """Write every short form `section: ClassName` as a mapping with `class_path`."""
    for section in CLASS_SECTIONS:
        if section in tree.children:
            tree.children[section] = _as_spec(tree.children[section])
    for section in NAMED_SECTIONS:
        group = tree.children.get(section)
        if group is not None and group.is_mapping:
            group.children = {name: _as_spec(node) for name, node in group.children.items()}
    return tree


def _as_spec(node: Node) -> Node:
    if isinstance(node.value, str):
        return mapping(node.where, {"class_path": Node(node.value, node.where)})
    return node


def merge(base: Node, top: Node) -> None:
    """Lay `top` over `base`, key by key; a list or a value replaces what was there.

    A change of class drops the arguments of the class before it, which are not its own.
    """
    if _changes_class(base, top):
        base.children.pop("init_args", None)
    for key, child in top.children.items():
        below = base.children.get(key)
        if below is not None and below.is_mapping and child.is_mapping:
            merge(below, child)
            below.where = child.where
        else:
            base.children[key] = child


def _changes_class(base: Node, top: Node) -> bool:
    before, after = base.get("class_path"), top.get("class_path")
    if before is None or after is None:
        return False
    return str(before.value).rpartition(".")[2] != str(after.value).rpartition(".")[2]


def _drop_removed(tree: Node) -> None:
    groups = [tree.children.get(section) for section in NAMED_SECTIONS]
    for group in (*groups, tree.get("data", "init_args", "modalities")):
        if group is not None and group.is_mapping:
            group.children = {
                name: node
                for name, node in group.children.items()
                if node.value is not None or node.is_mapping
            }


def _check_order(loaded: list[tuple[str, Node]], result: Composition) -> None:
    recipe: str | None = None
    for position, (name, tree) in enumerate(loaded):
        if is_recipe(tree):
            if recipe is not None:
                advice = (
                    "A recipe is a full run with model and data; give one, and lay files of "
                    "configs/ over it."
                )
                found = f"{name!r} is a second recipe after {recipe!r}"
                result.mistakes.append(Mistake(found, Where(_COMMAND_LINE), advice))
            elif position > 0:
                before = loaded[0][0]
                advice = f"Write --config {name} first, then --config {before}"
                found = f"The overlay {before!r} stands before the recipe {name!r}"
                result.mistakes.append(Mistake(found, Where(_COMMAND_LINE), advice))
            recipe = recipe or name


def _override(result: Composition, key: str, text: str) -> None:
    where = Where(f"{_COMMAND_LINE}, --{key}")
    if not text.strip():
        advice = "A variable of the shell may be empty; write null where no value is meant."
        result.mistakes.append(Mistake(f"Option '--{key}' has an empty value", where, advice))
        return
    value = parse(text, where.file, result.mistakes, numbered=False)
    value = value if value is not None else Node(None if text == "~" else text, where)
    path = spec_path(key.split("."))
    if not all(path):
        found = f"'--{key}' is no key"
        result.mistakes.append(Mistake(found, where, "Keys look like --trainer.max_epochs=3"))
        return
    node = _renamed(value, where)
    for name in reversed(path[1:]):
        node = mapping(where, {name: node})
    merge(result.tree, normalise(mapping(where, {path[0]: node})))


def spec_path(path: list[str]) -> list[str]:
    """Complete the short form of a class argument: `model.size` -> `model.init_args.size`."""
    at = 1 if path[0] in CLASS_SECTIONS else 2 if path[0] in NAMED_SECTIONS else None
    if at is None or len(path) <= at or path[at] in _SPEC_KEYS:
        return path
    return [*path[:at], "init_args", *path[at:]]


def _renamed(node: Node, where: Where) -> Node:
    """Give a tree from the command line the place of its option."""
    children = {key: _renamed(child, where) for key, child in node.children.items()}
    value: Any = [_renamed(item, where) for item in node.value] if node.is_list else node.value
    return Node(value, where, children)
