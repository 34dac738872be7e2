"""`stats` writes what `data.statistics` reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from domainssl.inspection import statistics as module


def test_file_of_stats_becomes_the_statistics_of_the_data(cli, folder: Path, sample_root: Path):
    from domainssl.datamodules.ssl4eo import SSL4EOS12DataModule

    result = cli("stats", "sample", "--split", "val", "--jobs", "0")
    assert result.status == 0, result.text
    assert "64 locations, 4 dates, in 2 blocks" in result.out
    assert "99 %" in result.out and "s2: S2L2A (dn)" in result.out
    assert "--data.statistics=stats.yaml" in result.out
    written = yaml.safe_load((folder / "stats.yaml").read_text())["modalities"]
    data = SSL4EOS12DataModule(statistics="stats.yaml")
    for name, modality in data.modalities.items():
        assert modality.mean == tuple(written[name]["mean"])
        assert modality.std == tuple(written[name]["std"])
    other = SSL4EOS12DataModule(modalities={"radar": "S1GRD"}, statistics="stats.yaml")
    assert other.modalities["radar"].mean == tuple(written["s1"]["mean"])


def test_interrupted_stats_say_how_to_go_on(cli, folder: Path, sample_root: Path, monkeypatch):
    measured = []
    original = module.measure_piece

    def second_is_interrupted(subject, number):
        if measured:
            raise KeyboardInterrupt
        measured.append(number)
        return original(subject, number)

    monkeypatch.setattr(module, "measure_piece", second_is_interrupted)
    stopped = cli("stats", sample_root, "--split", "val", "--jobs", "0", "--output", "a.yaml")
    assert stopped.status == 130
    assert "Stopped after 1 of 2 blocks; they are kept in a.yaml.partial" in stopped.out
    monkeypatch.setattr(module, "measure_piece", original)
    again = cli("stats", sample_root, "--split", "val", "--jobs", "0", "--output", "a.yaml")
    assert again.status == 0
    assert "1 blocks were measured by an earlier call" in again.out


@pytest.mark.parametrize("words", [["s1="], ["s1=S1GRD", "s1=S2L2A"]])
def test_products_without_a_key_of_their_own_are_refused(cli, words):
    result = cli("stats", "sample", "--products", *words)
    assert result.status == 2
    assert "expected KEY=PRODUCT" in result.err


def test_items_of_a_configuration_are_measured_and_used(cli, folder: Path):
    words = ["--config", "recipes/cube_croma.yaml", "--split", "val", "--jobs", "0"]
    result = cli("stats", *words)
    assert result.status == 0, result.text
    assert "as SentinelCubeDataModule" in result.out
    written = yaml.safe_load((folder / "stats.yaml").read_text())["modalities"]
    assert list(written) == ["s1", "s2"] and written["s2"]["valid_share"] > 0.9
    from domainssl.datamodules.cubes import SentinelCubeDataModule

    data = SentinelCubeDataModule(statistics="stats.yaml")
    assert data.modalities["s2"].mean == tuple(written["s2"]["mean"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sample", "--config", "recipes/cube_croma.yaml"], "but not both"),
        ([], "Give a path, or --config"),
        (["sample:treesat"], "Did you mean 'treesatai'"),
        (["sample:wether"], "Did you mean 'weather'"),
        (["sample", "--limt", "3"], "there is no option '--limt'"),
    ],
)
def test_words_that_name_no_data_are_refused(cli, words, said):
    for verb in ("stats", "inspect"):
        result = cli(verb, *words)
        assert result.status == 2 and said in result.err


def test_samples_whose_layers_a_recipe_states_are_known_by_name():
    """`inspect sample:weather` was refused, and its heights were told to lack dates."""
    from domainssl.cli.run.looking import data_at

    data = data_at("sample:weather", [], [], "inspect")
    assert list(data.layers) == ["s1", "s2", "dem", "era5"] and data.timeless == ("dem",)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sample:cubes", "--mask_clouds"], "stats --mask_clouds: is about files of SSL4EO-S12"),
        (["sample:cubes", "--products", "s1=S1GRD"], "stats --products: is about files"),
        (
            ["sample", "--products", "S1GRD", "--dn_offset=0"],
            "--dn_offset: is about products",
        ),
    ],
)
def test_options_that_nothing_reads_are_refused(cli, folder: Path, words, said):
    """They were passed over without a word."""
    result = cli("stats", *words)
    assert result.status == 2 and said in result.err
