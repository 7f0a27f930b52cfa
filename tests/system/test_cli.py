import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from flowturbo.system import cli
from flowturbo.system.options import option


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        (["--vae_ckpt", "vae_ema"], ["--vae-ckpt", "vae_ema"]),
        (["--a_b=c_d=e_f"], ["--a-b=c_d=e_f"]),
        (["--data-path", "my_data/x_1", "-o", "a_b"], ["--data-path", "my_data/x_1", "-o", "a_b"]),
        ([], []),
    ],
)
def test_flags_may_be_spelled_with_underscores_and_values_are_kept(given, spelled):
    assert cli.hyphenate(given) == spelled


def test_without_arguments_the_command_lines_are_taken(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--a_b", "c_d"])
    assert cli.hyphenate(None) == ["--a-b", "c_d"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--schedul", "H8"], "unrecognized arguments: --schedul H8; did you mean --schedule?"),
        (["--shedule=H8"], "did you mean --schedule?"),
        (["--sched", "H8"], "unrecognized arguments"),  # no abbreviations
        (["--xyzzy"], "unrecognized arguments: --xyzzy (see"),
        (["--count", "many"], "argument --count: invalid int value: 'many'"),
        (["--kind", "c"], "invalid choice"),
        (["--schedule"], "expected one argument"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_2(argv, message, capsys):
    parser = cli.new_parser("A script.")
    parser.add_argument("--schedule", default="H1P5R3", help="blocks")
    parser.add_argument("--count", type=int)
    parser.add_argument("--kind", choices=("a", "b"))
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_help_keeps_line_breaks_and_shows_defaults_worth_showing(capsys):
    parser = cli.new_parser("First.\n\nUsage:\n  a b", "last\n  line")
    parser.add_argument("--schedule", default="H1P5R3", help="blocks")
    parser.add_argument("--out", help="a file")
    parser.add_argument("--fast", action="store_true", help="quick")
    parser.add_argument("--warmup", type=int, default=0, help="updates")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "Usage:\n  a b" in text
    assert "last\n  line" in text
    assert "blocks (default: H1P5R3)" in text
    assert "updates (default: 0)" in text
    assert text.count("(default") == 2


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b\n\nc"), "a b c"),
        (ValueError(), "ValueError"),
        (OSError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
        (
            ValueError(
                "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                "  File \"a.py\", line 1\nValueError: cannot read image 'x: y.png': broken\n"
            ),
            "cannot read image 'x: y.png': broken",
        ),
    ],
)
def test_an_error_is_told_on_one_line(error, line):
    assert cli.one_line(error) == line


SCRIPT = """
import sys
from flowturbo.system import cli
class CannotCompile(ValueError): pass
ERRORS = {
    "value": ValueError("what was got\\nand what is expected"), "os": OSError("cannot write 'x'"),
    "diverged": FloatingPointError("step 3: nan"), "defect": KeyError("ours"), "interrupt": KeyboardInterrupt(),
    "advice": CannotCompile("a compiler is missing"),
}
def main():
    print("before")
    if sys.argv[1] != "nothing":
        raise ERRORS[sys.argv[1]]
cli.run_script(main)
"""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        ("nothing", 0, ""),
        ("value", 2, "script.py: error: what was got and what is expected\n"),
        ("os", 2, "script.py: error: cannot write 'x'\n"),
        ("advice", 2, "script.py: error: a compiler is missing; go on without --compile\n"),
        ("diverged", 1, "script.py: error: step 3: nan\n"),
        ("interrupt", 130, "script.py: interrupted\n"),
    ],
)
def test_mistakes_end_a_script_with_a_line_and_a_code(python, tmp_path, error, code, text):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = python(tmp_path / "script.py", error)
    assert (done.returncode, done.stdout, done.stderr) == (code, "before\n", text)


def test_defects_of_ours_and_whoever_asks_get_a_traceback(python, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = python(tmp_path / "script.py", "defect")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    done = python(tmp_path / "script.py", "value", FLOWTURBO_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_other_ranks_say_who_they_are(python, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    assert python(tmp_path / "script.py", "os", RANK="3").stderr.startswith("[rank 3] script.py: error: cannot write")


def told(tmp_path, rank):
    """Whether a rank would tell "a mistake"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        with cli.first_to_tell("a mistake") as first:
            return first


def test_a_mistake_of_every_rank_is_told_by_the_first(tmp_path):
    assert [told(tmp_path, rank) for rank in range(3)] == [True, False, False]
    assert told(tmp_path / "another run", 0)
    with cli.first_to_tell("another mistake") as first:
        assert first


def test_without_a_place_to_note_it_every_rank_tells(tmp_path):
    assert [told(tmp_path / "missing" / "folder", rank) for rank in range(2)] == [True, True]


def test_a_rank_that_ends_while_it_tells_leaves_it_to_the_next(python, tmp_path):
    code = "import os; from flowturbo.system import cli\nwith cli.first_to_tell('a mistake'): os._exit(0)"
    python("-c", code, TORCHELASTIC_ERROR_FILE=str(tmp_path / "0" / "error.json"))
    assert any(tmp_path.iterdir())
    assert [told(tmp_path, rank) for rank in (1, 2)] == [True, False]


@dataclass(frozen=True)
class Shape:
    width: int = option(1, "how wide")
    height: int = option(2, "how high")


PRESETS = cli.Presets("kind", "a ready shape", {"flat": {"width": 9, "depth": 3}, "tall": {"height": 9}})


@pytest.mark.parametrize(
    ("argv", "shape"),
    [
        ([], Shape(1, 5)),
        (["--kind", "flat"], Shape(9, 5)),
        (["--width", "4", "--kind", "flat"], Shape(4, 5)),
        (["--kind", "tall"], Shape(1, 9)),
    ],
    ids=str,
)
def test_presets_set_defaults_and_what_is_given_goes_before(argv, shape):
    assert cli.parse(cli.new_parser(""), argv, {"shape": Shape}, PRESETS, height=5) == [shape]


def test_an_unknown_preset_is_one_line(capsys):
    with pytest.raises(SystemExit):
        cli.parse(cli.new_parser(""), ["--kind", "round"], {"shape": Shape}, PRESETS)
    assert "invalid choice: 'round' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"1 \xb1 2 \u2192 3"), ("latin-1", r"1 ± 2 \u2192 3")])
def test_what_an_encoding_lacks_is_escaped(encoding, shown):
    code = "from flowturbo.system.cli import run_script; run_script(lambda: print('1 \xb1 2 \u2192 3'))"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.decode(encoding).strip(), done.stderr) == (0, shown, b"")


def test_control_characters_of_a_files_name_are_escaped():
    assert cli.one_line(ValueError("no such file: '\x1b[2J'\n\x07")) == r"no such file: '\x1b[2J' \x07"
