"""The options of work in pieces, which are the same in every verb."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from domainssl.cli.words import Parser
from domainssl.errors import DataError, counted

if TYPE_CHECKING:
    from domainssl.pieces import Plan, Shard

__all__ = ["add_plan", "plan_of", "refuse_nothing"]

_OPTIONS = ("jobs", "limit", "skip_bad", "restart", "scheduler")


def add_plan(
    parser: Parser,
    noun: str,
    *,
    jobs: int | None = None,
    again: str = "write again what is there",
    also: Sequence[str] = (),
    without: Collection[str] = (),
) -> None:
    """Add `--jobs`, `--shard`, `--scheduler`, `--limit`, `--skip_bad` and `--restart`.

    Args:
        parser: Of the verb.
        noun: What the pieces are, in plural.
        jobs: Processes where none are given; None is one per core.
        again: What `--restart` does.
        also: Other names of `--jobs`.
        without: Names of options that the verb does not have.
    """
    add = parser.add_argument
    usual = "one per core" if jobs is None else "this one alone"
    if "jobs" not in without:
        add("--jobs", *also, type=int, default=jobs,
            help=f"processes; 0 for this one alone (default: {usual})")  # fmt: skip
    add("--shard", default="1/1", metavar="I/N",
        help="do the I-th of N parts, for several machines that share the folder")  # fmt: skip
    if "scheduler" not in without:
        add("--scheduler", metavar="ADDRESS",
            help="a dask cluster that does it: tcp://HOST:PORT, or local to start one")  # fmt: skip
    if "limit" not in without:
        add("--limit", type=int, help=f"do so many {noun} only, evenly spread")
    add("--skip_bad", action="store_true", help=f"leave out and list {noun} that cannot be read")
    if "restart" not in without:
        add("--restart", action="store_true", help=again)


def plan_of(options: argparse.Namespace) -> Plan:
    """Return the plan that the options of `add_plan` ask for; without `--jobs`, in this process."""
    from domainssl.pieces import Plan, Shard

    given = {name: getattr(options, name) for name in _OPTIONS if hasattr(options, name)}
    return Plan(**{"jobs": 0, **given}, shard=Shard.parse(options.shard))


def refuse_nothing(entries: int, left_out: Collection[str], shard: Shard, noun: str) -> None:
    """Refuse a call that made nothing because it left everything out.

    A shard of several may be of bad pieces only; the others may not.

    Raises:
        DataError: All pieces of a whole call were left out.
    """
    if left_out and not entries and shard.count == 1:
        raise DataError(
            f"Nothing was made: {counted(len(left_out), noun)} left out, as said above, and there "
            "is no other. Mend or replace what is left out, and give the same command again."
        )
