"""YAML as a tree of nodes that know where they were written.

Only plain data is read: mappings, lists, text, numbers, booleans and null. Tags are refused
and nothing in a file is ever executed. Numbers and booleans follow YAML 1.2, so `1e-4` is a
number and `no` is text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from domainssl.errors import ConfigError

__all__ = ["MAX_TEXT", "ConfigMistakes", "Mistake", "Node", "Where", "dump", "parse", "shown"]

_MAX_NODES = 100_000
_MAX_DEPTH = 50
MAX_TEXT = 10_000_000  # characters
_MAX_SHOWN = 120  # characters of a value in a message
_DEEP = f"The YAML is nested more than {_MAX_DEPTH} levels deep"
_FLATTEN = "Check the brackets and the indentation; no section is that deep."
_BOOL, _FLOAT, _INT, _NULL, _STR = (
    f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "int", "null", "str")
)
_RESOLVERS = (
    (_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    (
        _FLOAT,
        re.compile(
            r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
            r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
        ),
        "-+.0123456789",
    ),
    (_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    (_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[Any, Any] = {}

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent lists inside mappings, as the recipes do."""
        super().increase_indent(flow, False)


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))


@dataclass(frozen=True)
class Where:
    """A place in a file, or the command line when `line` is None."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}, line {self.line}"


@dataclass(frozen=True)
class Mistake:
    """One thing to correct: what was found, where, and what to write instead."""

    found: str
    where: Where | None = None
    advice: str = ""

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.found}{place}." + (f"\n  {self.advice.strip()}" if self.advice else "")


class ConfigMistakes(ConfigError):
    """Every mistake of a configuration, in one exception."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        self.mistakes = list(dict.fromkeys(mistakes))
        count = len(self.mistakes)
        head = "1 mistake" if count == 1 else f"{count} mistakes"
        body = "\n".join(f"- {mistake}" for mistake in self.mistakes)
        super().__init__(f"{head} in the configuration; nothing was run.\n{body}")


@dataclass
class Node:
    """A mapping of nodes, a list of nodes or a plain value, with its place."""

    value: Any
    where: Where
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def is_mapping(self) -> bool:
        """True for a mapping; its members are in `children`."""
        return isinstance(self.value, dict)

    @property
    def is_list(self) -> bool:
        """True for a list; its members are in `value`."""
        return isinstance(self.value, list)

    def get(self, *path: str) -> Node | None:
        """Return the node at `path`, or None."""
        node: Node | None = self
        for key in path:
            node = node.children.get(key) if node is not None else None
        return node

    def plain(self) -> Any:
        """Return the tree as dicts, lists and values."""
        if self.is_mapping:
            return {key: child.plain() for key, child in self.children.items()}
        if self.is_list:
            return [item.plain() for item in self.value]
        return self.value


def shown(value: object) -> str:
    """Return a value as messages show it: its beginning, where it is long."""
    if isinstance(value, int) and value.bit_length() > 4 * _MAX_SHOWN:
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def mapping(where: Where, children: dict[str, Node] | None = None) -> Node:
    """Return a mapping node."""
    return Node({}, where, children or {})


def dump(data: object) -> str:
    """Return plain data as YAML that `parse` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def parse(text: str, file: str, mistakes: list[Mistake], numbered: bool = True) -> Node | None:
    """Read YAML text.

    Args:
        text: The YAML document.
        file: The name that mistakes show.
        mistakes: Receives what is wrong.
        numbered: Whether places carry line numbers (False for words of the command line).

    Returns:
        The tree, or None when the text is no YAML or is empty.
    """
    if len(text) > MAX_TEXT:
        found = f"A configuration of {len(text) / 1e6:.0f} million characters is not read"
        mistakes.append(Mistake(found, Where(file), f"At most {MAX_TEXT / 1e6:.0f} million are."))
        return None
    try:
        root = yaml.compose(text, Loader=_Loader)
    except RecursionError:
        mistakes.append(Mistake(_DEEP, Where(file), _FLATTEN))
        return None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None and numbered else None
        detail = ", ".join(part for part in (error.context, error.problem) if part)
        advice = "Check the indentation, quotes and brackets there and on the line before."
        if "alias" in detail:
            advice = "Put quotes around a text that begins with a star, such as '*'."
        mistakes.append(Mistake(f"Not valid YAML: {detail}", Where(file, line), advice))
        return None
    except yaml.YAMLError as error:
        mistakes.append(Mistake(f"Not valid YAML: {error}", Where(file)))
        return None
    if root is None:
        return None
    return _Converter(file, mistakes, numbered).convert(root)


class _Converter:
    def __init__(self, file: str, mistakes: list[Mistake], numbered: bool) -> None:
        self.file, self.mistakes, self.numbered = file, mistakes, numbered
        self.open: set[int] = set()
        self.count = 0

    def where(self, node: yaml.Node) -> Where:
        return Where(self.file, node.start_mark.line + 1 if self.numbered else None)

    def convert(self, node: yaml.Node, where: Where | None = None) -> Node:
        where = where or self.where(node)
        self.count += 1
        if id(node) in self.open or self.count > _MAX_NODES:
            if self.count <= _MAX_NODES or self.count == _MAX_NODES + 1:
                found = "An alias contains itself or unfolds to an enormous tree"
                self.mistakes.append(Mistake(found, where, "Write the values out."))
            return Node(None, where)
        if len(self.open) >= _MAX_DEPTH:
            self.mistakes.append(Mistake(_DEEP, where, _FLATTEN))
            return Node(None, where)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, where)
            if isinstance(node, yaml.SequenceNode):
                self._check_tag(node, "tag:yaml.org,2002:seq", where)
                return Node([self.convert(item) for item in node.value], where)
            assert isinstance(node, yaml.ScalarNode)
            return Node(self._scalar(node, where), where)
        finally:
            self.open.discard(id(node))

    def _check_tag(self, node: yaml.Node, expected: str, where: Where) -> bool:
        if node.tag == expected:
            return True
        shown = node.tag.replace("tag:yaml.org,2002:", "!!")
        self.mistakes.append(
            Mistake(
                f"The YAML tag {shown!r} is refused",
                where,
                "A configuration holds plain data only; nothing was executed. "
                "Name a class with class_path and give its arguments in init_args.",
            )
        )
        return False

    def _mapping(self, node: yaml.MappingNode, where: Where) -> Node:
        self._check_tag(node, "tag:yaml.org,2002:map", where)
        result = mapping(where)
        for key_node, value_node in node.value:
            place = self.where(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.mistakes.append(Mistake("A key must be a plain word", place))
                continue
            key = str(key_node.value)
            if key == "<<":
                advice = "Write the keys out, or lay a second --config file over the first."
                self.mistakes.append(Mistake("YAML merge keys (<<) are not read", place, advice))
                continue
            if key in result.children:
                first = result.children[key].where
                advice = f"It stands already on line {first.line}; keep one of the two."
                self.mistakes.append(Mistake(f"Key {key!r} is written twice", place, advice))
                continue
            result.children[key] = self.convert(value_node, place)
        return result

    def _scalar(self, node: yaml.ScalarNode, where: Where) -> Any:
        text = str(node.value)
        try:
            if node.tag == _STR:
                return text
            if node.tag == _NULL:
                return None
            if node.tag == _BOOL:
                return text.lower() == "true"
            if node.tag == _INT:
                return int(text.replace("_", ""), 0)
            if node.tag == _FLOAT:
                return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            self.mistakes.append(Mistake(f"{shown(text)} is not a number", where))
            return None
        self._check_tag(node, _STR, where)
        return None
