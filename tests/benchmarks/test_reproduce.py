"""The paper's table anew, end to end: a small model from a local server, real scripts, stopped and gone on with."""

import json
import threading

import numpy as np
import pytest
import torch

import benchmark
from benchmarks import reproduce
from benchmarks.options import ReproduceOptions
from flowturbo.sampling.sample_folder import read_archive
from flowturbo.system import cli
from flowturbo.system.claims import OtherSettings
from flowturbo.weights.fetch import Terms
from flowturbo.weights.registry import PACKAGED, Asset, RemoteFile

FILES = {"digits-predictor.pt": "p.pt", "digits-refiner.safetensors": "r.safetensors"}


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """The digits model and a reference of noise on a local server: their registry, and what was asked for."""
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    served, asked = tmp_path / "served", []
    served.mkdir()
    for file, name in FILES.items():
        (served / name).write_bytes((PACKAGED / file).read_bytes())
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(served / "noise.npz", arr_0=images)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(served))

        def log_message(self, *arguments):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLOWTURBO_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    url = f"http://127.0.0.1:{server.server_port}"
    names = [*FILES.values(), "noise.npz"]
    yield {name: Asset("small", "MIT", (RemoteFile(name, (f"{url}/{name}",)),)) for name in names}, asked
    server.shutdown()
    server.server_close()


def options(tmp_path, **changes):
    given = {
        **{"num_samples": 12, "schedules": ("H2", "H1R1"), "extractors": ("pixels",), "cfg_scale": 1.0},
        **{"predictor_ckpt": "p.pt", "refiner_ckpt": "r.safetensors", "vae_ckpt": "none", "reference": "noise.npz"},
        **{"results_dir": str(tmp_path / "out"), "batch_size": 6, "repeats": 1, "compile": False, "device": "cpu"},
    }
    return ReproduceOptions(**{**given, **changes})


@pytest.mark.slow
def test_the_table_end_to_end_stopped_and_gone_on_with(mirror, tmp_path, monkeypatch, capsys):
    assets, asked = mirror
    terms, script, ran = Terms(loopback=True, attempts=1), reproduce.script, []

    def stops(name, *arguments, **rest):
        if len(ran) == 4:  # the second row's samples are there, its evaluation is not
            raise cli.EndedEarly("stopped")
        ran.append(name)
        script(name, *arguments, **rest)

    monkeypatch.setattr(reproduce, "script", stops)
    with pytest.raises(cli.EndedEarly):
        reproduce.run(options(tmp_path), assets, terms)
    record = tmp_path / "out" / "reproduced.json"
    first = json.loads(record.read_text())["rows"]
    assert list(first) == ["H2"]
    assert first["H2"]["pixels"] > 0
    assert not (tmp_path / "out" / "samples" / "H2.npz").exists()  # measured: its images have gone
    assert len(read_archive(tmp_path / "out" / "samples" / "H1R1.npz")) == 12

    ran.clear()
    monkeypatch.setattr(reproduce, "script", lambda name, *a, **k: (ran.append(name), script(name, *a, **k)))
    results = reproduce.run(options(tmp_path), assets, terms)
    assert ran == ["sample_ddp_feature.py", "evaluator.py"]  # what was done is not done again
    assert results.rows["H2"]["pixels"] == first["H2"]["pixels"]
    assert all(row["ms"] > 0 and "ms_compiled" not in row for row in results.rows.values())
    assert sorted(asked) == sorted(set(asked))  # each file came once
    assert json.loads(record.read_text())["rows"] == results.rows
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line.split() for line in lines if line.startswith("H2 ")][-1:]
    assert row[1] == "-"  # nothing is published of it
    assert row[2] == f"{first['H2']['pixels']:.2f}"
    assert max(map(len, lines[-7:])) <= 120

    with pytest.raises(OtherSettings, match="num_samples 12, not 13"):
        reproduce.run(options(tmp_path, num_samples=13), assets, terms)


def test_a_script_that_fails_ends_it(tmp_path):
    with pytest.raises(cli.EndedEarly, match=r"evaluator\.py ended with exit code 2; what is done is kept"):
        reproduce.script("evaluator.py", str(tmp_path / "no.npz"), str(tmp_path / "no.npz"))


def test_published_beside_measured(tmp_path):
    results = reproduce.Results(tmp_path / "x.json", {"num_samples": 50_000})
    results.add("H1P5R3", inception=3.95, dinov2=81.2, ms=7.123, ms_compiled=5.5)
    text = reproduce.table(results, ["H1P5R3", "A8"], ["inception", "dinov2"])
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith(("H1P5R3", "A8"))}
    assert rows == {"H1P5R3": ["3.93", "3.95", "81.20", "38.30", "7.12", "5.50"], "A8": ["-"] * 6}
    assert max(map(len, text.splitlines())) <= 120


def test_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr(reproduce, "run", seen.append)
    benchmark.main(["--reproduce", "--num_samples", "100", "--schedules", "H8", "--no-compile"])
    assert (seen[0].num_samples, seen[0].schedules, seen[0].compile) == (100, ("H8",), False)
    assert reproduce.ROWS[:2] == ("H8", "H11")
    for flags in (["--num-samples", "1"], ["--schedules", "R3"], ["--ranks", "0"]):
        with pytest.raises(ValueError):
            benchmark.main(["--reproduce", *flags])
    assert torch.is_grad_enabled()
