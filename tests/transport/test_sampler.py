from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowturbo.models import SIT_CONFIGS, SiT
from flowturbo.refiner import VelocityRefiner
from flowturbo.transport import (
    PATHS,
    FlowTurbo,
    Guidance,
    ODESampler,
    SamplerSettings,
    SamplerSpec,
    Schedule,
    SDESampler,
)
from flowturbo.transport.blocks import State

FORMS = ("released", "consistent", "single")
SCHEDULES = ("H1P5R3", "H8", "P7", "P1", "E6", "P5R7H3", "[H1P1R1]x2", "[P1R2E1]x3", "E1R2P2R1H1", "H1R1")
UNGUIDED = Guidance(1.0)


def make_sampler(text, predictor, refiner=None, guidance=None, **settings):
    """The sampler that a text names."""
    return SamplerSpec.parse(text).build(predictor, refiner, SamplerSettings(guidance or Guidance(), **settings))


def labels(z):
    return torch.zeros(len(z), dtype=torch.int64)


def toy_predictor(x, t, y, drop):
    return torch.sin(x + t.reshape(-1, 1, 1, 1))


def toy_refiner(x, t, v, y, drop):
    return 0.1 * torch.cos(x + v)


# FlowTurbo


GOLDEN = [
    ("H1P5R3", 1.5),
    ("H2P4R2", 1.5),
    ("H1P5R3", 4.0),
    ("H3P0R0", 1.5),
    ("H2P0R2", 2.0),
    ("H0P4R0", 1.5),
    ("H0P7R0", 1.5),
]


@pytest.mark.parametrize(("schedule", "scale"), GOLDEN)
def test_latents_match_golden(schedule, scale, golden, golden_networks):
    arrays, _ = golden("flowturbo")
    sampler = FlowTurbo(*golden_networks, schedule, scale)
    out = sampler.sample(arrays["z"], arrays["y"])
    torch.testing.assert_close(out, arrays[f"latents/{schedule}/cfg{scale}"], atol=1e-4, rtol=0)


def test_every_golden_latent_is_compared(golden):
    arrays, _ = golden("flowturbo")
    assert {k for k in arrays if k.startswith("latents/")} == {f"latents/{s}/cfg{c}" for s, c in GOLDEN}


def test_the_released_sampler_is_the_default(golden, golden_networks):
    """H1P5R3 and cfg 1.5 as published; the other forms of R give other samples."""
    arrays, _ = golden("flowturbo")
    z, y, released = arrays["z"], arrays["y"], arrays["latents/H1P5R3/cfg1.5"]
    torch.testing.assert_close(FlowTurbo(*golden_networks).sample(z, y), released, atol=1e-4, rtol=0)
    for form in ("consistent", "single"):
        other = FlowTurbo(*golden_networks, refiner_step=form).sample(z, y)
        assert (other - released).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_networks_are_called_as_often_as_the_schedule_counts(schedule, form, scale, batch, recorder):
    predictor, refiner = recorder(toy_predictor), recorder(toy_refiner)
    sampler = FlowTurbo(predictor, refiner, schedule, scale, form)
    sampler.sample(*batch(2))
    counted = (len(predictor), len(refiner))
    assert counted == sampler.evaluations() == Schedule.parse(schedule).evaluations(form)


@pytest.mark.parametrize("form", FORMS)
def test_samples_do_not_depend_on_their_batch(form, predictor, refiner, batch):
    z, y = batch(5)
    sampler = FlowTurbo(predictor, refiner, "H1P3R2E1", refiner_step=form)
    together = sampler.sample(z, y)
    alone = torch.cat([sampler.sample(z[i : i + 1], y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_trajectory_yields_one_step_per_block(predictor, refiner, batch):
    z, y = batch(2)
    sampler = FlowTurbo(predictor, refiner, "[H1P2R1]x2E1")
    steps = list(sampler.trajectory(z, y))
    assert len(steps) == len(sampler.schedule) == 9
    assert all(isinstance(step, State) and step.x.shape == z.shape for step in steps)
    assert torch.equal(steps[-1].x, sampler.sample(z, y))


def test_steps_lie_on_the_uniform_grid(batch, recorder):
    z, y = batch(2)
    predictor, refiner = recorder(toy_predictor), recorder(toy_refiner)
    FlowTurbo(predictor, refiner, "H1P1R1E1").sample(z, y)
    for network, times in ((predictor, [0, 1 / 4, 2 / 4, 3 / 4]), (refiner, [2 / 4, 3 / 4])):
        assert [call[1].tolist() for call in network.calls] == [[t] * 4 for t in times]


@pytest.mark.parametrize(("block", "tolerance"), [("H", 1e-4), ("P", 1e-4), ("E", 2e-2)])
def test_the_flow_of_a_gaussian_is_reached(block, tolerance, gaussian):
    flow = gaussian(0.7, 0.4)
    z = torch.randn(8, 1, 4, 4, dtype=torch.float64)
    out = FlowTurbo(flow.network, None, f"{block}200", 1.0).sample(z, labels(z))
    torch.testing.assert_close(out, flow.flow(z), atol=tolerance, rtol=0)


def test_guidance_moves_the_sample_by_scale(predictor):
    """Constant branches: the sample is noise plus the guided constant, in the first three channels."""

    def constant(x, t, y, drop):
        dropped = torch.zeros(len(x), dtype=torch.bool) if drop is None else drop
        return torch.where(dropped, -1.0, 1.0).reshape(-1, 1, 1, 1).expand_as(x)

    z = torch.randn(2, 4, 2, 2)
    moved = torch.tensor([5.0, 5.0, 5.0, 1.0]).reshape(4, 1, 1).expand_as(z)  # -1 + 3·2
    guidance = Guidance(3.0)
    for name in ("H2P2", "E3", "dopri5"):
        out = make_sampler(name, constant, guidance=guidance).sample(z, labels(z))
        torch.testing.assert_close(out - z, moved, atol=1e-4, rtol=0)


def test_half_precision_networks_keep_the_state_in_float32(predictor, refiner, batch):
    z, y = batch(2)
    full = FlowTurbo(predictor, refiner, "H1P3R2").sample(z, y)
    half = FlowTurbo(predictor.bfloat16(), refiner.bfloat16(), "H1P3R2").sample(z, y)
    assert half.dtype == torch.float32
    assert (half - full).norm() < 0.05 * (full - z).norm()
    assert not torch.equal(half, half.bfloat16().float())


def test_the_noise_is_left_as_it_was(predictor, refiner, batch):
    z, y = batch(2)
    before = z.clone()
    for name in ("H1P1R1E1", "dopri5", "sde3"):
        make_sampler(name, predictor, refiner).sample(z, y)
        assert torch.equal(z, before)


def test_no_gradients_are_recorded(predictor, refiner, batch):
    z, y = batch(2)
    assert any(p.requires_grad for p in predictor.parameters())
    z.requires_grad_()
    for name in ("H1P1R1", "dopri5", "sde3"):
        assert not make_sampler(name, predictor, refiner, Guidance(2.0)).sample(z, y).requires_grad
    for step in FlowTurbo(predictor, refiner, "H1P1R1").trajectory(z, y):
        assert torch.is_grad_enabled()  # between the steps the caller's mode holds
        assert not step.x.requires_grad
        assert not step.v.requires_grad


def test_refiner_blocks_without_a_refiner_are_refused(predictor):
    with pytest.raises(ValueError, match="H1P5R3 has R blocks: they need a refiner"):
        FlowTurbo(predictor)
    assert FlowTurbo(predictor, schedule="H1P5").evaluations() == (7, 0)


def test_other_arguments_are_refused_at_construction(predictor, refiner):
    with pytest.raises(ValueError, match="'twice'"):
        FlowTurbo(predictor, refiner, refiner_step="twice")
    with pytest.raises(ValueError, match="Examples"):
        FlowTurbo(predictor, refiner, "R3H1")
    with pytest.raises(ValueError, match="expected blocks"):
        FlowTurbo(predictor, refiner, 8)


@pytest.mark.parametrize("name", ["H1", "dopri5", "sde2"])
@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 10]), "labels 0 to 10 must lie in 0 to 9"),
        (torch.tensor([-1, 3]), "labels -1 to 3"),
        (torch.tensor([1, 2, 3]), r"shape \(3,\)"),
        (torch.tensor([[1, 2]]), r"shape \(1, 2\)"),
        (torch.tensor(1), r"shape \(\)"),
        (torch.tensor([1.0, 2.0]), "float32"),
        (torch.tensor([True, False]), "bool"),
    ],
)
def test_labels_that_do_not_fit_are_refused(name, y, message, predictor, batch):
    z, _ = batch(2)
    with pytest.raises(ValueError, match=message):
        make_sampler(name, predictor).sample(z, y)


# dopri5


@pytest.mark.parametrize("name", PATHS)
def test_dopri5_follows_the_flow_of_a_gaussian(name, gaussian):
    flow = gaussian(0.7, 0.4, path=name)
    z = torch.randn(8, 1, 4, 4, dtype=torch.float64)
    sampler = ODESampler(flow.network, UNGUIDED, path=PATHS[name], atol=1e-9, rtol=1e-9)
    expected = flow.flow(z, *PATHS[name].interval)
    torch.testing.assert_close(sampler.sample(z, labels(z)), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
def test_dopri5_asks_for_no_velocity_outside_the_interval_of_the_path(tolerance, name, gaussian, recorder):
    """Left alone, torchdiffeq steps past the end and interpolates back."""
    network = recorder(gaussian(0.7, 0.4, path=name).network)
    z = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    ODESampler(network, UNGUIDED, path=PATHS[name], atol=tolerance, rtol=tolerance).sample(z, labels(z))
    times = [float(call[1][0]) for call in network.calls]
    low, high = PATHS[name].interval
    assert min(times) >= low
    assert max(times) <= high


def test_tighter_tolerances_take_more_evaluations_and_are_closer(gaussian, recorder):
    flow = gaussian(0.7, 0.1)
    z = torch.randn(8, 1, 4, 4, dtype=torch.float64)
    costs, errors = [], []
    for tolerance in (1e-2, 1e-4, 1e-6, 1e-8):
        network = recorder(flow.network)
        out = ODESampler(network, UNGUIDED, atol=tolerance, rtol=tolerance).sample(z, labels(z))
        costs.append(len(network))
        errors.append(float((out - flow.flow(z)).abs().max()))
    assert costs == sorted(set(costs))
    assert errors == sorted(set(errors), reverse=True)


def test_dopri5_agrees_with_many_heun_steps(predictor, batch):
    z, y = batch(2)
    heun = FlowTurbo(predictor, None, "H200", 1.5).sample(z, y)
    out = ODESampler(predictor, Guidance(1.5), atol=1e-5, rtol=1e-5).sample(z, y)
    torch.testing.assert_close(out, heun, atol=1e-2, rtol=0)


@pytest.mark.parametrize("kwargs", [{"atol": 0.0}, {"rtol": 0.0}, {"atol": -1e-3}, {"rtol": float("nan")}])
def test_tolerances_that_are_not_positive_are_refused(kwargs, predictor):
    with pytest.raises(ValueError, match="tolerances must be positive"):
        ODESampler(predictor, UNGUIDED, **kwargs)


# SDE


DIFFUSIONS = {  # the published D(t), on the linear path
    "sigma": lambda t: 1 - t,
    "linear": lambda t: 1 - t,
    "constant": lambda t: 1.0,
    "decreasing": lambda t: 0.25 * (math.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda t: math.sin(math.pi * t) ** 2,
}


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize("name", PATHS)
def test_sde_reaches_the_mean_and_variance_of_a_gaussian(name, diffusion, gaussian):
    """Standard errors for 80 000 values: 0.0028 for the mean, 0.5 % for the variance; the steps add about 1 %."""
    flow = gaussian(0.7, 0.8, path=name)
    z = torch.randn(5000, 1, 4, 4, dtype=torch.float64)
    sampler = SDESampler(flow.network, UNGUIDED, path=PATHS[name], steps=200, diffusion=diffusion, last_step=0.005)
    out = sampler.sample(z, labels(z))
    assert float(out.mean()) == pytest.approx(0.7, abs=0.015)
    assert float(out.var()) == pytest.approx(0.64, rel=0.04)
    assert float(torch.corrcoef(torch.stack([out.flatten(), z.flatten()]))[0, 1]) < 0.8  # the ODE has 1


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_sde_is_euler_maruyama_step_by_step(diffusion, gaussian, recorder):
    flow = gaussian(0.7, 0.4)
    network = recorder(flow.network)
    z = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    noise = torch.randn(4, *z.shape, dtype=torch.float64)
    sampler = SDESampler(network, UNGUIDED, steps=5, diffusion=diffusion, last_step=0.04)
    out = sampler.sample(z, labels(z), noise=lambda k: noise[k])
    x, dt = z, 0.96 / 4
    for k in range(5):
        d = DIFFUSIONS[diffusion](k * dt)
        drift = flow.velocity(x, k * dt) + d * flow.score(x, k * dt)
        x = x + dt * drift + math.sqrt(2 * d * dt) * noise[k] if k < 4 else x + 0.04 * drift
    torch.testing.assert_close(out, x, atol=1e-6, rtol=0)
    assert len(network) == 5


def test_sde_is_reproducible_by_its_noise(predictor, batch):
    z, y = batch(2)
    sampler = SDESampler(predictor, Guidance(1.5), steps=4)
    noise = torch.randn(4, *z.shape)
    first, second = (sampler.sample(z, y, noise=lambda k: noise[k]) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == z.dtype
    assert not torch.equal(first, sampler.sample(z, y))
    assert not torch.equal(sampler.sample(z, y), sampler.sample(z, y))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"diffusion": "SBDM"}, r"'SBDM' .*increasing-decreasing"),
        ({"steps": 1}, "got 1 and"),
        ({"steps": 10**6}, "got 1000000 and"),
        ({"last_step": 0.0}, r"and 0\.0"),
        ({"last_step": 1.0}, r"and 1\.0"),
    ],
)
def test_impossible_sdes_are_refused(kwargs, message, predictor):
    with pytest.raises(ValueError, match=message):
        SDESampler(predictor, UNGUIDED, **kwargs)


# By name


@pytest.mark.parametrize(
    ("text", "cls", "short"),
    [
        ("H1P5R3", FlowTurbo, "H1P5R3"),
        ("[h1 p1]x2", FlowTurbo, "H1P1H1P1"),
        ("dopri5", ODESampler, "dopri5"),
        (" DOPRI5 ", ODESampler, "dopri5"),
        ("sde", SDESampler, "sde250"),
        ("SDE40", SDESampler, "sde40"),
    ],
)
def test_samplers_by_name(text, cls, short, predictor, refiner):
    sampler = make_sampler(text, predictor, refiner)
    assert type(sampler) is cls
    assert str(sampler) == short


def test_named_samplers_take_their_options(predictor, refiner):
    guidance = Guidance(4.0, "all", (0.1, 0.9))
    turbo = make_sampler("H1R1", predictor, refiner, guidance, refiner_step="single")
    assert turbo.guidance == guidance
    assert turbo.evaluations() == (2, 1)
    path = PATHS["gvp"]
    ode = make_sampler("dopri5", predictor, None, guidance, path_type="gvp", atol=1e-3, rtol=1e-2)
    assert (ode.guidance, ode.path, ode.atol, ode.rtol) == (guidance, path, 1e-3, 1e-2)
    sde = make_sampler("sde30", predictor, None, guidance, path_type="gvp", diffusion="constant")
    assert (sde.guidance, sde.path, sde.steps, sde.diffusion) == (guidance, path, 30, "constant")


@pytest.mark.parametrize(
    ("text", "evaluations", "needs_refiner"),
    [("H1P5R3", (7, 6), True), ("P4", (5, 0), False), ("dopri5", None, False), ("sde20", (20, 0), False)],
)
def test_a_spec_knows_what_it_takes_before_there_are_networks(text, evaluations, needs_refiner):
    spec = SamplerSpec.parse(text)
    assert (spec.evaluations(), spec.needs_refiner) == (evaluations, needs_refiner)
    assert SamplerSpec.parse(str(spec)) == spec == SamplerSpec.parse(spec)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refiner_step": "twice"}, "'twice'"),
        ({"path_type": "curved"}, "'curved' .*linear, gvp, vp"),
        ({"diffusion": "SBDM"}, "'SBDM' .*increasing-decreasing"),
        ({"atol": 0.0}, "atol 0.0"),
        ({"rtol": float("nan")}, "rtol nan"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplerSettings(**settings)


@pytest.mark.parametrize("text", ["", "euler", "sde-5", "sde2.5", "dopri8", "heun", "R3"])
def test_unknown_names_are_refused_with_the_grammar(text, predictor, refiner):
    with pytest.raises(ValueError, match="Examples"):
        make_sampler(text, predictor, refiner)


@pytest.mark.parametrize("text", ["sde1", "sde0", "sde999999999"])
def test_impossible_numbers_of_sde_steps_are_refused(text, predictor):
    with pytest.raises(ValueError, match="2 to 100000 steps"):
        make_sampler(text, predictor)


# Full size


@pytest.mark.slow
def test_sit_xl_2_with_its_refiner_samples_h1p5r3_on_the_cpu(randomise, recorder):
    config = SIT_CONFIGS["SiT-XL/2"]
    networks = randomise(SiT(**config), 1, std=0.02), randomise(VelocityRefiner(**config | {"depth": 1}), 2, std=0.02)
    predictor, refiner = map(recorder, networks)
    z = torch.randn(1, 4, 32, 32)
    sampler = FlowTurbo(predictor, refiner, "H1P5R3", cfg_scale=4.0)
    out = sampler.sample(z, torch.tensor([207]))
    assert out.shape == z.shape
    assert out.isfinite().all()
    assert (out - z).abs().mean() > 1e-3  # the weights are not those of a new network, which returns zero
    assert (len(predictor), len(refiner)) == (7, 6)
    assert {len(call[0]) for call in predictor.calls + refiner.calls} == {2}


@pytest.mark.parametrize("labels", [[1, 2], (1, 2), 1, None, np.array([1, 2])], ids=lambda y: type(y).__name__)
def test_labels_that_are_no_tensor_are_named(predictor, batch, labels):
    z, _ = batch(2)
    message = f"labels of type {type(labels).__name__}: expected a tensor"
    for sampler in (FlowTurbo(predictor, schedule="E1"), ODESampler(predictor), SDESampler(predictor)):
        with pytest.raises(ValueError, match=message):
            sampler.sample(z, labels)
    with pytest.raises(ValueError, match="noise of type list: expected a tensor"):
        FlowTurbo(predictor, schedule="E1").sample(z.tolist(), torch.tensor([1, 2]))
