"""Statistics of a data set: equal to NumPy, to themselves with other processes, and resumable."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from ssl4eo_files import DATES, SIDE, write_split

from domainssl.errors import ConfigError, DataError, StorageError
from domainssl.inspection import statistics as module
from domainssl.inspection.blank import blank_items
from domainssl.inspection.moments import Counts, Grid, Moments, Relative
from domainssl.inspection.statistics import PERCENTS, measure
from domainssl.inspection.subjects import OfCatalogue
from domainssl.io.ssl4eo.layout import scan
from domainssl.io.ssl4eo.read import read
from domainssl.pieces import Plan, Shard

PRODUCTS = {"s1": "S1GRD", "s2": "S2L2A"}
FILES = [[0, 1], [2, 3, 4], [5], [6, 7]]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("ssl4eo")
    write_split(root, "train", FILES)
    return scan(str(root), "train", PRODUCTS)


def everything(catalogue, name):
    """All valid values of a modality, float64 (C, n), and the share of valid pixels."""
    blocks = [read(group, name, list(range(group.dates))) for group in catalogue.groups]
    values = [b.values.transpose(2, 0, 1, 3, 4)[:, b.valid] for b in blocks]
    valid = np.concatenate([b.valid.reshape(-1) for b in blocks])
    # contiguous, because NumPy sums pairwise only then
    whole = np.ascontiguousarray(np.concatenate(values, axis=1), np.float64)
    return whole, valid.mean()


def check_against_numpy(catalogue, path: Path) -> None:
    entries = yaml.safe_load(path.read_text())["modalities"]
    for name in PRODUCTS:
        values, share = everything(catalogue, name)
        entry = entries[name]
        np.testing.assert_allclose(entry["mean"], values.mean(1), rtol=1e-12)
        np.testing.assert_allclose(entry["std"], values.std(1), rtol=1e-12)
        assert entry["min"] == values.min(1).tolist() and entry["max"] == values.max(1).tolist()
        assert entry["valid_pixels"] == values.shape[1]
        assert entry["valid_share"] == pytest.approx(share, rel=1e-12)
        step = {"s1": 0.01, "s2": 1.0}[name]
        assert entry["percentile_resolution"] == step
        exact = np.percentile(values, PERCENTS, axis=1, method="inverted_cdf")
        found = np.array([entry["percentiles"][f"{p:g}"] for p in PERCENTS])
        tolerance = 0 if name == "s2" else step / 2 + 1e-9
        is_inside = exact <= {"s1": 40.0, "s2": 32767.0}[name]  # the tiny files show 250 dB
        assert np.abs(found - exact)[is_inside].max() <= tolerance
        outside = np.broadcast_to(values.max(1), exact.shape)[~is_inside]
        assert (found[~is_inside] == outside).all()


def test_figures_of_the_sample_equal_numpy(sample_root: Path, tmp_path: Path) -> None:
    catalogue = scan(str(sample_root), "val", PRODUCTS)
    measure(OfCatalogue(catalogue), tmp_path / "stats.yaml", Plan(jobs=0))
    check_against_numpy(catalogue, tmp_path / "stats.yaml")


def test_figures_do_not_depend_on_the_number_of_processes(catalogue, tmp_path: Path) -> None:
    texts = set()
    for workers in (0, 2, 3):
        measure(OfCatalogue(catalogue), tmp_path / "stats.yaml", Plan(jobs=workers))
        texts.add((tmp_path / "stats.yaml").read_bytes())
    assert len(texts) == 1
    assert os.listdir(tmp_path) == ["stats.yaml"]


def test_interrupted_measurement_goes_on_and_ends_with_the_same_file(
    catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(OfCatalogue(catalogue), tmp_path / "whole.yaml", Plan(jobs=0))
    output = tmp_path / "stats.yaml"
    seen: list[str] = []

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(OfCatalogue(catalogue), output, Plan(jobs=2), interrupt)
    assert not output.exists() and (tmp_path / "stats.yaml.partial").is_file()
    original = module.measure_piece
    monkeypatch.setattr(
        module,
        "measure_piece",
        lambda subject, number: seen.append(subject.keys[number]) or original(subject, number),
    )
    steps: list[tuple[int, int]] = []
    found = measure(OfCatalogue(catalogue), output, Plan(jobs=0), lambda *done: steps.append(done))
    assert (found.resumed, found.blocks) == (2, 4) and steps == [(2, 4), (3, 4), (4, 4)]
    assert seen == [group.key for group in catalogue.groups[2:]]
    assert output.read_bytes() == (tmp_path / "whole.yaml").read_bytes()
    assert not (tmp_path / "stats.yaml.partial").exists()


def test_shards_give_the_file_of_one_call_whoever_is_last(catalogue, tmp_path: Path) -> None:
    subject, output = OfCatalogue(catalogue), tmp_path / "stats.yaml"
    measure(subject, tmp_path / "whole.yaml", Plan(jobs=0))
    for number, missing in ((3, ["1/3", "2/3"]), (1, ["2/3"]), (2, [])):
        assert not output.exists()
        found = measure(subject, output, Plan(jobs=0, shard=Shard(number, 3)))
        assert found.missing == missing
    assert output.read_bytes() == (tmp_path / "whole.yaml").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["stats.yaml", "whole.yaml"]


def test_more_shards_than_pieces_end_too(catalogue, tmp_path: Path) -> None:
    shards = [Shard(i, 6) for i in (5, 6, 1, 2, 3, 4)]
    for shard in shards:
        measure(OfCatalogue(catalogue), tmp_path / "stats.yaml", Plan(jobs=0, shard=shard))
    check_against_numpy(catalogue, tmp_path / "stats.yaml")


def test_counted_numbers_equal_numpy_to_the_last_bit_of_float64() -> None:
    rng = np.random.default_rng(1)
    whole = rng.integers(-2000, 30_000, (2, 3, 500, 400)).astype(np.int16)
    decibels = rng.normal(-12, 5, (2, 3, 500, 400)).astype(np.float16)
    few = rng.random((3, 500, 400)) < 0.1
    for values, grid in ((whole, Grid(-1000, 32767, 1)), (decibels, Grid(-60, 40, 0.01))):
        for valid in (np.ones_like(few), few, ~few):
            counts = Counts(2, values.dtype)
            counts.add(values, valid)
            found, kept = counts.moments(grid), values[:, valid].astype(np.float64)
            assert (found.count, found.total) == (kept.shape[1], valid.size)
            np.testing.assert_allclose(found.mean, kept.mean(1), rtol=1e-14)
            np.testing.assert_allclose(found.std, kept.std(1), rtol=1e-13)
            assert found.low.tolist() == kept.min(1).tolist()
            assert found.high.tolist() == kept.max(1).tolist()
            plain = Moments.measure(values.astype(np.float32), valid, grid)
            assert (found.histogram == plain.histogram).all()


def test_values_of_any_size_have_percentiles_to_one_part_in_a_thousand() -> None:
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(300, 20, 5000), -rng.lognormal(0, 9, 5000)])[None]
    found = Moments.measure(values, np.ones(10_000, bool), Relative())
    exact = np.percentile(values, [1, 30, 50, 75, 99], axis=1, method="inverted_cdf")
    np.testing.assert_allclose(found.percentiles([1, 30, 50, 75, 99]), exact, rtol=1.01e-3)


def test_many_pieces_are_saved_rarely_and_at_the_end_whatever_ends_it(
    catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    save = module.Ledger.save
    monkeypatch.setattr(module, "_FEW", 1)
    monkeypatch.setattr(module, "_RARELY", 1e9)

    def noted(self: module.Ledger, facts: Any, arrays: Any) -> None:
        saved.append(len(facts["done"]))
        save(self, facts, arrays)

    monkeypatch.setattr(module.Ledger, "save", noted)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(OfCatalogue(catalogue), tmp_path / "stats.yaml", Plan(jobs=0), stop)
    assert saved == [1, 3]
    found = measure(OfCatalogue(catalogue), tmp_path / "stats.yaml", Plan(jobs=0))
    assert found.resumed == 3 and saved == [1, 3, 4]
    check_against_numpy(catalogue, tmp_path / "stats.yaml")


def test_two_calls_at_once_are_refused(catalogue, tmp_path: Path) -> None:
    output = tmp_path / "stats.yaml"

    def again(done: int, total: int) -> None:
        measure(OfCatalogue(catalogue), output, Plan(jobs=0))

    with pytest.raises(ConfigError, match=r"stats.yaml.partial: another process is at work"):
        measure(OfCatalogue(catalogue), output, Plan(jobs=0), again)


KILLED = """
import os, signal, sys
import psutil
from domainssl.inspection.statistics import measure
from domainssl.pieces import Plan
from domainssl.inspection.subjects import OfCatalogue
from domainssl.io.ssl4eo.layout import scan

def die(done, total):
    if done == 2:
        print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    catalogue = scan(sys.argv[1], "train", {"s1": "S1GRD", "s2": "S2L2A"})
    measure(OfCatalogue(catalogue), sys.argv[2], Plan(jobs=2), die)
"""


def test_killed_measurement_leaves_no_process_and_goes_on(catalogue, tmp_path: Path) -> None:
    script, output = tmp_path / "killed.py", tmp_path / "stats.yaml"
    script.write_text(KILLED)
    root = Path(module.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, script, catalogue.root, output],
        capture_output=True, text=True, timeout=1200, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [psutil.Process(int(p)) for p in done.stdout.split() if psutil.pid_exists(int(p))]
    assert len(done.stdout.split()) >= 2
    _, alive = psutil.wait_procs(left, timeout=600)
    assert not alive
    found = measure(OfCatalogue(catalogue), output, Plan(jobs=0))
    assert (found.resumed, found.blocks) == (2, 4)
    check_against_numpy(catalogue, output)


def stop_after_one(catalogue, output: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(OfCatalogue(catalogue), output, Plan(jobs=0), interrupt)


def test_partial_file_of_another_call_is_refused_until_restart(catalogue, tmp_path: Path) -> None:
    output = tmp_path / "stats.yaml"
    stop_after_one(catalogue, output)
    with pytest.raises(ConfigError, match=r"mask_clouds differ.*--restart"):
        measure(OfCatalogue(catalogue, mask_clouds=True), output, Plan(jobs=0))
    found = measure(OfCatalogue(catalogue, True), output, Plan(jobs=0, restart=True))
    assert (found.resumed, found.blocks) == (0, 4)


def test_damaged_partial_file_is_named(catalogue, tmp_path: Path) -> None:
    output = tmp_path / "stats.yaml"
    stop_after_one(catalogue, output)
    partial = tmp_path / "stats.yaml.partial"
    partial.write_bytes(partial.read_bytes()[:500])
    with pytest.raises(ConfigError, match=r"stats.yaml.partial: not a partial file.*--restart"):
        measure(OfCatalogue(catalogue), output, Plan(jobs=0))


def test_full_disk_is_an_error_and_leaves_the_last_state(
    catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "stats.yaml"
    stop_after_one(catalogue, output)
    before = (tmp_path / "stats.yaml.partial").read_bytes()

    def full(self: Path, target: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match=r"No space left on device.*another --output"):
        measure(OfCatalogue(catalogue), output, Plan(jobs=0))
    assert (tmp_path / "stats.yaml.partial").read_bytes() == before
    assert os.listdir(tmp_path) == ["stats.yaml.partial"]


def test_unreadable_block_ends_it_or_is_listed(tmp_path: Path) -> None:
    write_split(tmp_path / "data", "train", FILES)
    damaged = sorted((tmp_path / "data" / "train" / "S2L2A").iterdir())[1]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 3 : 2 * len(content) // 3] = bytes(
        2 * len(content) // 3 - len(content) // 3
    )
    damaged.write_bytes(content)
    catalogue = scan(str(tmp_path / "data"), "train", PRODUCTS)
    output = tmp_path / "stats.yaml"
    with pytest.raises(DataError, match=r"000002.zarr.zip.*--skip_bad"):
        measure(OfCatalogue(catalogue), output, Plan(jobs=0))
    found = measure(OfCatalogue(catalogue), output, Plan(jobs=2, skip_bad=True))
    assert found.resumed == 1  # the choice to skip may be made on the way
    report = yaml.safe_load(output.read_text())
    assert list(report["data"]["skipped"]) == ["ssl4eos12_train_seasonal_data_000002"]
    assert report["modalities"]["s1"]["pixels"] == 5 * DATES * SIDE * SIDE


def test_limit_spreads_blocks_over_the_data_set(catalogue, tmp_path: Path) -> None:
    found = measure(OfCatalogue(catalogue), tmp_path / "stats.yaml", Plan(jobs=0, limit=2))
    assert found.blocks == 2
    assert found.moments["s1"].total == (2 + 1) * DATES * SIDE * SIDE  # the first and third file
    with pytest.raises(ConfigError, match="limit: got 0, expected at least 1"):
        Plan(limit=0)


def test_release_b_gives_the_figures_of_release_a(catalogue, tmp_path: Path) -> None:
    write_split(tmp_path / "b", "train", FILES, release="B")
    other = OfCatalogue(scan(str(tmp_path / "b"), "train", PRODUCTS))
    measure(other, tmp_path / "b.yaml", Plan(jobs=0))
    check_against_numpy(catalogue, tmp_path / "b.yaml")


def test_merged_parts_equal_the_whole_even_far_from_zero() -> None:
    rng = np.random.default_rng(0)
    values = 1e6 + rng.normal(0, 1, (2, 40_000))
    valid = rng.random(40_000) < 0.7
    grid = Grid(1e6 - 3, 1e6 + 3, 0.01)  # some values are outside
    total = Moments(2, grid)
    for low in range(0, 40_000, 7_000):
        part = slice(low, low + 7_000)
        total.merge(Moments.measure(values[:, part], valid[part], grid))
    kept = values[:, valid]
    np.testing.assert_allclose(total.mean, kept.mean(1), rtol=1e-14)
    np.testing.assert_allclose(total.std, kept.std(1), rtol=1e-9)
    assert (total.histogram.sum(1) == kept.shape[1]).all() and total.total == 40_000
    assert total.percentiles([0, 100])[:, 0].tolist() == [kept[0].min(), kept[0].max()]
    exact = np.percentile(kept, [5, 50, 95], axis=1, method="inverted_cdf")
    assert np.abs(total.percentiles([5, 50, 95]) - exact).max() <= 0.005 + 1e-9


def test_parts_without_valid_pixels_change_nothing_but_the_total() -> None:
    grid = Grid(0, 10, 1)
    total = Moments.measure(np.array([[1.0, 3.0]]), np.array([True, True]), grid)
    total.merge(Moments.measure(np.array([[9.0, np.nan]]), np.array([False, False]), grid))
    assert (total.count, total.total, total.mean[0], total.std[0]) == (2, 4, 2.0, 1.0)


def test_data_without_a_valid_pixel_are_refused(
    catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = OfCatalogue(catalogue).modalities
    nothing = {n: Moments(len(f.channels), f.classes) for n, f in facts.items()}
    for moments in nothing.values():
        moments.total = 9
    monkeypatch.setattr(module, "measure_piece", lambda subject, number: nothing)
    with pytest.raises(DataError, match="'s1' has no valid pixel in 4 block"):
        measure(OfCatalogue(catalogue), tmp_path / "stats.yaml", Plan(jobs=0))


def test_processes_that_measure_files_do_not_import_torch() -> None:
    words = "import sys, domainssl.inspection.statistics as s; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", words], check=True, timeout=600, env=environment)


def test_blank_items_are_named_with_what_they_hold() -> None:
    values = np.random.default_rng(0).normal(size=(2, 5, 8, 8)).astype(np.float32)
    valid = np.ones((5, 8, 8), bool)
    values[:, 1], values[0, 2], valid[3] = 0.0, 7.0, False
    values[:, 4], valid[4, 0, 0] = 3.0, False
    values[0, 4, 0, 0] = np.nan
    found = blank_items(values, valid, ["a", "b", "c", "d", "e"])
    assert found == ["b: all 0", "d: nothing valid", "e: all 3"]
    assert blank_items(values[:, 1:2], valid[1:2], ["file"]) == ["file: all 0"]
    assert blank_items(values, valid, ["all of them"]) == []
    assert blank_items(values, valid, ["a", "", "c", "", ""]) == []  # lack the modality
    assert blank_items(np.array([[2.0, 3.0]]), np.array([True, False]), ["a", "b"]) == [
        "a: all 2", "b: nothing valid",
    ]  # fmt: skip
    values[:, 1, 7, 7] = 1.0  # the one voxel that a coarse look misses
    assert blank_items(values, valid, list("abcde"))[0] == "d: nothing valid"
