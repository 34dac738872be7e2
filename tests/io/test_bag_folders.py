"""Folders of bags are found, and converted slide by slide."""

from __future__ import annotations

import pytest
from bag_files import LATTICE, TRIDENT, clam, trident, write

from domainssl.cli import main
from domainssl.errors import ConfigError, DataError
from domainssl.inspection.recognise import inspect_path
from domainssl.io.slide.bag_folders import find_bags
from domainssl.io.slide.features import read_bag


def test_layouts_are_told_by_their_folders(tmp_path):
    clam(tmp_path / "clam")
    trident(tmp_path / "job" / "20x_256px_0px_overlap")
    assert find_bags(tmp_path / "clam").layout == "clam"
    found = find_bags(tmp_path / "job")
    assert found.layout == "trident" and [f.slide for f in found.files] == ["slide"]
    assert find_bags(found.folder).layout == "files"


def test_several_encoders_or_tilings_ask_for_a_choice(tmp_path):
    for tiling in ("20x_256px_0px_overlap", "10x_256px_0px_overlap"):
        trident(tmp_path / tiling)
    write(tmp_path / "10x_256px_0px_overlap" / "features_conch" / "a.h5", LATTICE, attrs=TRIDENT)
    with pytest.raises(ConfigError, match="10x_256px_0px_overlap/features_conch, 10x"):
        find_bags(tmp_path)
    assert [f.slide for f in find_bags(tmp_path, encoder="conch").files] == ["a"]
    with pytest.raises(ConfigError, match="Did you mean 'conch'"):
        find_bags(tmp_path, encoder="conh")
    with pytest.raises(DataError, match="sample:bags"):
        find_bags(tmp_path / "nowhere")


def test_the_verb_converts_goes_on_and_names_what_it_cannot_read(tmp_path, capsys):
    clam(tmp_path / "clam")
    write(tmp_path / "clam" / "h5_files" / "other.h5", LATTICE)
    words = ["bags", "convert", str(tmp_path / "clam"), "--to=zarr", f"--output={tmp_path / 'z'}"]
    assert main(words) == 0
    first = (tmp_path / "z" / "slide.zarr" / "zarr.json").stat().st_mtime_ns
    assert main(words) == 0
    assert (tmp_path / "z" / "slide.zarr" / "zarr.json").stat().st_mtime_ns == first
    assert read_bag(tmp_path / "z" / "other.zarr").patch_size_level0 is None
    assert "2 slides are in" in capsys.readouterr().out
    (tmp_path / "clam" / "h5_files" / "bad.h5").write_bytes(b"no HDF5")
    report = inspect_path(str(tmp_path / "clam" / "h5_files"))  # the first file is damaged
    assert report["kind"] == "bags" and "bad.h5" in report["problems"][0]
    assert main([*words, "--restart"]) == 2
    assert "bad.h5" in capsys.readouterr().err
    assert main([*words, "--skip_bad"]) == 0
    assert "2 slides are in" in capsys.readouterr().out
    assert main([*words[:-1], f"--output={tmp_path / 'clam'}"]) == 2
