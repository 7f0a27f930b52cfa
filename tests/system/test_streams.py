"""Scripts whose readers have gone, whose terminal was closed, or whose output fills a disk."""

import os
import subprocess
import sys

import pytest

from flowturbo.training.stopping import EXIT_STOPPED

SCRIPT = """
import os, sys
from flowturbo.system import cli

def main():
    for _ in range(3000):
        print("a line of twenty-four bytes" , flush=True)
    print("on stderr", file=sys.stderr)
    with open("done.txt", "w") as file:
        file.write(str(file.fileno()))
    if "stop" in sys.argv:
        sys.exit(75)

cli.run_script(main, "result" in sys.argv)
"""


@pytest.fixture
def script(tmp_path):
    """script(*arguments, redirected, unbuffered) -> the finished process, in tmp_path."""

    def run(*arguments, redirected="", unbuffered=""):
        command = f'"{sys.executable}" -c "$SCRIPT" {" ".join(arguments)} {redirected}'
        place = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
        environment = {**os.environ, "SCRIPT": SCRIPT, "PYTHONPATH": place, "PYTHONUNBUFFERED": unbuffered}
        return subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "redirected",
    [
        *("| head -1; exit ${PIPESTATUS[0]}", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"),
        *(">/dev/full", ">/dev/full 2>/dev/full", "2>&1 | true; exit ${PIPESTATUS[0]}"),
    ],
)
def test_nothing_that_happens_to_the_output_ends_the_work(script, tmp_path, redirected, unbuffered):
    done = script(redirected=redirected, unbuffered=unbuffered)
    assert done.returncode == 0
    assert int((tmp_path / "done.txt").read_text()) > 2  # a closed descriptor would be that of the file
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    full = redirected == ">/dev/full"
    assert done.stderr.count("warning: cannot write stdout: [Errno 28] No space left on device") == full


def test_a_result_that_was_lost_is_a_failure(script):
    done = script("result", redirected=">/dev/full")
    assert done.returncode == 1
    assert done.stderr.endswith("error: cannot write stdout: [Errno 28] No space left on device\n")
    assert script("result", redirected="| head -1; exit ${PIPESTATUS[0]}").returncode == 0  # who read has read enough


def test_an_exit_code_stays(script):
    assert script("stop", redirected=">/dev/full").returncode == EXIT_STOPPED
