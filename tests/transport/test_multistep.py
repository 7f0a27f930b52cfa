"""The blocks beside the published ones, on problems with known solutions; and solvers given by numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import STARTS, curved, curved_flow, final, order, perfect, stretched

from flowturbo.transport import FlowTurbo, Guidance, Schedule
from flowturbo.transport.blocks import integrate
from flowturbo.transport.solver import Solver
from flowturbo.transport.spec import SamplerSpec

# The Gaussian N(0, s²) from x_0 = 1 with 8 evaluations: the end error of each solver, by hand-derived formulas

GAUSSIAN = {  # schedule: s -> x(1) − s
    "H4": {0.01: 0.1153, 0.1: 0.0511, 0.3: 0.0100, 0.5: 0.0048, 1.0: -0.0100, 2.0: -0.0903},
    "D4": {0.01: -0.0089, 0.1: -0.0200, 0.3: -0.0020, 0.5: -0.0017, 1.0: -0.0021, 2.0: -0.0068},
    "H1P6": {0.01: 0.0620, 0.1: 0.0214, 0.3: 0.0097, 0.5: 0.0054, 1.0: -0.0028, 2.0: -0.0409},
    "E8": {0.01: -0.0093, 0.1: -0.0462, 0.3: -0.0653, 0.5: -0.0852, 1.0: -0.1492, 2.0: -0.3409},
    "A8": {0.01: -0.0091, 0.1: -0.0329, 0.3: -0.0193, 0.5: -0.0136, 1.0: -0.0114, 2.0: -0.0351},
    "E1A1B6": {0.01: -0.0090, 0.1: -0.0253, 0.3: -0.0027, 0.5: 0.0018, 1.0: -0.0056, 2.0: -0.0703},
    "F7": {0.01: -0.0079, 0.1: 0.0003, 0.3: 0.0019, 0.5: 0.0007, 1.0: -0.0029, 2.0: -0.0214},
    "M7": {0.01: -0.0079, 0.1: -0.0022, 0.3: -0.0004, 0.5: 0.0000, 1.0: 0.0022, 2.0: 0.0141},
}


@pytest.mark.parametrize("schedule", GAUSSIAN)
def test_the_end_errors_on_a_gaussian(schedule):
    assert Schedule.parse(schedule).evaluations() == (8, 0)
    for s, expected in GAUSSIAN[schedule].items():

        def velocity(x, t, s=s):
            return x * (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2)

        out = final(velocity, torch.ones(1, dtype=torch.float64), Schedule.parse(schedule).blocks)
        assert float(out) - s == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("grid", [None, stretched], ids=["uniform", "stretched"])
@pytest.mark.parametrize(("letter", "expected"), [("A", 2), ("B", 3), ("D", 2), ("F", 2), ("M", 2)])
def test_convergence_order(letter, expected, grid):
    counts = (32, 64, 128) if letter == "B" else (64, 128, 256)
    reached = order((curved, curved_flow), lambda n: letter * n, grid, counts)
    assert reached == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("grid", [None, stretched], ids=["uniform", "stretched"])
@pytest.mark.parametrize("mixed", ["AP", "MP", "FP", "DP", "HA", "DM", "EPPP", "ALA", "PM", "AB", "HM"])
def test_mixed_schedules_keep_second_order(mixed, grid):
    def spell(n):  # Euler once, at the start: its one step of first order costs no order of the whole
        return "E" + "P" * (n - 1) if "E" in mixed else (mixed * n)[:n]

    assert order((curved, curved_flow), spell, grid, (64, 128, 256)) > 1.75


def test_third_order_needs_a_second_order_start():
    assert order((curved, curved_flow), lambda n: "EA" + "B" * (n - 2), counts=(64, 128, 256)) < 2.3


@pytest.mark.parametrize(("refiner_step", "before", "like"), [("midpoint", "M", "M"), ("adams", "A", "A")])
def test_a_perfect_refiner_replaces_the_predictor(problem, refiner_step, before, like):
    velocity, _ = problem
    refined = final(velocity, STARTS, before * 4 + "RR", perfect(velocity), refiner_step)
    torch.testing.assert_close(refined, final(velocity, STARTS, before * 4 + like * 2), atol=1e-12, rtol=0)


def test_a_line_evaluates_nothing():
    assert Schedule.parse("A5L2").evaluations() == (5, 0)
    steps = Schedule.parse("A5L2").plan()
    assert steps[-1].times == steps[-2].times == ()


def points(schedule, velocity):
    """Where a schedule evaluates: states and times."""
    seen = []

    def recorded(x, t):
        seen.append((t, x.clone()))
        return velocity(x, t)

    final(recorded, STARTS, Schedule.parse(schedule).blocks)
    return seen


def test_the_pseudo_corrector_evaluates_where_adams_bashforth_does():
    """P (E1P6) has one evaluation more, at t = 1; leaving it out is A7."""
    pseudo, adams = points("E1P6", curved), points("A7", curved)
    # P's Euler step evaluates t0 once; its later points lie at the end of each step.
    assert [t for t, _ in adams][2:] == pytest.approx([t for t, _ in pseudo][1:-1])
    pseudo = points("P6", curved)[1:]
    for (t, x), (t_adams, x_adams) in zip(pseudo, points("A6", curved)[1:]):
        assert t == pytest.approx(t_adams)
        torch.testing.assert_close(x, x_adams, atol=1e-12, rtol=0)


# Guidance on the exact velocities of a mixture


def mixture_velocity(means, deviation):
    """The velocity of N(0, 1) to a mixture of isotropic Gaussians with these means (K, D), equal weights."""

    def velocity(x, t):
        variance = (1 - t) ** 2 + (t * deviation) ** 2
        offsets = x[:, None] - t * means
        share = torch.softmax(-offsets.square().sum(-1) / (2 * variance), dim=1)
        slope = (t * deviation**2 - (1 - t)) / variance
        return (share[..., None] * (means + slope * offsets)).sum(1)

    return velocity


def test_all_solvers_agree_on_a_guided_mixture():
    """Guided exact velocities: with many steps all reach the solution, with few M fails at strong guidance."""
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(20, 8, dtype=torch.float64, generator=generator)
    x = torch.randn(64, 8, dtype=torch.float64, generator=generator)
    one, whole = mixture_velocity(means[:1], 0.5), mixture_velocity(means, 0.5)

    def rmse(blocks, scale, exact):
        out = final(lambda x, t: whole(x, t) + scale * (one(x, t) - whole(x, t)), x, blocks)
        return float((out - exact).square().mean().sqrt())

    for scale in (1.5, 4.0):
        exact = final(lambda x, t, s=scale: whole(x, t) + s * (one(x, t) - whole(x, t)), x, "D" * 256)
        for letter in "HPADFM":
            assert rmse(letter * 64, scale, exact) < 2e-2
        if scale == 4:
            assert rmse("MMMMM", scale, exact) > 1.3 * rmse("AAAAAA", scale, exact)


# Solvers given by numbers


@pytest.mark.parametrize("schedule", ["A6", "M5", "D3", "B5", "F5", "A6@shift2", "E2A3M2", "A4L1"])
def test_a_schedule_as_a_solver_is_the_same(schedule):
    solver, text = Solver.of(schedule), Schedule.parse(schedule)
    assert solver.evaluations() == text.evaluations()
    *_, by_blocks = integrate(text.plan(), STARTS, curved)
    *_, by_numbers = integrate(solver.plan(), STARTS, curved)
    torch.testing.assert_close(by_numbers.x, by_blocks.x, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("schedule", "message"), [("H2", "a time twice"), ("A2R1", "R blocks")])
def test_what_no_solver_can_be_is_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        Solver.of(schedule)


@pytest.mark.parametrize(
    ("grid", "coefficients", "message"),
    [
        ((0.0, 1.0), ((0.9,),), r"row 0 of solver 's' adds up to 0.9, not to its step 1"),
        ((0.0, 1.0), ((math.nan,),), "row 0"),
        ((0.0, 0.5, 1.0), ((0.5,), (0.5,)), "rows of 1 to 2"),
        ((0.0, 0.5, 0.4, 1.0), ((0.5,), (0, -0.1), (0, 0, 0.6)), "rise from 0 to 1"),
        ((0.1, 1.0), ((0.9,),), "rise from 0 to 1"),
        ((0.0,), (), "rise from 0 to 1"),
    ],
)
def test_impossible_solvers_are_refused(grid, coefficients, message):
    with pytest.raises(ValueError, match=message):
        Solver("s", grid, coefficients)


def test_a_solver_samples_like_a_schedule(predictor, batch):
    z, y = batch(3)
    spec = SamplerSpec.parse(Solver.of("M4"))
    assert (str(spec), spec.evaluations(), spec.needs_refiner) == ("M4", (5, 0), False)
    by_numbers = spec.build(predictor).sample(z, y)
    torch.testing.assert_close(by_numbers, FlowTurbo(predictor, None, "M4").sample(z, y), atol=1e-5, rtol=0)


# Guidance at some of the evaluations only


def test_every_second_difference_is_extrapolated(predictor, batch):
    """Spelled out: Euler with 4 steps, the null branch at the first and third."""
    z, y = batch(3)
    null = torch.full_like(y, predictor.null_class)
    x, differences = z, []
    with torch.no_grad():
        for k in range(4):
            t = k / 4
            rows = torch.full((3,), t)
            condition = predictor(x, rows, y)
            if k % 2 == 0:
                difference = condition - predictor(x, rows, null)
                differences.append((t, difference))
            elif k == 1:
                difference = differences[0][1]
            else:
                (a, before), (b, last) = differences
                difference = last + (t - b) / (b - a) * (last - before)
            v = condition + (2.5 - 1) * torch.cat([difference[:, :3], torch.zeros_like(difference[:, 3:])], 1)
            x = x + v / 4
    sampler = FlowTurbo(predictor, None, "E4", Guidance(2.5, every=2))
    torch.testing.assert_close(sampler.sample(z, y), x, atol=1e-5, rtol=0)
    assert sampler.rows() == (6, 0)


@pytest.mark.parametrize(
    ("schedule", "guidance", "rows"),
    [
        ("A8", Guidance(1.5), (16, 0)),
        ("A8", Guidance(1.5, every=2), (12, 0)),
        ("A8", Guidance(1.0, every=2), (8, 0)),
        ("A9", Guidance(1.5, every=3), (12, 0)),
        ("A4", Guidance(1.5, interval=(0.25, 1.0)), (7, 0)),
        ("A4", Guidance(1.5, interval=(0.25, 1.0), every=2), (6, 0)),
        ("H1P2R1", Guidance(1.5, every=2), (6, 4)),
    ],
)
def test_rows_are_counted(schedule, guidance, rows, predictor, refiner, batch, recorder):
    networks = recorder(predictor), recorder(refiner)
    sampler = FlowTurbo(*networks, schedule, guidance)
    assert sampler.rows() == rows
    z, y = batch(2)
    sampler.sample(z, y)
    assert tuple(sum(len(call[0]) for call in network.calls) for network in networks) == (2 * rows[0], 2 * rows[1])


def test_extrapolated_guidance_converges_to_the_full_one(predictor, batch):
    z, y = batch(3)
    z, predictor = z.double(), predictor.double()
    errors = []
    for n in (16, 32, 64):
        full = FlowTurbo(predictor, None, f"A{n}", Guidance(2.0)).sample(z, y)
        some = FlowTurbo(predictor, None, f"A{n}", Guidance(2.0, every=2)).sample(z, y)
        errors.append(float((full - some).abs().max()))
    # Of second order, but for the second evaluation, whose difference is the first's.
    slope = -np.polyfit(np.log([16, 32, 64]), np.log(errors), 1)[0]
    assert slope > 1.5


@pytest.mark.parametrize("name", ["dopri5", "sde20"])
def test_samplers_without_blocks_refuse_it(name, predictor):
    from flowturbo.transport.spec import SamplerSettings

    with pytest.raises(ValueError, match="every 2 evaluations is for schedules of blocks alone"):
        SamplerSpec.parse(name).build(predictor, settings=SamplerSettings(Guidance(2.0, every=2)))


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_impossible_every_is_refused(every):
    with pytest.raises(ValueError, match="every"):
        Guidance(every=every)


def test_what_curved_flow_is():
    """The closed form that the orders above are measured with."""
    out = final(curved, STARTS, "D" * 2000)
    torch.testing.assert_close(out, curved_flow(STARTS), atol=1e-6, rtol=0)
