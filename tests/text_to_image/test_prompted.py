"""What recipe endpoint trains through is what pipelines sample with."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import NAMES, new_pipeline, noise_for, prompt_for, random_weights, run

from flowturbo.text_to_image import apply_flowturbo, refiner_from, remove_flowturbo
from flowturbo.text_to_image.encoded import Prompts
from flowturbo.text_to_image.endpoint import Conditioning, PromptTrajectories, endpoint_objective
from flowturbo.text_to_image.families import family_of, network_of, pack, unpack
from flowturbo.text_to_image.pipelines import guidance_of, latent_shape, shift_of

NORMALISED = ("Lumina2", "QwenImage")  # their pipelines rescale what guidance makes of a velocity


def prompts_for(name):
    """Row 0 is the null prompt's, row 1 the prompt's."""
    found = prompt_for(name)
    keys = list(family_of(network_of(new_pipeline(name))).conditions)
    null = {key: found.get(f"negative_{key}", found[key]) for key in keys}
    return Prompts({key: torch.cat([null[key], found[key]]).float().numpy() for key in keys})


@pytest.mark.parametrize("name", NAMES)
def test_trajectories_are_the_pipelines(name):
    pipe = new_pipeline(name)
    if name == "QwenImage":  # its grid ends before 0: no shift does
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    network, blocks, latents = network_of(pipe), "H1P2R2", noise_for(name)
    refiner = refiner_from(network)
    random_weights(refiner.network, seed=9)
    settings = {"velocity": "data-noise"} if name == "StableDiffusion" else {}
    scheduler = apply_flowturbo(pipe, refiner, blocks, **settings)
    guidance = 1.0 if name in NORMALISED else 3.0
    call = {"true_cfg_scale" if name == "QwenImage" else "guidance_scale": guidance}
    expected = run(name, pipe, latents, scheduler.evaluations, **call)
    remove_flowturbo(pipe)

    side = 8 * (1 if pipe.vae is None else pipe.vae_scale_factor)
    schedule = f"{blocks}@shift{shift_of(pipe, (side, side), scheduler.evaluations)}"
    given = Conditioning(prompts_for(name), guidance, bool(network.config.get("guidance_embeds")), torch.float32)
    channels, height, width = latent_shape(pipe, (side, side))
    assert (height, width) == (8, 8)
    trajectories = PromptTrajectories(((1 + given.guides) * channels, 8, 8), 1, {}, 0, 4)
    trajectories.branches = 1 + given.guides
    objective = endpoint_objective(
        (network, refiner.network), given, trajectories, (schedule, "A4@shift2"), "single", at_once=2
    )
    x = unpack(latents, (1, channels, 8, 8)) if family_of(network).packed else latents
    *_, end = objective.sampler.trajectory(x.repeat(1, trajectories.branches, 1, 1), torch.zeros(1, dtype=torch.int64))
    found = objective.outcome(end.x)
    found = pack(found) if family_of(network).packed else found
    # Pipelines round their timesteps to float32, and the random networks make more of that.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
    z, _ = trajectories.starts([0])
    assert torch.equal(objective.outcome(z), objective.outcome(z[:, :channels].repeat(1, trajectories.branches, 1, 1)))


def test_the_guidance_of_pipelines():
    found = {name: guidance_of(new_pipeline(name)) for name in NAMES}
    assert (found["SD3"], found["Flux"], found["QwenImage"]) == (7.0, 3.5, 4.0)
