"""Edits as closures over the velocity, on fields whose velocity is known in closed form."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from flowturbo.networks import compiled as static_graphs
from flowturbo.networks.compiled import StaticGraphs
from flowturbo.transport import PATHS, FlowTurbo, Guidance, Schedule
from flowturbo.transport.blocks import BLOCKS, REFINER_STEPS, take_step
from flowturbo.transport.editing import Edited, Known, Source, noise_through, start_of

SHAPE = (2, 1, 2, 3)
SECOND_ORDER = [letter for letter, block in BLOCKS.items() if block.leads and letter != "E"]


def drawn(shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


IMAGE, NOISE = drawn(SHAPE, 1), drawn(SHAPE, 2)
HARD = torch.tensor([[1.0, 1, 0], [0, 1, 0]], dtype=torch.float64)
SOFT = torch.tensor([[1.0, 0.7, 0.5], [0.3, 0.1, 0]], dtype=torch.float64)


class Classes:
    """The flow of data from a Gaussian whose pixels are correlated, one mean and covariance for each class."""

    num_classes = 2

    def __init__(self, gaussian, path="linear"):
        self.gaussian, self.path = gaussian, path
        self.mean = torch.stack([drawn((6,), 10 + c) for c in range(2)])
        self.std = torch.stack([0.2 + drawn((6,), 20 + c).abs() for c in range(2)])
        self.basis = torch.stack([torch.linalg.qr(drawn((6, 6), 30 + c))[0] for c in range(2)])

    def __call__(self, x, t, y, drop=None):
        flow = self.gaussian(self.mean[y], self.std[y], self.path)
        along = flow.velocity(torch.einsum("nji,nj->ni", self.basis[y], x.flatten(1)), t[:, None])
        return torch.einsum("nij,nj->ni", self.basis[y], along).reshape(x.shape)


Y, OLD = torch.tensor([0, 1]), torch.tensor([1, 0])
SOURCES = {
    "sdedit": Source(IMAGE, NOISE),
    "hard mask": Source(IMAGE, NOISE, HARD),
    "soft mask": Source(IMAGE, NOISE, SOFT),
    "mask over time": Source(IMAGE, NOISE, SOFT, ramp=0.5),
    "flowedit": Source(IMAGE, NOISE, labels=OLD),
    "flowedit in a mask": Source(IMAGE, NOISE, HARD, OLD),
}


def edited(network, schedule, source, start=0.0, path="linear"):
    sampler = FlowTurbo(network, None, schedule, 1.0, path=PATHS[path])
    return sampler.over(start, PATHS[path].interval[1]).edit(Y, source)


def slope(errors, counts):
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.fixture(scope="module")
def exact(gaussian):
    """exact(name, start) -> the edit in so many steps that its error is none; each worked out once."""
    found = {}

    def solve(name, start=0.0):
        if (name, start) not in found:
            found[name, start] = edited(Classes(gaussian), "B300", SOURCES[name], start)
        return found[name, start]

    return solve


COUNTS = (32, 96)


@pytest.mark.parametrize("letter", SECOND_ORDER)
@pytest.mark.parametrize("name", SOURCES)
def test_every_edit_keeps_the_order_of_its_blocks(letter, name, gaussian, exact):
    errors = [
        float((edited(Classes(gaussian), f"{letter}{n}", SOURCES[name]) - exact(name)).abs().max()) for n in COUNTS
    ]
    assert slope(errors, COUNTS) >= 1.9


def test_order_from_a_strength_on_and_on_a_curved_path(gaussian):
    network, start = Classes(gaussian, "gvp"), start_of(0.6, PATHS["gvp"])
    reference = edited(network, "H400", SOURCES["hard mask"], start, "gvp")
    errors = [
        float((edited(network, f"H1P{n - 1}", SOURCES["hard mask"], start, "gvp") - reference).abs().max())
        for n in COUNTS
    ]
    assert slope(errors, COUNTS) >= 1.9


@pytest.mark.parametrize("letter", ["H", "P"])
def test_overwriting_the_state_between_steps_is_first_order(letter, gaussian, exact):
    """What is often done; the reason for merging in the velocity."""
    network, source = Classes(gaussian), SOURCES["hard mask"]

    def velocity(x, t):
        return network(x, torch.full((2,), t, dtype=torch.float64), Y)

    def overwritten(n):
        x, velocities = NOISE, ()
        for step in Schedule.parse(f"{letter}{n}").plan():
            x = HARD * x + (1 - HARD) * source.at(PATHS["linear"], step.start).x
            handed = [velocities[k] for k in step.takes]
            x, new = take_step(step.block, step.weights, step.times, x, handed, velocity)
            at_hand = (*velocities, *new)
            velocities = tuple(at_hand[k] for k in step.keeps)
        return HARD * x + (1 - HARD) * IMAGE

    errors = [float((overwritten(n) - exact("hard mask")).abs().max()) for n in COUNTS]
    assert slope(errors, COUNTS) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("letter", SECOND_ORDER)
def test_inversion_there_and_back_is_second_order(letter, gaussian):
    network = Classes(gaussian)

    def error(n):
        sampler = FlowTurbo(network, None, f"{letter}{n}", 1.0)
        return float((sampler.sample(sampler.over(1, 0).sample(IMAGE, Y), Y) - IMAGE).abs().max())

    assert slope([error(n) for n in COUNTS], COUNTS) >= 1.9


# What is kept, and where an edit starts


@pytest.mark.parametrize("schedule", ["E3", "H2", "H1P3@shift3"])
@pytest.mark.parametrize("name", ["hard mask", "flowedit in a mask"])
def test_what_is_kept_arrives_at_the_image(schedule, name, gaussian):
    out = edited(Classes(gaussian), schedule, SOURCES[name])
    keep = (HARD == 0).expand(SHAPE)
    torch.testing.assert_close(out[keep], IMAGE[keep], atol=1e-12, rtol=0)
    assert float((out[~keep] - IMAGE[~keep]).abs().min()) > 1e-3


def test_the_network_sees_the_image_on_its_path_where_it_is_kept(gaussian, recorder):
    network = recorder(Classes(gaussian))
    edited(network, "H1P2", SOURCES["hard mask"], 0.25)
    keep = (HARD == 0).expand(SHAPE)
    times = [0.25, 0.5, 0.75, 1.0]
    assert [float(t[0]) for _, t, _, _ in network.calls] == times
    for (x, *_), t in zip(network.calls, times):
        torch.testing.assert_close(x[keep], (t * IMAGE + (1 - t) * NOISE)[keep])


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.05])
@pytest.mark.parametrize("name", PATHS)
def test_a_strength_starts_where_it_says_and_takes_every_step(strength, name, gaussian, recorder):
    low, high = PATHS[name].interval
    start = start_of(strength, PATHS[name])
    assert start == pytest.approx(high - strength * (high - low))
    network = recorder(Classes(gaussian, name))
    edited(network, "H2", SOURCES["sdedit"], start, name)
    times = [float(t[0]) for _, t, _, _ in network.calls]
    assert times == pytest.approx([start, (start + high) / 2, (start + high) / 2, high])
    x, _ = PATHS[name].sample(NOISE, IMAGE, torch.tensor(start, dtype=torch.float64))
    torch.testing.assert_close(network.calls[0][0], x)


def test_a_strength_of_one_is_sampling(gaussian):
    network = Classes(gaussian)
    plain = FlowTurbo(network, None, "H1P5", 1.0).sample(NOISE, Y)
    torch.testing.assert_close(edited(network, "H1P5", SOURCES["sdedit"]), plain)


@pytest.mark.parametrize("strength", [0, -0.5, 1.01, math.nan, math.inf])
def test_impossible_strengths_are_refused(strength):
    with pytest.raises(ValueError, match="must lie in"):
        start_of(strength, PATHS["linear"])


def test_a_mask_over_time_lets_go_at_one_minus_its_grey():
    source = Source(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), torch.tensor([1.0, 0.6, 0.2, 0.0]), ramp=0.1)

    def share(t):
        return source.at(PATHS["linear"], t).m.flatten().tolist()

    assert share(0.0) == [1, 0, 0, 0]
    assert share(1.0) == [1, 1, 1, 0]
    assert share(0.33) == [1, 0, 0, 0]
    assert share(0.45) == [1, 1, 0, 0]
    assert share(0.9) == [1, 1, 1, 0]
    assert 0 < share(0.4)[1] < 1


# FlowEdit


def test_flowedit_between_one_class_leaves_the_image(gaussian):
    out = edited(Classes(gaussian), "H1P3", Source(IMAGE, NOISE, labels=Y), 0.1)
    torch.testing.assert_close(out, IMAGE, atol=1e-12, rtol=0)


def test_flowedit_asks_for_both_classes_in_one_evaluation(gaussian, recorder):
    network = recorder(Classes(gaussian))
    edited(network, "H1P2", SOURCES["flowedit"], 0.1)
    assert len(network) == 4
    for x, t, y, _ in network.calls:
        assert y.tolist() == [*Y.tolist(), *OLD.tolist()]
        torch.testing.assert_close(x[2:], t[0] * IMAGE + (1 - t[0]) * NOISE)


def test_flowedit_is_the_published_ode(gaussian):
    """In terms of z_edit, Euler: dz = v(z + x_t − x1, new) − v(x_t, old)."""
    network, times = Classes(gaussian), Schedule("EEEE").times(0.2, 1)
    z = IMAGE
    for t, after in zip(times, times[1:]):
        x_t, time = t * IMAGE + (1 - t) * NOISE, torch.full((2,), t, dtype=torch.float64)
        z = z + (after - t) * (network(z + x_t - IMAGE, time, Y) - network(x_t, time, OLD))
    torch.testing.assert_close(edited(network, "E4", SOURCES["flowedit"], 0.2), z)


# Refiners, guidance and engines


def test_a_refiner_sees_and_corrects_what_the_predictor_gave(predictor, refiner, batch, recorder):
    """Not the edit's velocity, which on what is kept is that of one image."""
    (image, y), (noise, old) = batch(2, 0), batch(2, 1)
    asked, refined = recorder(predictor), recorder(refiner)
    FlowTurbo(asked, refined, "H1R1", 1.0, "single").edit(y, Source(image, noise, torch.ones(1, 1, 1, 1) / 2, old))
    _, _, seen, labels, _ = refined.calls[0]
    torch.testing.assert_close(seen, predictor(*asked.calls[1]))
    assert labels.tolist() == [*y.tolist(), *old.tolist()]


@pytest.mark.parametrize("form", REFINER_STEPS)
def test_a_perfect_refiner_edits_as_the_predictor_does(form, gaussian):
    network = Classes(gaussian)
    offset = lambda x, t, v, y, drop=None: network(x, t, y) - v  # noqa: E731
    for source in SOURCES.values():
        refined = FlowTurbo(network, offset, "H1R15", 1.0, form).edit(Y, source)
        plain = edited(network, "H16", source)
        close = 0.5 if form == "released" else 0.1  # the released form is first order
        assert float((refined - plain).abs().max()) < close


@pytest.fixture
def compiled_way(monkeypatch):
    """The compiled engine's own way through the networks, in patches, without a compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("guidance", [Guidance(1.0), Guidance(2.0, 3, (0.5, 1.0))], ids=["free", "guided"])
def test_compiled_edits_equal_eager_ones(name, guidance, compiled_way, predictor, refiner, batch):
    (image, y), (noise, old) = batch(3, 0), batch(3, 1)
    mask = torch.rand(3, 1, 8, 8)
    given = SOURCES[name]
    source = Source(
        image, noise, mask if given.mask is not None else None, old if given.labels is not None else None, given.ramp
    )
    eager, compiled = (
        FlowTurbo(predictor, refiner, "H1P2R1E1", guidance, engine=engine).over(0.3, 1)
        for engine in (None, StaticGraphs)
    )
    plain = eager.edit(y, source)
    torch.testing.assert_close(compiled.edit(y, source), plain, atol=2e-5, rtol=2e-5)
    *_, last = compiled.edit_trajectory(y, source)
    torch.testing.assert_close(last.x, plain, atol=2e-5, rtol=2e-5)
    assert float(plain.std()) > 0.1


@pytest.mark.slow
def test_an_edit_is_one_whole_graph_for_each_letter(compiler, predictor, batch):
    """In a backend that traces and does not generate code; no graph may break."""
    (image, y), (noise, old) = batch(2, 0), batch(2, 1)
    source = Source(image, noise, torch.rand(1, 1, 8, 8), old, 0.1)
    eager, compiled = (FlowTurbo(predictor, None, "H2", 2.0, engine=engine) for engine in (None, StaticGraphs))
    graphs = counters["stats"]["unique_graphs"]
    with compiler("eager"):
        made = compiled.edit(y, source)
    torch.testing.assert_close(made, eager.edit(y, source), atol=2e-5, rtol=2e-5)
    assert counters["stats"]["unique_graphs"] - graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hard mask", "flowedit in a mask"])
def test_compiled_edits_equal_eager_ones_in_generated_code(name, predictor, refiner, batch):
    (image, y), (noise, old) = batch(2, 0), batch(2, 1)
    labels = old if SOURCES[name].labels is not None else None
    source = Source(image, noise, (torch.rand(1, 1, 8, 8) > 0.5).float(), labels)
    plain, compiled = (
        FlowTurbo(predictor, refiner, "H1P2R1", 1.5, engine=engine).edit(y, source) for engine in (None, StaticGraphs)
    )
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-4)


def test_a_recorded_edit_takes_other_images_masks_and_labels(monkeypatch, compiled_way, predictor, batch):
    """What CUDA graphs replay: every tensor of the source is an input."""
    recorded = []

    def record(function, inputs):
        recorded.append(len(inputs))
        return function

    monkeypatch.setattr(static_graphs, "record", record)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    on_cuda = type("OnCuda", (torch.Tensor,), {"is_cuda": property(lambda self: True)})
    sampler, eager = (FlowTurbo(predictor, None, "H2", 1.0, engine=engine) for engine in (StaticGraphs, None))
    for seed in (0, 1):
        (image, y), (noise, old) = batch(2, seed), batch(2, seed + 5)
        source = Source(image, noise, torch.rand(1, 1, 8, 8), old, 0.1)
        made = sampler.engine.sample(noise.as_subclass(on_cuda), y, source)
        torch.testing.assert_close(made.as_subclass(torch.Tensor), eager.edit(y, source), atol=2e-5, rtol=2e-5)
    assert recorded == [6]  # once: start, labels, image, noise, mask, old labels


# The parts


def test_the_rows_of_an_edit_are_its_velocity_and_below_it_the_networks():
    networks = SimpleNamespace(velocity=lambda x, t: 2 * x + t, refine=lambda x, t, seen, base: base + 10 * seen + x)
    x, known = drawn(SHAPE, 5), Known(drawn(SHAPE, 6), drawn(SHAPE, 7), SOFT, True)
    of_edit = Edited(networks, lambda t: known)
    p = torch.cat([SOFT * x + (1 - SOFT) * known.x, known.x])
    moved = lambda v: SOFT * (v[:2] - v[2:] + known.u) + (1 - SOFT) * known.u  # noqa: E731
    v = of_edit.velocity(x, 0.3)
    torch.testing.assert_close(v, torch.cat([moved(2 * p + 0.3), 2 * p + 0.3]))
    seen, base = of_edit.velocity(x, 0.1), of_edit.velocity(x, 0.2)
    refined = base[2:] + 10 * seen[2:] + p
    torch.testing.assert_close(of_edit.refine(x, 0.5, seen, base), torch.cat([moved(refined), refined]))


@pytest.mark.parametrize("name", PATHS)
def test_a_noise_through_a_state(name):
    path = PATHS[name]
    x, _ = path.sample(NOISE, IMAGE, torch.tensor(0.4, dtype=torch.float64))
    torch.testing.assert_close(noise_through(x, IMAGE, path, 0.4), NOISE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"noise": NOISE[:1]}, "differ in shape"),
        ({"labels": Y[:1]}, "2 images need as many labels"),
        ({"ramp": 1.5}, "ramp 1.5 must lie in 0 to 1"),
        ({"ramp": -0.1}, "must lie in 0 to 1"),
    ],
)
def test_sources_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Source(**{"image": IMAGE, "noise": NOISE, **values})


def test_labels_of_an_edit_may_be_the_null_class(predictor, batch):
    image, noise = batch(1, 0)[0], batch(1, 1)[0]
    sampler = FlowTurbo(predictor, None, "H1", 1.0)
    null = sampler.edit(torch.tensor([10]), Source(image, noise))
    dropped = FlowTurbo(lambda x, t, y, drop: predictor(x, t, y, torch.ones(1, dtype=torch.bool)), None, "H1", 1.0)
    torch.testing.assert_close(null, dropped.edit(torch.tensor([3]), Source(image, noise)))
    for y, labels in ((11, None), (0, torch.tensor([11]))):
        with pytest.raises(ValueError, match="must lie in 0 to 9"):
            sampler.edit(torch.tensor([y]), Source(image, noise, labels=labels))
