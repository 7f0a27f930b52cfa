from dataclasses import dataclass

import pytest

from flowturbo.system import cli
from flowturbo.system.options import flag_of, option, seed, words_of


@dataclass(frozen=True)
class Kind:
    """One of each kind of field."""

    names: tuple[str, ...] = option((), "what", positional=True, nargs="*", metavar="NAME")
    schedule: str = option("H8", "100 % blocks", flags=("-s",))
    steps: int | None = option(None, "how many")
    interval: tuple[float, float] = option((0.0, 1.0), "between")
    tags: tuple[str, ...] | None = option(None, "words")
    compile: bool = option(False, "faster")
    seed: int = option(0, "key", type=seed)
    found: int = 7  # no flag

    def __post_init__(self):
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps {self.steps} must be at least 1")


@dataclass(frozen=True)
class Needed:
    """Fields without a default."""

    run: str = option(help="which", positional=True)
    out: str = option(help="where", flags=("-o",))


def parse(*argv, kind=Kind, **defaults):
    (options,) = cli.parse(cli.new_parser("A script."), argv, {"what": kind}, **defaults)
    return options


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["a", "b"], {"names": ("a", "b")}),
        (["--compile", "a"], {"names": ("a",), "compile": True}),
        (["a", "--no-compile"], {"names": ("a",)}),
        (["-s", "H1"], {"schedule": "H1"}),
        (["--schedule=H1"], {"schedule": "H1"}),
        (["--interval", "0.5", "1"], {"interval": (0.5, 1.0)}),
        (["--tags", "x", "y", "--steps", "3"], {"tags": ("x", "y"), "steps": 3}),
        (["--seed", "18446744073709551615"], {"seed": 2**64 - 1}),
    ],
)
def test_a_command_line_becomes_a_value(argv, expected):
    options = parse(*argv)
    assert options == Kind(**expected)
    assert hash(options) == hash(Kind(**expected))


def test_a_script_may_have_other_defaults():
    assert parse(steps=4, names=("x",)) == Kind(steps=4, names=("x",))


def test_what_has_no_default_is_required(capsys):
    assert parse("r", "-o", "x", kind=Needed) == Needed("r", "x")
    for argv, missing in ((["r"], "--out"), (["-o", "x"], "run")):
        with pytest.raises(SystemExit) as stopped:
            parse(*argv, kind=Needed)
        assert stopped.value.code == 2
        assert f"required: {missing}" in capsys.readouterr().err


def test_help_has_every_field_with_a_flag_in_its_group(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "what:" in text
    assert "100 % blocks (default: H8)" in text
    assert "--compile, --no-compile" in text
    assert "found" not in text
    assert "()" not in text


@pytest.mark.parametrize("value", ["-1", "18446744073709551616", "x", "1.5"])
def test_a_seed_is_a_key_of_64_bits(value, capsys):
    with pytest.raises(SystemExit):
        parse(f"--seed={value}")
    assert "--seed" in capsys.readouterr().err


def test_impossible_values_are_told_by_the_name_of_the_field():
    with pytest.raises(ValueError, match="steps 0 must be at least 1"):
        parse("--steps", "0")
    assert flag_of("cfg_scale") == "--cfg-scale"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, []),
        ({"schedule": "M7", "steps": 3}, ["--schedule", "M7", "--steps", "3"]),
        ({"interval": (0.25, 1.0)}, ["--interval", "0.25", "1"]),
        ({"interval": (0.1234567891, 1.0)}, ["--interval", "0.1234567891", "1"]),
        ({"tags": ("a b", "c"), "compile": True}, ["--tags", "a b", "c", "--compile"]),
        ({"names": ("x", "y")}, ["x", "y"]),
        ({"seed": 2**64 - 1}, ["--seed", "18446744073709551615"]),
    ],
)
def test_options_become_the_words_that_give_them(given, words):
    options = Kind(**given)
    assert words_of(options) == words
    assert parse(*words) == options


def test_words_are_those_beside_other_defaults():
    assert words_of(Kind(steps=3), steps=3) == []
    assert words_of(Kind(), schedule=None) == ["--schedule", "H8"]
    assert words_of(Kind(), compile=True) == ["--no-compile"]
    assert words_of(Kind(), steps=3) == []  # no word says None
