"""Solver files: written, read, found by name, and used wherever a schedule is."""

import json
import re

import pytest
import torch

import sample
import sample_ddp_feature
from flowturbo.sampling.solvers import (
    LearnedSolver,
    OtherSolver,
    check_made_for,
    parse_sampler,
    read_solver,
    write_solver,
)
from flowturbo.system.claims import OtherSettings
from flowturbo.system.files import sha256
from flowturbo.transport import FlowTurbo, Guidance
from flowturbo.transport.solver import Solver


def learned(schedule="A4", **about):
    solver = Solver.of(schedule)
    return LearnedSolver("any", solver.grid, solver.coefficients, **about)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, empty, with a solver called fast-4 in it."""
    monkeypatch.chdir(tmp_path)
    write_solver("solvers/fast-4.json", learned())
    return tmp_path


def test_what_is_written_is_read(tmp_path):
    about = {"guidance": Guidance(1.5, "all", (0.1, 0.9), 2), "model_sha256": "a" * 64}
    solver = learned("M5@shift2", **about, made={"by": "hand"}, error={"rmse": 0.1})
    write_solver(tmp_path / "m-5.json", solver)
    read = read_solver(tmp_path / "m-5.json")
    assert (read.name, read.grid, read.coefficients) == ("m-5", solver.grid, solver.coefficients)
    assert (read.guidance, read.model_sha256, read.made, read.error) == (*about.values(), {"by": "hand"}, {"rmse": 0.1})
    assert json.loads((tmp_path / "m-5.json").read_text())["evaluations"] == 6


@pytest.mark.parametrize("text", ["fast-4", "solvers/fast-4.json", "./solvers/../solvers/fast-4.json"])
def test_found_by_path_and_by_name(folder, text):
    spec = parse_sampler(text)
    assert (str(spec), spec.evaluations(), spec.needs_refiner) == ("fast-4", (4, 0), False)


def test_everything_else_is_what_it_was(folder):
    assert [str(parse_sampler(text)) for text in ("h1p5r3", "dopri5", "sde20", Solver.of("A2"))] == [
        *("H1P5R3", "dopri5", "sde20", "A2")
    ]


@pytest.mark.parametrize("text", ["fast-5", "../fast-4", "solvers/none.json", "Z9", "", "a\0b", "x" * 300, "."])
def test_what_is_no_solver_is_one_line(folder, text):
    with pytest.raises((ValueError, OSError)) as caught:
        parse_sampler(text)
    assert "\n" not in str(caught.value)


def test_the_message_names_both_ways(folder):
    with pytest.raises(ValueError, match=r"unknown|cannot read.*; or a solver: a \.json file, or its name in solvers/"):
        parse_sampler("fast-5")


@pytest.mark.parametrize("name", ["A6.json", "dopri5.json", "my solver.json", "x.txt", ".json", "ü.json"])
def test_names_by_which_it_would_not_be_found_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="solver file"):
        write_solver(tmp_path / name, learned())
    assert not list(tmp_path.iterdir())


GOOD = {"format": "flowturbo solver 1", "times": [0, 1], "coefficients": [[1]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot read"),
        ("[1]", "no JSON object"),
        ("{" * 100_000, "cannot read"),
        ({}, "format is 'None'"),
        (GOOD | {"format": "x" * 1000}, "format is"),
        (GOOD | {"times": None}, "expected times"),
        (GOOD | {"times": [0, "1"]}, "times hold '1'"),
        (GOOD | {"times": [0, True]}, "times hold 'True'"),
        (GOOD | {"times": [0, 10**400]}, "times hold '1000"),
        (GOOD | {"times": [0, 0.5]}, "rise from 0 to 1"),
        (GOOD | {"coefficients": [[float("nan")]]}, "coefficients hold 'nan'"),
        (GOOD | {"coefficients": [[1e300]]}, "coefficients hold '1e\\+300'"),
        (GOOD | {"coefficients": [[0.9]]}, "row 0 of solver 's' adds up to 0.9, not to its step 1"),
        (GOOD | {"coefficients": []}, "1 to 256 rows"),
        (GOOD | {"coefficients": [[0.0]] * 300}, "1 to 256 rows"),
        (GOOD | {"coefficients": {"0": 1}}, "1 to 256 rows"),
        (GOOD | {"model_sha256": "../../etc"}, "no sha256"),
        (GOOD | {"guidance": 4}, "guidance cannot be read"),
        (
            GOOD | {"guidance": {"scale": "nan", "channels": 3, "interval": [0, 1], "every": 1}},
            "guidance cannot be read",
        ),
        (GOOD | {"guidance": {"scale": 2, "channels": [], "interval": [0, 1], "every": 1}}, "guidance cannot be read"),
        (GOOD | {"pad": "x" * (5 << 20)}, "larger than 4 MiB"),
    ],
)
def test_damaged_and_hostile_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "s.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        read_solver(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_is_no_regular_file_is_not_read(tmp_path):
    with pytest.raises(ValueError, match="no such solver file"):
        read_solver("/dev/zero")
    with pytest.raises(ValueError, match="no such solver file"):
        read_solver(tmp_path)


# What it was made for


def test_another_model_or_guidance_is_told(tmp_path):
    model, told = tmp_path / "model.pt", []
    model.write_bytes(b"weights")
    own = learned(guidance=Guidance(1.0), model_sha256=sha256(model))

    def check(solver, scale, strict=False):
        told.clear()
        check_made_for(parse_sampler(solver), model, Guidance(scale), strict, told.append)
        return told

    assert check(own, 1.0) == check(learned(), 4.0) == check(Solver.of("A3"), 4.0) == []
    assert check(own, 4.0) == ["solver any was made for guidance cfg 1, not cfg 4: measure it before you trust it"]
    other = learned(guidance=Guidance(1.5), model_sha256="0" * 64)
    assert re.search(r"guidance cfg 1.5, not cfg 4 and another model \(sha256 000000000000…\)", *check(other, 4.0))
    with pytest.raises(OtherSolver, match="was made for guidance cfg 1, not cfg 4"):
        check(own, 4.0, strict=True)


def test_without_guidance_its_other_settings_say_nothing(tmp_path):
    solver = learned(guidance=Guidance(1.0, 3))
    check_made_for(parse_sampler(solver), "-", Guidance(1.0, "all", (0.1, 0.9)), True, pytest.fail)


# In the scripts


def test_sample_takes_it_beside_schedules(folder, pixel_models, capsys):
    arguments = [*pixel_models, "--device", "cpu", "--num-images", "2", "--cfg-scale", "1"]
    sample.main([*arguments, "--compare", "A4", "fast-4", "--out", "a.png"])
    said = capsys.readouterr()
    assert "fast-4   4 evaluations" in said.out
    assert "warning" not in said.err
    sample.main([*arguments, "--schedule", "solvers/fast-4.json"])
    assert len(list((folder / "samples").glob("*fast-4-cfg1-seed0*.png"))) == 1
    write_solver("solvers/for-4.json", learned(guidance=Guidance(4.0)))
    capsys.readouterr()
    sample.main([*arguments, "--schedule", "for-4"])
    told = "warning: solver for-4 was made for guidance cfg 4, not cfg 1: measure it before you trust it\n"
    assert told in capsys.readouterr().err
    with pytest.raises(OtherSolver):
        sample.main([*arguments, "--schedule", "for-4", "--strict"])


def test_sample_sets_belong_to_the_solver_that_made_them(folder, pixel_models, capsys):
    arguments = [*pixel_models, "--device", "cpu", "--num-fid-samples", "3", "--per-proc-batch-size", "2"]
    arguments += ["--schedule", "fast-4"]
    made = sample_ddp_feature.main(arguments)
    assert made.archive.name == "fast-4-cfg1.5-seed0.npz"
    sample_ddp_feature.main(arguments)
    assert "already complete" in capsys.readouterr().out
    write_solver("solvers/fast-4.json", learned("E4"))
    with pytest.raises(OtherSettings, match="was made with solver"):
        sample_ddp_feature.main(arguments)


def test_a_compiled_solver_is_the_same(predictor, batch, compiler):
    from flowturbo.networks.compiled import StaticGraphs

    z, y = batch(2)
    eager = FlowTurbo(predictor, None, learned("M3"), 2.0).sample(z, y)
    with compiler("eager"):
        compiled = FlowTurbo(predictor, None, learned("M3"), 2.0, engine=StaticGraphs).sample(z, y)
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=0)
