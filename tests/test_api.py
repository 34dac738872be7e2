"""What users import: packages that offer their classes lazily, recipes built in Python."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import domainssl
from domainssl.errors import ConfigError
from domainssl.lazy import exported

PACKAGES = ("objectives", "losses", "backbones", "callbacks", "datamodules", "training", "nn")


@pytest.mark.parametrize("name", PACKAGES)
def test_every_name_that_a_package_lists_can_be_imported_from_it(name: str) -> None:
    package = importlib.import_module(f"domainssl.{name}")
    assert dir(package) == sorted(exported(package.__name__))
    for attribute in dir(package):
        home = importlib.import_module(exported(package.__name__)[attribute])
        assert getattr(package, attribute) is getattr(home, attribute)


def test_classes_are_where_their_readers_look() -> None:
    from domainssl.backbones import CROMABackbone
    from domainssl.callbacks import OnlineEvaluation
    from domainssl.datamodules import SSL4EOS12DataModule
    from domainssl.losses import info_nce
    from domainssl.objectives import CROMA

    names = [c.__name__ for c in (CROMA, CROMABackbone, OnlineEvaluation, SSL4EOS12DataModule)]
    assert names == ["CROMA", "CROMABackbone", "OnlineEvaluation", "SSL4EOS12DataModule"]
    assert callable(info_nce)


def test_a_package_is_imported_without_torch_and_refuses_unknown_names() -> None:
    code = (
        "import domainssl.objectives, domainssl.datamodules, sys; dir(domainssl.objectives);"
        "assert 'torch' not in sys.modules; domainssl.objectives.CROMEA"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert "module 'domainssl.objectives' has no attribute 'CROMEA'" in done.stderr


def test_objectives_and_datamodules_are_listed_by_pattern() -> None:
    assert {"CROMA", "DeCUR", "OmniSat", "MAESTRO"} <= set(domainssl.list_objectives())
    assert domainssl.list_objectives("*Twins") == ["BarlowTwins"]
    assert "SSL4EOS12DataModule" in domainssl.list_datamodules("SSL4EO*")


def test_a_recipe_is_built_with_overlays_and_overrides(folder: Path, sample_root: Path) -> None:
    run = domainssl.build(
        "ssl4eo_croma",
        trainer={"max_epochs": 3, "accelerator": "cpu"},
        model={"mask_ratio": 0.6, "optimization": {"lr": 2e-3}},
        data={"root": str(sample_root), "global_batch_size": 16},
    )
    assert (run.trainer.max_epochs, run.model.optimization.lr) == (3, 2e-3)
    assert (run.model.mask_ratio, run.datamodule.global_batch_size) == ({"s1": 0.6, "s2": 0.6}, 16)
    assert not list(folder.iterdir()), "building wrote files"


def test_an_unknown_recipe_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'ssl4eo_croma'"):
        domainssl.build("ssl4eo_crom")
