"""Sampling blocks as static graphs.

What needs generated code runs on the golden networks, whose three graphs are compiled once. The rest takes the
backend "eager", which traces graphs and runs them as they are, and in `make test-slow` the real one too.
"""

from __future__ import annotations

import copy
import gc
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch._inductor.exc
from torch._dynamo.utils import counters

import sample
from flowturbo.models import SiT
from flowturbo.networks import compiled
from flowturbo.networks.compiled import CannotCompile, StaticGraphs
from flowturbo.networks.precision import cast
from flowturbo.refiner import VelocityRefiner
from flowturbo.system.advice import advice_for
from flowturbo.transport import FlowTurbo, Guidance, SamplerSettings, SamplerSpec, Schedule
from flowturbo.transport.blocks import REFINER_STEPS
from flowturbo.transport.samplers import Eager
from flowturbo.transport.solver import Solver

SMALL = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
FORMS = REFINER_STEPS[:3]


@pytest.fixture(scope="module", autouse=True)
def whole_steps():
    """As on CUDA: a graph for each letter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StaticGraphs, "whole_steps", True)
        yield


@pytest.fixture
def as_on_a_cpu(monkeypatch):
    """A graph for the transformer blocks alone."""
    monkeypatch.setattr(StaticGraphs, "whole_steps", None)


@pytest.fixture(scope="module")
def tiny(randomise):
    """(predictor, refiner), the same for the whole module so that their graphs are shared."""
    return randomise(SiT(**SMALL), 1), randomise(VelocityRefiner(**{**SMALL, "depth": 1}), 2)


@pytest.fixture(params=["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request, compiler):
    with compiler(request.param):
        yield request.param


@pytest.fixture
def uncompiled(monkeypatch):
    """The compiled sampler's own way through the networks, without a compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@contextmanager
def counting():
    """Yields what will have been compiled at the end: the number of new graphs, and their breaks."""
    before, found = counters["stats"]["unique_graphs"], SimpleNamespace()
    counters["graph_break"].clear()
    yield found
    found.graphs, found.breaks = counters["stats"]["unique_graphs"] - before, dict(counters["graph_break"])


def both(networks, schedule, **kwargs):
    """The compiled sampler and the eager one."""
    return FlowTurbo(*networks, schedule, engine=StaticGraphs, **kwargs), FlowTurbo(*networks, schedule, **kwargs)


def assert_equal(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# Generated code


@pytest.fixture(scope="module")
def golden_run(golden, golden_networks):
    """The golden arrays, and what H1P5R3 on their networks compiled."""
    torch._dynamo.reset()
    arrays, _ = golden("flowturbo")
    with counting() as first:
        FlowTurbo(*golden_networks, "H1P5R3", engine=StaticGraphs).sample(arrays["z"], arrays["y"])
    return arrays, first


def test_a_schedule_takes_one_whole_graph_for_each_letter(golden_run):
    _, first = golden_run
    assert first.graphs == len("HPR")
    assert first.breaks == {}


def test_latents_match_golden_whatever_schedule_and_scale_without_another_graph(golden_run, golden_networks):
    """Each by a sampler of its own: they share their graphs."""
    arrays, _ = golden_run
    names = [name for name in arrays if name.startswith("latents/")]
    assert len(names) == 7
    with counting() as more:
        for name in names:
            _, schedule, scale = name.split("/")
            sampler = FlowTurbo(*golden_networks, schedule, float(scale.removeprefix("cfg")), engine=StaticGraphs)
            for _ in range(2):
                assert_equal(sampler.sample(arrays["z"], arrays["y"]), arrays[name], 1e-4)
    assert more.graphs == 0


def test_generated_code_equals_the_eager_sampler(golden_run, golden_networks, randomise):
    """Other noise, labels, schedules, and other weights in the same graphs."""
    _, _ = golden_run
    z, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 9, 5])
    config = golden_networks[0].config
    others = randomise(SiT(**config), 5), randomise(VelocityRefiner(**{**config, "depth": 1}), 6)
    with counting() as more:
        for networks in (golden_networks, others):
            for schedule, scale in (("H1P5R3", 1.5), ("P3R4", 0.0), ("[H1P1R1]x2", 3.0), ("H2", 2.0)):
                quick, eager = both(networks, schedule, cfg_scale=scale)
                assert_equal(quick.sample(z, y), eager.sample(z, y))
    assert more.graphs == 0


# The same numbers as the eager sampler


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("schedule", "kwargs"),
    [
        ("H1P5R3", {}),
        ("P2R2P1H1R1", {"cfg_scale": 4.0}),
        ("[E1R1]x2E1", {}),
        ("H1P2R2", {"cfg_scale": 1.0}),
        ("H1R2", {"cfg_scale": Guidance(channels="all")}),
        ("H1P1R3P1R1", {"cfg_scale": Guidance(interval=(0.2, 0.7))}),
        ("H1R2H1R1", {"cfg_scale": Guidance(interval=(0.0, 0.45))}),
        ("H1P2R1@shift3", {}),
    ],
    ids=str,
)
def test_compiled_latents_equal_eager_ones(backend, schedule, kwargs, form, tiny, batch):
    z, y = batch(2)
    before = z.clone()
    quick, eager = both(tiny, schedule, refiner_step=form, **kwargs)
    with counting() as found:
        latents = quick.sample(z, y)
    assert found.breaks == {}
    # At scale 4 either sampler is up to 4e-5 away from the one in float64: rounding grows with the guidance.
    assert_equal(latents, eager.sample(z, y), 1e-4 if kwargs.get("cfg_scale") == 4 else 1e-5)
    assert (latents.dtype, latents.shape) == (z.dtype, z.shape)
    assert torch.equal(z, before)
    with counting() as again:
        assert torch.equal(quick.sample(z, y), latents)
    assert again.graphs == 0


@pytest.mark.parametrize(
    ("schedule", "form", "guidance", "graphs"),
    [
        ("A3", "released", Guidance(), "A"),  # the first step is padded with a zero velocity: one graph
        ("B4", "released", Guidance(), "DAB"),
        ("M3R2", "midpoint", Guidance(), "DMR"),
        ("F2A1R1L1", "adams", Guidance(), "DFARL"),
        (Solver.of("M3"), "released", Guidance(), "S"),
        ("A5", "released", Guidance(every=2), "Aa"),  # with the null branch and without
        ("A3R1", "adams", Guidance(every=3, interval=(0.3, 1.0)), None),
        (Solver.of("A4@shift2"), "released", Guidance(2.0, every=2), "Ss"),
    ],
    ids=str,
)
def test_every_block_and_solver_compiles(backend, schedule, form, guidance, graphs, tiny, batch):
    z, y = batch(2)
    quick, eager = both(tiny, schedule, refiner_step=form, cfg_scale=guidance)
    with counting() as found:
        latents = quick.sample(z, y)
    assert found.breaks == {}
    if graphs is not None:
        assert found.graphs <= len(graphs)
    assert_equal(latents, eager.sample(z, y))


@pytest.mark.parametrize(
    ("config", "rows", "scale"),
    [
        ({"in_channels": 1}, 2, 2.0),
        ({"input_size": (4, 8), "learn_sigma": False}, 2, 2.0),
        ({"patch_size": 4}, 1, 2.0),
        ({"patch_size": 4}, 1, 1.0),
    ],
    ids=["grey", "non-square", "a single image", "a single image, unguided"],
)
def test_compiled_latents_equal_eager_ones_in_other_shapes(backend, config, rows, scale, randomise):
    config = {**SMALL, **config}
    networks = randomise(SiT(**config), 1), randomise(VelocityRefiner(**{**config, "depth": 1}), 2)
    z, y = torch.randn(rows, *networks[0].input_shape), torch.arange(rows)
    quick, eager = both(networks, "H1P2R2", cfg_scale=scale)
    latents = quick.sample(z, y)
    assert (latents - z).abs().max() > 0.1
    assert_equal(latents, eager.sample(z, y))


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_steps_repeats_and_instances_share_a_graph_for_each_letter(compiler, scale, tiny, batch):
    torch._dynamo.reset()
    with compiler("eager"):
        with counting() as first:
            FlowTurbo(*tiny, "H2P4R3E2", scale, engine=StaticGraphs).sample(*batch(2))
        with counting() as more:
            FlowTurbo(*tiny, "P1R5H2E1P7R1", scale, engine=StaticGraphs).sample(*batch(2, seed=1))
        with counting() as other_rows:
            FlowTurbo(*tiny, "H2P4R3E2", scale, engine=StaticGraphs).sample(*batch(3))
    assert (first.graphs, first.breaks) == (len("HPRE"), {})
    assert more.graphs == 0
    assert other_rows.graphs == len("HPRE")


def test_weights_in_half_stay_near_full_precision(backend, tiny, batch, randomise):
    half = randomise(SiT(**SMALL), 1), randomise(VelocityRefiner(**{**SMALL, "depth": 1}), 2)
    for network in half:
        cast(network, torch.bfloat16)
    z, y = batch(2)
    latents = FlowTurbo(*half, "H1P2R1", engine=StaticGraphs).sample(z, y)
    full = FlowTurbo(*tiny, "H1P2R1").sample(z, y)
    assert latents.dtype == torch.float32
    assert 0 < (latents - full).norm() < 0.02 * (full - z).norm()


def test_weights_changed_in_place_count_at_once(backend, batch, randomise):
    networks = randomise(SiT(**SMALL), 1), randomise(VelocityRefiner(**{**SMALL, "depth": 1}), 2)
    quick, eager = both(networks, "H1P1R1")
    z, y = batch(2)
    before = quick.sample(z, y)
    for seed, network in enumerate(networks, 7):
        randomise(network, seed)
    after = quick.sample(z, y)
    assert (after - before).abs().max() > 0.1
    assert_equal(after, eager.sample(z, y))


@pytest.mark.parametrize("kwargs", [{}, {"cfg_scale": 1.0}, {"cfg_scale": Guidance(interval=(0.2, 0.7))}], ids=str)
def test_the_trajectory_is_the_eager_one_step_by_step(backend, kwargs, tiny, batch):
    z, y = batch(2)
    quick, eager = both(tiny, "P2R2E1", **kwargs)
    steps, expected = list(quick.trajectory(z, y)), list(eager.trajectory(z, y))
    assert len(steps) == len(expected) == 5
    for step, other in zip(steps, expected):
        assert_equal(step.x, other.x)
        assert_equal(step.v, other.v, 1e-4)  # it has values up to 20
    assert torch.equal(steps[-1].x, quick.sample(z, y))


def test_what_decode_makes_of_the_latents_is_returned(backend, tiny, batch):
    z, y = batch(2)
    decode = torch.nn.PixelShuffle(2)
    quick, eager = both(tiny, "H1P1R1", decode=decode)
    latents = FlowTurbo(*tiny, "H1P1R1").sample(z, y)
    for sampler in (quick, eager):
        images = sampler.sample(z, y)
        assert images.shape == (2, 1, 16, 16)
        assert_equal(images, decode(latents))
        *_, last = sampler.trajectory(z, y)
        assert_equal(last.x, latents)


def test_no_gradients_are_recorded(backend, tiny, batch):
    z, y = batch(2)
    z.requires_grad_()
    sampler = FlowTurbo(*tiny, "H1P1R1", engine=StaticGraphs)
    assert any(p.requires_grad for network in tiny for p in network.parameters())
    assert not sampler.sample(z, y).requires_grad
    for step in sampler.trajectory(z, y):
        assert torch.is_grad_enabled()  # between the steps the caller's mode holds
        assert not step.x.requires_grad


# On a CPU


@pytest.mark.parametrize(
    ("schedule", "form", "guidance"),
    [
        ("H2P4R2", "released", Guidance()),
        ("M3R1", "midpoint", Guidance(1.0)),
        ("A5", "released", Guidance(2.0, every=2)),
        ("H1R2H1R1", "single", Guidance(interval=(0.0, 0.45))),
    ],
    ids=str,
)
def test_one_graph_serves_all_blocks_of_both_networks(backend, as_on_a_cpu, schedule, form, guidance, tiny, batch):
    torch._dynamo.reset()
    z, y = batch(2)
    quick, eager = both(tiny, schedule, refiner_step=form, cfg_scale=guidance)
    with counting() as found:
        latents = quick.sample(z, y)
    assert found.breaks == {}
    sizes = {len(y), 2 * len(y)} if guidance.every > 1 or guidance.interval[1] < 1 else {len(y)}
    assert found.graphs == len(sizes)  # one for each number of rows
    assert_equal(latents, eager.sample(z, y))
    for step, other in zip(quick.trajectory(z, y), eager.trajectory(z, y)):
        assert_equal(step.x, other.x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_graph_is_traced_twice(compiler, dtype, tiny, batch):
    """In float64 the numbers of a schedule were taken for Python floats, which Dynamo specialises in a second run."""
    torch._dynamo.reset()
    z, y = batch(2)
    networks = [copy.deepcopy(network).to(dtype) for network in tiny]
    before = counters["aot_autograd"]["total"]
    with compiler("aot_eager"):
        quick, eager = both(networks, "H1P1R1")
        latents = quick.sample(z.to(dtype), y)
    assert latents.dtype == dtype
    assert_equal(latents, eager.sample(z.to(dtype), y))
    if dtype == torch.float32:
        assert counters["aot_autograd"]["total"] - before == len("HPR")


# What is computed, and what is held


class Watch:
    """The calls of a network's `modulations`, `embed` and `transform`: numbers of rows."""

    def __init__(self, monkeypatch, network):
        self.modulations, self.embedded, self.transformed = [], [], []
        modulations, embed, transform = network.modulations, network.embed, network.transform

        def watched_modulations(t, labels):
            self.modulations.append((t, labels))
            return modulations(t, labels)

        def watched_embed(*patches):
            self.embedded.append(tuple(map(len, patches)))
            return embed(*patches)

        def watched_transform(tokens, conditioning, run):
            self.transformed.append((len(tokens), len(conditioning)))
            return transform(tokens, conditioning, run)

        monkeypatch.setattr(network, "modulations", watched_modulations)
        monkeypatch.setattr(network, "embed", watched_embed)
        monkeypatch.setattr(network, "transform", watched_transform)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schedule", ["H1P5R3", "H8", "P7", "P1", "E6", "P5R7H3", "[H1P1R1]x2", "[P1R2E1]x3"])
def test_networks_are_evaluated_as_often_as_the_schedule_counts(
    uncompiled, monkeypatch, schedule, form, scale, predictor, refiner, batch
):
    of_predictor, of_refiner = Watch(monkeypatch, predictor), Watch(monkeypatch, refiner)
    sampler = FlowTurbo(predictor, refiner, schedule, scale, form, engine=StaticGraphs)
    sampler.sample(*batch(3))
    counted = (len(of_predictor.transformed), len(of_refiner.transformed))
    assert counted == Schedule.parse(schedule).evaluations(form)
    if (schedule, form) == ("H1P5R3", "released"):
        assert counted == (7, 6)


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 3), (2.0, 6)])
def test_both_branches_start_from_one_state(uncompiled, monkeypatch, scale, rows, predictor, refiner, batch):
    """The predictor's input has N rows, all after it one for each branch, and so has a refiner's velocity."""
    of_predictor, of_refiner = Watch(monkeypatch, predictor), Watch(monkeypatch, refiner)
    FlowTurbo(predictor, refiner, "H1P2R2", scale, engine=StaticGraphs).sample(*batch(3))
    assert set(of_predictor.embedded) == {(3,)}
    assert set(of_refiner.embedded) == {(rows, rows)}
    assert set(of_predictor.transformed) == set(of_refiner.transformed) == {(rows, rows)}


@pytest.mark.parametrize(
    ("kwargs", "labels"), [({"cfg_scale": 1.0}, [4, 5, 6]), ({}, [4, 5, 6, 10])], ids=["unguided", "guided"]
)
def test_the_conditioning_of_all_times_is_computed_at_once(
    uncompiled, monkeypatch, kwargs, labels, predictor, refiner, batch
):
    """A row for each image, and where guided one for the null class of all of them."""
    watches = Watch(monkeypatch, predictor), Watch(monkeypatch, refiner)
    sampler = FlowTurbo(predictor, refiner, "H1P2R1", engine=StaticGraphs, **kwargs)
    sampler.sample(batch(3)[0], torch.tensor([4, 5, 6]))
    for watch, steps in zip(watches, ([0, 1, 2, 3], [3, 4])):  # H and P, then R
        ((t, given),) = watch.modulations
        assert given.tolist() == labels * len(steps)
        assert t.tolist() == [k / 4 for k in steps for _ in labels]
    evaluations = len(watches[0].transformed)
    FlowTurbo(predictor, refiner, "H3", engine=StaticGraphs).sample(*batch(1))
    assert len(watches[0].modulations) == 2
    assert len(watches[0].transformed) == evaluations + 6
    assert len(watches[1].modulations) == 1  # no refiner without R blocks


def test_times_outside_the_interval_are_not_guided(uncompiled, monkeypatch, predictor, refiner, batch):
    of_predictor, of_refiner = Watch(monkeypatch, predictor), Watch(monkeypatch, refiner)
    FlowTurbo(predictor, refiner, "E2R1E1", cfg_scale=Guidance(interval=(0.2, 0.6)), engine=StaticGraphs).sample(
        *batch(3)
    )
    assert of_predictor.transformed == [(3, 3), (6, 6), (3, 3)]  # at 0, 1/4, 3/4
    assert of_refiner.transformed == [(6, 6), (3, 3)]  # at 2/4, 3/4


def held():
    """The bytes of all tensors there are."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # Not those that stand for others while tracing, nor sparse ones, which have no storage.
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_compiling_copies_no_weights(backend, randomise):
    config = {**SMALL, "hidden_size": 128}
    networks = randomise(SiT(**config), 1), randomise(VelocityRefiner(**{**config, "depth": 1}), 2)
    size = sum(p.nbytes for network in networks for p in network.parameters())
    z, y = torch.randn(1, 4, 8, 8), torch.tensor([3])
    before = held()
    assert before > size
    samplers = [FlowTurbo(*networks, schedule, engine=StaticGraphs) for schedule in ("H1P2R1", "H2P1R2")]
    for sampler in samplers:
        sampler.sample(z, y)
    assert held() - before < 0.05 * size
    assert all(a is b for s in samplers for a, b in zip(s.engine.networks.values(), networks))


# CUDA graphs, with stand-ins for the device


class FakeCuda:
    """Streams and graphs as torch.cuda has them: a replay computes the recorded call anew, in its own memory."""

    def __init__(self, monkeypatch, formula, fails=None):
        self.formula, self.fails, self.calls, self.log, self.stream = formula, fails, [], [], "main"
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self.Stream(self, "side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.Stream(self, self.stream))
        monkeypatch.setattr(torch.cuda, "stream", self.on_stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream.name))

    class Stream:
        def __init__(self, cuda, name):
            self.cuda, self.name = cuda, name

        def wait_stream(self, other):
            self.cuda.log.append(f"{self.name} waits for {other.name}")

    def function(self, *inputs):
        self.log.append(f"call on {self.stream}")
        self.calls.append((inputs, self.formula(*inputs)))
        return self.calls[-1][1]

    @contextmanager
    def on_stream(self, stream):
        before, self.stream = self.stream, stream.name
        yield
        self.stream = before

    @contextmanager
    def capture(self, graph, stream=None, capture_error_mode="global"):
        assert graph is self
        assert stream.name == "side"
        self.log.append(f"capture, {capture_error_mode}")
        before, self.stream = self.stream, "capture"
        yield
        if self.fails is not None:  # as torch's: the stream of the recording stays
            raise self.fails
        self.stream = before

    def replay(self):
        inputs, output = self.calls[-1]
        output.copy_(self.formula(*inputs))


def test_a_recording_is_replayed_with_the_inputs_of_the_call(monkeypatch):
    cuda = FakeCuda(monkeypatch, lambda x, scale: x * scale)
    first = torch.arange(3.0), torch.tensor(2.0)
    replay = compiled.record(cuda.function, first)
    warm_up = ["side waits for main", *["call on side"] * 3, "main waits for side"]
    assert cuda.log == [*warm_up, "capture, thread_local", "call on capture"]
    a = replay(*first)
    b = replay(torch.ones(3), torch.tensor(5.0))
    c = replay(*first)
    assert len(cuda.calls) == 4  # the function itself is not called again
    for result, expected in ((a, [0.0, 2.0, 4.0]), (b, [5.0] * 3), (c, [0.0, 2.0, 4.0])):
        assert result.tolist() == expected  # later calls change no earlier result
    assert first[0].tolist() == [0.0, 1.0, 2.0]  # the recording has buffers of its own
    assert first[1].item() == 2.0


@pytest.mark.parametrize("message", ["operation not permitted\nCompile with TORCH_USE_CUDA_DSA", ""])
def test_what_cannot_be_recorded_runs_as_it_is_with_a_warning(monkeypatch, message):
    cuda = FakeCuda(monkeypatch, lambda x: x + 1, fails=RuntimeError(message))
    reason = message.split("\n")[0] or "RuntimeError"
    with pytest.warns(UserWarning, match=f"^no CUDA graph, sampling goes on without: {reason}$"):
        function = compiled.record(cuda.function, [torch.zeros(2)])
    assert cuda.stream == "main"
    before = len(cuda.calls)
    assert function(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(cuda.calls) == before + 1


def test_a_failure_before_the_recording_is_not_hidden(monkeypatch):
    def fail(x):
        raise ValueError("this machine cannot compile")

    with pytest.raises(ValueError, match="cannot compile"):
        compiled.record(FakeCuda(monkeypatch, fail).function, [torch.zeros(2)])


class OnCuda(torch.Tensor):
    """A tensor on the CPU that passes for one on CUDA."""

    is_cuda = True


def test_a_trajectory_is_recorded_once_for_each_shape(uncompiled, monkeypatch, predictor, refiner, batch):
    """And called with all that may change: noise and labels."""
    recorded, replayed = [], []

    def record(function, inputs):
        recorded.append(tuple(len(value) if value.ndim else value.item() for value in inputs))
        return lambda *values: replayed.append(values) or function(*values)

    monkeypatch.setattr(compiled, "record", record)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    sampler, eager = both((predictor, refiner), "H1P1R1", cfg_scale=3.0)
    for rows, seed in ((2, 0), (2, 1), (3, 0), (2, 2)):
        z, y = batch(rows, seed)
        assert_equal(sampler.sample(z.as_subclass(OnCuda), y).as_subclass(torch.Tensor), eager.sample(z, y))
        assert torch.equal(replayed[-1][0], z)
        assert torch.equal(replayed[-1][1], y)
    assert recorded == [(2, 2), (3, 3)]
    assert len(replayed) == 4
    sampler.sample(*batch(2))  # on the CPU there is nothing to record
    sampler.engine.recording = False
    sampler.sample(batch(4)[0].as_subclass(OnCuda), batch(4)[1])
    assert (len(recorded), len(replayed)) == (2, 4)


# Refusals


def toy_predictor(x, t, y, drop):
    return x


def test_networks_that_cannot_be_compiled_are_refused(predictor, refiner):
    expected = "cannot be compiled: expected a SiT or a VelocityRefiner"
    with pytest.raises(ValueError, match=f"function {expected}"):
        FlowTurbo(toy_predictor, None, "H1", engine=StaticGraphs)
    with pytest.raises(ValueError, match=f"function {expected}"):
        FlowTurbo(predictor, toy_predictor, "H1R1", engine=StaticGraphs)
    with pytest.raises(ValueError, match=f"Linear {expected}"):
        FlowTurbo(torch.nn.Linear(1, 1), refiner, "H1R1", engine=StaticGraphs)
    assert isinstance(FlowTurbo(toy_predictor, None, "H1").engine, Eager)


@pytest.mark.parametrize("name", ["dopri5", "DOPRI5", "sde250", "sde20"])
def test_samplers_without_blocks_are_refused(name, predictor):
    with pytest.raises(ValueError, match=f"^only schedules of blocks can be compiled, not {name.lower()}$"):
        SamplerSpec.parse(name).build(predictor, engine=StaticGraphs)


def test_named_samplers_are_compiled_on_demand(predictor, refiner):
    settings = SamplerSettings(Guidance(2.0, "all", (0.1, 0.9)), "single")
    sampler = SamplerSpec.parse("H1R1").build(predictor, refiner, settings, StaticGraphs)
    assert (sampler.guidance, sampler.refiner_step) == (settings.guidance, "single")
    assert isinstance(sampler.engine, StaticGraphs)
    assert isinstance(SamplerSpec.parse("H1R1").build(predictor, refiner, settings).engine, Eager)


def test_what_the_eager_sampler_refuses_is_refused(uncompiled, predictor, batch, randomise):
    z, y = batch(2)
    free = randomise(SiT(**{**SMALL, "class_dropout_prob": 0.0}), 1)
    for engine in (Eager, StaticGraphs):
        sampler = FlowTurbo(predictor, None, "H1", engine=engine)
        with pytest.raises(ValueError, match="labels 0 to 10 must lie in 0 to 9"):
            sampler.sample(z, torch.tensor([0, 10]))
        with pytest.raises(ValueError, match=r"has shape \(., 4, 8, 10\), expected \(N, 4, 8, 8\)"):
            sampler.sample(torch.randn(2, 4, 8, 10), y)
        with pytest.raises(ValueError, match="this model has no null class"):
            FlowTurbo(free, None, "H1", engine=engine).sample(z, y)
        assert FlowTurbo(free, None, "H1", 1.0, engine=engine).sample(z, y).isfinite().all()


COMPILER_OUTPUT = """C++ compile error

Command:
g++ /tmp/a.cpp -o a.so

Output:
In file included from /tmp/a.cpp:1:
/tmp/a.h:2:10: fatal error: Python.h: No such file or directory
compilation terminated.
"""


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (lambda: RuntimeError(COMPILER_OUTPUT), "/tmp/a.h:2:10: fatal error: Python.h: No such file or directory"),
        (lambda: RuntimeError("No working C++ compiler found\nin this place"), "No working C++ compiler found"),
        (lambda: RuntimeError(), "RuntimeError"),
        (lambda: torch._inductor.exc.TritonMissing(None), "Cannot find a working triton"),
    ],
    ids=["Python.h", "no compiler", "no message", "no Triton"],
)
def test_a_machine_that_cannot_compile_is_told_on_one_line(compiler, failure, reason, predictor, batch):
    def broken(graph, inputs):
        raise failure()

    torch._dynamo.reset()
    with compiler(broken):
        sampler = FlowTurbo(predictor, None, "H1", engine=StaticGraphs)
        with pytest.raises(CannotCompile, match="this machine cannot compile") as caught:
            sampler.sample(*batch(1))
    message = str(caught.value)
    assert f"are needed): {reason}" in message
    assert advice_for(caught.value) == "; go on without --compile"
    assert "\n" not in message


def test_a_defect_keeps_its_own_error(compiler, monkeypatch, predictor, batch):
    """What Dynamo cannot trace is a fault of ours, not of the machine."""
    monkeypatch.setattr(type(predictor), "embed", lambda self, *args: torch._dynamo.graph_break())
    with compiler("eager"), pytest.raises(torch._dynamo.exc.Unsupported):
        FlowTurbo(predictor, None, "H1", engine=StaticGraphs).sample(*batch(1))


@pytest.mark.slow
def test_without_a_c_compiler_the_script_says_so_on_one_line(python, tmp_path):
    flags = ["--predictor-ckpt", "digits-predictor.pt", "--vae-ckpt", "none", "--schedule", "H1P1"]
    environment = {"CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    out = tmp_path / "out.png"
    done = python(sample.__file__, "--compile", "--device", "cpu", "--out", out, *flags, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    *_, last = done.stderr.splitlines()
    assert "sample.py: error: this machine cannot compile (a C++ compiler on CPU" in last
    assert "'/nonexistent/c++'" in last
    assert last.endswith("go on without --compile")
    assert not out.exists()
