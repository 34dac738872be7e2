"""Run the backbone of a checkpoint over the prediction data."""

from __future__ import annotations

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Run `Trainer.predict` on a composed and checked configuration."""
    from domainssl.cli.run.train import run_verb

    return run_verb("predict", argv)
