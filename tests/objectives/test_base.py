import math
from contextlib import nullcontext

import pytest
import torch
from tiny import TinyData, TinyObjective, tiny_modalities, tiny_trainer

from domainssl.errors import ConfigError, DomainSSLError
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization


def make(**options):
    torch.manual_seed(0)
    return TinyObjective(tiny_modalities(), **options)


def test_training_lowers_the_loss_and_logs_every_term(tmp_path):
    model = make()
    trainer = tiny_trainer(tmp_path, max_epochs=10)
    trainer.fit(model, datamodule=TinyData())
    assert sum(model.losses_seen[-4:]) < sum(model.losses_seen[:4])
    metrics = trainer.callback_metrics
    assert {"train/loss", "train/loss/contrast", "train/loss/size", "val/loss"} <= set(metrics)
    terms = metrics["train/loss/contrast"] + metrics["train/loss/size"]
    torch.testing.assert_close(metrics["train/loss"], terms)


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(tmp_path):
    losses = []
    for seed in (3, 3, 4):
        model = make(execution={"seed": seed})
        torch.manual_seed(len(losses))  # nothing outside may matter
        tiny_trainer(tmp_path).fit(model, datamodule=TinyData())
        losses.append(model.losses_seen)
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_validation_uses_the_same_draws_every_time_and_leaves_training_alone(tmp_path):
    with_val, without_val = make(), make()
    tiny_trainer(tmp_path).fit(with_val, datamodule=TinyData())
    tiny_trainer(tmp_path, limit_val_batches=0).fit(without_val, datamodule=TinyData())
    assert with_val.losses_seen == without_val.losses_seen
    trainer = tiny_trainer(tmp_path)
    first = trainer.validate(with_val, datamodule=TinyData(), verbose=False)
    again = trainer.validate(with_val, datamodule=TinyData(), verbose=False)
    assert first == again


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stop):
    whole = make()
    tiny_trainer(tmp_path).fit(whole, datamodule=TinyData())
    first = make()
    trainer = tiny_trainer(tmp_path, max_epochs=2)
    path = tmp_path / "stop.ckpt"

    def save(outputs, batch, batch_idx, module=first, own=first.on_train_batch_end):
        own(outputs, batch, batch_idx)
        done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        if done == stop and not path.exists():
            trainer.save_checkpoint(path)

    first.on_train_batch_end = save
    trainer.fit(first, datamodule=TinyData())
    second = make()
    tiny_trainer(tmp_path).fit(second, datamodule=TinyData(), ckpt_path=str(path))
    assert second.losses_seen == whole.losses_seen[stop:]


def test_a_checkpoint_loads_with_weights_only_and_rebuilds_the_objective(tmp_path):
    model = make(optimization=Optimization(lr=0.02, betas=(0.8, 0.9)))
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(model, datamodule=TinyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["hyper_parameters"]["optimization"]["betas"] == [0.8, 0.9]
    again = TinyObjective.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.optimization == model.optimization
    torch.testing.assert_close(again.state_dict(), model.state_dict())


def test_resuming_with_other_arguments_is_refused_with_every_difference(tmp_path):
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(make(), datamodule=TinyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = make(temperature=0.5, optimization={"lr": 0.5}, execution={"allow_accumulation": True})
    with pytest.raises(ConfigError) as error:
        tiny_trainer(tmp_path).fit(other, datamodule=TinyData(), ckpt_path=tmp_path / "a.ckpt")
    text = str(error.value)
    assert "temperature: checkpoint 0.2, configuration 0.5" in text
    assert "optimization.lr: checkpoint 0.01, configuration 0.5" in text
    assert "execution.allow_accumulation: checkpoint" not in text


def test_an_argument_newer_than_the_checkpoint_counts_as_its_default(tmp_path):
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(make(), datamodule=TinyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del content["hyper_parameters"]["temperature"]
    torch.save(content, tmp_path / "old.ckpt")
    tiny_trainer(tmp_path).fit(make(), datamodule=TinyData(), ckpt_path=tmp_path / "old.ckpt")
    with pytest.raises(ConfigError, match=r"temperature: checkpoint '\(not there\)'"):
        tiny_trainer(tmp_path).fit(
            make(temperature=0.4), datamodule=TinyData(), ckpt_path=tmp_path / "old.ckpt"
        )


def test_weight_decay_spares_biases_norms_and_tokens():
    model = make()
    model.backbone.mask_token = torch.nn.Parameter(torch.zeros(1, 1, 8))
    model.norm = torch.nn.LayerNorm(8)
    decayed, free = model.configure_optimizers()["optimizer"].param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "backbone.layers.s1.weight",
        "backbone.layers.s2.weight",
    }
    assert decayed["weight_decay"] == 0.05 and free["weight_decay"] == 0
    assert "backbone.mask_token" in {names[id(p)] for p in free["params"]}
    assert len(free["params"]) == 5


def test_rate_rises_then_falls_per_optimiser_step(tmp_path):
    model = make(optimization={"lr": 1.0, "warmup_steps": 2, "final_lr_fraction": 0.1})
    rates = []
    step = model.optimizer_step

    def record(*args, **kwargs):
        rates.append(model.trainer.optimizers[0].param_groups[0]["lr"])
        step(*args, **kwargs)

    model.optimizer_step = record
    tiny_trainer(tmp_path, max_epochs=3, accumulate_grad_batches=2).fit(
        _allowed(model), datamodule=TinyData(items=24)
    )
    # 3 batches per epoch in pairs: 2 steps per epoch, 6 in all
    expected = [0.5, 1.0] + [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert rates == pytest.approx(expected)


def _allowed(model):
    model.execution = Execution(allow_accumulation=True)
    return model


def test_accumulation_is_refused_for_a_contrastive_method_unless_allowed(tmp_path, caplog):
    with pytest.raises(ConfigError, match="contrastive batch is 1/4 of global_batch_size"):
        tiny_trainer(tmp_path, accumulate_grad_batches=4).fit(make(), datamodule=TinyData())
    tiny_trainer(tmp_path, accumulate_grad_batches=4).fit(
        make(execution={"allow_accumulation": True}), datamodule=TinyData()
    )
    assert "contrastive batch is 1/4" in caplog.text


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_true_half_precision_is_refused_with_the_reason(tmp_path, precision):
    with pytest.raises(ConfigError, match="rounds digital numbers"):
        tiny_trainer(tmp_path, precision=precision).fit(make(), datamodule=TinyData())


def test_bf16_mixed_trains(tmp_path):
    model = make()
    tiny_trainer(tmp_path, precision="bf16-mixed").fit(model, datamodule=TinyData())
    assert all(math.isfinite(loss) for loss in model.losses_seen)


def test_a_run_of_unknown_length_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"Set trainer\.max_steps"):
        tiny_trainer(tmp_path, max_epochs=-1).fit(make(), datamodule=TinyData())


def test_another_context_size_than_the_data_have_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="context_size is 96"):
        tiny_trainer(tmp_path).fit(make(context_size=96), datamodule=TinyData())


@pytest.mark.parametrize(
    ("found", "asked", "is_same"),
    [
        ((96, 96, 32), (96, 96, 32), True),
        ((96, 96, 32), [96, 96, 32], True),
        ((96, 96, 32), (32, 32, 96), False),
        ((96, 96, 32), (96, 96), False),
        ((64, 64), 64, True),
        (64, (64, 64, 64), True),
        ((64, 32), 64, False),
    ],
)
def test_sizes_are_compared_axis_by_axis_in_order(tmp_path, found, asked, is_same):
    data = TinyData()
    data.context_size = found
    outcome = nullcontext() if is_same else pytest.raises(ConfigError, match="context_size")
    with outcome:
        tiny_trainer(tmp_path).fit(make(context_size=asked), datamodule=data)


def test_modalities_that_differ_from_the_data_are_refused(tmp_path):
    data = TinyData()
    data.modalities = {
        **data.modalities,
        "s2": data.modalities["s2"].of(
            {**data.modalities["s2"].to_dict(), "channels": ("B02", "B04", "B03")}
        ),
    }
    with pytest.raises(DomainSSLError, match="another order"):
        tiny_trainer(tmp_path).fit(make(), datamodule=data)


def test_after_step_follows_optimiser_steps_not_batches(tmp_path):
    model = make(execution={"allow_accumulation": True})
    tiny_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2).fit(
        model, datamodule=TinyData()
    )
    assert len(model.losses_seen) == 4
    assert model.steps_followed == 2


def _poison(at):
    def edit(batch, index):
        if index == at:
            batch["poison"] = torch.tensor(float("nan"))
        return batch

    return edit


class Unguarded(TinyObjective):
    """Meets a NaN in one of its terms."""

    def forward(self, batch, draws, outputs=False):
        step = super().forward(batch, draws, outputs)
        step.losses["contrast"] = step.losses["contrast"] + batch.get("poison", 0)
        return step


def test_a_loss_that_is_not_finite_names_term_batch_and_ids(tmp_path):
    model = Unguarded(tiny_modalities())
    trainer = tiny_trainer(tmp_path, log_every_n_steps=3)
    with pytest.raises(DomainSSLError) as error:
        trainer.fit(model, datamodule=TinyData(items=64, edit=_poison(1)))
    text = str(error.value)
    assert "loss 'contrast' in training batch 1" in text
    assert "1_008, 1_009" in text
    assert trainer.global_step == 3  # noticed at the logging interval, not before


def test_no_checkpoint_is_written_once_a_loss_was_not_finite(tmp_path):
    model = Unguarded(tiny_modalities())
    trainer = tiny_trainer(tmp_path, log_every_n_steps=1000)
    with pytest.raises(DomainSSLError, match="'contrast' in training batch 1"):
        original = model.on_train_batch_end

        def save(*args):
            original(*args)
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

        model.on_train_batch_end = save
        trainer.fit(model, datamodule=TinyData(edit=_poison(1)))
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ["1.ckpt"]


def test_no_checkpoint_is_written_with_a_weight_that_is_not_finite(tmp_path):
    model = make()
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(model, datamodule=TinyData())
    trainer.state.fn = "fit"
    with torch.no_grad():
        model.backbone.layers["s1"].weight[0, 0] = float("inf")
    with pytest.raises(DomainSSLError, match=r"1 weights, first backbone.layers.s1.weight"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


def test_weights_of_a_modality_absent_from_the_batch_stay_untouched(tmp_path):
    def drop(batch, index):
        if index == 3:
            batch["s1.present"] = torch.zeros(len(batch["s1"]), dtype=torch.bool)
        return batch

    model = make(optimization={"lr": 0.01, "weight_decay": 0.5, "warmup_steps": 0})
    weights = []
    own = model.on_train_batch_end

    def record(*args):
        own(*args)
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})

    model.on_train_batch_end = record
    tiny_trainer(tmp_path, max_epochs=2).fit(model, datamodule=TinyData(edit=drop))
    before, after, later = weights[2], weights[3], weights[4]
    name = "backbone.layers.s1.weight"
    torch.testing.assert_close(before[name], after[name], rtol=0, atol=0)
    assert not torch.equal(after[name], later[name])
    assert not torch.equal(before["backbone.layers.s2.weight"], after["backbone.layers.s2.weight"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1}, "optimization.lr: got -1"),
        ({"betas": [0.9]}, r"optimization.betas: got \(0.9,\)"),
        ({"learning_rate": 1}, "Optimization has no field 'learning_rate'.* It has lr, "),
        ({"weight_deca": 1}, "Did you mean 'weight_decay'"),
    ],
)
def test_optimization_refuses_what_it_cannot_use(options, text):
    with pytest.raises(ConfigError, match=text):
        make(optimization=options)


def test_predict_returns_the_features_of_the_backbone(tmp_path):
    model, data = make(), TinyData()
    data.predict_dataloader = data.val_dataloader
    found = tiny_trainer(tmp_path).predict(model, datamodule=data)
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        torch.testing.assert_close(found[0].pooled, model.backbone(batch).pooled)
