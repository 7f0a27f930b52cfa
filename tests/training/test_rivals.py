"""A refiner beside its free rows, from fixed noises."""

import pytest
import torch

from flowturbo.networks.autoencoder import NoAutoencoder
from flowturbo.sampling.fidelity import Draws, Fidelity, end_points, fine_end_points
from flowturbo.sampling.generate import Networks
from flowturbo.training.curves import RIVALS
from flowturbo.training.rivals import EndPoints, free_rows
from flowturbo.transport import Guidance, SamplerSettings, Schedule


@pytest.mark.parametrize(
    ("schedule", "free", "without"),
    [
        ("H1P5R2", "H1P5L2", "H1P5"),
        ("M4R1@shift2", "M4L1@shift2", "M4@shift2"),
        ("[H1P1R1]x2", "H1P1L1H1P1L1", "H1P1H1P1"),
        ("P5R7H3", "P5L7H3", "P5H3"),
    ],
)
def test_the_rows_to_beat_have_the_evaluations_of_the_predictor(schedule, free, without):
    schedule = Schedule.parse(schedule)
    rows = free_rows(schedule)
    assert {name: str(row) for name, row in rows.items()} == {"rmse_free": free, "rmse_without": without}
    assert {row.evaluations() for row in rows.values()} == {(schedule.evaluations()[0], 0)}
    assert list(RIVALS) == ["rmse", *rows]


def test_end_points_are_compared_as_users_would_sample(predictor, refiner):
    """By the definition of fidelity, guided; the fine solution and the rivals are computed once."""
    networks = Networks(predictor, refiner, FourChannels(), torch.device("cpu"))
    settings, asked = SamplerSettings(Guidance(2.0, "all"), "single"), []
    measure = EndPoints(lambda: asked.append(1) or networks, Schedule.parse("H1P1R1"), settings, "M8", 6)
    calls = []
    hook = predictor.register_forward_hook(lambda *_: calls.append(1))
    text, figures = measure()
    first = len(calls)
    assert measure() == (text, figures)
    assert first == 9 + 3 + 3 + 3  # M8, and three times H1P1
    assert len(calls) - first == 3
    hook.remove()
    assert len(asked) == 2
    draws = Draws.random(0, range(6), 10)
    target = fine_end_points(networks, settings, *draws, fine="M8")
    for name, row in (("rmse", "H1P1R1"), ("rmse_free", "H1P1L1"), ("rmse_without", "H1P1")):
        expected = Fidelity.of(end_points(networks, row, settings, *draws), target).rmse
        assert (figures[name], figures[name + "_error"]) == pytest.approx(expected)
        assert f"{row} {expected}" in text


class FourChannels(NoAutoencoder):
    """None, for a model of four channels: end points need no images."""

    channels = 4
