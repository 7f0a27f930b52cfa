"""The short table of schedules for a budget."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from flowturbo.planning import menu
from flowturbo.planning.costs import Costs
from flowturbo.sampling.generate import find_files, load_networks
from flowturbo.sampling.options import NetworkOptions
from flowturbo.sampling.solvers import parse_schedule
from flowturbo.transport import Guidance
from flowturbo.transport.spec import SamplerSettings


@pytest.mark.parametrize(("form", "count"), [(None, 24), ("midpoint", 32), ("released", 31)])
def test_the_table_has_each_kind_of_step_at_each_number_of_evaluations(form, count):
    texts = menu.schedules(form)
    assert len(set(texts)) == count
    found = {}
    for text in texts:
        predictor, refiner = parse_schedule(text).evaluations(form or "released")
        found.setdefault(predictor + refiner, []).append(text)
    assert tuple(sorted(found)) == menu.EVALUATIONS
    assert found[6][:3] == ["M5", "A6", "H1P4"]


def test_rows_come_cheapest_first_with_their_errors(pixel_models, monkeypatch):
    monkeypatch.setattr(menu, "EVALUATIONS", (3, 6))
    costs = Costs({("predictor", True): 2.0, ("predictor", False): 1.0, ("refiner", True): 0.5}, 0.25, 2, False)
    monkeypatch.setattr(menu, "measure_costs", lambda *_: costs)
    _, predictor, _, refiner, *_ = pixel_models
    options = NetworkOptions(predictor, refiner, "none", device="cpu")
    networks = load_networks(options, find_files(options, refiner=True))
    settings = SamplerSettings(Guidance(2.0), "midpoint")
    rows = list(menu.measure_menu(networks, settings, 2, samples=4))
    assert [row.ms for row in rows] == sorted(row.ms for row in rows)
    measured = {str(row.candidate): row for row in rows}
    assert set(measured) == {"M2", "A3", "H1P1", "M5", "A6", "H1P4", "M1R1", "M4R1"}
    assert measured["M5"].ms == 12.25
    assert measured["M4R1"].ms == 10.75
    assert measured["M4R1"].evaluations == (5, 1)
    assert measured["M5"].rows == (12, 0)
    assert 0 < measured["A6"].fidelity.rmse.value < measured["A3"].fidelity.rmse.value
    alone = list(menu.measure_menu(replace(networks, refiner=None), settings, 2, samples=4))
    assert {str(row.candidate) for row in alone} == {"M2", "A3", "H1P1", "M5", "A6", "H1P4"}


def test_the_best_row_within_a_budget():
    def row(name, ms, error):
        rmse = SimpleNamespace(value=error)
        return SimpleNamespace(candidate=name, ms=ms, fidelity=SimpleNamespace(rmse=rmse))

    rows = [row("A3", 5.0, 0.3), row("M4", 9.0, 0.1), row("H1P3", 9.0, 0.2), row("A16", 30.0, 0.05)]
    assert menu.best_within(rows, 10).candidate == "M4"
    assert menu.best_within(rows, 9).candidate == "M4"
    assert menu.best_within(rows, 8.99).candidate == "A3"
    with pytest.raises(ValueError, match="nothing fits 4 ms: the cheapest, A3, takes 5"):
        menu.best_within(rows, 4)
    with pytest.raises(ValueError, match="nothing is measured yet"):
        menu.best_within([], 4)
