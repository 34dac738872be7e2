import logging

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny import TinyData, TinyObjective, tiny_modalities, tiny_trainer

from domainssl.callbacks.evaluation import OnlineEvaluation
from domainssl.evaluation.report import subset_name, subsets

NAMES = ("s1", "s2", "joint")


def run(folder, callbacks, data=None, model=None, ckpt_path=None, **options):
    torch.manual_seed(0)
    model = model or TinyObjective(tiny_modalities())
    trainer = tiny_trainer(folder, callbacks=callbacks, **options)
    trainer.fit(model, datamodule=data or TinyData(held_out=60), ckpt_path=ckpt_path)
    return model, trainer


def test_every_metric_is_logged_beside_its_baselines(tmp_path):
    _, trainer = run(tmp_path, [OnlineEvaluation(per_class=5)], max_epochs=8)
    metrics = trainer.callback_metrics
    for name in NAMES:
        for kind in ("knn", "probe"):
            assert {f"val/{s}{kind}/{name}" for s in ("", "untrained/", "raw/")} <= set(metrics)
        for kind in ("emb_std", "rankme"):
            assert {f"val/{kind}/{name}", f"val/untrained/{kind}/{name}"} <= set(metrics)
    for pair in ("s1-s2", "s2-s1"):
        now, before = (metrics[f"val/{s}retrieval/{pair}/R@1"] for s in ("", "untrained/"))
        assert now > before
    assert metrics["val/probe/joint"] > metrics["val/raw/probe/joint"]
    assert (metrics["val/items"], metrics["val/classes"]) == (60, 3)


def test_training_is_the_same_with_and_without_evaluation(tmp_path):
    plain, _ = run(tmp_path, [])
    watched, _ = run(tmp_path, [OnlineEvaluation()])
    assert watched.losses_seen == plain.losses_seen


def test_modes_and_random_state_are_left_as_they_were(tmp_path):
    states = []

    class Around(Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.dropout.eval()  # a frozen part keeps its mode
            states.append((torch.get_rng_state(), [m.training for m in pl_module.modules()]))

    before, after = Around(), Around()
    after.on_fit_start = lambda trainer, module: states.append(
        (torch.get_rng_state(), [m.training for m in module.modules()])
    )
    run(tmp_path, [before, OnlineEvaluation(), after], max_epochs=1)
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


def test_evaluation_happens_every_n_epochs_and_at_the_end(tmp_path):
    seen = []

    class Count(OnlineEvaluation):
        def _evaluate(self, trainer, module, found):
            super()._evaluate(trainer, module, found)
            seen.append(trainer.global_step)

    run(tmp_path, [Count(every_n_epochs=2)], max_epochs=5)
    assert seen == [8, 16, 20]


def test_a_run_that_ends_between_evaluations_gets_a_last_one(tmp_path, capsys):
    callback = OnlineEvaluation(every_n_epochs=3)
    run(tmp_path, [callback], max_epochs=-1, max_steps=6)
    assert callback._evaluated_at == 6
    assert "Is it learning? 60 held-out items" in capsys.readouterr().out


def test_the_table_compares_with_both_baselines_in_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run(tmp_path, [OnlineEvaluation(per_class=5)], max_epochs=6)
    text = capsys.readouterr().out
    plain = " ".join(text.split())
    assert "standard error of a share of 60 items: up to 6.5 points; probe: mean of 5" in plain
    assert "5 splits with 5 labels per class" in plain
    assert "points over untrained backbone" in text and "over per-band statistics" in text
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert [row[0] for row in rows if row[0]] == [*NAMES, "s1 → s2", "s2 → s1"]
    assert [row[1] for row in rows[:4]] == ["kNN", "probe", "emb. std", "eff. rank"]
    assert all(row[2] and row[3] for row in rows)
    assert rows[0][4].endswith("%") and rows[0][5] == "33.3 %" and rows[-1][5] == "1.7 %"


def test_without_labels_retrieval_and_rank_remain_and_one_line_says_so(tmp_path, capsys):
    _, trainer = run(tmp_path, [OnlineEvaluation()], TinyData(labelled=False), max_epochs=3)
    metrics = set(trainer.callback_metrics)
    assert {"val/retrieval/s1-s2/R@1", "val/rankme/joint"} <= metrics
    assert not any("knn" in name or "probe" in name for name in metrics)
    assert capsys.readouterr().out.count("carry no labels") == 1


def test_a_resumed_run_keeps_the_baseline_of_the_untrained_backbone(tmp_path):
    first = OnlineEvaluation()
    _, trainer = run(tmp_path, [first], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = OnlineEvaluation()
    run(tmp_path, [second], ckpt_path=tmp_path / "a.ckpt", max_epochs=2)
    assert second.baseline == first.baseline
    assert "val/untrained/knn/joint" in second.baseline


def test_a_callback_added_on_resume_does_not_call_trained_weights_untrained(tmp_path, caplog):
    _, trainer = run(tmp_path, [], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    callback = OnlineEvaluation()
    with caplog.at_level(logging.WARNING):
        run(tmp_path, [callback], ckpt_path=tmp_path / "a.ckpt", max_epochs=2)
    assert all(name.startswith("val/raw/") for name in callback.baseline)
    assert "no values of the untrained backbone" in caplog.text


class Collapsing(TinyObjective):
    """After a few batches every item looks the same."""

    def after_step(self, step):
        super().after_step(step)
        if self.steps_followed == 6:
            for layer in self.backbone.layers.values():
                layer.weight.zero_()
                layer.bias.fill_(1.0)


def test_collapse_is_told_and_may_end_the_run(tmp_path, caplog):
    model = Collapsing(tiny_modalities(), optimization={"lr": 1e-9})
    run(tmp_path, [OnlineEvaluation()], model=model, max_epochs=4)
    assert caplog.text.count("Features have collapsed") == 1
    assert "emb_std/s1" in caplog.text
    model = Collapsing(tiny_modalities(), optimization={"lr": 1e-9})
    _, trainer = run(tmp_path, [OnlineEvaluation(stop_on_collapse=True)], model=model, max_epochs=9)
    assert trainer.global_step == 8


def test_items_without_a_modality_are_left_out_of_its_scores(tmp_path):
    data = TinyData(held_out=48)
    loader = data.val_dataloader()
    for batch in loader.batches:
        batch["s1.present"] = torch.ones(8, dtype=torch.bool)
        batch["s1.present"][::2] = False
        batch["s1"][::2] = 1e6  # filler that would win every vote
    data.val_dataloader = lambda: loader
    callback = OnlineEvaluation()
    rows = []
    original = callback._gathered

    def note(module):
        rows.append(original(module))
        return rows[-1]

    callback._gathered = note
    run(tmp_path, [callback], data, max_epochs=1)
    assert rows[0].rows(("s1",)).sum() == 24 and rows[0].rows(("s2",)).sum() == 48
    from domainssl.evaluation.probes import knn_accuracy

    keep = rows[-1].rows(("s1",))
    expected = knn_accuracy(rows[-1].features["s1"][keep], rows[-1].labels[keep])
    assert callback.metrics["val/knn/s1"] == expected


def test_a_batch_without_a_modality_counts_as_absent(tmp_path):
    callback = OnlineEvaluation()
    model = TinyObjective(tiny_modalities())
    trainer = tiny_trainer(tmp_path)
    trainer.strategy.connect(model)
    whole, part = TinyData(held_out=16).val_dataloader().batches
    part = {k: v for k, v in part.items() if k != "s1"}
    for batch in (whole, part):
        callback._collect(trainer, model, batch)
    found = callback._gathered(model)
    assert found.present["s1"].sum() == 8 and len(found.features["s2"]) == 16


def test_an_item_that_comes_twice_counts_once(tmp_path):
    callback = OnlineEvaluation()
    model = TinyObjective(tiny_modalities())
    trainer = tiny_trainer(tmp_path)
    trainer.strategy.connect(model)
    batches = TinyData(held_out=16).val_dataloader().batches
    for batch in (*batches, batches[0]):
        callback._collect(trainer, model, batch)
    assert len(callback._gathered(model).labels) == 16


def test_scans_of_several_sources_are_looked_up_among_each_other(tmp_path):
    data = TinyData(held_out=48)
    data.source_names = {"s1": ("ct", "mr")}
    loader = data.val_dataloader()
    items = [name for batch in loader.batches for name in batch["id"]]
    data.persons = {name: row // 2 for row, name in enumerate(items)}
    for batch in loader.batches:
        batch["s1.source"] = torch.arange(len(batch["id"])) % 2
    data.val_dataloader = lambda: loader
    callback = OnlineEvaluation()
    _, trainer = run(tmp_path, [callback], data, max_epochs=6)
    metrics = trainer.callback_metrics
    for pair in ("ct-mr", "mr-ct"):
        for kind in ("P@1", "P@5", "mAP"):
            names = {f"val/{s}retrieval/{pair}/{kind}" for s in ("", "untrained/", "raw/")}
            assert names <= set(metrics)
        assert 0 < metrics[f"val/retrieval/{pair}/chance"] < 0.5
    assert metrics["val/retrieval/ct-mr/mAP"] > metrics["val/raw/retrieval/ct-mr/mAP"]
    found = [key for key in metrics if "/ct-" in key]
    assert len(found) == 12 and "val/retrieval/s1-s2/R@1" in metrics


def test_subsets_grow_slowly_with_many_modalities():
    assert subsets(("a", "b")) == [("a",), ("b",), ("a", "b")]
    assert len(subsets(tuple("abcd"))) == 15
    assert len(subsets(tuple("abcdefg"))) == 7 + 7 + 1
    assert subset_name(("a", "b"), ("a", "b")) == "joint"
    assert subset_name(("a", "b"), ("a", "b", "c")) == "a+b"
    assert subset_name(("a",), ("a",)) == "a"


def test_validate_alone_prints_the_table(tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, callbacks=[OnlineEvaluation()])
    trainer.validate(TinyObjective(tiny_modalities()), datamodule=TinyData(), verbose=False)
    assert "Is it learning?" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [2, 0.5])
def test_the_baseline_respects_the_limit_of_validation_batches(tmp_path, limit):
    callback = OnlineEvaluation()
    counts = []
    original = callback._gathered

    def note(module):
        counts.append(len(callback._parts))
        return original(module)

    callback._gathered = note
    run(tmp_path, [callback], TinyData(held_out=32), limit_val_batches=limit, max_epochs=1)
    assert counts == [2, 2]
