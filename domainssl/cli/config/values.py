"""Values that have the right type and still cannot be meant."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Iterator
from typing import Any

from domainssl.cli.config.nodes import Node
from domainssl.cli.config.schema import alternatives, mapping_values

__all__ = ["members", "misplaced_classes", "trainer_refusal", "value_refusal"]

_NUMBERS = (bool, int, float)
_MAX_SEED = 2**32 - 1

_COUNT = "a whole number of 1 or more"
_SOME = "more than zero batches: a whole number, or a fraction up to 1.0"
_FEW = "a whole number of batches, or a fraction up to 1.0"


def _is_share_or_count(value: float) -> bool:
    return value >= 0 and (isinstance(value, int) or value <= 1)


_TRAINER: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("accumulate_grad_batches", "check_val_every_n_epoch", "num_nodes"),
        (lambda v: v >= 1, _COUNT),
    ),
    **dict.fromkeys(
        ("max_epochs", "max_steps"),
        (lambda v: v >= 1 or v == -1, f"{_COUNT}, or -1 for no limit"),
    ),
    **dict.fromkeys(
        ("min_epochs", "min_steps", "log_every_n_steps", "reload_dataloaders_every_n_epochs"),
        (lambda v: v >= 0, "0 or more"),
    ),
    "limit_train_batches": (lambda v: v > 0 and _is_share_or_count(v), _SOME),
    "val_check_interval": (lambda v: v > 0 and _is_share_or_count(v), _SOME),
    **dict.fromkeys(
        ("limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches"),
        (_is_share_or_count, _FEW),
    ),
    "num_sanity_val_steps": (lambda v: v >= -1, "0 or more, or -1 for all"),
    "gradient_clip_val": (lambda v: v >= 0, "a number of 0 or more"),
}


def trainer_refusal(name: str, value: Any, verb: str) -> str | None:
    """Return what is accepted instead of a number that would train nothing, or never end."""
    if name not in _TRAINER or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if math.isnan(value):  # refused everywhere
        return None
    if verb != "fit" and name in ("max_epochs", "max_steps", "limit_train_batches"):
        return None
    accepts, words = _TRAINER[name]
    return None if accepts(value) else f"Accepted: {words}."


def value_refusal(path: str, value: Any, hint: Any) -> str | None:
    """Return why a plain value cannot be used, None where nothing speaks against it.

    Args:
        path: Its key, with those above.
        value: A scalar; containers are looked into by the caller.
        hint: What the constructor is annotated with.
    """
    kinds = set(alternatives(hint))
    is_known = hint is not Any and bool(kinds) and Any not in kinds
    key = path.rpartition(".")[2]
    if value is None:
        return "null is no value for it" if is_known and type(None) not in kinds else None
    if isinstance(value, str):
        if is_known and all(map(_holds_no_text, kinds)):
            return _why_no_text(value)
        if not value.strip() and not path.startswith("loggers.") and str in kinds:
            return "it is empty, as from a variable that is not set"
    if isinstance(value, bool):
        is_number = is_known and bool not in kinds and kinds <= {*_NUMBERS, type(None)}
        return "a number is expected" if is_number else None
    if isinstance(value, float) and math.isnan(value):
        return "not a number (nan) is no value for it"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "it does not fit into 64 bits"
    if isinstance(value, int) and key in ("seed", "seed_everything"):
        return None if 0 <= value <= _MAX_SEED else f"a seed is between 0 and {_MAX_SEED}"
    return None


def _holds_no_text(kind: Any) -> bool:
    """Tell whether an annotation is that of numbers, or of containers of them."""
    if kind in (*_NUMBERS, type(None), Ellipsis):
        return True
    inner = typing.get_args(kind)
    is_list = typing.get_origin(kind) in (list, tuple, set, frozenset)
    return is_list and all(_holds_no_text(a) for k in inner for a in alternatives(k))


def _why_no_text(text: str) -> str | None:
    """Return what to say of a text that a parser would read as a number or as true or false."""
    if text.lower() in ("yes", "no", "on", "off", "true", "false", "y", "n"):
        return "it is text; write true or false, without quotes"
    try:
        float(text)
    except ValueError:
        return None
    return "it is text, not a number; leave the quotes out"


def members(node: Node, path: str, hint: Any) -> Iterator[tuple[Node, str, Any]]:
    """Yield the values inside a list or a mapping with their places and annotations."""
    if node.is_mapping:
        inner = mapping_values(hint)
        for key, child in node.children.items():
            yield child, f"{path}.{key}", Any if inner is None else inner
    elif node.is_list:
        kinds = [a for kind in alternatives(hint) for a in typing.get_args(kind)]
        kinds = [kind for kind in kinds if kind is not Ellipsis]
        union = typing.Union[tuple(kinds)] if kinds else Any  # noqa: UP007
        for position, child in enumerate(node.value):
            yield child, f"{path}[{position}]", union


def misplaced_classes(node: Node, path: str, hint: Any) -> Iterator[tuple[Node, str]]:
    """Yield every `class_path` in a place for plain data, where nothing may be built."""
    kinds = list(alternatives(hint))
    if node.is_mapping and "class_path" in node.children:
        if not any(_is_class(kind) for kind in kinds):
            yield node.children["class_path"], f"{path}.class_path"
        return
    for child, place, inner in members(node, path, hint):
        yield from misplaced_classes(child, place, inner)


def _is_class(kind: Any) -> bool:
    return isinstance(kind, type) and kind.__module__ != "builtins"
