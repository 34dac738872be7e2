"""Files that are written completely or not at all."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

__all__ = ["write_json", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write a text under a hidden name first, in UTF-8, and replace the file when it is whole."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, data: object) -> None:
    """Write JSON completely or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
