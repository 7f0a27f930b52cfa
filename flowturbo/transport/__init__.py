"""The mathematics of FlowTurbo: paths, schedules, steps, guidance, losses and samplers.

Pure: imports torch, torchdiffeq and itself, and receives the networks as callables. Time runs from 0 (noise)
to 1 (data) everywhere.
"""

from flowturbo.transport.guidance import Guidance
from flowturbo.transport.losses import flow_matching_loss, refiner_loss, refiner_times
from flowturbo.transport.path import PATHS, Path
from flowturbo.transport.samplers import FlowTurbo, ODESampler, Sampler, SDESampler, make_sampler
from flowturbo.transport.schedule import Schedule

__all__ = [
    "PATHS",
    "FlowTurbo",
    "Guidance",
    "ODESampler",
    "Path",
    "SDESampler",
    "Sampler",
    "Schedule",
    "flow_matching_loss",
    "make_sampler",
    "refiner_loss",
    "refiner_times",
]
