import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from PIL import Image, ImageDraw
from rich.console import Console
from tiny import Batches, TinyBackbone, TinyData, TinyObjective, tiny_modalities, tiny_trainer

from domainssl.callbacks.export import ExportBackbone
from domainssl.callbacks.gradients import GradientNorm
from domainssl.callbacks.progress import ProgressBar
from domainssl.callbacks.reconstruction import ReconstructionPanels, own_colours, row_labels
from domainssl.callbacks.summary import Summary
from domainssl.callbacks.throughput import Throughput
from domainssl.evaluation.picture import bands_line, colour_bands, panel, planes_of
from domainssl.modality import Modality
from domainssl.nn.normalization import Normalizer


def run(folder, callbacks, data=None, **options):
    torch.manual_seed(0)
    model = TinyObjective(tiny_modalities())
    trainer = tiny_trainer(folder, callbacks=callbacks, **options)
    trainer.fit(model, datamodule=data or TinyData())
    return model, trainer


class Clock:
    """Time that only passes where a test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        fake = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr("domainssl.callbacks.throughput.time", fake)


class SlowData(TinyData):
    """Every batch takes a while to come."""

    def __init__(self, clock, seconds, **options):
        super().__init__(**options)
        self.clock, self.seconds = clock, seconds

    def train_dataloader(self):
        outer = self

        class Slow(Batches):
            waited_s = 0.0

            def __iter__(self):
                for batch in super().__iter__():
                    outer.clock.now += outer.seconds
                    self.waited_s += outer.seconds
                    yield batch

        return Slow(self.make(self.items, 1), self)


class SlowStep(Callback):
    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.clock.now += self.seconds

    def on_validation_batch_end(self, *args):
        self.clock.now += 100


def test_data_wait_is_the_share_of_time_spent_on_fetching(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    callbacks = [Throughput(), SlowStep(clock, 0.01)]
    _, trainer = run(tmp_path, callbacks, SlowData(clock, 0.03, items=64), max_epochs=2)
    metrics = trainer.callback_metrics
    assert metrics["perf/data_wait"] == pytest.approx(0.75)
    assert metrics["perf/samples_per_s"] == pytest.approx(8 / 0.04)


def test_loaders_that_do_not_count_their_waiting_have_no_share_of_it(tmp_path):
    _, trainer = run(tmp_path, [Throughput()], max_epochs=2)
    assert "perf/samples_per_s" in trainer.callback_metrics
    assert "perf/data_wait" not in trainer.callback_metrics


def test_validation_does_not_count_as_training_time(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    callbacks = [Throughput(), SlowStep(clock, 0.01)]
    rates = []

    class Note(Callback):
        def on_train_batch_end(self, trainer, *args):
            rates.append(float(trainer.callback_metrics.get("perf/samples_per_s", 0)))

    data = SlowData(clock, 0.03, items=64)
    run(tmp_path, [*callbacks, Note()], data, max_epochs=2, log_every_n_steps=4)
    assert rates[8:] and max(rates) == pytest.approx(min(r for r in rates if r))


def test_gradient_norm_is_that_before_clipping(tmp_path):
    seen = []

    class Measure(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            squares = [p.grad.square().sum() for p in pl_module.parameters() if p.grad is not None]
            seen.append(torch.stack(squares).sum().sqrt())

    _, trainer = run(tmp_path, [Measure(), GradientNorm()], gradient_clip_val=1e-4, max_epochs=1)
    torch.testing.assert_close(trainer.callback_metrics["train/grad_norm"], seen[-1])
    assert seen[-1] > 1e-3


def test_without_a_terminal_every_epoch_leaves_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(Batches, "waited_s", 0.0, raising=False)  # as the stream counts it
    out = io.StringIO()
    bar = ProgressBar(console=Console(file=out, width=200))
    run(tmp_path, [Throughput(), bar], max_epochs=3, enable_progress_bar=True)
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "epoch 1/3 step 4",
        "epoch 2/3 step 8",
        "epoch 3/3 step 12",
    ]
    assert "contrast" in lines[0] and "samples/s" in lines[0] and "data wait" in lines[0]
    assert "val " in lines[1]


def test_a_line_shows_the_validation_of_its_own_epoch_only(tmp_path):
    out = io.StringIO()
    bar = ProgressBar(line_every_s=0, console=Console(file=out, width=200))
    run(tmp_path, [bar], max_epochs=3, check_val_every_n_epoch=2, enable_progress_bar=True)
    ends = [line for line in out.getvalue().splitlines() if "batch" not in line]
    assert ["val " in line for line in ends] == [False, True, False]  # the third repeated it


def test_an_epoch_shorter_than_the_logging_interval_still_tells_its_loss(tmp_path):
    out = io.StringIO()
    bar = ProgressBar(console=Console(file=out, width=200))
    options = {"log_every_n_steps": 50, "max_epochs": -1, "max_steps": 8}
    run(tmp_path, [bar], enable_progress_bar=True, **options)
    first = out.getvalue().splitlines()[0]
    assert first.startswith("epoch 1/? step 4") and "loss " in first and "contrast" in first


def test_without_a_terminal_long_epochs_leave_lines_in_between(tmp_path):
    out = io.StringIO()
    bar = ProgressBar(line_every_s=0, console=Console(file=out, width=200))
    run(tmp_path, [bar], max_epochs=1, enable_progress_bar=True)
    assert "epoch 1/1 step 2 batch 2/4" in out.getvalue()
    assert "batch 4/4" not in out.getvalue()  # that is the line of the epoch


def test_on_a_terminal_a_bar_shows_the_terms(tmp_path):
    out = io.StringIO()
    bar = ProgressBar(console=Console(file=out, width=200, force_terminal=True))
    run(tmp_path, [bar], max_epochs=1, enable_progress_bar=True)
    assert "4/4" in out.getvalue() and "contrast" in out.getvalue()


def test_panels_show_the_same_items_and_the_end_of_the_run(tmp_path):
    plain, _ = run(tmp_path / "plain", [], max_epochs=3)
    watched, _ = run(tmp_path / "seen", [ReconstructionPanels(every_n_epochs=2)], max_epochs=3)
    assert watched.losses_seen == plain.losses_seen
    written = sorted(p.name for p in (tmp_path / "seen" / "panels").iterdir())
    assert written == [f"step_00000{n}_{m}.png" for n in ("08", "12") for m in ("s1", "s2")]
    first, last = (np.asarray(Image.open(tmp_path / "seen" / "panels" / n)) for n in written[1::2])
    assert first.shape == last.shape and first.shape[1:] == (4 + 3 * 124, 3)
    assert np.array_equal(first[32:, :248], last[32:, :248])  # inputs and masks do not change


def test_panels_reach_tensorboard(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path, name="", version="")
    run(tmp_path, [ReconstructionPanels(every_n_epochs=5)], max_epochs=1, logger=logger)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["images"]) == {"reconstruction/s1", "reconstruction/s2"}


@pytest.mark.parametrize(
    ("channels", "bands"),
    [
        (("B01", "B02", "B03", "B04"), (3, 2, 1)),
        (("VV", "VH"), (0, 1)),
        (("t1",), (0,)),
        (("red", "green", "blue", "nir"), (0, 1, 2)),
        (("a", "b", "c", "d"), (0, 1, 2)),
        (("a", "b"), (0,)),
    ],
)
def test_bands_are_chosen_as_people_look_at_them(channels, bands):
    assert colour_bands(channels) == bands


def test_red_is_red_in_a_panel():
    modality = Modality(
        name="s2", kind="image", channels=("B02", "B03", "B04"), value_unit="dn", size=(8, 8)
    )
    x = torch.zeros(1, 3, 8, 8)
    x[0, 2, :4] = 1.0  # B04 is high in the upper half
    hidden = torch.full_like(x, float("nan"))
    picture = panel({"input": x, "visible": hidden}, modality, "t")
    assert picture[-110, 20].tolist() == [255, 0, 0]
    assert picture[-10, 20].tolist() == [0, 0, 0]
    assert picture[-110, 160].tolist() == [128, 128, 128]


@pytest.mark.parametrize("form", ["zscore", "scale(255)", "mean2std"])
def test_stained_tissue_is_shown_in_its_own_colours(form):
    modality = Modality(
        name="he", kind="image", channels=("red", "green", "blue"), value_unit="rgb8",
        size=(8, 8), mean=(176.0, 132.0, 206.0), std=(26.0, 23.0, 26.0),
    )  # fmt: skip
    raw = torch.tensor([160.0, 120.0, 180.0]).view(1, 3, 1, 1).repeat(1, 1, 8, 8)
    normalizer = Normalizer({"he": modality}, form)
    x = normalizer({"he": raw})["he"]
    hidden = torch.full_like(x, float("nan"))
    shown, limits = own_colours({"input": x, "visible": hidden}, modality, normalizer)
    assert limits == (0.0, 255.0) and bands_line(modality, limits).endswith("from 0 to 255")
    picture = panel(shown, modality, "t", limits=limits)
    assert picture[-10, 20].tolist() == [160, 120, 180]
    assert picture[-10, 160].tolist() == [128, 128, 128]


def test_what_cannot_be_undone_or_has_no_colours_is_stretched():
    modality = Modality(
        name="he", kind="image", channels=("red", "green", "blue"), value_unit="rgb8", size=(8, 8)
    )
    columns = {"input": torch.rand(1, 3, 8, 8)}
    assert own_colours(columns, modality, Normalizer({"he": modality}, "batch")) == (columns, None)
    optical = replace(modality, value_unit="dn")
    assert own_colours(columns, optical, Normalizer({"he": optical}, "identity")) == (columns, None)


def words_of(monkeypatch):
    """Return the list of texts that are drawn from now on."""
    drawn = []
    plain = ImageDraw.ImageDraw.text

    def text(self, place, words, **options):
        drawn.append(words)
        plain(self, place, words, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return drawn


def test_a_panel_tells_its_columns_bands_items_and_dates(tmp_path, monkeypatch):
    drawn = words_of(monkeypatch)
    run(tmp_path, [ReconstructionPanels()], max_epochs=1)
    text = " ".join(drawn)
    assert "s1 after step 4 VV, VH, VV - VH as red, green, blue" in text
    assert "B04, B03, B02 as red, green, blue, normalised" in text
    assert "visible: what the model is given, grey is hidden" in text
    assert [w for w in drawn if w in ("input", "visible", "predicted")] == [
        "input", "visible", "predicted"
    ] * 2  # fmt: skip
    ids = next(iter(TinyData().val_dataloader()))["id"][:4]
    assert [w for w in drawn if w in ids] == [*ids, *ids]


@pytest.mark.parametrize(
    ("kind", "dates", "shape", "expected"),
    [
        ("image", [18262, 0], (2, 1, 4, 4), ["a, 2020-01-01", "b"]),
        ("series", [[0, 18262, 9], [0, 18293, 9]], (2, 3, 1, 4, 4),
         ["a, 2020-01-01 (2 of 3 dates)", "b, 2020-02-01 (2 of 3 dates)"]),
        ("series", [[0, 18262, 9], [0, 18293, 9]], (2, 1, 4, 4),
         ["a, one of 3 dates", "b, one of 3 dates"]),
    ],
)  # fmt: skip
def test_the_rows_of_a_panel_are_called_by_item_and_date(kind, dates, shape, expected):
    modality = Modality(name="s2", kind=kind, channels=("B04",), value_unit="dn", size=(4, 4))
    batch = {"id": ["a", "b"], "s2.dates": torch.tensor(dates, dtype=torch.int32)}
    assert row_labels(batch, modality, torch.zeros(shape)) == expected


def test_the_rows_of_a_panel_say_which_items_lack_the_modality():
    modality = Modality(
        name="flair", kind="volume", channels=("m",), value_unit="arbitrary", size=(4, 4, 4)
    )
    batch = {"id": ["a", "b"], "flair.present": torch.tensor([True, False])}
    assert row_labels(batch, modality, torch.zeros(2, 1, 4, 4, 4)) == ["a", "b, not there"]


def test_one_date_of_a_series_is_a_picture():
    modality = Modality(
        name="s2", kind="series", channels=("B02", "B03", "B04"), value_unit="dn", size=(8, 8)
    )
    x = torch.rand(2, 3, 8, 8)
    assert panel({"input": x}, modality, "t").shape[2] == 3


def test_a_volume_is_shown_as_its_middle_slice_front_up_and_right_on_the_left():
    modality = Modality(name="ct", kind="volume", channels=("hu",), value_unit="hu", size=(6, 4, 6))
    x = torch.zeros(1, 1, 6, 4, 6)
    x[..., 3] = torch.linspace(0, 1, 6)[:, None]  # brighter to the patient's right
    x[:, :, 0, 3, 3] = 1.0  # and at the front of the patient's left
    (plane,) = planes_of(x, modality)[0]
    expected = np.repeat(np.linspace(1, 0, 6, dtype=np.float32)[None], 4, axis=0)
    expected[0, 5] = 1.0
    np.testing.assert_allclose(plane, expected, rtol=1e-6)
    series = Modality(name="ct", kind="series", channels=("hu",), value_unit="hu", size=(6, 4, 6))
    dates = torch.stack([torch.zeros_like(x), x, torch.zeros_like(x)], dim=1)
    np.testing.assert_array_equal(planes_of(dates, series)[0, 0], plane)
    picture = panel({"input": x}, modality, "t")
    assert picture[-10, 10].tolist() == [255, 255, 255] and picture[-10, 120].tolist() == [0, 0, 0]
    assert "middle slice" in bands_line(modality)


def test_the_exported_backbone_holds_the_trained_weights_and_their_origin(tmp_path):
    callback = ExportBackbone(licence="CC-BY-4.0")
    model, _ = run(tmp_path, [callback], max_epochs=1)
    card = json.loads((tmp_path / "backbone" / "backbone.json").read_text())
    assert card["name"] == "tiny.TinyBackbone" and card["licence"] == "CC-BY-4.0"
    assert card["provenance"]["objective"] == "TinyObjective"
    assert card["provenance"]["optimizer_steps"] == 4
    from safetensors.torch import load_file

    again = TinyBackbone(card["modalities"])
    again.load_state_dict(load_file(tmp_path / "backbone" / "backbone.safetensors"))
    batch = next(iter(TinyData().val_dataloader()))
    torch.testing.assert_close(again(batch).pooled, model.backbone(batch).pooled, rtol=0, atol=0)


def test_the_summary_says_what_was_trained_where_it_lies_and_how_to_load_it(tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="", version="")
    (tmp_path / "config.yaml").write_text("")
    run(tmp_path, [ExportBackbone(), Summary(), Throughput()], max_epochs=2, logger=logger)
    text = capsys.readouterr().out
    assert f"next     python -m domainssl evaluate {tmp_path} --output evaluation" in text
    assert f"python -m domainssl embed {tmp_path / 'backbone'} INPUT --output PATH" in text
    assert "TinyBackbone" in text and "TinyObjective: 2 epochs, 8 steps" in text
    assert f'load_backbone("{tmp_path / "backbone"}")' in text
    assert "metrics.csv" in text and "samples/s" in text


def test_the_summary_of_a_resumed_run_tells_its_steps_from_those_before(tmp_path, capsys):
    last = tmp_path / "last.ckpt"
    run(tmp_path, [], max_epochs=1)[1].save_checkpoint(last)
    trainer = tiny_trainer(tmp_path, callbacks=[Summary()], max_epochs=3)
    trainer.fit(TinyObjective(tiny_modalities()), datamodule=TinyData(), ckpt_path=last)
    text = capsys.readouterr().out
    assert "3 epochs, 12 steps in all" in text
    assert "for 8 steps after the resume at step 4 (" in text


def test_an_interrupted_run_says_how_to_go_on(tmp_path, capsys):
    class Break(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path, [Summary(), Break()])
    text = capsys.readouterr().out
    assert "RuntimeError after step" in text and "no checkpoint was written yet" in text
