"""The networks as training calls them, against the velocity that their pipelines compute."""

from __future__ import annotations

import pytest
import torch
from tiny import NAMES, new_pipeline, noise_for, prompt_for, velocity_of

from flowturbo.data.loader import Batch
from flowturbo.text_to_image.encoded import Draws
from flowturbo.text_to_image.families import family_of, network_of, pack, unpack, velocity
from flowturbo.text_to_image.objective import CaptionObjective, shifted
from flowturbo.text_to_image.refined import refiner_from
from flowturbo.transport import Grid


def conditions_for(name):
    return {key: value for key, value in prompt_for(name, negative=False).items() if "negative" not in key}


@pytest.mark.parametrize("name", NAMES)
def test_velocity_is_the_pipelines(name):
    pipe = new_pipeline(name)
    network = network_of(pipe)
    family = family_of(network)
    x = noise_for(name)
    guidance = 3.0 if name in ("Flux", "Flux2") else 1.0
    settings = {"true_cfg_scale": 1.0} if name == "QwenImage" else {"guidance_scale": guidance}
    expected = velocity_of(name, pipe, family.sign if name == "StableDiffusion" else 1, **settings)(x, 0.7)
    latents = unpack(x, (1, 4, 8, 8)) if family.packed else x
    sigma = torch.tensor([0.7])
    found = velocity(network, latents, sigma, conditions_for(name), torch.tensor([guidance]))
    torch.testing.assert_close(pack(found) if family.packed else found, expected, rtol=1e-4, atol=1e-5)


def test_packing():
    x = torch.randn(2, 4, 6, 8)
    assert pack(x).shape == (2, 12, 16)
    assert torch.equal(unpack(pack(x), x.shape), x)


@pytest.mark.parametrize("name", NAMES)
def test_a_refiner_sees_in_training_what_the_hook_gives_it(name):
    """The raw answer of the network, whatever its sign; training counts velocities from noise to data."""
    pipe = new_pipeline(name)
    network = network_of(pipe)
    family = family_of(network)
    refiner = refiner_from(network)
    for parameter in refiner.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = unpack(noise_for(name), (1, 4, 8, 8)) if family.packed else noise_for(name)
    conditions = conditions_for(name)
    draws = Draws(x, torch.full((1, 3), 0.5), *[*conditions.values(), torch.empty(1, 0)][:2])
    batch = Batch(x, torch.zeros(1), torch.zeros(1), draws)
    objective = CaptionObjective(network, family, torch.float32, (1.0, 5.0))
    t = torch.tensor([0.3])
    v = objective.function(network, batch)(x, t, conditions, None)
    offset = objective.function(refiner.network, batch)(x, t, v, conditions, None)

    seen = []
    raw = network.forward
    network.forward = lambda *args, **kwargs: (seen.append((args, kwargs)), raw(*args, **kwargs))[1]
    velocity(network, x, 1 - t, conditions, torch.tensor([3.0]))
    network.forward = raw
    args, kwargs = seen[0]
    answer = network(*args, **kwargs)[0]
    expected = refiner(answer, *args, **kwargs)
    expected = unpack(expected, x.shape) if family.packed else expected
    torch.testing.assert_close(offset, -family.sign * expected, rtol=1e-4, atol=1e-5)


def test_shifted_times_are_the_grids():
    times = Grid("shift", 3.0).times(8)
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(shifted(u, 3.0), torch.tensor(times, dtype=torch.float64))
