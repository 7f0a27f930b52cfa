"""Learned solvers: the numbers, the search, its state; and published tables."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import plan
from flowturbo.networks.autoencoder import NoAutoencoder
from flowturbo.planning.learned import Numbers
from flowturbo.planning.options import SearchOptions
from flowturbo.planning.search import Search, Trajectories, draw, mean_squared_error, split_classes, starts
from flowturbo.planning.tables import read_tables
from flowturbo.sampling.generate import Networks
from flowturbo.sampling.solvers import parse_sampler, read_solver
from flowturbo.system.claims import OtherSettings
from flowturbo.transport import FlowTurbo, Guidance, SamplerSettings
from flowturbo.transport.solver import Solver

# The numbers


@pytest.mark.parametrize("schedule", ["A6", "M5", "D3", "E2@shift2", "A1"])
def test_a_solver_comes_back_from_its_numbers(schedule):
    solver = Solver.of(schedule)
    back = Numbers.of(solver).solver("back")
    assert back.grid == pytest.approx(solver.grid, abs=1e-6)
    for row, expected in zip(back.coefficients, solver.coefficients):
        assert row == pytest.approx(expected, abs=1e-6)


def test_any_numbers_are_a_solver():
    generator = torch.Generator().manual_seed(0)
    numbers = Numbers(3 * torch.randn(7, generator=generator), 5 * torch.randn(7, 7, generator=generator))
    solver = numbers.solver("any")  # Solver refuses times that do not rise and rows that miss their steps
    assert len(solver) == 7
    times, rows = numbers.rows()
    assert rows.sum(1).tolist() == pytest.approx(times.diff().tolist(), abs=1e-5)


@pytest.fixture
def networks(predictor):
    return Networks(predictor.requires_grad_(False), None, AnyAutoencoder(), torch.device("cpu"))


class AnyAutoencoder(torch.nn.Module):
    channels = 4


class GaussianModel(torch.nn.Module):
    """The exact velocity of Gaussian data, another standard deviation for every pixel and class."""

    input_shape, num_classes, class_dropout_prob = (1, 4, 4), 10, 0.0

    def forward(self, x, t, y, drop=None):
        s = torch.linspace(0.05, 1, 16).view(1, 1, 4, 4) * (1 + y.view(-1, 1, 1, 1) / 10)
        t = t.view(-1, 1, 1, 1)
        return x * (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2)


@pytest.fixture
def gaussians():
    return Networks(GaussianModel(), None, NoAutoencoder(), torch.device("cpu"))


@pytest.mark.parametrize("guidance", [Guidance(1.0), Guidance(2.0), Guidance(2.0, interval=(0.3, 1.0), every=2)])
def test_the_loss_is_the_samplers_and_its_gradient_is_right(networks, guidance):
    settings = SamplerSettings(guidance)
    draws = draw(0, 5, 3, [1, 4])
    pool = Trajectories.of(networks, draws, torch.zeros(3, 4, 8, 8))
    numbers = Numbers.of(Solver.of("M3"))
    loss = mean_squared_error(
        networks, settings, Numbers(*(t.requires_grad_() for t in numbers.tensors)), pool, torch.arange(3), True
    )
    sampled = FlowTurbo(networks.predictor, None, "M3", guidance).sample(pool.z, pool.y)
    assert loss.item() == pytest.approx(float(sampled.square().mean()), rel=1e-4)
    loss.backward()
    direction = [torch.randn_like(t) * 0.5 for t in numbers.tensors]
    slope = sum(float((t.grad * d).sum()) for t, d in zip(numbers.tensors, direction))

    def at(h):
        moved = Numbers(*(t.detach() + h * d for t, d in zip(numbers.tensors, direction)))
        return mean_squared_error(networks, settings, moved, pool, torch.arange(3), False).item()

    assert slope == pytest.approx((at(0.01) - at(-0.01)) / 0.02, rel=0.05, abs=1e-4)


# The search

QUICK = SearchOptions(
    evaluations=3, steps=12, batch_size=8, trajectories=16, test_trajectories=16, lr=0.03, save_every=5
)


def test_classes_and_noise_of_the_test_are_not_learned_from():
    learned, tested = split_classes(0, 10)
    assert sorted(learned + tested) == list(range(10))
    assert len(tested) == 2
    assert split_classes(0, 1) == ([0], [0])
    assert split_classes(0, 1000) != split_classes(1, 1000)
    assert set(draw(0, 7, 50, tested).classes) == set(tested)


def test_starts_have_the_evaluations_asked_for():
    assert [str(solver) for solver in starts(6)] == ["A6", "M5", "F5", "B5", "D3"]
    assert [str(solver) for solver in starts(1)] == ["A1"]


@pytest.mark.parametrize("forward_only", [False, True])
def test_a_search_beats_its_start_on_other_noise_and_classes(gaussians, tmp_path, forward_only):
    options = replace(QUICK, forward_only=forward_only, steps=60)
    found = Search(gaussians, SamplerSettings(Guidance(1.0)), options, 0, tmp_path / "s.pt").run()
    assert found.against_start.value < (0.8 if forward_only else 0.5)
    assert found.tested["learned"].rmse.value < min(found.tested[name].rmse.value for name in ("A3", "M2", "F2"))
    assert len(found.tested["learned"]) == 16


def test_a_search_goes_on_where_it_was_saved(gaussians, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole.pt", tmp_path / "broken.pt"
    settings = SamplerSettings(Guidance(1.0))
    expected = Search(gaussians, settings, QUICK, 0, whole).run()
    steps = []

    class Interrupted(Search):
        def _descend(self, *arguments):
            steps.append(1)
            if len(steps) == 8:
                raise KeyboardInterrupt
            return super()._descend(*arguments)

    with pytest.raises(KeyboardInterrupt):
        Interrupted(gaussians, settings, QUICK, 0, broken).run()
    kept = shutil.copy(broken, tmp_path / "kept.pt")
    found = Interrupted(gaussians, settings, QUICK, 0, broken).run()
    assert len(steps) == 8 + 12 - 5
    assert found.solver == expected.solver
    with pytest.raises(OtherSettings, match=r"was made with lr 0.03, not 0.1"):
        Search(gaussians, settings, replace(QUICK, lr=0.1), 0, kept).run()


def test_the_command_writes_a_solver_that_sample_takes(pixel_models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["search", "--predictor-ckpt", pixel_models[1], "--vae-ckpt", "none", "--device", "cpu"]
    arguments += ["--evaluations", "3", "--steps", "2", "--batch-size", "4", "--trajectories", "4"]
    arguments += ["--test-trajectories", "4", "--cfg-scale", "2"]
    plan.main(arguments)
    assert "saved solvers/learned-3-cfg2.json" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("solvers/[!.]*")] == ["learned-3-cfg2.json"]
    solver = read_solver("solvers/learned-3-cfg2.json")
    assert (solver.guidance, len(solver), solver.made["start"][0] in "AMFBD") == (Guidance(2.0), 3, True)
    assert 0 < solver.error["standard_error"] < solver.error["rmse"]
    assert solver.differences(lambda: solver.model_sha256, Guidance(2.0)) == []
    assert parse_sampler("learned-3-cfg2").evaluations() == (3, 0)
    with pytest.raises(ValueError, match="is there already"):
        plan.main(arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluations": 0}, "evaluations 0"),
        ({"trajectories": 3}, "at least batch_size"),
        ({"test_trajectories": 1}, "at least 2"),
        ({"lr": 0.0}, "lr 0.0"),
        ({"steps": 0}, "steps 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SearchOptions(**options)


# Published tables

TABLE = """
import torch
raise SystemExit("this file is never run")
OTHER = 3
FM_DATA = dict(
    step2=dict(timedeltas=[0.3001, 0.7], coeffs=[[0.0, 0.0], [-0.5, 0.0]]),
    step3=dict(timedeltas=[0.2, 0.3, 0.5], coeffs=[[0, 0, 0], [-1, 0, 0], [0.25, -1.25, 0]]),
)
def f(): pass
"""


def test_a_table_is_read_and_normalised(tmp_path):
    (tmp_path / "t.py").write_text(TABLE)
    found = read_tables(tmp_path / "t.py")
    assert list(found) == ["fm_data-2", "fm_data-3"]
    two, three = found.values()
    assert two.grid == pytest.approx((0, 0.3001 / 1.0001, 1))
    step = 0.7 / 1.0001
    assert two.coefficients[1] == pytest.approx((-0.5 * step, 1.5 * step))
    assert three.coefficients[2] == pytest.approx((0.125, -0.625, 1.0))


def test_adams_bashforth_as_a_table_is_adams_bashforth(tmp_path):
    rows = [[0.0] * 5] + [[0.0] * (k - 1) + [-0.5] + [0.0] * (5 - k) for k in range(1, 5)]
    (tmp_path / "t.py").write_text(f"AB = {{'step5': {{'timedeltas': {[0.2] * 5}, 'coeffs': {rows}}}}}")
    (solver,) = read_tables(tmp_path / "t.py").values()
    expected = Solver.of("A5")
    assert solver.grid == pytest.approx(expected.grid)
    for row, other in zip(solver.coefficients, expected.coefficients):
        assert row == pytest.approx(other, abs=1e-12)


def test_import_writes_solver_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.py").write_text(TABLE)
    plan.main(["import", "t.py", "--name", "published", "--cfg-scale", "1.5"])
    assert capsys.readouterr().out.count("saved solvers/published-") == 2
    solver = read_solver("solvers/published-3.json")
    assert (solver.guidance, solver.model_sha256) == (Guidance(1.5), None)
    assert json.loads((tmp_path / "solvers/published-2.json").read_text())["made"]["table"] == "t.py"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no table"),
        ("x = 1", "holds no table"),
        ("def (", "cannot be read as a table"),
        ("\0", "cannot be read as a table"),
        ("A = " + "(" * 3000, "cannot be read as a table"),
        ("A = dict(s=dict(timedeltas=[1.0], coeffs=[[0.0]], x=__import__('os').system('touch /tmp/w')))", "cannot be"),
        ("A = dict(s=dict(timedeltas=[0.5], coeffs=[[0.0]]))", "add up to 0.5, not to 1"),
        ("A = dict(s=dict(timedeltas=[0.5, 0.5], coeffs=[[0.0]]))", "expected 2 rows"),
        ("A = dict(s=dict(timedeltas=[1.5, -0.5], coeffs=[[0.0], [0.0]]))", "rise from 0 to 1"),
        ("A = dict(s=dict(timedeltas=[0.5, 0.5], coeffs=[[0.0], [1e999]]))", "not finite"),
        ("A = dict(s=dict(timedeltas=['a'], coeffs=[[0.0]]))", "cannot be read"),
        ("A = dict(s=dict(timedeltas=7, coeffs=[[0.0]]))", "cannot be read"),
        ("A = dict(s=3, timedeltas=4)", "cannot be read"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path, content, message):
    path = tmp_path / "t.py"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_tables(path)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, SyntaxError)


def test_an_import_is_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = "dict(step2=dict(timedeltas=[0.5, 0.5], coeffs=[[0, 0], [{a}, 0]]))"
    Path("two.py").write_text(f"A = {table.format(a=-0.5)}\nB = {table.format(a=0.1)}\n")
    with pytest.raises(ValueError, match=r"foo-2\.json' is there already"):  # both would be foo-2
        plan.main(["import", "two.py", "--name", "foo"])
    assert not list(tmp_path.glob("solvers/*"))
    Path("one.py").write_text(f"A = {table.format(a=-0.5)}\n")
    plan.main(["import", "one.py", "--name", "foo"])
    with pytest.raises(ValueError, match=r"foo-2\.json' is there already"):
        plan.main(["import", "one.py", "--name", "foo"])
    Path("large.py").write_text(f"A = {table.format(a=1e9)}\n")
    with pytest.raises(ValueError, match="expected numbers of at most"):  # no reader would take it
        plan.main(["import", "large.py"])
    for text in ('x = ["timedeltas"]', 'DOC = "timedeltas"'):
        Path("odd.py").write_text(text)
        with pytest.raises(ValueError, match=r"odd\.py' (cannot be read as|holds no) "):
            plan.main(["import", "odd.py"])
