"""The words of a verb: argparse, whose mistakes are ours, with the nearest valid name.

Options are written in full: an abbreviation would change its meaning, or become ambiguous, with the
next option that a verb learns.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from domainssl.errors import ConfigError, nearest

__all__ = ["ALWAYS", "Parser"]

ALWAYS = ("--help", "--debug")
"""Options of every verb."""

_NUMBER = re.compile(r"-\d+$|-\d*\.\d+$")  # as argparse tells a negative number from an option
_CHOICE = re.compile(r"invalid choice: '(?P<word>.*)' \(choose from (?P<known>.*)\)$")


class Parser(argparse.ArgumentParser):
    """A parser of the words after a verb.

    Args:
        passes: Start of options that are handed on, such as `--data.`; `parse_known_args` returns
            them as `--data.KEY=VALUE`.
        more: Arguments of argparse.

    Raises:
        ConfigError: From `parse_args` and `parse_known_args`: an option or a word that the verb
            does not know, or a value that it does not take.
    """

    def __init__(self, *, passes: str | None = None, **more: Any) -> None:
        self._own_options: dict[str, argparse.Action] = {}
        self._actions_of_verb: Any = None
        self._passes = passes
        super().__init__(**{"allow_abbrev": False, **more})

    def add_argument(self, *names: str, **more: Any) -> argparse.Action:  # type: ignore[override]
        """Add an argument, and remember how an option is spelled."""
        action = super().add_argument(*names, **more)
        self._own_options |= {name: action for name in names if name.startswith("-")}
        return action

    def add_subparsers(self, **more: Any) -> Any:  # type: ignore[override]
        """Add actions, such as `cache build`."""
        self._actions_of_verb = super().add_subparsers(**more)
        return self._actions_of_verb

    def options(self) -> list[str]:
        """Return how the options of the verb and of its actions are spelled."""
        return list(self._known_options())

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Return the options, and the words that are handed on."""
        words = list(args or ())
        self._check(words)
        self._refuse_blank(words)
        options, rest = super().parse_known_args(_joined(words, self._passes), namespace)
        strange = [word for word in rest if not self._is_passed(word)]
        if strange:
            self.error(f"{strange[0]!r} is a word too many")
        return options, rest

    def error(self, message: str) -> NoReturn:
        """Raise what argparse complains about as an error of ours."""
        choice = _CHOICE.search(message)
        known = [] if choice is None else re.findall(r"[^\s,']+", choice["known"])
        close = "" if choice is None else nearest(choice["word"], known)
        raise ConfigError(
            f"{self.prog.removeprefix('python -m domainssl ')}: {message}.{close} "
            f"See {self.prog} --help."
        )

    def _refuse_blank(self, words: Sequence[str]) -> None:
        """Refuse words of nothing: an empty path would be the folder one is in."""
        before = ""
        for word in words:
            name, equals, value = word.partition("=")
            is_option = bool(equals) and name.startswith("-") and not self._is_passed(word)
            is_theirs = self._is_passed(before) and "=" not in before
            if (is_option and not value.strip()) or not (word.strip() or is_theirs):
                option = name if is_option else before
                action = self._known_options().get(option)
                if action is None or action.default != "":
                    where = f"{option}: " if action is not None else ""
                    self.error(
                        f"{where}got {(value if is_option else word)!r}, expected a value that is "
                        "not blank; a variable of the shell may be empty"
                    )
            before = word

    def _known_options(self) -> dict[str, argparse.Action]:
        """Return the options of the verb and of its actions by how they are spelled."""
        known = dict(self._own_options)
        actions = () if self._actions_of_verb is None else self._actions_of_verb.choices.values()
        for action in actions:
            known |= action._known_options()
        return known

    def _is_passed(self, word: str) -> bool:
        return self._passes is not None and word.startswith(self._passes)

    def _check(self, words: Iterable[str]) -> None:
        """Refuse options that nobody knows, before argparse misses others for their sake."""
        known = self.options()
        for word in words:
            if word == "--":
                return
            name = word.partition("=")[0]
            is_option = len(word) > 1 and word.startswith("-") and " " not in name
            if not is_option or _NUMBER.match(word) or name in known or self._is_passed(word):
                continue
            offered = sorted({*ALWAYS, *(n for n in known if n[:2] == "--" and "-" not in n[2:])})
            passed = [f"{self._passes}KEY"] if self._passes else []
            self.error(
                f"there is no option {name!r}.{nearest(name, offered)} "
                f"Options: {', '.join([*offered, *passed])}"
            )


def _joined(words: Sequence[str], passes: str | None) -> list[str]:
    """Write `--data.KEY VALUE` as one word, which argparse would otherwise tear apart."""
    found: list[str] = []
    for word in words:
        before = found[-1] if found else ""
        is_open = passes is not None and before.startswith(passes) and "=" not in before
        if is_open and not word.startswith("--"):
            found[-1] = f"{before}={word}"
        else:
            found.append(word)
    return found
