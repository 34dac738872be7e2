from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from ssl4eo_files import tile_table

from domainssl.datamodules import SSL4EOS12DataModule
from domainssl.datamodules.base import DomainDataModule
from domainssl.errors import ConfigError, DataError
from domainssl.io.ssl4eo.write import write_release_a
from domainssl.loading.source import Loading
from domainssl.modality import check_batch
from domainssl.sources.dates import Dates
from domainssl.sources.windows import Window

FIXED = Window(size=16)
RESIZED = Window(size=16, min_size=12, max_size=30)
SIDE = 40


def module(root, stage="fit", **changes):
    options = {"global_batch_size": 4, "window": FIXED, "loading": Loading(workers=0), **changes}
    data = SSL4EOS12DataModule(root=str(root), **options)
    data.setup(stage)
    return data


def train(data, epoch=0):
    data.epoch = epoch
    return list(data.train_dataloader())


def expected_pixels(location: int, date: int, geo: dict) -> np.ndarray:
    """The test pattern at the centres of a delivered window, found through its affine map."""
    row, column = np.mgrid[:16, :16] + 0.5
    x = geo["a"] * column + geo["b"] * row + geo["c"] - (500000.0 + 1000.0 * location)
    y = 4_900_000.0 - (geo["d"] * column + geo["e"] * row + geo["f"])
    rows, columns = (y // 10).astype(int), (x // 10).astype(int)
    return (rows * SIDE + columns) % 1000 + 1.0 + 2 * location + date


@pytest.mark.parametrize("release", ["release_a", "release_b"])
def test_every_pixel_is_the_offset_free_value_of_its_place_and_date(release, request):
    data = module(request.getfixturevalue(release))
    seen = []
    for batch in train(data):
        check_batch(batch, data.modalities, training=True)
        for i, name in enumerate(batch["id"]):
            location, date = map(int, name.split("_"))
            expected = expected_pixels(location, date, batch["s2.geo"][i])
            assert np.array_equal(batch["s2"][i, 5].numpy(), expected)
            assert np.array_equal(batch["s1"][i, 1].float().numpy() * 4, expected)
            seen.append(location)
    assert len(set(seen)) == len(seen) == len(data.train_dataloader()) * 4


@pytest.mark.parametrize("release", ["release_a", "release_b"])
@pytest.mark.parametrize("window", [FIXED, RESIZED])
def test_chosen_bands_are_those_of_the_product_in_the_order_asked(release, window, request):
    root, bands = request.getfixturevalue(release), ("B11", "B02", "B8A")
    whole = module(root, window=window)
    some = module(root, window=window, modalities={"s2": {"product": "S2L2A", "bands": bands}})
    all_bands, own = whole.modalities["s2"], some.modalities["s2"]
    places = [all_bands.channels.index(band) for band in bands]
    assert own.channels == bands
    for fact in ("mean", "std", "wavelengths_nm"):
        assert getattr(own, fact) == tuple(getattr(all_bands, fact)[place] for place in places)
    for split in ("train_dataloader", "val_dataloader"):
        for expected, batch in zip(getattr(whole, split)(), getattr(some, split)(), strict=True):
            assert torch.equal(batch["s2"], expected["s2"][:, places])
            assert torch.equal(batch["s2.valid"], expected["s2.valid"])


def test_products_share_window_flips_and_turns_when_resized(release_a):
    for batch in train(module(release_a, window=RESIZED)):
        for s1, s2 in zip(batch["s1"], batch["s2"], strict=True):
            assert torch.allclose(s1[0] * 4, s2[0], rtol=1e-3)
        assert batch["s1.geo"] == batch["s2.geo"]


def test_fixed_windows_keep_the_stored_type_until_the_device(release_a):
    data = module(release_a)
    batch = train(data)[0]
    assert (batch["s1"].dtype, batch["s2"].dtype) == (torch.float16, torch.int16)
    moved = data.on_after_batch_transfer(batch, 0)
    assert moved["s1"].dtype == moved["s2"].dtype == torch.float32
    assert moved["s2.valid"].dtype == torch.bool and moved["id"] == batch["id"]


def test_windows_differ_between_locations_and_epochs_and_repeat_for_equal_seeds(release_a):
    def places(epoch, seed=0):
        batches = train(module(release_a, seed=seed), epoch)
        return {i: (g["c"], g["f"], g["a"], g["b"]) for b in batches
                for i, g in zip(b["index"].tolist(), b["s2.geo"])}  # fmt: skip

    first = places(1)
    assert first == places(1)
    other = places(2)
    assert sum(first[i] != other[i] for i in first.keys() & other.keys()) > 10
    assert first != places(1, seed=1)


def test_one_date_is_drawn_per_file_and_epoch_and_only_its_block_decoded(release_a):
    data = module(release_a, global_batch_size=2)
    drawn = []
    for epoch in range(3):
        dates: dict[int, set[str]] = {}
        for batch in train(data, epoch):
            assert torch.equal(batch["s1.dates"], batch["s2.dates"])
            for name, index in zip(batch["id"], batch["index"].tolist()):
                dates.setdefault(index // 6, set()).add(name.split("_")[1])
        assert all(len(found) == 1 for found in dates.values())
        drawn.append(tuple(sorted((k, *v) for k, v in dates.items())))
    assert len(set(drawn)) > 1
    stream = data.train_dataloader()
    list(stream)
    assert stream.read_amplification == pytest.approx(1.0)
    one_date = 22 * SIDE * SIDE * (2 * 2 + 12 * 2 + 1)
    assert stream.tally.bytes_decoded == pytest.approx(one_date, rel=0.01)


@pytest.mark.parametrize(
    ("dates", "count"),
    [
        (Dates(mode="all"), 4),
        (Dates(mode="views"), 2),
        (Dates(mode="views", max_dates=3), 3),
        (Dates(mode="all", max_dates=2), 2),
        (Dates(mode="fixed", positions=(0, 3)), 2),
    ],
)
def test_several_dates_come_as_a_series(release_a, dates, count):
    data = module(release_a, dates=dates)
    batch = train(data)[0]
    assert data.modalities["s2"].kind == "series"
    check_batch(batch, data.modalities, training=True)
    assert batch["s2"].shape == (4, count, 12, 16, 16)
    assert batch["s1.valid"].shape == (4, count, 16, 16)
    assert batch["s2.frames"].all() and batch["s2.frames"].shape == (4, count)
    days = batch["s2.dates"]
    assert days.dtype == torch.int32 and (days.diff(dim=1) > 0).all()
    if dates.places or (dates.mode, count) == ("all", 2):
        assert (days[:, 1] - days[:, 0] == 240).all()
    assert torch.allclose(batch["s1"][:, :, 0].float() * 4, batch["s2"][:, :, 0].float())


def test_a_fixed_date_is_an_image_of_that_date(release_a):
    data = module(release_a, dates=Dates(mode="fixed", positions=2))
    batch = train(data)[0]
    assert data.modalities["s2"].kind == "image"
    assert all(name.endswith("_2") for name in batch["id"])
    assert (batch["s2.dates"] == int(np.datetime64("2020-06-13").astype(int))).all()


def test_dates_that_do_not_exist_are_refused(release_a):
    with pytest.raises(ConfigError, match="5 dates are needed, the files hold 4"):
        module(release_a, dates=Dates(mode="fixed", positions=4))
    with pytest.raises(ConfigError, match="Did you mean 'one'"):
        Dates(mode="ones")
    with pytest.raises(ConfigError, match="dates.span_days: got 30.*no use for it.*positions"):
        module(release_a, dates=Dates(span_days=30))
    for places in (None, (), (0, 0), -1):
        with pytest.raises(ConfigError, match="mode 'fixed' needs a position"):
            Dates(mode="fixed", positions=places)


def test_held_out_items_are_central_complete_and_the_same_each_time(release_a):
    data = module(release_a, global_batch_size=3)
    first, second = list(data.val_dataloader()), list(data.val_dataloader())
    assert [i for b in first for i in b["index"].tolist()] == list(range(8))
    assert [b["id"] for b in first] == [b["id"] for b in second]
    assert all(torch.equal(a["s2"], b["s2"]) for a, b in zip(first, second, strict=True))
    geo = first[0]["s2.geo"][0]
    assert (geo["c"], geo["f"]) == (500000.0 + 100 * 1000.0 + 120.0, 4_900_000.0 - 120.0)


def test_labels_beside_the_data_are_delivered_and_may_be_absent(release_a, release_b):
    data = module(release_a)
    assert data.label_names == ("water", "crops", "trees") and data.num_classes == 3
    for batch in train(data):
        assert batch["label"].tolist() == [int(name.split("_")[0]) % 3 for name in batch["id"]]
    assert "label" not in train(module(release_a, labels=None))[0]
    unlabelled = module(release_b)
    assert unlabelled.label_names is None and "label" not in train(unlabelled)[0]


@pytest.mark.parametrize(
    ("release", "name", "there"),
    [("release_a", "0900000", "'0000000'"), ("release_b", "x", "'0000000' or 'ssl4eos12_train_")],
)
def test_labels_that_name_no_location_are_refused(release, name, there, request, tmp_path):
    root = request.getfixturevalue(release)
    table = tmp_path / "labels.csv"
    table.write_text(f"sample,label\n{name},1\n")
    with pytest.raises(DataError, match=f"names none of the .* it has '{name}', they .* {there}"):
        module(root, labels=str(table))
    # a key of a tar, or an id, of one split is enough; of the other one it is said
    known = "ssl4eos12_train_seasonal_data_0000003" if release == "release_b" else "0000003"
    table.write_text(f"sample,label\n{known},1\n")
    data = module(root, labels=str(table))
    assert len(data.problems) == 1 and "(val)" in data.problems[0]
    labels = torch.cat([batch["label"] for batch in train(data)]).tolist()
    assert sorted(set(labels)) == [-1, 1] and labels.count(1) == 1


@pytest.fixture
def copy_of_a(release_a, tmp_path) -> Path:
    return Path(shutil.copytree(release_a, tmp_path / "copy"))


def test_a_held_out_folder_of_another_name_is_told_and_an_empty_one_refused(copy_of_a, caplog):
    (copy_of_a / "val").rename(copy_of_a / "validation")
    module(copy_of_a)
    assert "nothing is held out for validation; rename 'validation' to it" in caplog.text
    (copy_of_a / "val" / "S1GRD").mkdir(parents=True)
    (copy_of_a / "val" / "S2L2A").mkdir()
    with pytest.raises(DataError, match=r"val/S1GRD: neither .*A\) nor .*B\).*Download its files"):
        module(copy_of_a)


def test_training_files_among_held_out_ones_and_lists_that_name_others_are_told(copy_of_a):
    name = "ssl4eos12_{}_seasonal_data_00000{}.zarr.zip".format
    for product in ("S1GRD", "S2L2A"):
        shutil.copy(copy_of_a / "train" / product / name("train", 1),
                    copy_of_a / "val" / product / name("val", 9))  # fmt: skip
    (copy_of_a / "splits").mkdir()
    listed = f"{name('train', 1)}\n{name('train', 7)}\n"
    (copy_of_a / "splits" / "ssl4eos12_train.txt").write_text(listed)
    gone, more, leak = module(copy_of_a).problems
    assert gone.endswith(f"1 of its files are not there, such as {name('train', 7)}; left out")
    assert "3 files that are there are not in the list" in more
    assert "1 files of 'val' are copies of files of 'train'" in leak and name("val", 9) in leak


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_truncated_file_is_named(copy_of_a):
    truncate(next((copy_of_a / "train/S2L2A").glob("*2.zarr.zip")))
    with pytest.raises(DataError, match=r"train.S2L2A.ssl4eos12_train_seasonal_data_000002"):
        train(module(copy_of_a))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_file_is_replaced_by_good_locations_when_asked(copy_of_a, workers):
    truncate(next((copy_of_a / "train/S2L2A").glob("*2.zarr.zip")))
    loading = Loading(workers=workers, max_bad_fraction=0.5)
    data = module(copy_of_a, on_bad_sample="replace", loading=loading)
    batches = train(data)
    data.teardown()
    assert len(batches) == 5
    assert not {i for b in batches for i in b["index"].tolist()} & set(range(6, 12))
    with pytest.raises(DataError, match="6 of 22 train items"):
        train(module(copy_of_a, on_bad_sample="replace"))


def test_one_damaged_location_of_a_tar_costs_that_location_only(release_b, tmp_path):
    root = Path(shutil.copytree(release_b, tmp_path / "copy"))
    tar = next((root / "train/S2L2A").glob("*1.tar"))
    content = bytearray(tar.read_bytes())
    where = content.find(b"bands/0.0.0.0", len(content) // 4)
    content[where + 20 : where + 60] = bytes(40)
    tar.write_bytes(bytes(content))
    loading = Loading(workers=0, max_bad_fraction=0.5)
    first = Dates(mode="fixed", positions=0)
    data = module(root, on_bad_sample="replace", loading=loading, dates=first, global_batch_size=12)
    stream = data.train_dataloader()
    [batch] = list(stream)
    assert len(stream.tally.bad) == 1
    assert len(set(batch["index"].tolist())) == 11
    with pytest.raises(DataError, match="000001.tar"):
        train(module(root, dates=first))


def test_invalid_pixels_are_marked_and_finite(tmp_path):
    root = tmp_path
    for split in ("train", "val"):
        s1 = np.full((2, 4, 2, SIDE, SIDE), -10, np.float16)
        s1[:, :, 0, 20, 20] = np.nan
        s1[:, :, 1, 21, 20] = -np.inf
        s2 = np.full((2, 4, 12, SIDE, SIDE), 2000, np.int16)
        cloud = np.zeros((2, 4, SIDE, SIDE), np.uint8)
        cloud[:, :, 18, 18], cloud[:, :, 22, 22] = 6, 4
        for product, values, mask in (("S1GRD", s1, None), ("S2L2A", s2, cloud)):
            folder = root / split / product
            folder.mkdir(parents=True)
            table = tile_table([1, 2], s1=product == "S1GRD")
            write_release_a(folder / "ssl4eos12_x_000001.zarr.zip", product, values, table, mask)
    [batch] = list(module(root).val_dataloader())  # the centre starts at 12, 12
    for name, places in (("s1", {(8, 8), (9, 8)}), ("s2", {(6, 6)})):
        assert batch[name].isfinite().all()
        assert {tuple(p) for p in (~batch[f"{name}.valid"][0]).nonzero().tolist()} == places
    [batch] = list(module(root, dates=Dates(mask_clouds=True)).val_dataloader())
    assert not batch["s2.valid"][0, 10, 10]
    resized = Window(size=20, min_size=40, max_size=40)
    [batch] = train(module(root, window=resized, global_batch_size=2))
    assert batch["s1"].isfinite().all()
    assert (batch["s1"][batch["s1.valid"][:, None].expand(-1, 2, -1, -1)] == -10).all()
    assert 0 < (~batch["s1.valid"][0]).sum() <= 16


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_of_any_start_method_read_the_same(release_a, method, workers):
    alone = train(module(release_a, window=RESIZED))
    data = module(release_a, window=RESIZED, loading=Loading(workers=workers, start_method=method))
    together = train(data)
    data.teardown()
    for a, b in zip(alone, together, strict=True):
        assert a["id"] == b["id"]
        assert torch.equal(a["s1"], b["s1"]) and torch.equal(a["s2"], b["s2"])


def test_modalities_are_known_without_the_disk(tmp_path):
    data = SSL4EOS12DataModule(root=str(tmp_path / "nothing"), modalities={"rgb": "S2RGB"})
    assert data.context_size == (120, 120)
    rgb = data.modalities["rgb"]
    assert (rgb.channels, rgb.value_unit, rgb.size) == (("B04", "B03", "B02"), "rgb8", (120, 120))
    s2 = SSL4EOS12DataModule().modalities["s2"]
    assert (s2.value_unit, s2.gsd_m, s2.num_channels) == ("dn", 10.0, 12)
    assert s2.mean[0] == pytest.approx(793.243) and s2.wavelengths_nm[0] == pytest.approx(442.7)


def test_a_path_that_does_not_exist_mentions_the_sample(tmp_path):
    with pytest.raises(DataError, match="'sample'"):
        module(tmp_path / "nothing")


def test_a_folder_without_held_out_files_trains_and_says_so(release_a, tmp_path, caplog):
    shutil.copytree(release_a / "train", tmp_path / "flat")
    data = module(tmp_path / "flat")
    assert "has no folder 'val'" in caplog.text
    assert len(train(data)) == 5 and data.val_dataloader() == []
    predicted = [i for b in data.predict_dataloader() for i in b["index"].tolist()]
    assert predicted == list(range(22))


def test_statistics_come_from_a_file_or_are_left_to_the_card(tmp_path):
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps({"s1": {"mean": [-11, -19], "std": [4, 5]}}))

    def s1(statistics):
        data = SSL4EOS12DataModule(modalities={"s1": "S1GRD"}, statistics=str(statistics))
        return data.modalities["s1"]

    assert s1(path).mean == (-11.0, -19.0) and s1(path).std == (4.0, 5.0)
    assert s1("card").mean is None
    card = {"modalities": {"s1": {"mean": [1, 2], "std": [3, 4], "channels": ["VH", "VV"]}}}
    path.write_text(json.dumps(card))
    with pytest.raises(ConfigError, match="channels of 's1' is .'VH', 'VV'."):
        s1(path)
    with pytest.raises(ConfigError, match="Did you mean 'published'"):
        s1("publishd")
    card["modalities"]["s1"]["channels"] = ["VV", "VH"]
    path.write_text(json.dumps(card))
    some = {"s1": {"product": "S1GRD", "bands": ["VH"]}}
    data = SSL4EOS12DataModule(modalities=some, statistics=str(path))
    assert (data.modalities["s1"].mean, data.modalities["s1"].std) == ((2.0,), (4.0,))


def test_mistakes_are_refused_with_the_nearest_name(release_a):
    with pytest.raises(ConfigError, match="Did you mean 'S2L2A'"):
        SSL4EOS12DataModule(modalities={"s2": "S2L2B"})
    for bands, said in ((["B8"], "S2L2A has no band 'B8', expected some of B01"), ([], "got none"),
                        (["B02", "B02"], "B02 is named twice")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            SSL4EOS12DataModule(modalities={"s2": {"product": "S2L2A", "bands": bands}})
    with pytest.raises(ConfigError, match="on_bad_sample: got 'skip'"):
        SSL4EOS12DataModule(on_bad_sample="skip")
    with pytest.raises(ConfigError, match="global_batch_size to at most 22"):
        module(release_a, global_batch_size=23).train_dataloader()


def test_describe_and_identity_tell_the_files_apart(release_a, release_b, caplog):
    with caplog.at_level(logging.INFO):
        data = module(release_a, window=RESIZED)
        list(data.train_dataloader())
    assert "read amplification 1.00" in caplog.text
    text = "\n".join(data.describe())
    assert "release A, train: 22 locations in 4 files of 40 x 40 px, 4 dates" in text
    assert "stored offset 1000 (found, removed)" in text
    assert "labels: water, crops, trees" in text
    assert data.identity() == module(release_a).identity() != module(release_b).identity()
    json.dumps(data.identity())


def test_windows_larger_than_the_scene_are_clipped_and_said(release_a, caplog):
    with caplog.at_level(logging.INFO):
        data = module(release_a, window=Window(size=16, min_size=12, max_size=180))
    assert "training windows are 12 to 40 px instead of 12 to 180" in caplog.text
    assert len(train(data)) == 5


@pytest.mark.parametrize(
    ("text", "drawn", "fixed"),
    [
        ("{mode: one}", 1, ()),
        ("{mode: fixed, positions: 2}", 0, (2,)),
        ("{mode: fixed, positions: [0, 2]}", 0, (0, 2)),
    ],
)
def test_the_command_line_reads_dates_and_parts_of_groups(text, drawn, fixed):
    parser = ArgumentParser()
    parser.add_subclass_arguments(DomainDataModule, "data")
    arguments = ["--data=SSL4EOS12DataModule", f"--data.dates={text}", "--data.window.size=32",
                 "--data.window.min_size=20", "--data.loading.workers=1",
                 "--data.modalities={s1: S1GRD, s2: {product: S2L2A, bands: [B02, B8A]}}",
                 ]  # fmt: skip
    config = parser.parse_args(arguments)
    data = parser.instantiate(config).data
    assert (data.dates.drawn(), data.dates.places) == (drawn, fixed)
    assert {n: m.num_channels for n, m in data.modalities.items()} == {"s1": 2, "s2": 2}
    assert (data.window.shape, data.window.least, data.loading.workers) == ((32, 32), 20, 1)
    again = parser.instantiate(parser.parse_string(parser.dump(config))).data
    assert again.arguments == data.arguments
