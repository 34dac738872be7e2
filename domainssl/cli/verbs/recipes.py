"""List the recipes, and the configs that can be laid over them."""

from __future__ import annotations

from pathlib import Path

from domainssl.cli.words import Parser

__all__ = ["run"]


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
    found = {"recipes": catalog.recipes(), "configs": catalog.configs()}
    titles = {
        "recipes": "Recipes: complete runs, python -m domainssl fit --config RECIPE",
        "configs": "Configs: laid over a recipe, … --config RECIPE --config CONFIG",
    }
    width = max((len(name) for group in found.values() for name in group), default=0)
    for group, entries in found.items():
        screen.print(f"[bold]{titles[group]}[/]")
        for name, path in entries.items():
            about, needs = _comments(path)
            screen.print(f"  [cyan]{escape(name):<{width}}[/]  {escape(about)}")
            if needs:
                screen.print(f"  {'':<{width}}  [dim]needs: {escape(needs)}[/]")
        if not entries:
            screen.print("  none found")
        screen.print()
    return 0


def _comments(path: Path) -> tuple[str, str]:
    """Return the first comment line and what follows `# needs:`."""
    comments = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.lstrip("# ").strip())
    needs = [c.partition(":")[2].strip() for c in comments if c.lower().startswith("needs:")]
    return comments[0] if comments else "", needs[0] if needs else ""
