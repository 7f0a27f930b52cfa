"""The mathematics of FlowTurbo: paths, grids, blocks, schedules, guidance, losses and samplers.

Pure: imports torch, torchdiffeq and itself, and receives the networks as callables. Time runs from 0 (noise)
to 1 (data) everywhere. Names load when they are first used: options and schedules need no torch.
"""

# ruff: noqa: F401

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowturbo.transport.grids import Grid
    from flowturbo.transport.guidance import Guidance
    from flowturbo.transport.losses import (
        endpoint_loss,
        flow_matching_loss,
        predictor_times,
        refiner_loss,
        refiner_times,
    )
    from flowturbo.transport.path import PATHS, Path
    from flowturbo.transport.samplers import FlowTurbo, ODESampler, Sampler, SDESampler
    from flowturbo.transport.schedule import Schedule
    from flowturbo.transport.spec import SamplerSettings, SamplerSpec

_HOMES = {
    "Grid": "grids",
    "Guidance": "guidance",
    "endpoint_loss": "losses",
    "flow_matching_loss": "losses",
    "predictor_times": "losses",
    "refiner_loss": "losses",
    "refiner_times": "losses",
    "PATHS": "path",
    "Path": "path",
    "FlowTurbo": "samplers",
    "ODESampler": "samplers",
    "SDESampler": "samplers",
    "Sampler": "samplers",
    "Schedule": "schedule",
    "SamplerSettings": "spec",
    "SamplerSpec": "spec",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
