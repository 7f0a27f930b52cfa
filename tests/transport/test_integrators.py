from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowturbo.transport import Schedule
from flowturbo.transport.integrators import (
    Step,
    euler_step,
    heun_step,
    integrate,
    pseudo_corrector_step,
    refiner_step,
)

STARTS = torch.linspace(-1, 1, 13, dtype=torch.float64)


def curved(x, t):
    """x' = cos(t)(1 + x²)/2: not autonomous, not linear."""
    return math.cos(t) * (1 + x**2) / 2


def curved_flow(x):
    return torch.tan(x.atan() + math.sin(1) / 2)


@pytest.fixture(params=["gaussian", "curved"])
def problem(request, gaussian):
    """A velocity and its exact flow map from t = 0 to 1."""
    if request.param == "curved":
        return curved, curved_flow
    flow = gaussian(mean=0.7, std=0.4)
    return flow.velocity, flow.flow


def final(velocity, x, blocks, **kwargs):
    times = Schedule(blocks).times(torch.float64).tolist()
    for step in integrate(velocity, x, blocks, times, **kwargs):
        x = step.x
    return x


def order(problem, spell, **kwargs):
    """The slope of log error over log N."""
    velocity, flow = problem
    counts = [64, 128, 256, 512]
    errors = [float((final(velocity, STARTS, spell(n), **kwargs) - flow(STARTS)).abs().max()) for n in counts]
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize(
    ("spell", "expected"),
    [
        (lambda n: "E" * n, 1),
        (lambda n: "H" * n, 2),
        (lambda n: "P" * n, 2),
        (lambda n: "H" + "P" * (n - 1), 2),
        (lambda n: "HP" * (n // 2), 2),
        (lambda n: "H" * (n // 4) + "P" * (n - n // 4), 2),
        (lambda n: "HE" * (n // 2), 1),
    ],
    ids=["Euler", "Heun", "pseudo corrector", "one Heun first", "alternating", "a quarter Heun", "half Euler"],
)
def test_convergence_order(problem, spell, expected):
    assert order(problem, spell) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("form", "expected"), [("consistent", 2), ("single", 2), ("released", 1)])
def test_convergence_order_with_a_perfect_refiner(problem, form, expected):
    """The released form adds to the first refined velocity what was meant for the old one: first order."""
    velocity, _ = problem

    def spell(n):
        return "H" + "R" * (n - 1)

    reached = order(problem, spell, offset=lambda x, t, v: velocity(x, t) - v, refiner_form=form)
    assert reached == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("form", "block"), [("consistent", "H"), ("single", "P")])
def test_a_perfect_refiner_replaces_the_predictor(problem, form, block):
    velocity, _ = problem
    refined = final(velocity, STARTS, "HRRRR", offset=lambda x, t, v: velocity(x, t) - v, refiner_form=form)
    torch.testing.assert_close(refined, final(velocity, STARTS, "H" + block * 4), atol=1e-12, rtol=0)


# One step of each against its formula


T0, T1, DT = 0.3, 0.55, 0.25
X = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
V = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def velocity(x, t):
    return torch.sin(3 * x + t) - t * x**2


def offset(x, t, v):
    return 0.3 * torch.cos(x - 2 * v) + t * v


def assert_step(step, x, v):
    assert isinstance(step, Step)
    torch.testing.assert_close(step.x, x, atol=1e-12, rtol=0)
    torch.testing.assert_close(step.v, v, atol=1e-12, rtol=0)


def test_euler_hands_on_the_velocity_at_its_start(recorder):
    count = recorder(velocity)
    d = velocity(X, T0)
    assert_step(euler_step(count, X, T0, T1), X + DT * d, d)
    assert len(count) == 1


def test_heun_hands_on_the_velocity_at_its_euler_point(recorder):
    count = recorder(velocity)
    d = velocity(X, T0)
    d_next = velocity(X + DT * d, T1)
    assert_step(heun_step(count, X, T0, T1), X + DT / 2 * (d + d_next), d_next)
    assert len(count) == 2


def test_pseudo_corrector_takes_the_velocity_it_is_given(recorder):
    count = recorder(velocity)
    d_next = velocity(X + DT * V, T1)
    assert_step(pseudo_corrector_step(count, X, T0, T1, V), X + DT / 2 * (V + d_next), d_next)
    assert len(count) == 1


def test_pseudo_corrector_without_a_velocity_is_heun(recorder):
    count = recorder(velocity)
    assert_step(pseudo_corrector_step(count, X, T0, T1, None), *heun_step(velocity, X, T0, T1))
    assert len(count) == 2


def test_released_refiner_step(recorder):
    count = recorder(offset)
    d = V + offset(X, T0, V)
    d_next = d + offset(X + DT * d, T1, V)
    assert_step(refiner_step(count, X, T0, T1, V), X + DT / 2 * (d + d_next), d)
    assert_step(refiner_step(count, X, T0, T1, V, "released"), X + DT / 2 * (d + d_next), d)
    assert len(count) == 2 + 2


def test_consistent_refiner_step(recorder):
    count = recorder(offset)
    d = V + offset(X, T0, V)
    d_next = d + offset(X + DT * d, T1, d)
    assert_step(refiner_step(count, X, T0, T1, V, "consistent"), X + DT / 2 * (d + d_next), d_next)
    assert len(count) == 2


def test_single_refiner_step(recorder):
    count = recorder(offset)
    d_next = V + offset(X + DT * V, T1, V)
    assert_step(refiner_step(count, X, T0, T1, V, "single"), X + DT / 2 * (V + d_next), d_next)
    assert len(count) == 1


def test_rows_below_the_state_are_handed_on_but_do_not_move_it():
    """A second branch of ones below the first, as guidance has it."""

    def both(x, t):
        return torch.cat([velocity(x, t), torch.ones_like(x)])

    for step, alone in [
        (euler_step(both, X, T0, T1), euler_step(velocity, X, T0, T1)),
        (heun_step(both, X, T0, T1), heun_step(velocity, X, T0, T1)),
        (pseudo_corrector_step(both, X, T0, T1, torch.cat([V, V])), pseudo_corrector_step(velocity, X, T0, T1, V)),
    ]:
        assert_step(step, alone.x, torch.cat([alone.v, torch.ones_like(X)]))


# The loop


def test_integrate_chains_the_steps_and_their_velocities():
    times = [0.0, 0.1, 0.3, 0.6, 0.8, 1.0]
    x1, v1 = euler_step(velocity, X, 0.0, 0.1)
    x2, v2 = pseudo_corrector_step(velocity, x1, 0.1, 0.3, v1)
    x3, v3 = refiner_step(offset, x2, 0.3, 0.6, v2, "single")
    x4, v4 = heun_step(velocity, x3, 0.6, 0.8)
    x5, v5 = refiner_step(offset, x4, 0.8, 1.0, v4, "single")
    steps = list(integrate(velocity, X, "EPRHR", times, offset=offset, refiner_form="single"))
    assert len(steps) == 5
    for step, expected in zip(steps, [(x1, v1), (x2, v2), (x3, v3), (x4, v4), (x5, v5)]):
        assert_step(step, *expected)


def test_integrate_takes_times_as_a_tensor_too():
    times = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    for a, b in zip(integrate(velocity, X, "HP", times), integrate(velocity, X, "HP", times.tolist())):
        assert_step(a, *b)


@pytest.mark.parametrize(
    ("blocks", "times", "kwargs", "message"),
    [
        ("HR", [0, 0.5, 1], {}, "need a refiner"),
        ("HH", [0, 1], {}, "2 steps need 3 times, got 2"),
        ("HH", [0, 0.3, 0.6, 1], {}, "2 steps need 3 times, got 4"),
        ("HR", [0, 0.5, 1], {"offset": offset, "refiner_form": "double"}, "'double'"),
    ],
)
def test_integrate_refuses(blocks, times, kwargs, message):
    with pytest.raises(ValueError, match=message):
        list(integrate(velocity, X, blocks, times, **kwargs))
