"""YAML is read as plain data with places."""

import pytest

from domainssl.cli.config.nodes import ConfigMistakes, Mistake, Where, dump, parse


def read(text):
    mistakes = []
    tree = parse(text, "x.yaml", mistakes)
    return tree, mistakes


def test_numbers_and_booleans_follow_yaml_1_2():
    tree, mistakes = read("a: 1e-4\nb: no\nc: true\nd: 2020-01-01\ne: 010\nf: 0x10\ng: 1_000\nh:")
    assert mistakes == []
    assert tree.plain() == {
        "a": 1e-4,
        "b": "no",
        "c": True,
        "d": "2020-01-01",
        "e": "010",
        "f": 16,
        "g": 1000,
        "h": None,
    }


def test_what_is_dumped_reads_back_unchanged():
    data = {"a": "1e-4", "b": "no", "c": "true", "d": 1e-05, "e": [1, [2.5, None]], "f": "x: y"}
    tree, mistakes = read(dump(data))
    assert mistakes == [] and tree.plain() == data


def test_every_key_knows_its_line():
    tree, _ = read("a:\n  b: 1\n  c:\n    - 2\n")
    assert tree.get("a", "b").where == Where("x.yaml", 2)
    assert tree.get("a", "c").where.line == 3
    assert tree.get("a", "c").value[0].where.line == 4


def test_python_tags_are_refused_and_nothing_runs(tmp_path):
    target = tmp_path / "touched"
    _, mistakes = read(
        f"a: !!python/object/apply:os.mkdir ['{target}']\nb: !!python/name:os.system\n"
    )
    assert [m.where.line for m in mistakes] == [1, 2]
    assert "'!!python/object/apply:os.mkdir' is refused" in str(mistakes[0])
    assert "nothing was executed" in str(mistakes[0])
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\nb: 2", "Not valid YAML: while parsing a flow sequence, expected ',' or ']'"),
        ("a: 1\na: 2", "Key 'a' is written twice (x.yaml, line 2).\n  It stands already on line 1"),
        ("b: &x {c: 1}\na:\n  <<: *x", "YAML merge keys (<<) are not read (x.yaml, line 3)"),
        ("a: &x [*x]", "An alias contains itself"),
        ("a: !env HOME", "The YAML tag '!env' is refused (x.yaml, line 1)"),
        ("? [1, 2]\n: 3", "A key must be a plain word (x.yaml, line 1)"),
        ("a: !!int many", "'many' is not a number (x.yaml, line 1)"),
    ],
)
def test_what_yaml_can_say_and_a_configuration_cannot(text, expected):
    _, mistakes = read(text)
    assert len(mistakes) == 1
    assert str(mistakes[0]).startswith(expected)


def test_an_alias_bomb_is_refused():
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    _, mistakes = read("\n".join(lines))
    assert len(mistakes) == 1
    assert "unfolds to an enormous tree" in str(mistakes[0])


def test_mistakes_are_counted_and_listed_once():
    mistake = Mistake("Unknown config key 'a'", Where("x.yaml", 3), " Did you mean 'b'?")
    text = str(ConfigMistakes([mistake, mistake]))
    assert text == (
        "1 mistake in the configuration; nothing was run.\n"
        "- Unknown config key 'a' (x.yaml, line 3).\n  Did you mean 'b'?"
    )
