from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import STARTS, final, order, perfect, stretched

from flowturbo.transport import Schedule
from flowturbo.transport.blocks import (
    BLOCKS,
    REFINER_BLOCKS,
    REFINER_STEPS,
    Block,
    Stage,
    State,
    integrate,
    lagrange_weights,
    plan,
    resolve,
    take_step,
)


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


@pytest.mark.parametrize("blocks", ["H", "P", "HP", "HPPP"])
def test_second_order_on_a_grid_that_is_not_uniform(problem, blocks):
    reached = order(problem, lambda n: (blocks * n)[:n], stretched)
    assert reached == pytest.approx(2, abs=0.1)


def test_second_order_backwards_and_from_anywhere(gaussian):
    flow = gaussian(mean=0.7, std=0.4)
    for start, end in ((0.3, 1.0), (1.0, 0.0), (0.9, 0.25)):

        def there(x, start=start, end=end):
            return flow.flow(x, start, end)

        reached = order(
            (flow.velocity, there), lambda n: "HP" * (n // 2), lambda n, a=start, b=end: Schedule("H" * n).times(a, b)
        )
        assert reached == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("refiner_step", "expected"), [("consistent", 2), ("single", 2), ("released", 1)])
def test_convergence_order_with_a_perfect_refiner(problem, refiner_step, expected):
    """The released form adds to the first refined velocity what was meant for the old one: first order."""
    velocity, _ = problem

    def spell(n):
        return "H" + "R" * (n - 1)

    reached = order(problem, spell, refine=perfect(velocity), refiner_step=refiner_step)
    assert reached == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("refiner_step", "block"), [("consistent", "H"), ("single", "P")])
def test_a_perfect_refiner_replaces_the_predictor(problem, refiner_step, block):
    velocity, _ = problem
    refined = final(velocity, STARTS, "HRRRR", perfect(velocity), refiner_step)
    torch.testing.assert_close(refined, final(velocity, STARTS, "H" + block * 4), atol=1e-12, rtol=0)


# One step of each against its formula


T0, T1, DT = 0.3, 0.55, 0.25
X = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
V = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def velocity(x, t):
    return torch.sin(3 * x + t) - t * x**2


def offset(x, t, v):
    return 0.3 * torch.cos(x - 2 * v) + t * v


def refine(x, t, seen, base):
    return base + offset(x, t, seen)


def step(block, v=None, velocity=velocity, refine=refine, before="H"):
    """(x, v) after one step from X at T0; v is what the block before it, a Heun step, handed on."""
    blocks = [block] if v is None else [BLOCKS[before], block]
    planned = plan(blocks, [0.1, T0, T1][-len(blocks) - 1 :])[-1]
    x, new = take_step(block, planned.weights, planned.times, X, [v] if planned.takes else [], velocity, refine)
    return x, new[min(len(new) - 1, max(block.keeps))]


def assert_step(taken, x, v):
    for value, expected in zip(taken, (x, v)):
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)


def test_euler_hands_on_the_velocity_at_its_start(recorder):
    count = recorder(velocity)
    d = velocity(X, T0)
    assert_step(step(BLOCKS["E"], velocity=count), X + DT * d, d)
    assert len(count) == 1


def test_heun_hands_on_the_velocity_at_its_euler_point(recorder):
    count = recorder(velocity)
    d = velocity(X, T0)
    d_next = velocity(X + DT * d, T1)
    assert_step(step(BLOCKS["H"], velocity=count), X + DT / 2 * (d + d_next), d_next)
    assert len(count) == 2


@pytest.mark.parametrize("before", ["H", "P", "E"])
def test_pseudo_corrector_takes_the_velocity_it_is_given(before, recorder):
    """As published, with the weights of the trapezoid also where that velocity is an Euler step's, of its start."""
    count = recorder(velocity)
    d_next = velocity(X + DT * V, T1)
    assert_step(step(BLOCKS["P"], V, count, before=before), X + DT / 2 * (V + d_next), d_next)
    assert len(count) == 1


def test_pseudo_corrector_comes_first_as_heun():
    assert resolve("PP") == [BLOCKS["H"], BLOCKS["P"]]
    assert resolve("EP") == [BLOCKS["E"], BLOCKS["P"]]


def test_released_refiner_step(recorder):
    count = recorder(refine)
    d = V + offset(X, T0, V)
    d_next = d + offset(X + DT * d, T1, V)
    assert_step(step(REFINER_BLOCKS["released"], V, refine=count), X + DT / 2 * (d + d_next), d)
    assert len(count) == 2


def test_consistent_refiner_step(recorder):
    count = recorder(refine)
    d = V + offset(X, T0, V)
    d_next = d + offset(X + DT * d, T1, d)
    assert_step(step(REFINER_BLOCKS["consistent"], V, refine=count), X + DT / 2 * (d + d_next), d_next)
    assert len(count) == 2


def test_single_refiner_step(recorder):
    count = recorder(refine)
    d_next = V + offset(X + DT * V, T1, V)
    assert_step(step(REFINER_BLOCKS["single"], V, refine=count), X + DT / 2 * (V + d_next), d_next)
    assert len(count) == 1


def test_rows_below_the_state_are_handed_on_but_do_not_move_it():
    """A second branch of ones below the first, as guidance has it."""

    def both(x, t):
        return torch.cat([velocity(x, t), torch.ones_like(x)])

    for letter, given, alone in [("E", None, None), ("H", None, None), ("P", torch.cat([V, V]), V)]:
        x, v = step(BLOCKS[letter], alone)
        assert_step(step(BLOCKS[letter], given, both), x, torch.cat([v, torch.ones_like(X)]))


# The formula


@pytest.mark.parametrize(
    ("nodes", "order", "expected"),
    [
        ([0.0], 1, [0.5]),
        ([-0.25, 0.0], 1, [None, 0.5]),
        ([0.0, 0.5], 2, [0.25, 0.25]),  # the trapezoid
        ([-0.5, 0.0], 2, [-0.25, 0.75]),  # Adams-Bashforth 2
        ([-1.0, -0.5, 0.0], 3, [0.5 * 5 / 12, -0.5 * 16 / 12, 0.5 * 23 / 12]),  # Adams-Bashforth 3
        ([-0.25, 0.0], 2, [-0.5, 1.0]),  # variable steps: h (1 + h/(2 h'), -h/(2 h'))
        ([0.0], 3, [0.5]),  # lower order where there is less
        ([-0.5, None], 2, [0.5, None]),
        ([], 1, []),
        ([0.1, 0.3], 0, [None, None]),
    ],
)
def test_weights_are_those_of_the_books(nodes, order, expected):
    assert lagrange_weights(nodes, order, 0.0, 0.5) == pytest.approx(expected)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_integrate_polynomials_exactly(order):
    random = np.random.default_rng(order)
    nodes = list(random.uniform(-1, 1, 4))
    start, end = 0.2, -0.7
    for power in range(order):
        weights = lagrange_weights(nodes, order, start, end)
        total = sum(w * node**power for w, node in zip(weights, nodes) if w is not None)
        assert total == pytest.approx((end ** (power + 1) - start ** (power + 1)) / (power + 1))


# The table, and what follows from it


def test_what_the_table_says_of_the_published_blocks():
    derived = {k: (b.evaluations("predictor"), b.evaluations("refiner"), b.leads) for k, b in BLOCKS.items()}
    assert {k: derived[k] for k in "EHPR"} == {
        "E": (1, 0, True),
        "H": (2, 0, True),
        "P": (1, 0, True),
        "R": (0, 2, False),
    }
    assert [REFINER_BLOCKS[form].evaluations("refiner") for form in REFINER_STEPS[:3]] == [2, 2, 1]


def test_a_block_that_is_added_to_the_table_is_known_everywhere(monkeypatch, problem):
    """Ralston's method of two stages: a row is all it takes."""
    monkeypatch.setitem(BLOCKS, "X", Block("a new one", (Stage(0, 0), Stage(2 / 3, 1)), 2))
    blocks = resolve("XPX")
    assert [block.evaluations("predictor") for block in blocks] == [2, 1, 2]
    assert order(problem, lambda n: "X" * n) == pytest.approx(2, abs=0.05)


def test_a_step_takes_only_what_it_works_with():
    """So that static graphs have one shape: P one velocity, R one, H none."""
    steps = Schedule.parse("H1P2R2H1P1").plan()
    assert [len(step.takes) for step in steps] == [0, 1, 1, 1, 1, 0, 1]


# The loop


def test_integrate_chains_the_steps_and_their_velocities():
    times = [0.0, 0.1, 0.3, 0.6, 0.8, 1.0]
    x, v, expected = X, None, []
    for k, letter in enumerate("EPRHR"):
        t0, t1 = times[k : k + 2]
        d, dt = v, t1 - t0
        if letter in "EH":
            d = velocity(x, t0)
        ahead = x + dt * d
        if letter == "E":
            x, v = ahead, d
        else:
            v = d + offset(ahead, t1, d) if letter == "R" else velocity(ahead, t1)
            x = x + dt / 2 * (d + v)
        expected.append((x, v))
    states = list(integrate(Schedule("EPRHR").plan("single", times), X, velocity, refine))
    assert len(states) == 5
    for state, (x, v) in zip(states, expected):
        assert_step((state.x, state.v), x, v)


@pytest.mark.parametrize("first", range(6))
def test_integrate_goes_on_from_where_earlier_steps_have_come_to(first):
    steps = Schedule("DMBRRL").plan("adams", [0.0, 0.1, 0.3, 0.6, 0.8, 0.9, 1.0])
    states = list(integrate(steps, X, velocity, refine))
    begin = states[first - 1] if first else State(X, ())
    rest = list(integrate(steps[first:], begin.x, velocity, refine, begin.velocities))
    assert len(rest) == 6 - first
    for state, expected in zip(rest, states[first:]):
        assert torch.equal(state.x, expected.x)
        assert all(map(torch.equal, state.velocities, expected.velocities))


@pytest.mark.parametrize(
    ("blocks", "times", "message"),
    [
        ("HH", [0, 1], "2 steps need 3 times, got 2"),
        ("H", [0, 0.5, 1], "1 steps need 2 times, got 3"),
        ("HH", [0, 0.5, 0.5], "one way"),
        ("HH", [0, 0.5, 0.2], "one way"),
        ("HH", [0.5, 0.5, 0.2], "one way"),
        ("HH", [0, float("nan"), 1], "one way"),
    ],
)
def test_impossible_times_are_refused(blocks, times, message):
    with pytest.raises(ValueError, match=message):
        plan(resolve(blocks), times)


def test_refiner_blocks_without_a_refiner_are_refused():
    with pytest.raises(ValueError, match="need a refiner"):
        next(integrate(Schedule("HR").plan(), X, velocity))


def test_an_unknown_form_of_the_refiner_is_refused():
    with pytest.raises(ValueError, match="'twice'"):
        resolve("HR", "twice")
