from __future__ import annotations

import math

import pytest
import torch

from flowturbo.transport import FlowTurbo, Guidance, Schedule
from flowturbo.transport.blocks import integrate
from flowturbo.transport.branches import guide
from flowturbo.transport.guidance import Instant
from flowturbo.transport.samplers import guided as bind

NULL = 10


def unpack(x, t, *rest):
    """Toy networks: they depend on everything, and row by row."""
    t = t.reshape(-1, 1, 1, 1)
    *v, y, drop = rest
    label = (y if drop is None else torch.where(drop, NULL, y)).reshape(-1, 1, 1, 1)
    return x, t, *v, label


def predict(*args):
    x, t, label = unpack(*args)
    return torch.sin(2 * x + label) + t * label / 10


def refine(*args):
    x, t, v, label = unpack(*args)
    return 0.2 * torch.cos(x + v + label) - 0.1 * t * v


@pytest.fixture
def xy():
    return torch.randn(3, 4, 2, 2, dtype=torch.float64), torch.tensor([1, 5, 9])


def branches(network, x, t, y, *v):
    """(conditional, null) predictions; v may be a pair of branches."""
    rows = torch.full((len(x),), t, dtype=x.dtype)
    v = v[0] if v else ((), ())
    null = torch.full_like(y, NULL)
    return network(x, rows, *v[0], y, None), network(x, rows, *v[1], null, None)


def guided(condition, null, scale, channels):
    mixed = null + scale * (condition - null)
    return [torch.cat([mixed[:, :channels], own[:, channels:]], 1) for own in (condition, null)]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
@pytest.mark.parametrize(("channels", "count"), [(3, 3), ("all", 4), (1, 1), (4, 4), (9, 4)])
def test_formula(scale, channels, count):
    condition, null = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    first, second = guide(torch.cat([condition, null]), scale, channels).chunk(2)
    expected = (1 - scale) * null[:, :count] + scale * condition[:, :count]
    torch.testing.assert_close(first[:, :count], expected)
    torch.testing.assert_close(second[:, :count], expected)
    assert torch.equal(first[:, count:], condition[:, count:])
    assert torch.equal(second[:, count:], null[:, count:])


def test_three_channels_are_the_default():
    assert Guidance(1.5) == Guidance(1.5, 3, (0.0, 1.0))


def test_velocity_evaluates_both_branches_in_one_call(xy, recorder):
    x, y = xy
    network = recorder(predict)
    out = bind(Guidance(2.0), y, network).velocity(x, Instant(0.25, True))
    torch.testing.assert_close(out, torch.cat(guided(*branches(predict, x, 0.25, y), 2.0, 3)))
    ((states, times, labels, drop),) = network.calls
    assert torch.equal(states, torch.cat([x, x]))
    assert torch.equal(times, torch.full((6,), 0.25, dtype=torch.float64))
    assert torch.equal(labels, torch.cat([y, y]))
    assert drop.tolist() == [False] * 3 + [True] * 3


def test_a_refinement_shows_each_branch_its_own_velocity(xy, recorder):
    x, y = xy
    network = recorder(refine)
    v = torch.randn(6, 4, 2, 2, dtype=torch.float64)
    base = torch.randn(6, 4, 2, 2, dtype=torch.float64)
    out = bind(Guidance(2.0), y, predict, network).refine(x, Instant(0.25, True), v, base)
    expected = guided(*branches(refine, x, 0.25, y, [[half] for half in v.chunk(2)]), 2.0, 3)
    torch.testing.assert_close(out, base + torch.cat(expected))
    assert len(network) == 1


def test_the_null_half_keeps_its_own_fourth_channel_along_a_trajectory(xy):
    """Two steps with everything spelled out: Heun, then the released refiner step."""
    x, y = xy
    h = 0.5
    d = guided(*branches(predict, x, 0.0, y), 3.0, 3)
    v = guided(*branches(predict, x + h * d[0], h, y), 3.0, 3)
    x1 = x + h / 2 * (d[0] + v[0])
    seen = [[half] for half in v]
    offset = guided(*branches(refine, x1, h, y, seen), 3.0, 3)
    r = [a + b for a, b in zip(v, offset)]
    offset = guided(*branches(refine, x1 + h * r[0], 1.0, y, seen), 3.0, 3)
    r_next = [a + b for a, b in zip(r, offset)]
    x2 = x1 + h / 2 * (r[0] + r_next[0])
    steps = list(FlowTurbo(predict, refine, "H1R1", cfg_scale=3.0).trajectory(x, y))
    torch.testing.assert_close(steps[0].x, x1)
    torch.testing.assert_close(steps[0].v, torch.cat(v))
    torch.testing.assert_close(steps[1].x, x2)
    torch.testing.assert_close(steps[1].v, torch.cat(r))
    assert not torch.allclose(v[0][:, 3:], v[1][:, 3:])


def test_scale_1_is_unguided_bit_for_bit_and_costs_one_branch(predictor, refiner, batch, recorder):
    z, y = batch(3)
    networks = recorder(predictor), recorder(refiner)
    sample = FlowTurbo(*networks, "H1P2R2", cfg_scale=1.0).sample(z, y)
    for network in networks:
        assert len(network) == 4
        for x, *_, drop in network.calls:
            assert len(x) == 3
            assert drop is None

    def rows(t):
        return torch.full((3,), t)

    with torch.no_grad():
        *_, last = integrate(
            Schedule("HPPRR").plan(),
            z,
            lambda x, t: predictor(x, rows(t), y),
            lambda x, t, seen, base: base + refiner(x, rows(t), seen, y),
        )
    assert torch.equal(sample, last.x)


def test_scale_1_equals_the_limit_of_guidance(predictor, refiner, batch):
    z, y = batch(3)
    exact = FlowTurbo(predictor, refiner, "H1P2R2", cfg_scale=1.0).sample(z, y)
    near = FlowTurbo(predictor, refiner, "H1P2R2", cfg_scale=1 + 1e-6).sample(z, y)
    torch.testing.assert_close(near, exact, atol=1e-4, rtol=0)


def test_scale_0_is_the_null_class(xy):
    x, y = xy
    out = bind(Guidance(0.0, "all"), y, predict).velocity(x, Instant(0.25, True))
    torch.testing.assert_close(out, torch.cat([branches(predict, x, 0.25, y)[1]] * 2))


@pytest.mark.parametrize("channels", [3, "all"])
@pytest.mark.parametrize("form", ["released", "consistent", "single"])
def test_samples_do_not_depend_on_their_batch(channels, form, predictor, refiner, batch):
    z, y = batch(4)
    z = z.double()
    guidance = Guidance(4.0, channels, (0.2, 0.7))
    sampler = FlowTurbo(predictor.double(), refiner.double(), "H1P2R2", guidance, form)
    alone = torch.cat([sampler.sample(z[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(sampler.sample(z, y), alone, atol=1e-9, rtol=0)


# The interval


@pytest.mark.parametrize(
    ("interval", "doubled"),
    [
        ((0.0, 1.0), {0.0, 0.25, 0.5, 0.75, 1.0}),
        ((0.25, 0.75), {0.25, 0.5, 0.75}),
        ((0.3, 0.6), {0.5}),
        ((0.0, 0.0), {0.0}),
        ((0.8, 0.9), set()),
    ],
)
def test_only_times_in_the_interval_cost_both_branches(interval, doubled, predictor, refiner, batch, recorder):
    z, y = batch(3)
    networks = recorder(predictor), recorder(refiner)
    FlowTurbo(*networks, "H1P1R1E1", Guidance(2.0, interval=interval)).sample(z, y)
    seen = set()
    for x, t, *_, drop in networks[0].calls + networks[1].calls:
        time = float(t[0])
        seen.add(time)
        assert len(x) == len(t) == (6 if time in doubled else 3)
        assert (drop is not None) == (time in doubled)
    assert seen == {0.0, 0.25, 0.5, 0.75}  # E's own time is the last; H and P see their end, R both ends


@pytest.mark.parametrize("form", ["released", "consistent", "single"])
@pytest.mark.parametrize(
    "interval", [(0.0, 0.3), (0.0, 0.5), (0.0, 0.7), (0.3, 1.0), (0.5, 1.0), (0.7, 1.0), (0.6, 0.8)]
)
def test_refiner_steps_cross_the_interval_in_both_directions(form, interval, xy):
    """H1R3 with both branches always held: outside the interval the null branch is a copy of the conditional one."""
    x, y = xy
    scale, h = 2.5, 0.25

    def inside(t):
        return interval[0] <= t <= interval[1]

    def both(network, x, t, *v):
        condition, null = branches(network, x, t, y, *v)
        return guided(condition, null, scale, 3) if inside(t) else [condition, condition]

    def add(base, offset, t):
        return [a + b for a, b in zip(base, offset)] if inside(t) else [base[0] + offset[0]] * 2

    def refined(x, t, seen, base):
        return add(base, both(refine, x, t, [[half] for half in seen]), t)

    d = both(predict, x, 0.0)
    v = both(predict, x + h * d[0], h)
    x = x + h / 2 * (d[0] + v[0])
    for i in (1, 2, 3):
        t0, t1 = i * h, (i + 1) * h
        d = v if form == "single" else refined(x, t0, v, v)
        d_next = refined(x + h * d[0], t1, d if form == "consistent" else v, d)
        x = x + h / 2 * (d[0] + d_next[0])
        v = d if form == "released" else d_next
    sampler = FlowTurbo(predict, refine, "H1R3", Guidance(scale, interval=interval), form)
    torch.testing.assert_close(sampler.sample(xy[0], y), x)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale": -0.5}, r"-0\.5"),
        ({"scale": math.nan}, "nan"),
        ({"scale": math.inf}, "inf"),
        ({"channels": 0}, "channels 0"),
        ({"channels": -1}, "channels -1"),
        ({"channels": 2.5}, r"channels 2\.5"),
        ({"channels": "some"}, "'some'"),
        ({"channels": "3"}, "'3'"),
        ({"interval": (0.7, 0.3)}, r"0\.7 to 0\.3"),
        ({"interval": (-0.1, 1.0)}, r"-0\.1"),
        ({"interval": (0.0, 1.1)}, r"1\.1"),
        ({"interval": (math.nan, 1.0)}, "nan"),
    ],
)
def test_impossible_guidance_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**kwargs)
