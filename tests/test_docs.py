"""README and docs: links lead somewhere, commands name what there is and run, nothing is left to fill in.

A command that no test runs says why, in a comment behind it or at the head of its block: `# needs a GPU`,
`# needs the network`, `# needs public weights`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request):
    return request.param


def test_links_and_pictures_are_there(page):
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


def test_nothing_is_left_to_fill_in(page):
    """A page is written round names in capitals that figures take the place of."""
    assert re.findall(r"^[A-Z0-9]{4,}$", page.read_text(encoding="utf-8"), flags=re.M) == []


def commands(text):
    """(script, arguments) of every command of ours in fenced shell blocks."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = shlex.split(line, comments=True)
            for k, word in enumerate(words):
                if re.fullmatch(r"[a-z_0-9]+\.py", word):
                    end = next((j for j in range(k, len(words)) if words[j] in ("&&", "|", ";", ">")), len(words))
                    yield word, words[k + 1 : end]


@pytest.fixture(scope="module")
def known(python):
    """known(script, *subcommand) -> the flags in its help."""

    @cache
    def flags(script, *subcommand):
        done = python(script, *subcommand, "--help", COLUMNS="200")
        assert done.returncode == 0, done.stderr
        return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", done.stdout))

    return flags


def test_commands_name_scripts_and_flags_that_there_are(page, known):
    for script, arguments in commands(page.read_text(encoding="utf-8")):
        assert (ROOT / script).is_file() or script.startswith("my_"), script
        words = [word for word in arguments[:1] if re.fullmatch("[a-z]+", word)]
        try:
            flags = known(script, *words)
        except AssertionError:  # the word is no subcommand
            flags = known(script)
        given = {word.partition("=")[0].replace("_", "-") for word in arguments if re.match("--[a-z]", word)}
        assert given <= flags | {"--help"}, (script, given - flags)


def test_the_commands_are_found():
    """The test above would pass if it found none."""
    found = [script for page in PAGES for script, _ in commands(page.read_text(encoding="utf-8"))]
    assert len(found) > 40
    assert {"sample.py", "train.py", "evaluator.py", "plan.py", "edit.py", "text_to_image.py"} <= set(found)


NEEDS = re.compile(r"#.*\bneeds (a GPU|the network|public weights)\b")
ELSEWHERE = {  # what runs the commands that the test below leaves alone, by how they begin
    "make demo": "tests/test_demo.py",
    "make test": ".ci/run",
    "make check": ".ci/run",
    "make docs": "tests/test_site.py",
    "python -m pytest": ".ci/run",
    "source .venv/bin/activate": "Makefile",
    "python web.py": "tests/web/test_launch.py",
    "python benchmark.py": "tests/benchmarks/test_benchmark.py",
}
SHORTER = {  # flags that are put behind those of a page, so that a command is run in seconds
    "sample.py": ["--num-images", "2"],
    "sample_ddp_feature.py": ["--num-fid-samples", "8", "--per-proc-batch-size", "4"],
    "train.py": ["--steps", "2", "--num-workers", "0", "--global-batch-size", "4", "--sample-every", "0"],
    "train.py --recipe endpoint": ["--trajectories", "64", "--reference", "M2"],
    "train.py --target predictor": ["--hidden-size", "32", "--depth", "2", "--num-heads", "4"],
    "plan.py": ["--num-images", "16", "--batch-size", "4"],
    "examples/refiner_for_your_model.py": ["--trajectories", "64", "--steps", "2"],
    "plan.py search": ["--steps", "2", "--trajectories", "8", "--test-trajectories", "8", "--batch-size", "4"],
}


def lines(text):
    """(command, whether it is marked as one that no test runs) of every line of the fenced shell blocks."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S):
        first = block.splitlines()[0]
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if line and not line.startswith("#"):
                marked = bool(NEEDS.search(line)) or (first.startswith("#") and bool(NEEDS.search(first)))
                yield shlex.join(shlex.split(line, comments=True)), marked


def shortened(command):
    """The command with flags that make it short."""
    words = shlex.split(command)
    for key, flags in SHORTER.items():
        script, *given = key.split()
        if script in words and all(word in words for word in given):
            if script == "plan.py" and not given and "search" in words:
                continue
            words += flags
    return words


def to_run(page):
    """The commands that the test below runs."""
    found = [command for command, marked in lines(page.read_text(encoding="utf-8")) if not marked]
    return [command for command in found if not command.startswith(tuple(ELSEWHERE))]


@pytest.fixture
def run(tmp_path):
    """run(command) -> its exit status and what it said, in a folder with pictures of pets."""
    place = tmp_path / "work"
    place.mkdir()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").symlink_to(sys.executable)
    paths = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    away = {"FLOWTURBO_OFFLINE": "1", "FLOWTURBO_CACHE": str(tmp_path / "cache")}

    def execute(command):
        words = [
            str(ROOT / word) if (ROOT / word).is_file() and "/" not in word else word for word in shortened(command)
        ]
        words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
        words[0] = sys.executable if words[0] == "python" else words[0]
        return subprocess.run(
            words, cwd=place, env={**os.environ, **paths, **away}, capture_output=True, text=True, timeout=600
        )

    execute.place = place
    return execute


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run_one_after_the_other(page, run, class_folder):
    class_folder(run.place / "pets", classes=2, images=8, size=(40, 32))
    for command in to_run(page):
        done = run(command)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        assert "Traceback" not in done.stderr, command


def test_commands_are_run_or_say_why_not():
    """The test above would pass if it found none; what runs elsewhere names a file that there is."""
    runs = {page.name: to_run(page) for page in PAGES}
    assert sum(map(len, runs.values())) >= 15
    assert {"colour-model.md", "recipes.md", "refiners.md", "sampling.md", "planning.md"} <= {
        n for n, c in runs.items() if c
    }
    assert all((ROOT / place).is_file() for place in ELSEWHERE.values())
    every = [command for page in PAGES for command, _ in lines(page.read_text(encoding="utf-8"))]
    assert all(any(command.startswith(start) for command in every) for start in ELSEWHERE)
    for page in PAGES:
        for command, marked in lines(page.read_text(encoding="utf-8")):
            words = shlex.split(command)
            if not marked and "sample.py" in words:  # what it would sample without these is to be downloaded
                assert {"--model", "--predictor-ckpt"} & set(words), (page.name, command)
