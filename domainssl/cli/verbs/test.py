"""Measure a checkpoint on the test data."""

from __future__ import annotations

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Run `Trainer.test` on a composed and checked configuration."""
    from domainssl.cli.run.train import run_verb

    return run_verb("test", argv)
