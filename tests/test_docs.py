"""README and docs: links lead somewhere, commands name scripts and flags that there are, nothing is left to fill in."""

from __future__ import annotations

import re
import shlex
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
