"""Measure a checkpoint on the validation data."""

from __future__ import annotations

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Run `Trainer.validate` on a composed and checked configuration."""
    from domainssl.cli.run.train import run_verb

    return run_verb("validate", argv)
