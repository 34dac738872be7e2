"""What is in the wheel, what it asks for, and that it runs away from the checkout."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
IGNORED = (".*", "build", "dist", "site", "runs", "lightning_logs", "__pycache__", "*.egg-info")


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by way of the source distribution, as an index would offer it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    shutil.copytree(
        REPOSITORY, copy, symlinks=True,
        ignore=lambda where, names: (
            shutil.ignore_patterns(*IGNORED, "tests", "docs")(where, names)
            if Path(where) == REPOSITORY else shutil.ignore_patterns("__pycache__")(where, names)
        ),
    )  # fmt: skip
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), cwd=copy)
    (found,) = folder.glob("*.whl")
    return found


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def requirements(wheel: Path) -> list[str]:
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    return Parser().parsestr(archive.read(path).decode()).get_all("Requires-Dist") or []


def test_wheel_holds_every_source_recipe_and_config_behind_the_links(wheel: Path) -> None:
    expected = {"domainssl/py.typed"}
    for folder in ("datamodules", "recipes", "configs", "domainssl"):
        prefix = "" if folder == "domainssl" else "domainssl/"
        for path in (REPOSITORY / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".sh") and "__pycache__" not in path.parts:
                expected.add(prefix + path.relative_to(REPOSITORY).as_posix())
    assert {"domainssl/recipes/ssl4eo_croma.yaml", "domainssl/datamodules/ssl4eo.py"} <= expected
    assert expected - names(wheel) == set()


def test_wheel_installs_one_top_level_package_without_tests(wheel: Path) -> None:
    top = {name.split("/")[0] for name in names(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"domainssl"}
    assert any(name.endswith("licenses/LICENSE") for name in names(wheel))


def test_plain_install_asks_for_nothing_that_belongs_to_an_extra(wheel: Path) -> None:
    plain = {re.split(r"[\s<>=!~;\[]", r)[0] for r in requirements(wheel) if "extra ==" not in r}
    assert {"torch", "lightning", "jsonargparse", "safetensors"} <= plain
    assert plain & {"zarr", "rasterio", "torchgeo", "monai", "nibabel", "openslide-python"} == set()


def project() -> dict[str, object]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_constraints_pin_every_requirement_within_its_bounds() -> None:
    from packaging.requirements import Requirement

    text = (REPOSITORY / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    pins = dict(line.split("==") for line in lines)
    declared = project()
    groups = [declared["dependencies"], *declared["optional-dependencies"].values()]  # type: ignore
    for requirement in (Requirement(r) for group in groups for r in group):
        if requirement.name == "domainssl":
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pins, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pins[name]), (str(requirement), pins[name])


IMPORT_NAMES = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn",
                "openslide": "openslide-python"}  # fmt: skip


def test_every_imported_library_is_declared() -> None:
    declared = project()
    extras = declared["optional-dependencies"]
    groups = [declared["dependencies"], *(v for k, v in extras.items() if k != "dev")]  # type: ignore
    known = {re.split(r"[\s<>=!~;\[]", r)[0] for group in groups for r in group}
    known |= {"domainssl", *sys.stdlib_module_names}
    undeclared = set()
    for folder in ("domainssl", "datamodules"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                found = []
                if isinstance(node, ast.Import):
                    found = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found = [node.module]
                for name in {full.split(".")[0] for full in found}:
                    if IMPORT_NAMES.get(name, name) not in known:
                        undeclared.add(f"{path.name}: {name}")
    assert not undeclared


def test_every_requirement_carries_its_reason() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    listed = re.findall(r'^    "[A-Za-z][\w.\[\]-]*[<>=].*$|^    "types-.*$', text, re.MULTILINE)
    assert len(listed) >= 30
    assert [line for line in listed if not re.search(r'",\s+# \S+', line)] == []


@pytest.mark.slow
def test_installed_wheel_runs_the_recipe_away_from_the_checkout(
    wheel: Path, tmp_path: Path
) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
        "--target", str(site), str(wheel), cwd=work,
    )  # fmt: skip
    where = run(
        sys.executable, "-c", "import domainssl; print(domainssl.__file__)",
        cwd=work, PYTHONPATH=str(site),
    )  # fmt: skip
    assert Path(where.strip()).is_relative_to(site)
    run(
        sys.executable, "-m", "domainssl", "fit", "--config", "recipes/ssl4eo_croma.yaml",
        "--trainer.max_epochs=1", cwd=work, PYTHONPATH=str(site),
    )  # fmt: skip
    assert list(work.rglob("*.ckpt")), "the run left no checkpoint"


# `sitecustomize` of an environment in which modules are not there
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Rest(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            return None
        return super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):  # libraries look there, too, for each other
        for each in super().find_distributions(*args, **kwargs):
            if each.metadata["Name"].lower().replace("_", "-") not in {gone!r}:
                yield each

sys.meta_path = [Rest if each is PathFinder else each for each in sys.meta_path]
"""


def _closure(wanted: list[str]) -> set[str]:
    """Return the distributions that an installation of these requirements brings."""
    found: set[str] = set()
    waiting = [(Requirement(text).name, Requirement(text).extras) for text in wanted]
    while waiting:
        name, extras = waiting.pop()
        name = canonicalize_name(name)
        if name in found:
            continue
        try:
            asked = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # of another platform
        found.add(name)
        for text in asked:
            more = Requirement(text)
            marks = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            if more.marker is None or any(more.marker.evaluate(mark) for mark in marks):
                waiting.append((more.name, more.extras))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "recipe"), [("medical", "petct_croma"), ("pathology", "stains_croma")]
)
def test_a_domain_trains_where_only_its_extra_is_installed(
    extra: str, recipe: str, tmp_path: Path
) -> None:
    declared = project()
    extras = declared["optional-dependencies"]
    there = _closure([*declared["dependencies"], *extras[extra]])  # type: ignore[misc,index]
    modules = metadata.packages_distributions()
    hidden = sorted(
        module
        for module, homes in modules.items()
        if not {canonicalize_name(home) for home in homes} & (there | {"domainssl"})
    )
    assert "torchgeo" in hidden and "torch" not in hidden
    installed = {canonicalize_name(each.metadata["Name"]) for each in metadata.distributions()}
    gone = sorted(installed - there - {"domainssl"})
    (tmp_path / "sitecustomize.py").write_text(
        WITHOUT.format(hidden=hidden, gone=gone), encoding="utf-8"
    )
    paths = os.pathsep.join([str(tmp_path), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    words = ["fit", "--config", f"recipes/{recipe}.yaml", "--trainer.max_epochs=1"]
    run(sys.executable, "-m", "domainssl", *words, cwd=tmp_path, PYTHONPATH=paths)
    assert list(tmp_path.rglob("*.ckpt")), "the run left no checkpoint"
    code = "from importlib.util import find_spec; print(find_spec('torchgeo'))"
    assert run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=paths) == "None\n"
