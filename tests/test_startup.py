"""Help and mistakes answer at once: no script imports torch before its command line is parsed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
ARGUMENTS = ("--help", "--no-such-flag")

# All in one process, in which neither torch nor gradio can be imported. Prints a list of [exit code, what was printed].
PROBE = """
import contextlib, io, json, runpy, sys

class TooEarly(BaseException):
    pass

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "gradio"):
            raise TooEarly(name)

sys.meta_path.insert(0, Guard())
found = []
for script, *arguments in json.loads(sys.argv[1]):
    sys.argv = [script, *arguments]
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    except TooEarly as early:
        code = f"imports {early}"
    except Exception as error:
        code = repr(error)
    found.append([code, text.getvalue()])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers():
    """{(script, argument): [exit code, text]}."""
    calls = [(script, argument) for script in SCRIPTS for argument in ARGUMENTS]
    command = [sys.executable, "-c", PROBE, json.dumps(calls)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(zip(calls, json.loads(done.stdout)))


def test_the_originals_scripts_are_there():
    assert {"train.py", "sample.py", "sample_ddp_feature.py", "evaluator.py", "download.py", "export.py"} <= set(
        SCRIPTS
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_torch(answers, script):
    code, text = answers[script, "--help"]
    assert code == 0
    assert text.startswith(f"usage: {script}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistyped_flag_is_one_line_and_needs_no_torch(answers, script):
    code, text = answers[script, "--no-such-flag"]
    assert code == 2
    assert text.startswith(f"{script}: error: ")
    assert text.count("\n") == 1
