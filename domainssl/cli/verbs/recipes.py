"""List the recipes, and the configs that can be laid over them."""

from __future__ import annotations

import re
from pathlib import Path

from domainssl.cli.words import Parser

__all__ = ["run"]

_DOMAINS = {
    "geo": "Earth observation: pip install 'domainssl[geo]'",
    "medical": "CT, MR and PET: pip install 'domainssl[medical]'",
    "pathology": "Tiles and slides: pip install 'domainssl[pathology]'",
}  # by extra
_USUAL = re.compile(  # the heading says the extra
    r"pip install 'domainssl\[\w+\]'; the embedded sample is made on first use\. "
    r"A CPU takes (?P<time>about [\w ]+)\."
)


def run(argv: list[str]) -> int:
    """Print every recipe and overlay with what its first comments say."""
    parser = Parser(
        prog="python -m domainssl recipes",
        description="List the recipes (complete runs) and the configs (overlays) of the working "
        "directory and of the installed package.",
    )
    parser.parse_args(argv)
    from rich.markup import escape

    from domainssl.cli.config import catalog
    from domainssl.cli.console import console

    screen = console()
    groups = _groups(catalog.recipes())
    groups["Configs: laid over a recipe, … --config RECIPE --config CONFIG"] = catalog.configs()
    width = max((len(name) for entries in groups.values() for name in entries), default=0)
    screen.print("Recipes are complete runs: python -m domainssl fit --config RECIPE")
    screen.print("Embedded samples are made on first use; behind a recipe: its time on a CPU.\n")
    for title, entries in groups.items():
        screen.print(f"[bold]{escape(title)}[/]")
        for name, path in entries.items():
            about, needs = _comments(path)
            usual = _USUAL.fullmatch(needs)
            after = f" [dim]({usual['time']})[/]" if usual else ""
            screen.print(f"  [cyan]{escape(name):<{width}}[/]  {escape(about)}{after}")
            if usual:
                continue
            if needs:
                screen.print(f"  {'':<{width}}  [dim]needs: {escape(needs)}[/]")
        if not entries:
            screen.print("  none found")
        screen.print()
    return 0


def _groups(recipes: dict[str, Path]) -> dict[str, dict[str, Path]]:
    """Return the recipes by the domain of the extra that they need."""
    groups: dict[str, dict[str, Path]] = {}
    for name, path in recipes.items():
        needs = _comments(path)[1]
        extra = next((word for word in _DOMAINS if f"[{word}]" in needs), "")
        title = _DOMAINS.get(extra, "Recipes of your own")
        groups.setdefault(title, {})[name] = path
    order = [*_DOMAINS.values(), "Recipes of your own"]
    return {title: groups[title] for title in order if title in groups}


def _comments(path: Path) -> tuple[str, str]:
    """Return the first comment line and what follows `# needs:`."""
    comments = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.lstrip("# ").strip())
    needs = [c.partition(":")[2].strip() for c in comments if c.lower().startswith("needs:")]
    return comments[0] if comments else "", needs[0] if needs else ""
