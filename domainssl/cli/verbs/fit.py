"""Train an objective or fine-tune a task: --config recipes/NAME.yaml [--config configs/…]"""

from __future__ import annotations

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Run `Trainer.fit` on a composed and checked configuration."""
    from domainssl.cli.run.train import run_verb

    return run_verb("fit", argv)
