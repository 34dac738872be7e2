"""What the README and the documentation print is real: commands, options, Python, tables."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FIRST = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
PAGES = [*FIRST, *sorted((REPOSITORY / "docs").rglob("*.md"))]
# The line before a block of Python that needs what is not here (data, a GPU, a finished run).
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    is_run: bool


def blocks(page: Path, *languages: str) -> list[Block]:
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.strip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        language = lines[start].strip().removeprefix("```").strip()
        text = textwrap.dedent("\n".join(lines[start + 1 : number]))
        is_run = not (start and NOT_RUN.fullmatch(lines[start - 1].strip()))
        if language in languages:
            found.append(
                Block(page=page, line=start + 2, language=language, text=text, is_run=is_run)
            )
        start = None
    assert start is None, f"{page.name}: a fenced block is not closed"
    return found


def commands(page: Path) -> list[tuple[int, list[str]]]:
    """Words of every shell command of a page, with its line; comments dropped, lines joined."""
    found = []
    for block in blocks(page, "bash"):
        text = block.text.replace("\\\n", " ")
        for offset, line in enumerate(text.splitlines()):
            words = shlex.split(line, comments=True)
            if words:
                found.append((block.line + offset, words))
    return found


def our_commands(verb: str = "") -> list[object]:
    """Every `python -m domainssl` command of all pages, as parameters."""
    return [
        pytest.param(words[3:], id=f"{page.stem}:{line}")
        for page in PAGES
        for line, words in commands(page)
        if words[:3] == ["python", "-m", "domainssl"] and (not verb or words[3:4] == [verb])
    ]


def relative(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def test_readme_opens_with_the_two_commands() -> None:
    first = blocks(REPOSITORY / "README.md", "bash")[0]
    assert first.text.split("\n") == ["make fit", "make test"]
    assert first.line <= 8


def test_documented_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {w[1] for page in PAGES for _, w in commands(page) if w[0] == "make"}
    assert {"fit", "test"} <= named <= targets


def test_documented_extras_exist() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    text = "".join(page.read_text() for page in PAGES)
    named = {e for group in re.findall(r"domainssl\[([a-z,]+)\]", text) for e in group.split(",")}
    assert {"geo", "medical", "pathology", "all"} <= named <= set(project["optional-dependencies"])


def test_documented_verbs_exist() -> None:
    folder = REPOSITORY / "domainssl" / "cli" / "verbs"
    verbs = {path.stem for path in folder.glob("*.py") if path.stem != "__init__"}
    named = {parameter.values[0][0] for parameter in our_commands()}  # type: ignore[attr-defined]
    assert {"fit", "inspect", "export", "doctor", "recipes"} <= named
    assert {word for word in named if not word.startswith("-")} <= verbs
    table = (REPOSITORY / "docs" / "cli.md").read_text().split("## Configuration")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    explained = {w for row in rows for w in re.findall(r"`([a-z]+)", row.split("|")[1])}
    assert verbs <= explained


PAGE_OF_MISTAKES = REPOSITORY / "docs" / "cli.md"
MISTAKEN = [w[3:] for _, w in commands(PAGE_OF_MISTAKES) if "--model.mask_ration=0.5" in w]


def test_printed_mistakes_are_what_the_command_line_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from domainssl.cli import main

    monkeypatch.chdir(REPOSITORY)
    assert main(MISTAKEN[0]) == 2
    (printed,) = blocks(PAGE_OF_MISTAKES, "text")
    assert capsys.readouterr().err.split() == printed.text.split()


@pytest.mark.parametrize("words", our_commands("fit"))
def test_documented_fit_commands_have_no_mistakes(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from domainssl.cli.run.train import prepare

    if words in MISTAKEN:
        pytest.skip("shown for its mistakes, see the test above")
    monkeypatch.chdir(REPOSITORY)
    dropped = ("--print_config", "--ckpt_path=")  # the checkpoint comes from the command before
    words = [word for word in words[1:] if not word.startswith(dropped)]
    request = prepare("fit", words)  # raises with every mistake
    assert request.config["model"]["class_path"].startswith(
        ("domainssl.objectives.", "domainssl.tasks.")
    )


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=relative)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "documentation"}
    for block in blocks(page, "python"):
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True)
        if block.is_run:
            exec(code, namespace)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{relative(page)}: {target}"


@pytest.mark.parametrize(
    "page", [*PAGES, *(REPOSITORY / n for n in ("Makefile", "pyproject.toml"))], ids=relative
)
def test_no_page_names_a_machine_path(page: Path) -> None:
    found = re.findall(r"(?<![\w.~])/(?:home|root|work|Users)/\S*", page.read_text("utf-8"))
    assert not found


def test_every_recipe_uses_classes_of_the_api_page() -> None:
    page = (REPOSITORY / "docs" / "api.md").read_text()
    for recipe in sorted((REPOSITORY / "recipes").glob("*.yaml")):
        for section in ("model", "data"):
            text = recipe.read_text().split(f"\n{section}:\n")[1]
            name = re.search(r"class_path: (\w+)", text)
            assert name and re.search(rf"members: \[.*\b{name[1]}\b", page), recipe.name


def printed_options() -> dict[str, dict[str, list[str]]]:
    """Return the rows of every table of options below docs/objectives, by objective and option."""
    found: dict[str, dict[str, list[str]]] = {}
    for page in sorted((REPOSITORY / "docs" / "objectives").glob("*.md")):
        for section in page.read_text(encoding="utf-8").split("\n## ")[1:]:
            rows = [
                [cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
                for line in section.splitlines()
                if line.startswith("|")
            ]
            if rows and rows[0][:3] == ["option", "default", "reference"]:
                heading = section.splitlines()[0]
                owner = heading.removeprefix("Options of ") if " of " in heading else page.stem
                found[owner.lower()] = {row[0]: row[1:] for row in rows[2:]}
    return found


def test_printed_option_tables_are_what_the_code_does() -> None:
    from domainssl.cli.config.catalog import find_classes
    from domainssl.cli.config.schema import dataclasses_in, parameters

    coded = {}
    for name, path in find_classes("model").items():
        module, _, cls = path.rpartition(".")
        for parameter in parameters(getattr(importlib.import_module(module), cls)).values():
            for options in dataclasses_in(parameter.hint):
                given = {f.name: f.metadata for f in dataclasses.fields(options)}
                table = {n: facts for n, facts in given.items() if "ours" in facts}
                assert all(facts["text"] for facts in table.values()), f"{path}: without a text"
                if table:
                    coded[name.lower()] = {
                        n: [_text(facts["ours"]), _text(facts["reference"])]
                        for n, facts in table.items()
                    }
    assert len(coded) >= 6
    printed = printed_options()
    assert {n: {o: row[:2] for o, row in rows.items()} for n, rows in printed.items()} == coded
    assert all(row[2] for rows in printed.values() for row in rows.values())


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_tests_that_the_page_of_faults_names_exist() -> None:
    page = (REPOSITORY / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[-1] for line in page.splitlines() if line.startswith("| ")]
    named = {name for row in rows for name in re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+){3,})`", row)}
    there = "\n".join(path.read_text(encoding="utf-8") for path in REPOSITORY.glob("tests/*/*.py"))
    missing = named - set(re.findall(r"def test_(\w+)", there))
    assert len(named) > 60 and not missing, missing
