"""What a test writes, and numbers as targets."""

from __future__ import annotations

import csv

import lightning.pytorch as pl
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_tasks import CLASSES, MODALITIES, backbone, batch, task
from torch.utils.data import DataLoader

from domainssl.callbacks import ResultTables
from domainssl.callbacks.summary import Summary
from domainssl.callbacks.tables import _draw, _joined
from domainssl.errors import ConfigError, DataError
from domainssl.tasks import NumberLoss, RegressionTask, SegmentationTask
from domainssl.tasks.regression import number_loss


def run(model, batches, folder, **options):
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[ResultTables(**options)],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    found = trainer.test(model, DataLoader(batches, batch_size=None), verbose=False)
    return found[0]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_test_leaves_predictions_confusion_and_a_table_per_class(tmp_path):
    model, given = task(), batch(9)
    given["label"][4] = -1
    logged = run(model, [given], tmp_path)
    with torch.no_grad():
        chances = model.eval().logits(given).softmax(1)
    folder = tmp_path / "test"
    rows = rows_of(folder / "predictions.csv")
    assert [row["id"] for row in rows] == given["id"] and rows[4]["label"] == ""
    assert [row["predicted"] for row in rows] == [CLASSES[i] for i in chances.argmax(1).tolist()]
    assert float(rows[2]["p(nests)"]) == pytest.approx(float(chances[2, 1]), rel=1e-4)
    counts = torch.zeros(3, 3)
    for i, row in enumerate(rows):
        if i != 4:
            counts[int(given["label"][i]), CLASSES.index(row["predicted"])] += 1
    written = [[int(row[c]) for c in CLASSES] for row in rows_of(folder / "confusion.csv")]
    assert written == counts.int().tolist()
    assert logged["test/accuracy"] == pytest.approx(float(counts.diag().sum() / 8))
    table = {row["class"]: row for row in rows_of(folder / "classes.csv")}
    recall = counts.diag() / counts.sum(1)
    assert [float(table[c]["recall"]) for c in CLASSES] == pytest.approx(recall.tolist(), abs=1e-5)
    assert (folder / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_the_screen_shows_metrics_a_table_of_classes_and_where_files_lie(tmp_path, capsys):
    model, given = task(), batch(9)
    given["label"] = torch.tensor([0, 0, 0, 0, 0, 1, 1, -1, -1])  # none of the third class
    logged = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[ResultTables()], enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    ).test(model, DataLoader([given], batch_size=None))[0]  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("result"))
    assert f"accuracy {logged['test/accuracy']:.4g}" in lines[first]
    assert f"loss {logged['test/loss']:.4g}" in " ".join(lines[first : first + 3])
    begin = next(i for i, line in enumerate(lines) if line.startswith("class"))
    assert lines[begin].split() == ["class", "labelled", "auroc", "f1", "precision", "recall"]
    shown = [line.split() for line in lines[begin + 1 : begin + 4]]
    assert [row[:2] for row in shown] == [[CLASSES[0], "5"], [CLASSES[1], "2"], [CLASSES[2], "0"]]
    assert shown[0][5] == f"{logged[f'test/recall/{CLASSES[0]}']:.3f}" and shown[2][2:] == ["-"] * 4
    table = {row["class"]: row for row in rows_of(tmp_path / "test" / "classes.csv")}
    assert table[CLASSES[2]]["recall"] == "" and table[CLASSES[1]]["recall"] != ""
    text = "".join(lines[begin + 4 :]).replace("\n", "")
    assert "written" in text and "confusion.csv" in text and "Test metric" not in " ".join(lines)


def test_a_test_of_maps_counts_pixels(tmp_path, caplog):
    given = batch() | {"mask": torch.zeros(4, 16, 16, dtype=torch.int64)}
    given["mask"][:, 8:], given["mask"][:, :, :4] = 1, -1
    model = SegmentationTask(
        backbone(), modalities=MODALITIES, classes=CLASSES, head={"name": "linear"}
    )
    logged = run(model, [given], tmp_path)
    folder = tmp_path / "test"
    assert not (folder / "predictions.csv").exists()
    counts = [[int(row[c]) for c in CLASSES] for row in rows_of(folder / "confusion.csv")]
    assert [sum(row) for row in counts] == [4 * 8 * 12, 4 * 8 * 12, 0]
    right = counts[0][0] + counts[1][1]
    assert logged["test/accuracy"] == pytest.approx(right / (2 * 4 * 8 * 12))
    table = {row["class"]: row["iou"] for row in rows_of(folder / "classes.csv")}
    assert float(table[CLASSES[0]]) == pytest.approx(
        counts[0][0] / (sum(counts[0]) + counts[1][0]), abs=1e-5
    )
    assert table[CLASSES[2]] == ""  # of no pixel
    assert f"test/iou/{CLASSES[1]}" in logged  # logged as 0 before, as if it were never found
    assert not [name for name in logged if name.endswith(f"/{CLASSES[2]}")]
    assert f"test: 1 of 3 classes have no label ({CLASSES[2]})" in caplog.text
    assert _draw(np.full((3, 3), 1e6), CLASSES, tmp_path / "large.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["item", "items", "map"])
def test_means_are_those_of_the_classes_that_are_told(kind):
    """A class that is predicted and has no label counted as 0, though it is not told."""
    predicted = torch.eye(3)[[0, 2, 1]]
    if kind == "map":
        model = SegmentationTask(
            backbone(), modalities=MODALITIES, classes=CLASSES, head={"name": "linear"}
        )
        predicted, target, wanted = predicted.argmax(1), torch.tensor([0, 1, 1]), {"iou": 0.75}
    else:
        model = task(multi_label=kind == "items")
        target, wanted = torch.tensor([0, 1, 1]), {"f1": 5 / 6, "balanced_accuracy": 0.75}
    if kind == "items":  # nobody has the second, all have the third, of which no curve tells
        target, wanted = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 0, 1]]), {"f1": 0.75, "auroc": 1.0}
    watched = model.metrics()
    watched.update(predicted, target)
    named = model.named_results(model.computed(watched))
    for mean, source in model.means().items():
        told = [v for n, v in named.items() if n.startswith(source.removesuffix("_of") + "/")]
        assert float(named[mean]) == pytest.approx(float(sum(told)) / len(told))
    assert {name: float(named[name]) for name in wanted} == pytest.approx(wanted)
    assert ("auroc/nests" in named, "auroc/mucin" in named) == (kind == "item", False)


def test_predictions_may_be_parquet_and_several_labels_have_no_confusion(tmp_path):
    given = batch()
    given["label"] = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, torch.nan, 0], [0, 1, 0]])
    given["label"][:, 1] = 0  # nobody has it
    logged = run(task(multi_label=True), [given], tmp_path, format="parquet")
    table = pq.read_table(tmp_path / "test" / "predictions.parquet").to_pydict()
    assert table["label"] == ["glands;mucin", "", "glands", ""]
    assert f"test/recall/{CLASSES[0]}" in logged and f"test/recall/{CLASSES[1]}" not in logged
    per_class = {row["class"]: row["f1"] for row in rows_of(tmp_path / "test" / "classes.csv")}
    assert per_class[CLASSES[1]] == "" and per_class[CLASSES[0]] != ""
    assert not (tmp_path / "test" / "confusion.csv").exists()
    with pytest.raises(ConfigError, match="ResultTables.format: got 'xls'"):
        ResultTables(format="xls")


def test_a_fit_ends_with_the_metrics_of_the_held_out_items(tmp_path, capsys):
    model, given = task(), batch(9)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[Summary()], max_epochs=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, *(DataLoader([given], batch_size=None) for _ in range(2)))
    found = {name: float(value) for name, value in model.results["val"].items() if value.ndim == 0}
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in found.items())
    assert list(found) == ["accuracy", "auroc", "balanced_accuracy", "f1"]
    assert f"validation: {shown}" in " ".join(capsys.readouterr().out.split())


def test_an_item_that_two_ranks_had_is_written_once():
    rows = _joined([{"id": ["a", "b"], "x": [1, 2]}, {}, {"id": ["c", "a"], "x": [3, 1]}])
    assert rows == {"id": ["a", "b", "c"], "x": [1, 2, 3]}


def test_numbers_are_learned_in_their_own_units_and_unknown_ones_left_out(tmp_path):
    target = torch.tensor([[120.0], [torch.nan], [80.0], [95.0]])
    predicted = torch.full((4, 1), 100.0, requires_grad=True)
    loss = number_loss(predicted, target, NumberLoss(mean=100.0, std=20.0))
    assert loss.item() == pytest.approx((1 + 1 + 0.0625) / 3)
    loss.backward()
    assert predicted.grad[1] == 0
    model = RegressionTask(
        backbone(), modalities=MODALITIES, targets=("age",), loss=NumberLoss(mean=50.0, std=10.0)
    )
    given = {**batch(), "target": torch.tensor([40.0, 50.0, torch.nan, 70.0])}
    logged = run(model, [given], tmp_path)
    with torch.no_grad():
        numbers = model.eval().logits(given)[:, 0]
    known = torch.tensor([0, 1, 3])
    expected = (numbers[known] - given["target"][known]).abs().mean()
    assert logged["test/mae"] == pytest.approx(float(expected), rel=1e-5)
    assert [row["age"] for row in rows_of(tmp_path / "test" / "predictions.csv")][2] == "nan"
    given["target"] = torch.zeros(4, 2)
    with pytest.raises(DataError, match=r"batch.target: got shape \(4, 2\).*age"):
        model.losses(numbers, given)
