"""Two steps of training a refiner for every family of networks, by the run's own update."""

from __future__ import annotations

import pytest
import torch
from tiny import NAMES, new_pipeline, noise_for, prompt_for

from flowturbo.data.loader import Batch
from flowturbo.system.distributed import World
from flowturbo.text_to_image.encoded import Draws
from flowturbo.text_to_image.families import family_of, network_of, unpack
from flowturbo.text_to_image.objective import VelocityRefinement
from flowturbo.text_to_image.options import CaptionOptimisation
from flowturbo.text_to_image.refined import refiner_from
from flowturbo.training.step import State, update


def batch_for(name, rows=3):
    """Latents of 8x8 with the embeddings of a prompt, as they come from a cache."""
    family = family_of(network_of(new_pipeline(name)))
    x = noise_for(name, rows)
    x = unpack(x, (rows, 4, 8, 8)) if family.packed else x
    prompt = prompt_for(name, rows, negative=False)
    kept = [prompt[key].float() for key in family.conditions] + [torch.empty(rows, 0)]
    generator = torch.Generator().manual_seed(1)
    noise, uniform = torch.randn(x.shape, generator=generator), torch.rand(rows, 3, generator=generator)
    return Batch(x, torch.zeros(rows), torch.arange(rows), Draws(noise, uniform, *kept[:2]))


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_every_family(name):
    teacher = network_of(new_pipeline(name)).requires_grad_(False)
    network, family = refiner_from(teacher).network, family_of(teacher)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimisation = CaptionOptimisation(global_batch_size=3, steps=2, lr=1e-3, warmup=0, clip_grad=None, ema_decay=0.0)
    state = State.new(network, torch.device("cpu"), optimisation)
    objective = VelocityRefinement(network, family, torch.float32, (1.0, 5.0), teacher, 3.0, 0.2)
    with torch.enable_grad():
        told = [
            update(state, World(0, 0, 1, torch.device("cpu")), batch_for(name), objective, optimisation)
            for _ in range(2)
        ]
    assert told[1].loss < told[0].loss  # of the same batch
    assert told[0].norm > 0
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert {f"{family.input}.weight", f"{family.output}.weight"} <= changed
    # All learn but the last block's answers for the tokens of text, which nothing goes on from.
    assert len(changed) > len(before) / 2
