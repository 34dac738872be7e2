"""A fine-tuned model is exported and loaded as one thing, with its classes."""

from __future__ import annotations

import json

import pytest
import torch
from small_tasks import CLASSES, backbone, batch, task

import domainssl
from domainssl.errors import WeightsError
from domainssl.tasks import Tuning, whole_task


@pytest.mark.parametrize("mode", ["full", "frozen", "lora"])
def test_an_export_predicts_what_the_task_did(tmp_path, mode):
    kept = task(tuning=Tuning(mode=mode))
    for name, parameter in kept.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    kept.eval()
    before = torch.random.get_rng_state()
    card = domainssl.export_task(kept, tmp_path / "out", licence="MIT")
    loaded = domainssl.load_task(tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not loaded.training and loaded.classes == CLASSES
    torch.testing.assert_close(loaded.logits(batch()), kept.logits(batch()))
    facts = json.loads(card.read_text())
    assert facts["classes"] == list(CLASSES) and facts["kind"] == "classification"
    assert facts["licence"] == "MIT" and facts["provenance"]["tuning"]["mode"] == mode
    assert facts["modalities"]["he"]["mean"] == [128.0] * 3
    assert loaded.tuning.mode == "full" and not hasattr(kept.backbone.embed, "lora_A")
    with pytest.raises(WeightsError, match="exists already; pass overwrite=True"):
        domainssl.export_task(kept, tmp_path / "out")
    again = domainssl.export_task(loaded, tmp_path / "again")
    torch.testing.assert_close(domainssl.load_task(again).logits(batch()), kept.logits(batch()))


def test_a_damaged_or_missing_export_is_refused(tmp_path):
    domainssl.export_task(task(), tmp_path / "out")
    tensors = tmp_path / "out" / "task.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    with pytest.raises(WeightsError, match="damaged or of another export"):
        domainssl.load_task(tmp_path / "out")
    domainssl.export_backbone(backbone(), tmp_path / "backbone")
    with pytest.raises(WeightsError, match="There is a backbone, which predicts nothing"):
        domainssl.load_task(tmp_path / "backbone")
    domainssl.export_task(task(), tmp_path / "run" / "task")
    for place in (tmp_path / "run", tmp_path / "run" / "task"):
        with pytest.raises(WeightsError, match=r"lies a task.*load_task\('.*run/task'\).*predict"):
            domainssl.load_backbone(place)
    with pytest.raises(WeightsError, match="'runs/nothere' does not exist") as caught:
        domainssl.load_backbone("runs/nothere")
    assert "croma_base" not in str(caught.value)
    card = tmp_path / "out" / "task.json"
    facts = json.loads(card.read_text())
    card.write_text(json.dumps({**facts, "classes": "a"}))
    with pytest.raises(WeightsError, match="'classes' is a str, expected a list"):
        domainssl.load_task(tmp_path / "out")
    domainssl.export_task(task(), tmp_path / "out", overwrite=True)
    facts = json.loads(card.read_text())
    card.write_text(json.dumps({**facts, "name": "os.ClassificationTask"}))
    with pytest.raises(WeightsError, match="no task 'os.ClassificationTask'"):
        domainssl.load_task(tmp_path / "out")


def test_a_copy_is_made_without_a_trace_in_the_original():
    kept = task(tuning=Tuning(mode="lora"))
    names = set(kept.state_dict())
    whole = whole_task(kept)
    assert set(kept.state_dict()) == names and any("lora_A" in name for name in names)
    assert not any("lora_" in name for name in whole.state_dict())
