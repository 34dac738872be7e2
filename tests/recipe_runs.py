"""Train a recipe as a user would, and judge what the run logged."""

from __future__ import annotations

from pathlib import Path

import domainssl
from domainssl.cli import main
from domainssl.matrix.runs import Outcome, read_outcome

__all__ = ["RECIPES", "assert_learned", "train"]

RECIPES = Path(domainssl.__file__).parent / "recipes"


def train(folder: Path, recipe: Path, seed: int = 0) -> Outcome:
    """Run a recipe on the CPU and return what its evaluation found at the end."""
    words = ["fit", "--config", str(recipe), f"--run_dir={folder}", "--trainer.accelerator=cpu"]
    words += [f"--seed_everything={seed}", f"--model.seed={seed}", f"--data.seed={seed}"]
    assert main(words) == 0
    return read_outcome(folder)


def assert_learned(outcome: Outcome) -> None:
    """Assert every criterion of learning, and list those that are missed."""
    criteria = outcome.criteria()
    missed = [str(criterion) for criterion in criteria if not criterion.passed]
    assert not missed, f"{len(missed)} of {len(criteria)}:\n" + "\n".join(missed)
