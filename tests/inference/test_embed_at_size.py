"""A scene of 2196 x 2196 x 12 pixels: bounded memory, a real kill, two ranks."""

from __future__ import annotations

import filecmp
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import domainssl
from domainssl.bench.embed import tiny_backbone, write_scene
from domainssl.bench.processes import ROLLUP, pss_mb

SHARDS = 9  # 3 x 3, of 960 pixels
MOST_MB = 1400.0  # a shard with its halo, the next one, vectors, PyTorch: nothing grows with area


def start(folder: Path, output: str, **environment: str) -> subprocess.Popen[bytes]:
    words = ["embed", str(folder / "tiny"), str(folder / "scene.tif"), f"--output={output}"]
    return subprocess.Popen(
        [sys.executable, "-m", "domainssl", *words, "--dtype=float16"],
        cwd=folder, env={**os.environ, **environment},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def done(folder: Path, output: str) -> int:
    marks = folder / f".{output}.part-embed" / "done"
    return sum(not p.name.startswith(".") for p in marks.iterdir()) if marks.is_dir() else 0


def same(a: Path, b: Path) -> bool:
    names = sorted(str(p.relative_to(a)) for p in a.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(b)) for p in b.rglob("*") if p.is_file())
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


@pytest.mark.slow
@pytest.mark.skipif(not Path(ROLLUP.format("self")).exists(), reason="PSS is Linux only")
def test_a_large_scene_takes_bounded_memory_and_survives_a_kill(tmp_path: Path) -> None:
    write_scene(tmp_path / "scene.tif", 2196)
    domainssl.export_backbone(tiny_backbone(), tmp_path / "tiny")
    whole, peak = start(tmp_path, "whole.zarr"), 0.0
    while whole.poll() is None:
        try:
            peak = max(peak, pss_mb(whole.pid))
        except (OSError, AssertionError):
            break  # it has ended
        time.sleep(0.1)
    assert whole.wait() == 0 and 0 < peak < MOST_MB
    killed = start(tmp_path, "killed.zarr")
    while killed.poll() is None and done(tmp_path, "killed.zarr") < SHARDS // 2:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert SHARDS // 2 <= done(tmp_path, "killed.zarr") < SHARDS
    assert not (tmp_path / "killed.zarr").exists()
    assert start(tmp_path, "killed.zarr").wait() == 0
    ranks = [
        start(tmp_path, "ranks.zarr", RANK=str(n), LOCAL_RANK=str(n), WORLD_SIZE="2")
        for n in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    for name in ("killed", "ranks"):
        assert same(tmp_path / "whole.zarr", tmp_path / f"{name}.zarr"), name
        assert filecmp.cmp(
            tmp_path / "whole.zarr.png", tmp_path / f"{name}.zarr.png", shallow=False
        )
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
