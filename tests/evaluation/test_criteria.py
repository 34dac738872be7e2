"""The criteria of learning: what they judge, where the bounds lie, and what they refuse."""

from __future__ import annotations

import math

import pytest

from domainssl.errors import DataError
from domainssl.evaluation.criteria import learning_criteria


def metrics(**changes: float) -> dict[str, float]:
    """Metrics of a run with two modalities that meets every criterion exactly."""
    found = {}
    for name in ("s1", "s2", "joint"):
        found[f"val/probe/{name}"] = 0.55
        found[f"val/untrained/probe/{name}"] = 0.5
        found[f"val/raw/probe/{name}"] = 0.54
    found |= {f"val/retrieval/{pair}/R@1": 10 / 64 for pair in ("s1-s2", "s2-s1")}
    return found | changes


def missed(found: dict[str, float], contrastive: bool = True) -> list[str]:
    return [c.name for c in learning_criteria(found, 64, contrastive) if not c.passed]


def test_a_run_on_the_bounds_meets_them_all():
    assert missed(metrics()) == []
    assert len(learning_criteria(metrics(), 64, contrastive=True)) == 8
    assert len(learning_criteria(metrics(), 64, contrastive=False)) == 6


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"val/probe/s1": 0.549}, "probe of s1 over untrained + 0.05"),
        ({"val/untrained/probe/joint": 0.51}, "probe of joint over untrained + 0.05"),
        ({"val/raw/probe/s2": 0.55}, "probe of s2 over raw statistics"),
        ({"val/retrieval/s2-s1/R@1": 9 / 64}, "R@1 of s2-s1 over 10 times chance"),
        ({"val/retrieval/s2-s1/R@1": math.nan}, "R@1 of s2-s1 over 10 times chance"),
    ],
)
def test_each_sentence_fails_by_itself(change, name):
    assert missed(metrics(**change)) == [name]


def test_retrieval_is_not_asked_of_methods_that_do_not_compare_modalities():
    assert missed(metrics(**{"val/retrieval/s2-s1/R@1": 0.0}), contrastive=False) == []


def test_a_probe_that_is_not_a_number_fails_both_of_its_sentences():
    assert len(missed(metrics(**{"val/probe/s1": math.nan}))) == 2


def test_subsets_in_between_are_not_judged():
    poor = {f"val/{s}probe/s1+s2": v for s, v in (("", 0.1), ("untrained/", 0.9), ("raw/", 0.9))}
    assert missed(metrics(**poor)) == []


def test_a_criterion_says_what_it_found_and_needed():
    first = learning_criteria(metrics(**{"val/probe/s1": 0.5}), 64, contrastive=False)[0]
    assert str(first) == "probe of s1 over untrained + 0.05: 0.500, needed at least 0.550, missed"


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("val/probe/", r"no val/probe/<modality>"),
        ("val/untrained/", r"no 'val/untrained/probe/s1'"),
        ("val/raw/", r"no 'val/raw/probe/s1'"),
        ("val/retrieval/", r"logs no val/retrieval/"),
    ],
)
def test_metrics_that_are_missing_are_refused_not_passed(without, said):
    found = {k: v for k, v in metrics().items() if not k.startswith(without)}
    with pytest.raises(DataError, match=said):
        learning_criteria(found, 64, contrastive=True)


def test_no_held_out_items_are_refused():
    with pytest.raises(DataError, match="got 0 held-out items"):
        learning_criteria(metrics(), 0, contrastive=True)


def test_a_method_with_a_teacher_keeps_half_of_the_untrained_rank():
    ranks = {f"val/rankme/{n}": 5.0 for n in ("s1", "s2", "joint")}
    ranks |= {f"val/untrained/rankme/{n}": 10.0 for n in ("s1", "s2", "joint")}
    judged = learning_criteria(metrics(**ranks), 64, contrastive=False, self_distilling=True)
    assert len(judged) == 9 and all(c.passed for c in judged)
    ranks["val/rankme/s2"] = 4.9
    judged = learning_criteria(metrics(**ranks), 64, contrastive=False, self_distilling=True)
    assert [c.name for c in judged if not c.passed] == ["effective rank of s2 over half"]


def test_retrieval_is_not_asked_where_there_is_one_modality():
    found = {"val/probe/ct": 0.6, "val/untrained/probe/ct": 0.5, "val/raw/probe/ct": 0.5}
    assert missed(found) == [] and len(learning_criteria(found, 64, contrastive=True)) == 2
