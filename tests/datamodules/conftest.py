from __future__ import annotations

from pathlib import Path

import pytest
from ssl4eo_files import TRAIN, VAL, write_split


@pytest.fixture(scope="session")
def release_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("release_a")
    write_split(root, "train", TRAIN)
    write_split(root, "val", VAL)
    labels = root / "labels"
    labels.mkdir()
    for split, files in (("train", TRAIN), ("val", VAL)):
        rows = [f"{i:07d},{i % 3},{('water', 'crops', 'trees')[i % 3]}" for f in files for i in f]
        (labels / f"{split}.csv").write_text("\n".join(["sample,label,name", *rows]) + "\n")
    return root


@pytest.fixture(scope="session")
def release_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("release_b")
    write_split(root, "train", TRAIN[:2], release="B")
    write_split(root, "val", VAL[:1], release="B")
    return root
