"""Compiled code kept across processes: whole, one machine's, and nobody else's."""

import os
import stat
import subprocess
import sys

import pytest

from flowturbo.networks import kept_code as module
from flowturbo.networks.kept_code import KeptCode, machine
from flowturbo.networks.kept_code import _usual_place as usual_place


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "compiled" / "here"


def write(folder, **files):
    for name, content in files.items():
        path = folder / "aa" / f"{name}.so"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def names(folder):
    return sorted(path.stem for path in folder.rglob("*.so"))


def test_what_was_recorded_is_there_for_the_next_process(folder):
    first = KeptCode(folder)
    write(folder, a="code", b="code")
    first.record()
    first.lock.close()
    second = KeptCode(folder)
    assert names(folder) == ["a", "b"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    second.lock.close()


def test_damaged_and_half_written_files_are_removed(folder):
    first = KeptCode(folder)
    write(folder, whole="code", cut="code", other="code")
    first.record()
    write(folder, unrecorded="of a process that was killed", cut="co", other="cude")
    first.lock.close()
    KeptCode(folder).lock.close()
    assert names(folder) == ["whole"]


@pytest.mark.parametrize("record", ["", "{}", '{"files": 3}', "no json"])
def test_with_a_damaged_record_all_is_compiled_anew(folder, record):
    first = KeptCode(folder)
    write(folder, a="code")
    first.lock.close()
    first.notes.write_text(record)
    KeptCode(folder).lock.close()
    assert names(folder) == []


def test_two_processes_at_once_disturb_each_other_in_nothing(folder):
    """Neither removes or records what the other is writing; who is alone at the end records all."""
    first = KeptCode(folder)
    write(folder, a="half of what the fir")
    second = KeptCode(folder)
    assert names(folder) == ["a"]
    second.record()
    assert not second.notes.exists()
    write(folder, a="half of what the first writes is now whole")
    first.record()
    first.lock.close()
    second.record()
    second.lock.close()
    KeptCode(folder).lock.close()
    assert names(folder) == ["a"]


def test_a_folder_that_has_grown_too_large_is_emptied(folder, monkeypatch):
    first = KeptCode(folder)
    write(folder, a="code")
    first.record()
    first.lock.close()
    monkeypatch.setattr(module, "LIMIT", 3)
    KeptCode(folder).lock.close()
    assert names(folder) == []


def test_a_folder_that_others_may_write_to_is_not_used(folder):
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write there"):
        KeptCode(folder)


def test_another_torch_or_processor_has_a_folder_of_its_own(monkeypatch):
    here = machine()
    assert here == machine()
    monkeypatch.setattr(module.torch, "__version__", "1.0")
    assert machine() != here
    monkeypatch.undo()
    monkeypatch.setattr(module.Path, "read_text", lambda self: "model name : another\nflags : avx")
    assert machine() != here


@pytest.mark.parametrize("place", ["cache", "own", "unusable"])
def test_where_a_process_compiles(tmp_path, place):
    """In the cache folder, unless the user has named another, or it cannot be written to."""
    cache = tmp_path / "cache"
    environment = {**os.environ, "FLOWTURBO_CACHE": str(cache), "PYTHONPATH": os.getcwd()}
    environment.pop(module.VARIABLE, None)
    if place == "own":
        environment[module.VARIABLE] = str(tmp_path / "own")
    if place == "unusable":
        cache.write_text("a file")
    code = (
        "import os\nfrom flowturbo.networks.compiled import kept_code\n"
        f"print(kept_code() is not None, os.environ.get({module.VARIABLE!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    used, _, where = done.stdout.strip().partition(" ")
    expected = {
        "cache": ("True", str(cache / "compiled" / machine())),
        "own": ("False", str(tmp_path / "own")),
        "unusable": ("False", usual_place()),
    }
    assert (used, where) == expected[place], done.stderr


SAMPLE = """
import sys, torch
from flowturbo.models import SiT
from flowturbo.networks.compiled import StaticGraphs
from flowturbo.transport import FlowTurbo
torch.manual_seed(0)
network = SiT(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=10).eval()
z, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
with torch.no_grad():
    for parameter in network.parameters():
        parameter.normal_(std=0.2)
    compiled, eager = (FlowTurbo(network, None, "H1", engine=engine).sample(z, y) for engine in (StaticGraphs, None))
print(float((compiled - eager).abs().max()))
"""


@pytest.mark.slow
def test_a_later_process_compiles_nothing_and_survives_damage(tmp_path):
    """With the real compiler: once, again, with damaged files, and two at once."""
    environment = {**os.environ, "FLOWTURBO_CACHE": str(tmp_path), "PYTHONPATH": os.getcwd()}
    environment.pop(module.VARIABLE)
    folder = tmp_path / "compiled" / machine()

    def start():
        return subprocess.Popen([sys.executable, "-c", SAMPLE], env=environment, stdout=subprocess.PIPE, text=True)

    def code():
        return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.so")}

    def finish(*processes):
        for process in processes:
            out, _ = process.communicate(timeout=300)
            assert process.returncode == 0
            assert float(out) < 1e-5

    finish(start())
    made = code()
    assert made
    finish(start())
    assert code() == made
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    finish(start(), start())
    assert code().keys() == made.keys()
    assert all(time != made[path] for path, time in code().items())
