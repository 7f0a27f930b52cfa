"""The planner's candidates, rounds and choice."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

import plan
from flowturbo.planning.candidates import LETTERS, candidates, refined
from flowturbo.planning.costs import Costs
from flowturbo.planning.options import PlannerOptions
from flowturbo.planning.planner import Candidate, Measured, Planner, front, promising
from flowturbo.sampling.fidelity import Fidelity
from flowturbo.sampling.options import NetworkOptions, SamplingOptions
from flowturbo.transport import Guidance, SamplerSettings, SamplerSpec, Schedule
from flowturbo.transport.blocks import REFINER_STEPS
from flowturbo.weights.registry import PACKAGED

DIGITS = PACKAGED / "digits-predictor.pt"


@pytest.mark.parametrize("evaluations", [1, 2, 5, 6])
def test_candidates_take_exactly_what_was_asked_for(evaluations):
    thorough = candidates(evaluations, thorough=True)
    assert {Schedule.parse(text).evaluations() for text in thorough} == {(evaluations, 0)}
    assert len(thorough) == len(set(thorough))
    assert set(candidates(evaluations, thorough=False)) < set(thorough)
    if evaluations == 6:
        assert {text[0] for text in thorough} == set(LETTERS)
        assert len(thorough) >= 150


@pytest.mark.parametrize("form", REFINER_STEPS)
def test_refined_candidates_count_both_networks(form):
    found = [Schedule.parse(text) for text in refined(8, form)]
    assert found
    assert {sum(schedule.evaluations(form)) for schedule in found} == {8}
    assert all(schedule.blocks[-1] == "R" for schedule in found)


COSTS = Costs({("predictor", True): 2.0, ("predictor", False): 1.0, ("refiner", True): 0.5}, 3.0, 4, False)


@pytest.mark.parametrize(
    ("text", "guidance", "expected"),
    [
        ("A5", Guidance(2.0), 13),
        ("H2", Guidance(2.0), 11),
        ("A5", Guidance(1.0), 8),
        ("A4", Guidance(2.0, every=2), 9),
        ("A4", Guidance(2.0, interval=(0.5, 1.0)), 9),
        ("H1P1R2", Guidance(2.0), 11),
    ],
)
def test_costs_add_up(text, guidance, expected):
    assert COSTS.ms(SamplerSpec.parse(text), SamplerSettings(guidance)) == pytest.approx(expected)


def test_costs_are_told_for_each_block():
    told = COSTS.table()
    assert next(line for line in told.splitlines() if line.startswith("H ")).split()[-2:] == ["2", "4"]


def measured(text, ms, squares):
    return Measured(Candidate(SamplerSpec.parse(text)), (1, 0), (1, 0), ms, Fidelity(torch.as_tensor(squares).double()))


def test_the_front_is_what_nothing_cheaper_beats():
    rows = [measured("A1", 1, [4, 4]), measured("A2", 2, [5, 5]), measured("A3", 3, [1, 1]), measured("E3", 3, [2, 2])]
    assert [str(row.candidate) for row in front(rows)] == ["A1", "A3"]


def test_a_round_keeps_what_may_yet_be_the_best():
    noise = torch.rand(64, dtype=torch.float64)
    rows = [measured(f"A{k}", 1, noise + 0.001 * k) for k in range(1, 7)]  # paired: each is surely worse
    rows += [measured("M9", 1, noise.flip(0)), measured("M3", 0.5, noise + 9)]  # as good; and cheap
    assert {str(c) for c in promising(rows)} == {"A1", "A2", "A3", "M9", "M3"}  # four stay in anyhow


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one positive budget"),
        ({"rows": 4, "evaluations": 4}, "one positive budget"),
        ({"budget_ms": -1.0}, "one positive budget"),
        ({"evaluations": 4, "refiners": ("R.pt",)}, "FORM:FILE"),
        ({"evaluations": 4, "refiners": ("sharp:R.pt",)}, "FORM:FILE"),
        ({"evaluations": 4, "solvers": ("dopri5",)}, "no schedule and no solver"),
        ({"evaluations": 4, "plot": "x.jpg"}, "png"),
        ({"evaluations": 4, "num_images": 3}, "at least 16"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PlannerOptions(**options)


def test_a_plan_is_a_table_a_picture_and_a_command(pixel_models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flowturbo.planning.planner.FINE", "D6")
    _, predictor, _, refiner, *_ = pixel_models
    networks = ["--predictor-ckpt", predictor, "--vae-ckpt", "none", "--device", "cpu"]
    budget = ["--evaluations", "2", "--num-images", "16", "--batch-size", "16", "--refiners", f"single:{refiner}"]
    plan.main([*networks, *budget, "--solvers", "A2@shift3", "--plot", str(tmp_path / "p.png"), "--cfg-scale", "2"])
    out = capsys.readouterr().out
    assert "R refiner" in out  # its cost
    *_, last = out.splitlines()
    assert last.startswith("best within 2 evaluations: python sample.py --schedule ")
    assert f"--predictor-ckpt {predictor} --vae-ckpt none --device cpu --cfg-scale 2" in last
    assert Image.open(tmp_path / "p.png").size == (900, 560)


@pytest.mark.parametrize(("budget", "expected"), [({"rows": 4}, 4), ({"evaluations": 2}, 4), ({"budget_ms": 7.0}, 4)])
def test_all_candidates_are_within_the_budget(pixel_models, budget, expected, monkeypatch):
    monkeypatch.setattr("flowturbo.planning.planner.measure_costs", lambda *_: COSTS)
    networks = NetworkOptions(pixel_models[1], vae_ckpt="none", device="cpu")
    planner = Planner(PlannerOptions(**budget), networks, SamplingOptions(cfg_scale=2.0))
    found = planner.candidates()
    assert max(sum(c.spec.rows(planner.settings)) for c in found) == expected
    assert all(planner.fits(c) for c in found)
    nothing = Planner(replace(planner.options, budget_ms=1.0, rows=None, evaluations=None), networks, SamplingOptions())
    with pytest.raises(ValueError, match="nothing can be sampled within 1 ms"):
        nothing.run()


@pytest.mark.slow  # a minute on an idle core
def test_the_choice_is_within_a_standard_error_of_an_exhaustive_search(monkeypatch, capsys):
    """On digits, out of 210 candidates with up to 6 evaluations; rounds are cut out of the exhaustive measurement."""
    options = PlannerOptions(evaluations=6, num_images=64, batch_size=64, exhaustive=True)
    networks = NetworkOptions(str(DIGITS), vae_ckpt="none", device="cpu")
    planner = Planner(options, networks, SamplingOptions(cfg_scale=1.0))
    planner.run()
    everything = dict(planner.seen)
    assert len(everything) >= 200
    evaluated = []

    def cut(candidate, fine, size):
        row = everything[candidate]
        evaluated.append(size)
        return replace(row, fidelity=Fidelity(row.fidelity.squares[:size]))

    planner.options = replace(options, exhaustive=False)
    monkeypatch.setattr(planner, "measure", cut)
    chosen = planner.run()[-1]
    best = min(everything.values(), key=lambda row: row.fidelity.rmse.value)
    assert chosen.fidelity.rmse.value <= best.fidelity.rmse.value + best.fidelity.rmse.standard_error
    assert sum(evaluated) < 0.6 * 64 * len(everything)
    with capsys.disabled():
        print(f"\nchosen {chosen.candidate} {chosen.fidelity}, best {best.candidate} {best.fidelity}")
        print(f"{len(everything)} candidates, {sum(evaluated)} of {64 * len(everything)} samples evaluated")
        for row in sorted(everything.values(), key=lambda row: row.fidelity.rmse.value)[:12]:
            print(row.candidate, row.fidelity)
