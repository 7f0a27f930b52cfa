"""FlowTurboScheduler through the pipelines of diffusers, against transport's own integration."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import (
    BRANCHES,
    NAMES,
    PARTS,
    ClosedForm,
    assert_equal,
    new_pipeline,
    new_transformer,
    noise_for,
    prompt_for,
    run,
    turbo,
    velocity_of,
)

from flowturbo import FlowTurboScheduler, Schedule
from flowturbo.networks.calls import CallCounter
from flowturbo.sampling.solvers import LearnedSolver, write_solver
from flowturbo.transport.blocks import BLOCKS, integrate
from flowturbo.transport.solver import Solver

SOLVERS = "".join(letter for letter, block in BLOCKS.items() if block.leads)
SECOND_ORDER = SOLVERS.replace("E", "")
EACH = [f"H1{letter}3" for letter, block in BLOCKS.items() if not block.evaluations("refiner")]
ALONE = [f"{letter}4" for letter in SOLVERS]


def evaluations_of(schedule):
    return sum(Schedule.parse(schedule).evaluations("single"))


def expected(name, pipe, schedule, latents, sign=1, **more):
    """What transport makes of the pipeline's velocity over the scheduler's grid."""
    steps = Schedule.parse(schedule).plan("single", pipe.scheduler._grid)
    x = latents
    for state in integrate(steps, latents, velocity_of(name, pipe, sign, **more)):
        x = state.x
    return x


@pytest.mark.parametrize("schedule", [*EACH, *ALONE, "H1P2H1P1E1", "E2P2@shift2"])
def test_sd3_equals_transport(schedule):
    network = new_transformer("SD3").double()
    pipe, latents = turbo(new_pipeline("SD3", network), schedule), noise_for("SD3", 2, torch.float64)
    with CallCounter(network) as calls:
        found = run("SD3", pipe, latents, evaluations_of(schedule))
    assert calls.count == evaluations_of(schedule)
    torch.testing.assert_close(found, expected("SD3", pipe, schedule, latents), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", ["H1P3E1", "H2"])
def test_every_pipeline_equals_transport(name, schedule):
    settings = {"velocity": "data-noise"} if name == "StableDiffusion" else {}
    pipe, latents = turbo(new_pipeline(name), schedule, **settings), noise_for(name)
    network = pipe.unet if name == "StableDiffusion" else pipe.transformer
    with CallCounter(network) as calls:
        found = run(name, pipe, latents, evaluations_of(schedule))
    assert calls.count == evaluations_of(schedule) * BRANCHES.get(name, 1)
    sign = -1 if name == "StableDiffusion" else 1
    assert_equal(found, expected(name, pipe, schedule, latents, sign))


def test_true_guidance_of_flux_equals_transport():
    pipe, latents, more = turbo(new_pipeline("Flux"), "H1P3"), noise_for("Flux"), {"true_cfg_scale": 2.0}
    with CallCounter(pipe.transformer) as calls:
        found = run("Flux", pipe, latents, 5, **more)
    assert calls.count == 10
    torch.testing.assert_close(found, expected("Flux", pipe, "H1P3", latents, **more), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_a_schedule_as_many_blocks_as_fit(solver):
    pipe = turbo(new_pipeline("SD3"), solver=solver)
    with CallCounter(pipe.transformer) as calls:
        run("SD3", pipe, noise_for("SD3"), 6)
    assert calls.count == len(pipe.scheduler.timesteps) == 6


COUNTS = (16, 32, 64, 128)


def order_of(errors):
    return -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]


@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_order_of_text_to_image(solver):
    field, latents = ClosedForm(), noise_for("SD3", 1, torch.float64)
    pipe = turbo(new_pipeline("SD3", field), solver=solver)
    ends = [run("SD3", pipe, latents, n, guidance_scale=1.0) for n in COUNTS]
    assert order_of([float((end - field.flow(latents)).std()) for end in ends]) > 1.9


def edit(kind, field, solver, steps, **call):
    """An image-to-image or inpainting pipeline's latents, in float64, from a fixed image and fixed noise."""
    pipe = turbo(new_pipeline("SD3", field, kind), solver=solver)
    pipe.vae.double()
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, 16, 16, generator=generator, dtype=torch.float64)
    prompt = {name: value.double() for name, value in prompt_for("SD3", negative=False).items()}
    settings = {"image": image, "guidance_scale": 1.0, "num_inference_steps": steps, "output_type": "latent"}
    return pipe(**prompt, **settings, generator=generator, **call).images


@pytest.mark.parametrize("solver", SECOND_ORDER)
@pytest.mark.parametrize("strength", [0.5, 0.75])
def test_order_of_image_to_image(solver, strength):
    errors = []
    for n in COUNTS:
        field = ClosedForm()
        end = edit("Img2Img", field, solver, n, strength=strength)
        assert field.first[1] < 1
        errors.append(float((end - field.flow(*field.first)).std()))
    assert order_of(errors) > 1.9


def masks():
    """Pixels of an image of 16x16 that are to change: half of them, and with soft edges."""
    hard = torch.zeros(1, 1, 16, 16)
    hard[..., 8:] = 1
    return hard


@pytest.fixture(scope="module")
def inpainted():
    with torch.no_grad():
        return edit("Inpaint", ClosedForm(), "P", 1024, strength=1.0, mask_image=masks())


@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_order_of_inpainting(solver, inpainted):
    """The pipeline overwrites what is known after every evaluation."""
    ends = [edit("Inpaint", ClosedForm(), solver, n, strength=1.0, mask_image=masks()) for n in COUNTS]
    assert order_of([float((end - inpainted).std()) for end in ends]) > 1.9


def softly_masked(solver, steps):
    """Text-to-image whose latents a callback draws half way to a known image, noised, wherever the mask is soft."""
    field, latents = ClosedForm(), noise_for("SD3", 1, torch.float64)
    known = torch.ones_like(latents)
    weight = torch.linspace(0, 1, 8, dtype=torch.float64)

    def blend(pipe, i, t, kwargs):
        sigma = float(pipe.scheduler.sigmas[i + 1])
        noised = (1 - sigma) * known + sigma * latents
        return {"latents": weight * kwargs["latents"] + (1 - weight) * noised}

    pipe = turbo(new_pipeline("SD3", field), solver=solver)
    return run("SD3", pipe, latents, steps, guidance_scale=1.0, callback_on_step_end=blend)


@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_callbacks_that_edit_latents_converge(solver):
    """At first order: a soft mask that is laid on after every evaluation depends itself on their number."""
    coarse, fine, finest = (softly_masked(solver, n) for n in (16, 32, 128))
    assert float((fine - finest).std()) < 0.6 * float((coarse - finest).std())


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
@pytest.mark.parametrize("schedule", [None, "H1P3", "H2E1"])
def test_flux_edits_begin_where_eulers_do(kind, schedule):
    mask = {"mask_image": masks()} if kind == "Inpaint" else {}
    count = evaluations_of(schedule) if schedule else 5
    begun = []
    for scheduler in ("Euler", "FlowTurbo"):
        pipe = new_pipeline("Flux", kind=kind)
        if scheduler == "FlowTurbo":
            turbo(pipe, schedule)
        with CallCounter(pipe.transformer) as calls:
            out = pipe(
                image=torch.zeros(1, 3, 16, 16), strength=0.6, num_inference_steps=count, output_type="latent",
                height=16, width=16, generator=torch.Generator().manual_seed(0), **mask,
                **prompt_for("Flux", negative=False),
            ).images  # fmt: skip
        assert out.isfinite().all()
        begun.append(calls.count)
    assert begun[0] == begun[1]


def test_a_start_in_the_middle_has_the_evaluations_that_are_left():
    for schedule in (*EACH, *ALONE, "H1P3R2"):
        scheduler = FlowTurboScheduler(schedule=schedule)
        count = evaluations_of(schedule)
        scheduler.set_timesteps(count)
        times = scheduler.timesteps.tolist()
        for start in range(count):
            scheduler.set_begin_index(start)
            left = scheduler.trajectory
            assert [1000 * evaluation.time for evaluation in left] == pytest.approx(times[start:], abs=1e-3)
            assert left[0].network == "predictor"


def test_a_saved_pipeline_comes_back(tmp_path):
    pipe = turbo(new_pipeline("SD3"), "H1P3")
    pipe.save_pretrained(tmp_path)
    names = pipe.load_config(tmp_path)
    assert names["scheduler"] == ["flowturbo", "FlowTurboScheduler"]
    loaded = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path, **dict.fromkeys(PARTS["SD3"]))
    assert type(loaded.scheduler) is FlowTurboScheduler
    assert loaded.scheduler.config["schedule"] == "H1P3"
    latents = noise_for("SD3")
    assert torch.equal(run("SD3", loaded, latents, 5), run("SD3", pipe, latents, 5))


def test_the_shift_is_the_models():
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    unipc = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    for model in (euler, unipc):
        scheduler = FlowTurboScheduler.from_config(model.config, schedule="E4")
        scheduler.set_timesteps(4)
        assert scheduler.sigmas.tolist() == pytest.approx([1 - t for t in Schedule.parse("E4@shift3").times()])
        scheduler = FlowTurboScheduler.from_config(model.config, schedule="E4@power2")  # in its place
        scheduler.set_timesteps(4)
        assert scheduler.sigmas.tolist() == pytest.approx([1 - t for t in Schedule.parse("E4@power2").times()])


def test_learned_solvers(tmp_path):
    """On their own times, like the schedule that one is made of."""
    solver = Solver.of("A4@power2")
    file = tmp_path / "mine.json"
    write_solver(file, LearnedSolver("mine", solver.grid, solver.coefficients))
    latents = noise_for("SD3")
    found = [run("SD3", turbo(new_pipeline("SD3"), schedule), latents, 4) for schedule in (str(file), "A4@power2")]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    scheduler = FlowTurboScheduler(schedule=str(file))
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    assert [evaluation.time for evaluation in scheduler.trajectory] == pytest.approx([1 - 0.25, 1 - 0.5625])
    with pytest.raises(ValueError, match="dopri5 is no schedule"):
        FlowTurboScheduler(schedule="dopri5")


def test_given_sigmas_and_timesteps():
    scheduler = FlowTurboScheduler(schedule="E2", shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.75, 0])
    scheduler.set_timesteps(timesteps=[1000, 500])
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.5, 0])
    scheduler = FlowTurboScheduler(schedule="H2")
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])  # one for each evaluation: the curve in two steps
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 500, 500, 0])


@pytest.mark.parametrize(
    ("settings", "call", "message"),
    [
        ({"schedule": "H1P5"}, {"num_inference_steps": 28}, "H1P5 makes 7 evaluations in 6 steps: .* 7, got 28"),
        ({"schedule": "H1P5"}, {"sigmas": [1.0, 0.5]}, "got 2"),
        ({"solver": "H"}, {"num_inference_steps": 5}, "no schedule of H blocks .* makes 5 evaluations"),
        ({"schedule": "Q3"}, {}, "cannot read schedule"),
        ({"solver": "R"}, {}, "solver 'R' is not one of"),
        ({"velocity": "up"}, {}, "velocity 'up' is not one of noise-data, data-noise"),
        ({}, {"sigmas": [1.0], "timesteps": [1000.0]}, "expected one of them"),
    ],
)
def test_what_cannot_be_is_one_line(settings, call, message):
    with pytest.raises(ValueError, match=message) as error:
        FlowTurboScheduler(**settings).set_timesteps(**call)
    assert "\n" not in str(error.value)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="config is of a model that predicts 'epsilon', not of a flow model"):
        FlowTurboScheduler.from_config(diffusers.PNDMScheduler().config)
    with pytest.raises(ValueError, match="stochastic sampling"):
        FlowTurboScheduler.from_config(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True).config)
    scheduler = FlowTurboScheduler()
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="per_token_timesteps"):
        scheduler.step(x, scheduler.timesteps[0], x, per_token_timesteps=x)
    with pytest.raises(ValueError, match="is an integer"):
        scheduler.step(x, 0, x)
