"""Options of the verbs: written in full, and answered with the nearest name where misspelled."""

import importlib
from pathlib import Path

import pytest

from domainssl.cli import verb_table
from domainssl.cli.words import Parser
from domainssl.errors import ConfigError

LIGHTNING = ("fit", "validate", "test", "predict")


@pytest.fixture
def parser() -> Parser:
    made = Parser(prog="python -m domainssl paint", passes="--data.")
    made.add_argument("paths", nargs="+")
    made.add_argument("--colour", choices=("red", "green"))
    made.add_argument("--layers", type=int)
    return made


@pytest.mark.parametrize("verb", [v for v in verb_table() if v not in LIGHTNING])
def test_every_verb_answers_misspelled_and_shortened_options_alike(cli, verb):
    result = cli(verb, "--hlp")
    assert result.status == 2, result.text
    assert f"{verb}: there is no option '--hlp'. Did you mean '--help'?" in result.err
    assert f"See python -m domainssl {verb} --help." in result.err
    assert "there is no option '--hel'" in cli(verb, "--hel").err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("embed --outptu out", "embed: there is no option '--outptu'. Did you mean '--output'?"),
        ("inspect sample --jsn", "Did you mean '--json'?"),
        ("evaluate runs/x --sees=3", "Did you mean '--seeds'?"),
        ("tile slides --min-tisue=1", "Did you mean '--min_tissue'?"),
        ("embed x y --output=", "embed: --output: got '', expected a value that is not blank"),
        ("bags convert x --dtyp float32", "bags: there is no option '--dtyp'."),
        ("bags convrt", "invalid choice: 'convrt' (choose from"),
        ("bags convrt", "Did you mean 'convert'?"),
        ("cache lst", "Did you mean 'list'?"),
        ("export --checkpoint a --output b --format onxx", "Did you mean 'onnx'?"),
        ("predict task input", "the following arguments are required: --output."),
        ("doctor now", "doctor: 'now' is a word too many."),
        ("matrix --seeds many", "argument --seeds: invalid int value: 'many'."),
        ("inspect sample --data.root=x", "'--data.root=x' changes the data of a recipe"),
        ("cache list --data.root=x", "cache list: there is no option '--data.root'."),
        ("cache --data.root=x", "is for `cache build --config RECIPE`"),
        ("fit --config recipes/ssl4eo_croma.yaml --plann", "Did you mean '--plan'?"),
        ("fit --config recipes/ssl4eo_croma.yaml --plan=true", "Write --plan alone."),
        ("fit --confg recipes/ssl4eo_croma.yaml", "Did you mean 'config'?"),
        ("--versoin", "Did you mean '--version'?"),
    ],
)  # fmt: skip
def test_mistakes_in_words_get_one_message(cli, words, said):
    result = cli(*words.split())
    assert result.status == 2
    assert said in result.err and result.err.count("error:") == 1 and "Traceback" not in result.err


def test_options_of_data_are_handed_on_however_they_are_written(parser):
    words = ["a", "--data.root", "/x", "--layers", "-3", "--data.loading={workers: 0}"]
    options, more = parser.parse_known_args(words)
    assert (options.paths, options.layers) == (["a"], -3)
    assert more == ["--data.root=/x", "--data.loading={workers: 0}"]


def test_words_after_two_dashes_are_no_options(parser):
    assert parser.parse_args(["--", "--layrs"]).paths == ["--layrs"]


def test_an_option_of_another_parser_is_refused(parser):
    with pytest.raises(ConfigError, match=r"Options: --colour, --debug, --help, --layers, --data"):
        parser.parse_args(["a", "--size=3"])


def test_no_verb_has_a_parser_of_its_own():
    for verb in verb_table():
        module = importlib.import_module(f"domainssl.cli.verbs.{verb}")
        assert "ArgumentParser(" not in Path(module.__file__ or "").read_text()


@pytest.mark.parametrize("words", [["x", "--output", " "], ["x", "--output="], ["", "--output=a"]])
def test_blank_words_are_refused_where_nothing_else_was_the_default(parser, words):
    """`--output ""` wrote into the working directory."""
    parser.add_argument("--output")
    parser.add_argument("--group", default="")
    with pytest.raises(ConfigError, match=r"paint: .*got ' ?', expected a value that is not blank"):
        parser.parse_known_args(words)
    options, rest = parser.parse_known_args(["x", "--group", "", "--data.root", "", "--data.a="])
    assert options.group == "" and rest == ["--data.root=", "--data.a="]
