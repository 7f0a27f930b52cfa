"""A velocity refiner for your own flow model: trained where its trajectories end, without any images.

Put your network in the place of `velocity`. The rest is the recipe `endpoint` (docs/refiners.md) in its shortest
form: the blocks before R are computed once, and the refiner learns to end where a finer solution ends. With
the digits model of the package it takes about a minute on one CPU core:

    python examples/refiner_for_your_model.py
"""

from __future__ import annotations

import argparse
import time
from itertools import islice

import torch
from torch import Tensor

from flowturbo import FlowTurbo, VelocityRefiner
from flowturbo.data.randomness import keyed_noise
from flowturbo.sampling import load_bundled
from flowturbo.transport import Schedule, endpoint_loss
from flowturbo.transport.blocks import State

SCHEDULE, FORM = Schedule.parse("H1P5R1"), "single"  # what you are going to sample with
REFERENCE = "M16"  # the finer solution
SHAPE, CLASSES = (1, 8, 8), 10  # of your model's states and labels
REFINER = {"patch_size": 2, "hidden_size": 96, "num_heads": 6, "learn_sigma": False}
HELD_OUT = 256


def velocity(x: Tensor, t: Tensor, y: Tensor, drop: Tensor | None = None) -> Tensor:
    """dx/dt at states x (N, C, H, W), times t (N,) from 0 (noise) to 1 (data), of classes y (N,).

    A network that runs from 1 to 0 is -network(x, 1 - t, y). `drop` (N,) asks for the null class; it is not used
    without guidance.
    """
    return DIGITS(x, t, y, drop)


DIGITS = load_bundled("digits", refiner=False, device="cpu").predictor


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", default="refiner.pt")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    refiner = VelocityRefiner(**REFINER, input_size=SHAPE[1], in_channels=SHAPE[0], num_classes=CLASSES)
    count = HELD_OUT + options.trajectories
    noise, labels = keyed_noise(0, range(count), SHAPE), torch.arange(count) % CLASSES

    begin = time.perf_counter()
    print(f"{count} trajectories up to the first R, and their ends by {REFERENCE}")
    sampler = FlowTurbo(velocity, refiner, SCHEDULE, 1.0, FORM)
    first = len(SCHEDULE.prefix)
    *_, state = islice(sampler.trajectory(noise, labels), first)
    ends = FlowTurbo(velocity, None, REFERENCE, 1.0).sample(noise, labels)

    optimiser = torch.optim.AdamW(refiner.parameters(), lr=1e-3, weight_decay=0)
    refiner.train()
    for step in range(1, options.steps + 1):
        rows = HELD_OUT + torch.randint(options.trajectories, (options.batch_size,))
        here = State(state.x[rows], tuple(v[rows] for v in state.velocities))
        *_, last = sampler.going_on(here, labels[rows], first)
        loss = endpoint_loss(last.x, ends[rows]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 0:
            print(f"step {step}: end-point RMSE of the batch {loss.sqrt():.4f}")
    refiner.eval()
    model = {"class": "VelocityRefiner", **refiner.config}
    torch.save({"ema": refiner.state_dict(), "config": {"model": model, "refiner_step": FORM}}, options.out)
    print(f"{time.perf_counter() - begin:.0f} seconds; saved {options.out}\n")

    print(f"{'schedule':<10}{'evaluations':>12}  end-point RMSE, {HELD_OUT} noises that were not trained on")
    blocks = SCHEDULE.blocks
    for schedule in (SCHEDULE.prefix, blocks.replace("R", "L"), blocks.replace("R", "P"), blocks):
        compared = FlowTurbo(velocity, refiner, Schedule(schedule), 1.0, FORM)
        made = compared.sample(noise[:HELD_OUT], labels[:HELD_OUT])
        errors = endpoint_loss(made, ends[:HELD_OUT])
        rmse, spread = errors.mean().sqrt(), errors.std() / HELD_OUT**0.5
        counts = " + ".join(str(each) for each in compared.evaluations() if each)
        print(f"{compared!s:<10}{counts:>12}  {rmse:.4f} ± {spread / (2 * rmse):.4f}")


if __name__ == "__main__":
    main()
