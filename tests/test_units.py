"""Values in another unit than the model's are noticed; rare but right ones are not."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TinyBackbone, TinyData, TinyObjective, tiny_trainer

from domainssl import export_backbone, load_backbone
from domainssl.backbones.base import Backbone
from domainssl.errors import DataError
from domainssl.io.ssl4eo.facts import product
from domainssl.io.ssl4eo.layout import scan
from domainssl.io.ssl4eo.read import read
from domainssl.modality import Modality
from domainssl.units import UnitCheck, unit_of_item

SIDE = 32
RNG = np.random.default_rng(0)


def modality(product_name: str, name: str = "s2", **changes) -> Modality:
    facts = product(product_name)
    given = {"mean": facts.mean, "std": facts.std, "valid_range": facts.valid_range, **changes}
    return Modality(
        name=name,
        kind="image",
        channels=facts.bands,
        value_unit=given.pop("value_unit", facts.value_unit),
        **given,
    )


def image(low: float, high: float, count: int = 6, bands: int = 12) -> np.ndarray:
    """Whole numbers, (B, C, H, W)."""
    return RNG.integers(low, high, (count, bands, SIDE, SIDE)).astype(np.float32)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Some windows of the embedded sample by product, all fully valid."""
    from domainssl.datamodules.samples import ssl4eo

    names, folder = ("S1GRD", "S2L1C", "S2L2A"), tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl4eo, "LOCATIONS", {"val": 32})  # one file of five
        ssl4eo.build(folder, names)
    catalogue = scan(str(folder), "val", {n.lower(): n for n in names})
    out = {}
    for name in names:
        block = read(catalogue.groups[0], name.lower(), [0])
        kept = block.valid.all((1, 2, 3))
        out[name] = block.values[kept, 0, :, :48, :48].astype(np.float32)[:12]
        assert len(out[name]) > 4
    return out


def look(values: np.ndarray, kind: Modality, **companions) -> None:
    """Show the values to a check, in two batches."""
    check = UnitCheck({kind.name: kind})
    for half in (slice(0, len(values) // 2), slice(len(values) // 2, None)):
        batch = {kind.name: torch.tensor(values[half])}
        batch.update({f"{kind.name}.{k}": torch.tensor(v[half]) for k, v in companions.items()})
        check.look(batch, "train")


def zscore(values: np.ndarray, name: str) -> np.ndarray:
    facts = product(name)
    mean, std = (np.array(x, np.float32)[:, None, None] for x in (facts.mean, facts.std))
    return (values - mean) / std


@pytest.mark.parametrize(
    ("name", "change", "declared", "words"),
    [
        ("S2L2A", lambda x: x / 10_000, "dn", "digital numbers.*If they are reflectance"),
        ("S2L2A", lambda x: zscore(x, "S2L2A"), "dn", "look normalised already"),
        ("S2L2A", lambda x: np.clip(x / 10_000, 0, 1), "dn", "check the scale factor"),
        ("S2L2A", lambda x: x, "reflectance", r"reflectance \(0..1\).*divide them by 10000"),
        ("S2L2A", lambda x: zscore(x, "S2L2A"), "reflectance", "look normalised already"),
        ("S2L1C", lambda x: x + 1000, "dn", "B10 lies near 1000.*dn_offset: 1000"),
        ("S1GRD", lambda x: 10 ** (x / 10), "db", r"decibels.*10 \* log10\(x\)"),
        ("S1GRD", lambda x: zscore(x, "S1GRD"), "db", "look normalised already"),
        ("S1GRD", lambda x: x, "linear", r"linear power.*10 \*\* \(x / 10\)"),
        ("S2L2A", lambda x: x / 100, "dn", "percent of reflectance.*multiply them by 100"),
        ("S2L2A", lambda x: x / 100, "reflectance", "percent of reflectance: divide"),
        ("S1GRD", lambda x: x * 100, "db", r"within \[-60.0, 40.0\].*nodata values"),
    ],
)
def test_values_in_another_unit_are_noticed(sample, name, change, declared, words) -> None:
    limits = product(name).valid_range if declared == product(name).value_unit else None
    kind = modality(name, value_unit=declared, valid_range=limits)
    with pytest.raises(DataError, match=words):
        look(change(sample[name]), kind)


SCALES = {  # value_unit: low and high of an item that is right, factors that no unit bears
    "dn": (100, 9000, (100, 1e-4)),
    "reflectance": (0.01, 0.9, (10, 1e4, 1e-4)),
    "db": (-25, -5, (100, 10, 0.02, -10)),
    "linear": (1e-3, 0.4, (1e4, 1e-6, -1e4)),
    "rgb8": (10, 250, (257, 1 / 255, -1)),
    "hu": (-1000, 1500, (10, 1e-3)),
    "m": (0, 3000, (100, -1)),
    "index": (-0.2, 0.9, (10_000,)),
}


@pytest.mark.parametrize("unit", SCALES)
def test_no_unit_bears_another_scale_without_limits_on_the_card(unit: str) -> None:
    """Decibels times 100 of int16 passed as `db`: only one bound was compared."""
    low, high, factors = SCALES[unit]
    kind = Modality(name="x", kind="image", channels=("a", "b"), value_unit=unit)
    right = np.random.default_rng(1).uniform(low, high, (2, 400))
    assert unit_of_item(right, kind) == "fits"
    for factor in factors:
        assert unit_of_item(right * factor, kind) not in ("fits", ""), factor


def test_message_names_values_expectation_remedy_and_flag(sample) -> None:
    with pytest.raises(DataError) as error:
        look(sample["S2L2A"] / 10_000, modality("S2L2A"))
    text = str(error.value)
    assert (
        text.startswith("s2 values lie in [0.0") and " fully valid items of the train data" in text
    )
    assert "this model expects digital numbers without offset (0..10000)" in text
    assert "model.init_args.execution.check_units: false" in text


@pytest.mark.parametrize("name", ["S1GRD", "S2L1C", "S2L2A"])
def test_right_values_pass(sample, name) -> None:
    look(sample[name], modality(name))


def test_right_reflectance_and_linear_power_pass(sample) -> None:
    look(sample["S2L2A"] / 10_000, modality("S2L2A", value_unit="reflectance", valid_range=(0, 2)))
    look(10 ** (sample["S1GRD"] / 10), modality("S1GRD", value_unit="linear", valid_range=(0, 100)))


def resized(values: np.ndarray) -> np.ndarray:
    """The windows as a random-resize crop delivers them: no whole numbers any more."""
    x = torch.nn.functional.interpolate(torch.tensor(values), scale_factor=1.5, mode="bilinear")
    return x.numpy()


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(image(0, 250), id="water"),
        pytest.param(image(0, 3), id="water in SWIR, almost black"),
        pytest.param(image(-5, 8), id="night"),
        pytest.param(resized(image(-5, 8)), id="night, resized"),
        pytest.param(resized(image(0, 250)), id="water, resized"),
        pytest.param(image(6_000, 18_000), id="snow"),
        pytest.param(resized(image(6_000, 18_000)), id="snow, resized"),
        pytest.param(np.zeros((6, 12, SIDE, SIDE), np.float32), id="empty"),
        pytest.param(np.full((6, 12, SIDE, SIDE), 0.5, np.float32), id="one value everywhere"),
    ],
)
def test_water_night_snow_and_empty_windows_pass(values) -> None:
    look(values, modality("S2L2A"))


@pytest.mark.parametrize(
    "values", [image(900, 4_000, bands=13), image(6_000, 18_000, bands=13)], ids=["cloud", "snow"]
)
def test_bright_scenes_are_not_taken_for_an_offset(values) -> None:
    values[:, 10] = RNG.integers(0, 300, (6, SIDE, SIDE))  # B10: a little cirrus
    look(values, modality("S2L1C"))


def test_calm_water_and_towns_in_decibels_pass() -> None:
    calm = RNG.normal(-28, 2, (6, 2, SIDE, SIDE)).astype(np.float32)
    town = RNG.normal(0, 6, (6, 2, SIDE, SIDE)).astype(np.float32)
    for values in (calm, town, np.zeros_like(calm)):
        look(values, modality("S1GRD", "s1"))


def test_items_that_are_not_fully_valid_have_no_voice(sample) -> None:
    values = sample["S2L2A"] / 10_000
    valid = np.ones((len(values), 48, 48), bool)
    valid[2:, 0, 0] = False
    look(values, modality("S2L2A"), valid=valid)  # two are left, three are needed
    present = np.arange(len(values)) < 2
    look(values, modality("S2L2A"), present=present)
    valid[2] = True
    with pytest.raises(DataError, match="3 of 3 fully valid items"):
        look(values, modality("S2L2A"), valid=valid)


def test_undeclared_missing_values_in_a_part_of_the_windows_are_told(sample) -> None:
    values = image(-20, -6, bands=2)
    values[:2, :, :, :20] = -9999
    batch = {"s1": torch.from_numpy(values)}
    found = UnitCheck({"s1": modality("S1GRD", "s1")}).find(batch, "train", "the data")
    assert "s1 values are -9999 in a part of 2 item(s)" in found
    assert "data.init_args.modalities.s1.nodata: -9999" in found
    values[:2, :, :, :20] = -25
    assert UnitCheck({"s1": modality("S1GRD", "s1")}).find(batch, "train", "the data") == ""


def test_items_must_agree(sample) -> None:
    values = sample["S2L2A"].copy()
    values[1::2] /= 10_000
    look(values, modality("S2L2A"))


def test_padded_dates_of_a_series_do_not_count(sample) -> None:
    facts = product("S2L2A")
    kind = Modality(
        name="s2",
        kind="series",
        channels=facts.bands,
        value_unit="dn",
        mean=facts.mean,
        std=facts.std,
    )
    series = np.stack([sample["S2L2A"] / 10_000] * 3, axis=1)  # (B, T, C, H, W)
    series[:, 2] = 30_000
    frames = np.ones((len(series), 3), bool)
    frames[:, 2] = False
    valid = np.ones((*series.shape[:2], 48, 48), bool)
    valid[:, 2] = False
    with pytest.raises(DataError, match="If they are reflectance"):
        look(series, kind, frames=frames, valid=valid)


def test_only_the_first_eight_batches_of_each_loader_are_looked_at(sample) -> None:
    right, wrong = ({"s2": torch.tensor(sample["S2L2A"] * factor)} for factor in (0.0, 1 / 10_000))
    check = UnitCheck({"s2": modality("S2L2A")})
    for _ in range(8):
        check.look(right, "train")
    check.look(wrong, "train")
    with pytest.raises(DataError, match="of the validate data"):
        check.look(wrong, "validate")


def test_units_that_the_files_state_are_believed(sample) -> None:
    check = UnitCheck({"s2": modality("S2L2A")}, stated=("s2",))
    check.look({"s2": torch.tensor(sample["S2L2A"] / 10_000)}, "train")


class DecibelData(TinyData):
    """A foreign DataModule that declares decibels and delivers linear power."""

    def __init__(self) -> None:
        def linear(batch, index):
            return {**batch, "s1": batch["s1"].abs() * 0.1 + 1e-3}

        super().__init__(edit=linear)
        plain = {**self.modalities["s1"].to_dict(), "value_unit": "db"}
        self.modalities = {**self.modalities, "s1": Modality.of(plain)}


def test_fit_ends_with_the_message_unless_the_flag_is_off(tmp_path: Path) -> None:
    data = DecibelData()
    with (
        warnings.catch_warnings(),
        pytest.raises(DataError, match="s1 values lie in .* of the train data.*linear power"),
    ):
        warnings.filterwarnings("error", message=".*on_before_batch_transfer.*")
        tiny_trainer(tmp_path, max_epochs=1).fit(TinyObjective(data.modalities), data)
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(TinyObjective(data.modalities, execution={"check_units": False}), data)
    assert trainer.global_step == 4


def test_loaders_without_a_data_module_and_hooks_of_a_data_module_are_looked_at(
    tmp_path: Path,
) -> None:
    data = DecibelData()
    with pytest.raises(DataError, match="s1 values lie in"):
        tiny_trainer(tmp_path).fit(TinyObjective(data.modalities), data.train_dataloader())

    class Scaled(TinyData):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return {**batch, "s1": batch["s1"].abs() * 0.1 + 1e-3}

    scaled = Scaled()
    scaled.modalities = data.modalities
    with pytest.raises(DataError, match="s1 values lie in"):
        tiny_trainer(tmp_path).fit(TinyObjective(data.modalities), scaled)


def test_a_data_module_may_state_its_units(tmp_path: Path) -> None:
    data = DecibelData()
    data.units_stated = ("s1",)
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(TinyObjective(data.modalities), data)
    assert trainer.global_step == 4


def real_windows(folder: Path, *files: tuple[str, int]) -> np.ndarray:
    """Real scenes, less the offset they carry, cut into windows of 32 pixels, (n, C, 32, 32)."""
    rasterio = pytest.importorskip("rasterio")
    windows = []
    for name, offset in files:
        with rasterio.open(folder / name) as file:
            scene = np.nan_to_num(file.read().astype(np.float32)) - offset
        side = scene.shape[1] // SIDE * SIDE
        cut = scene[:, :side, :side].reshape(len(scene), side // SIDE, SIDE, -1, SIDE)
        windows.append(cut.transpose(1, 3, 0, 2, 4).reshape(-1, len(scene), SIDE, SIDE))
    return np.concatenate(windows)


def verdicts(values: np.ndarray, kind: Modality) -> set[str]:
    return {unit_of_item(item.reshape(len(item), -1).astype(np.float64), kind) for item in values}


def test_every_window_of_real_scenes_speaks_for_its_unit(shared_data: Path) -> None:
    s1 = real_windows(
        shared_data / "eo",
        ("terramesh_examples/S1RTC/433D_629L_3_1.tif", 0),
        ("terramesh_examples/S1RTC/637U_59R_1_3.tif", 0),
        ("sen1floods11/Spain_7370579_S1Hand.tif", 0),
    )
    s2 = real_windows(
        shared_data / "eo",
        ("terramesh_examples/S2L1C/433D_629L_3_1.tif", 1000),
        ("terramesh_examples/S2L1C/637U_59R_1_3.tif", 0),
        ("sen1floods11/Spain_7370579_S2Hand.tif", 0),
    )
    assert len(s1) == len(s2) == 354
    db, dn = modality("S1GRD"), modality("S2L1C")
    linear = modality("S1GRD", value_unit="linear", valid_range=None)
    reflectance = modality("S2L1C", value_unit="reflectance", valid_range=None)
    power = 10 ** (s1 / 10)
    assert verdicts(s1, db) == verdicts(power, linear) == {"fits"}
    assert verdicts(s2, dn) == verdicts(s2 / 10_000, reflectance) == {"fits"}
    assert verdicts(power, db) == {"linear"} and verdicts(s1, linear) == {"db"}
    assert verdicts(s2 / 10_000, dn) == {"reflectance"} and verdicts(s2, reflectance) == {"dn"}
    assert verdicts(zscore(s2, "S2L1C"), dn) == {"normalised"}
    assert verdicts(s2 + 1000, dn) == {"offset"}


def loaded(folder: Path, sample: dict[str, np.ndarray]) -> Backbone:
    kind = modality("S2L2A", size=(48, 48))
    export_backbone(TinyBackbone({"s2": kind}, side=48), folder / "exported", licence="MIT")
    return load_backbone(folder / "exported")


@pytest.mark.parametrize("count", [1, 4])
def test_a_loaded_backbone_warns_once_of_another_unit(sample, tmp_path, caplog, count) -> None:
    backbone = loaded(tmp_path, sample)
    wrong = torch.tensor(sample["S2L2A"][:count]) / 10000
    with torch.no_grad():
        backbone({"s2": wrong})
        backbone({"s2": wrong})
    [text] = [r.getMessage() for r in caplog.records if "s2 values" in r.getMessage()]
    assert f"{count} of {count} fully valid items of the first batch" in text
    assert "multiply them by 10000" in text and "check_units" not in text


def test_a_loaded_backbone_is_silent_about_right_values(sample, tmp_path, caplog) -> None:
    backbone = loaded(tmp_path, sample)
    with torch.no_grad():
        copied = copy.deepcopy(backbone)
        pickle.loads(pickle.dumps(backbone))({"s2": torch.tensor(sample["S2L2A"][:4])})
        copied({"s2": torch.tensor(sample["S2L2A"][:1])})
    assert not caplog.records


def test_a_compiled_backbone_looks_at_no_values(sample, tmp_path, caplog) -> None:
    compiled = torch.compile(loaded(tmp_path, sample), backend="eager")
    with torch.no_grad():
        compiled({"s2": torch.tensor(sample["S2L2A"][:4]) / 10000})
    assert not [r for r in caplog.records if "s2 values" in r.getMessage()]
