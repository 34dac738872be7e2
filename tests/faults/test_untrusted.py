"""Files that bring code along: refused with a message, and nothing of them is executed."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from cli_runs import RECIPE

from domainssl.cli import main
from domainssl.errors import DataError
from domainssl.io.raster.zarr import open_cube
from domainssl.training.sharded_folder import check_sharded_folder


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(autouse=True)
def recipe(folder: Path) -> None:
    (folder / "tiny.yaml").write_text(RECIPE)


def evil_files(folder: Path) -> dict[str, Path]:
    evil = Evil(folder / "touched")
    torch.save({"state_dict": {}, "evil": evil}, folder / "zip.ckpt")
    torch.save({"evil": evil}, folder / "legacy.ckpt", _use_new_zipfile_serialization=False)
    (folder / "plain.ckpt").write_bytes(pickle.dumps(evil))
    return {path.stem: path for path in folder.glob("*.ckpt")}


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_a_pickled_checkpoint_is_refused_by_fit_and_auto_resume(folder, capsys, kind):
    path = evil_files(folder)[kind]
    last = folder / "here" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_bytes(path.read_bytes())
    for words in ([f"--ckpt_path={path.name}"], ["--run_dir=here", "--auto_resume"]):
        assert main(["fit", "--config=tiny.yaml", *words]) == 2
        error = capsys.readouterr().err
        assert "holds pickled Python objects, or is damaged, and was refused" in error
        assert "Traceback" not in error
    assert not (folder / "touched").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_a_pickled_checkpoint_is_not_exported(folder, capsys, kind):
    path = evil_files(folder)[kind]
    assert main(["export", f"--checkpoint={path}", "--output=out"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (folder / "touched").exists() and not (folder / "out").exists()


@pytest.fixture
def sharded(folder: Path) -> Path:
    """Return a checkpoint in a folder as torch writes it, with plain values besides tensors."""
    import torch.distributed.checkpoint as dcp

    path = folder / "here" / "checkpoints" / "last.ckpt"
    state = {"state_dict": {"a": torch.zeros(3, dtype=torch.bfloat16)}, "optimizer_0": {"lr": 0.1}}
    dcp.save(state, checkpoint_id=path, no_dist=True)
    torch.save({"epoch": 1}, path / "meta.pt")
    return path


def test_a_sharded_checkpoint_that_torch_has_written_passes(sharded):
    check_sharded_folder(sharded)


@pytest.mark.parametrize("place", ["metadata", "value", "meta.pt", "outside", "cut", "missing"])
def test_a_sharded_checkpoint_that_brings_code_is_refused(folder, sharded, capsys, place):
    evil = Evil(folder / "touched")
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    if place == "metadata":
        metadata.planner_data = evil
    elif place == "value":
        index = next(i for i in metadata.storage_data if i.fqn == "optimizer_0.lr")
        content = io.BytesIO()
        torch.save(evil, content)
        (sharded / "__1_0.distcp").write_bytes(content.getvalue())
        place_of = metadata.storage_data[index]
        place_of.relative_path, place_of.offset = "__1_0.distcp", 0
        place_of.length = len(content.getvalue())
    elif place == "outside":
        next(iter(metadata.storage_data.values())).relative_path = "../../outside"
    elif place == "meta.pt":
        torch.save(evil, sharded / "meta.pt")
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    if place == "cut":
        (sharded / ".metadata").write_bytes((sharded / ".metadata").read_bytes()[:-40])
    elif place == "missing":
        (sharded / ".metadata").unlink()
    for words in ([f"--ckpt_path={sharded}"], ["--run_dir=here", "--auto_resume"]):
        assert main(["fit", "--config=tiny.yaml", *words]) == 2
        error = capsys.readouterr().err
        assert "last.ckpt" in error and "Traceback" not in error
    assert not (folder / "touched").exists()


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch touched']",
        "!!python/object/new:subprocess.Popen [['touch', 'touched']]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!evil {a: 1}",
    ],
)
def test_python_tags_are_refused_in_files_and_on_the_command_line(folder, capsys, tag):
    (folder / "evil.yaml").write_text(RECIPE + f"name: {tag}\n")
    assert main(["fit", "--config=evil.yaml"]) == 2
    assert "is refused" in capsys.readouterr().err
    assert main(["fit", "--config=tiny.yaml", f"--name={tag}"]) == 2
    assert "is refused" in capsys.readouterr().err
    assert not (folder / "touched").exists()


def test_a_statistics_file_with_python_tags_is_refused(folder, capsys):
    tag = "!!python/object/apply:os.system ['touch touched']"
    (folder / "statistics.yaml").write_text(f"s1: {tag}\n")
    words = ["--config=recipes/ssl4eo_croma.yaml", "--data.statistics=statistics.yaml"]
    assert main(["fit", *words]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (folder / "touched").exists()


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "C:/evil", "..\\evil"])
def test_a_zip_member_outside_its_archive_is_refused_and_written_nowhere(folder, name):
    (folder / "inside").mkdir()
    path = folder / "inside" / "data.zarr.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(".zgroup", "{}")
        file.writestr(name, "x")
    with pytest.raises(DataError, match="refuses member"):
        open_cube(str(path)).arrays  # noqa: B018
    assert main(["inspect", str(path)]) == 2
    assert not (folder / "evil").exists() and not Path("/evil").exists()


def test_a_link_in_a_tar_is_refused(folder):
    from domainssl.io.storage.archives import tar_index

    with tarfile.open(folder / "link.tar", "w") as tar:
        info = tarfile.TarInfo("a.zarr.zip")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match="neither file nor folder"):
        tar_index(str(folder / "link.tar"))


def test_a_cube_with_pickled_strings_is_refused(folder):
    path = folder / "pickled.zarr.zip"
    content = io.BytesIO()
    pickle.dump([Evil(folder / "touched")], content)
    metadata = (
        '{"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "compressor": null, '
        '"fill_value": null, "order": "C", "filters": [{"id": "pickle"}]}'
    )
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(".zgroup", '{"zarr_format": 2}')
        file.writestr("names/.zarray", metadata)
        file.writestr("names/0", content.getvalue())
    with pytest.raises(DataError, match="array 'names' is pickled, which is refused"):
        open_cube(str(path)).read("names")
    assert not (folder / "touched").exists()
