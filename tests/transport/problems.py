"""Problems with known flow maps, and how fast a trajectory comes near them."""

from __future__ import annotations

import math

import numpy as np
import torch

from flowturbo.transport import Schedule
from flowturbo.transport.blocks import integrate

STARTS = torch.linspace(-1, 1, 13, dtype=torch.float64)


def curved(x, t):
    """x' = cos(t)(1 + x²)/2: not autonomous, not linear."""
    return math.cos(t) * (1 + x**2) / 2


def curved_flow(x):
    return torch.tan(x.atan() + math.sin(1) / 2)


def final(velocity, x, blocks, refine=None, refiner_step="released", times=None):
    for state in integrate(Schedule(blocks).plan(refiner_step, times), x, velocity, refine):
        x = state.x
    return x


def stretched(n):
    """A grid that is no longer uniform however fine it is: its steps alternate, long and short, and shrink."""
    places = [(k + 0.2 * (k % 2)) / n for k in range(n + 1)]
    places[-1] = 1.0
    return [u**1.3 for u in places]


def order(problem, spell, grid=None, counts=(64, 128, 256, 512), **kwargs):
    """The slope of log error over log N."""
    velocity, flow = problem
    errors = []
    for n in counts:
        out = final(velocity, STARTS, spell(n), times=grid and grid(n), **kwargs)
        errors.append(float((out - flow(STARTS)).abs().max()))
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def perfect(velocity):
    """A refiner that knows the velocity: base + (v(x, t) - seen)."""
    return lambda x, t, seen, base: base + velocity(x, t) - seen
