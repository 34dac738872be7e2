"""The command line: one verb per file in `domainssl/cli/verbs`.

A verb is a module with a docstring, whose first line is its help, and a function
`run(argv: list[str]) -> int`. Its file name is the verb. Only the chosen verb is imported.
"""

from __future__ import annotations

import ast
import errno
import importlib
import os
import signal
import sys
import traceback
from pathlib import Path

from domainssl.errors import ConfigError, DomainSSLError, nearest
from domainssl.lazy import parsed
from domainssl.screen import COMMAND, printable

__all__ = ["main", "verb_table"]

_ORDER = ("fit", "validate", "test", "predict", "recipes", "inspect", "stats", "export", "doctor")
_RUNS = ("fit", "validate", "test", "predict")
_REPLACED = {"learning": "matrix"}
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_TERMINATED = 128 + signal.SIGTERM
_PIPE = 128 + signal.SIGPIPE
_PLACE = (
    errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENOENT, errno.ELOOP, errno.EINVAL, errno.ENOTEMPTY, errno.EBUSY, errno.EIO, errno.ESTALE,
)  # fmt: skip
_FOLDER = Path(__file__).parent / "verbs"


def verb_table() -> dict[str, str]:
    """Return every verb with its line of help, the usual ones first."""
    found = _verbs()
    rank = {verb: position for position, verb in enumerate(_ORDER)}
    names = sorted(found, key=lambda verb: (rank.get(verb, len(rank)), verb))
    return {v: (ast.get_docstring(parsed(found[v])) or "").partition("\n")[0] for v in names}


def _verbs() -> dict[str, Path]:
    """Return the file of every verb."""
    return {p.stem: p for p in _FOLDER.glob("*.py") if not p.stem.startswith("_")}


def _help() -> str:
    rows = "\n".join(f"  {verb:<10} {line}" for verb, line in verb_table().items())
    return (
        "usage: python -m domainssl VERB [options]\n\n"
        "Self-supervised pretraining for co-registered scientific imagery.\n\n"
        f"verbs:\n{rows}\n\n"
        "start with:\n"
        "  python -m domainssl recipes\n"
        "  python -m domainssl fit --config recipes/ssl4eo_croma.yaml\n\n"
        "`python -m domainssl VERB --help` explains a verb; --debug shows where an error arose;\n"
        "--version prints the version."
    )


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: The words after `python -m domainssl`; None takes them from the process.

    Returns:
        0 on success, 2 when something has to be corrected by the user, 1 for any other
        failure, 130 after an interrupt, 141 where nobody reads the output, 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    status = _status(words, debug)
    return _PIPE if _reader_is_gone() else status


def _status(words: list[str], debug: bool) -> int:
    """Run one verb; see `main`."""
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help() + "\n")
        return 0
    if words[0] == "--version":
        from domainssl import __version__

        sys.stdout.write(f"domainssl {__version__}\n")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in _verbs():
        _complain(_unknown_verb(verb))
        return 2
    from domainssl.cli.console import printable_logs

    try:
        with printable_logs():
            return int(importlib.import_module(f"domainssl.cli.verbs.{verb}").run(rest))
    except KeyboardInterrupt:
        _complain("Interrupted.")
        return 130
    except SystemExit as stop:  # argparse and jsonargparse leave this way after --help
        if type(stop).__name__ == "SIGTERMException":  # Lightning's, without a status of its own
            _complain("Terminated by SIGTERM.")
            return _TERMINATED
        return stop.code if isinstance(stop.code, int) else 2 if stop.code else 0
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return _PIPE
        if debug:
            raise
        if isinstance(error, DomainSSLError) or type(error).__name__ == "MisconfigurationException":
            # a mistake in the configuration is the same on all ranks and is said once
            _complain(str(error), everywhere=not isinstance(error, ConfigError))
            return 2
        if isinstance(error, OSError) and error.errno in _DISK:
            is_run = verb in _RUNS and any(word.startswith(("--config", "-c")) for word in rest)
            _complain(_disk(error, is_run), everywhere=True)
            return 2
        if isinstance(error, OSError) and error.errno in _PLACE and error.filename is not None:
            _complain(_place(error), everywhere=True)
            return 2
        sys.stderr.write(printable(traceback.format_exc()))
        _complain(f"{verb} failed: {type(error).__name__}: {error}")
        return 1


def _reader_is_gone() -> bool:
    """Whether nobody reads the output any more, as after `| head`; if so, drop what is left."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _unknown_verb(word: str) -> str:
    if word.startswith("-"):
        close = nearest(word, ("--help", "--version", "--debug"))
        return (
            f"Option {word!r} stands before the verb.{close} Write the verb first:\n"
            f"{COMMAND} fit {word} …   Verbs: {', '.join(verb_table())}"
        )
    if word in _REPLACED:
        return (
            f"The verb {word!r} was replaced by {_REPLACED[word]!r}: see {_REPLACED[word]} --help."
        )
    return f"Unknown verb {word!r}.{nearest(word, verb_table())} Verbs: {', '.join(verb_table())}"


def _disk(error: OSError, is_run: bool) -> str:
    """Say what a full, broken or read-only disk means for a run, or for another verb."""
    place = f" at {error.filename!r}" if error.filename else ""
    if not is_run:
        return (
            f"Nothing can be written{place}: {error.strerror}. Make room, or choose another "
            "--output (for the cache: DOMAINSSL_CACHE); the same command goes on."
        )
    return (
        f"Nothing can be written{place}: {error.strerror}. Make room, or choose another place "
        "with run_dir (for the cache: DOMAINSSL_CACHE); an interrupted run goes on with "
        "--auto_resume."
    )


def _place(error: OSError) -> str:
    """Say what a file or folder that cannot be used means."""
    shown = str(error.filename)
    shown = shown if len(shown) <= 300 else f"{shown[:150]}…{shown[-100:]}"
    return (
        f"{shown!r} cannot be used: {error.strerror}. Check that the name is right, that it is "
        "the kind of thing expected there, and who may read and write it; run_dir and "
        "DOMAINSSL_CACHE choose other places. --debug shows what was being done."
    )


def _complain(text: str, everywhere: bool = False) -> None:
    """Write an error to stderr: on the first process of the node, or on every one with its rank."""
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank not in ("", "0") and not everywhere:
        return
    from domainssl.cli.console import error_console

    label = "error" if rank in ("", "0") else f"error on local rank {rank}"
    error_console().print(f"[bold red]{label}:[/] {_escape(text)}", highlight=False, soft_wrap=True)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
