"""Container, conda environment and extras name what there is. No image is built: that needs a Docker daemon."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KNOWN = {"ARG", "FROM", "ENV", "RUN", "COPY", "WORKDIR", "USER", "VOLUME", "EXPOSE", "CMD"}


def instructions():
    """(instruction, the rest) of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name, " ".join(rest.split())


def listed(pattern):
    """The tracked files that git finds for a pattern, whose star goes past slashes."""
    done = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def tracked(source):
    """The files of the repository that a COPY source names: there a star stops at a slash."""
    return [name for name in listed(source) if "/" not in name or "*" not in source]


def extras():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return {
        name: re.findall(r'"([^"]+)"', value)
        for name, value in re.findall(r"^([\w-]+) = \[(.*?)\]$", table, re.M | re.S)
    }


def kept_for_the_image(path):
    """Whether .dockerignore lets a file through: the last line that matches it or a folder of it decides."""
    places = [Path(path), *list(Path(path).parents)[:-1]]
    kept = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.lstrip("!")
        if pattern and not line.startswith("#") and any(matches(pattern, place) for place in places):
            kept = line.startswith("!")
    return kept


def matches(pattern, place):
    """As Docker has it: a star stops at a slash, and **/ stands for any folders."""
    if pattern.startswith("**/"):
        return fnmatch.fnmatch(place.name, pattern[3:])
    parts = pattern.split("/")
    return len(parts) == len(place.parts) and all(map(fnmatch.fnmatch, place.parts, parts))


def test_the_dockerfile_has_known_instructions_in_order():
    found = list(instructions())
    assert {name for name, _ in found} == KNOWN
    assert [name for name, _ in found[:2]] == ["ARG", "FROM"]
    assert found[0][1].partition("=")[0] == "BASE"
    assert found[1][1] == "${BASE}"
    names = [name for name, _ in found]
    assert names.index("USER") > max(k for k, name in enumerate(names) if name in ("RUN", "COPY"))
    for name, rest in found:
        if name == "RUN":
            assert subprocess.run(["sh", "-n", "-c", rest]).returncode == 0, rest
        if name == "CMD":
            assert all(isinstance(word, str) for word in json.loads(rest))


def test_what_the_dockerfile_copies_is_there_and_not_ignored():
    for name, rest in instructions():
        if name == "COPY":
            *sources, _ = rest.split()
            for source in sources:
                files = tracked(source)
                assert files, source
                assert all(map(kept_for_the_image, files)), source
    assert not kept_for_the_image("tests/test_docs.py")
    assert not kept_for_the_image("results/000-refiner/checkpoints/1.pt")
    assert not kept_for_the_image("secrets.txt")


def test_every_module_of_the_repository_is_in_the_image():
    """The scripts import one another's folders: what is a package here is copied."""
    copied = {source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]}
    used = {Path(name).parts[0] for name in listed("*/*.py")}
    assert used <= copied | {"tests", "docs"}
    assert "*.py" in copied


def test_the_image_starts_a_script_with_flags_that_it_has(python):
    (command,) = [json.loads(rest) for name, rest in instructions() if name == "CMD"]
    assert command[0] == "python"
    assert (ROOT / command[1]).is_file()
    known = python(command[1], "--help").stdout
    assert all(flag in known for flag in command if flag.startswith("--"))
    (port,) = [rest for name, rest in instructions() if name == "EXPOSE"]
    assert port == command[command.index("--port") + 1]


def test_build_arguments_of_the_page_are_the_dockerfiles():
    declared = {rest.partition("=")[0] for name, rest in instructions() if name == "ARG"}
    page = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    used = re.findall(r"--build-arg (\w+)=", page)
    assert set(used) == declared
    (port,) = re.findall(r"-p 127\.0\.0\.1:\d+:(\d+)", page)
    assert port in [rest for name, rest in instructions() if name == "EXPOSE"]
    mounted = set(re.findall(r"-v \$PWD/\w+:(/\w+)", page))
    (volumes,) = [json.loads(rest) for name, rest in instructions() if name == "VOLUME"]
    assert mounted <= set(volumes)


def named_extras(text):
    return {extra for group in re.findall(r"(?:\.|flowturbo)\[([\w,-]+)\]", text) for extra in group.split(",")}


@pytest.mark.parametrize(
    "file", ["Dockerfile", "environment.yml", "Makefile", "docs/installing.md", "docs/web.md", "CONTRIBUTING.md"]
)
def test_extras_that_are_named_are_there(file):
    named = named_extras((ROOT / file).read_text(encoding="utf-8"))
    assert named
    assert named <= extras().keys()


def test_extras_are_explained_and_the_tests_have_them_all():
    table = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs" / "installing.md").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(table) == sorted(extras())
    assert {"web", "t2i", "demo", "plot", "docs"} <= extras().keys()
    assert named_extras(" ".join(extras()["test"])) == extras().keys() - {"test", "demo-text"}


def test_conda_installs_as_make_does():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert "name: FlowTurbo" in text
    assert named_extras(text) == named_extras(
        (ROOT / "Makefile").read_text(encoding="utf-8").partition("$(READY): ")[2]
    )
    required = re.search(r'requires-python = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    assert f"python {required}" in text


def test_apt_is_told_yes_and_leaves_no_lists():
    (line,) = [rest for name, rest in instructions() if name == "RUN" and "apt-get" in rest]
    words = shlex.split(line)
    assert "--yes" in words
    assert "--no-install-recommends" in words
    assert words[-2:] == ["-rf", "/var/lib/apt/lists/*"]
