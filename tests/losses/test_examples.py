"""Every public loss shows what it computes, in an example that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import domainssl.losses

MODULES = [
    importlib.import_module(f"domainssl.losses.{found.name}")
    for found in pkgutil.iter_modules(domainssl.losses.__path__)
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_examples_of_losses_print_what_they_say(module: ModuleType) -> None:
    result = doctest.testmod(module)
    public = [n for n in module.__all__ if inspect.isfunction(getattr(module, n))]
    assert [n for n in public if ">>>" not in (getattr(module, n).__doc__ or "")] == []
    assert result.attempted >= len(public)
    assert result.failed == 0
