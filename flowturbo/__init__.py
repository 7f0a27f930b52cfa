"""FlowTurbo: fast sampling of frozen flow models.

    from flowturbo import FlowTurbo, Schedule, SiT, VelocityRefiner
    sampler = FlowTurbo.from_name("colour")     # a small model that comes with the package

Names load when they are first used, so that importing the package costs nothing.
"""

# ruff: noqa: F401

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowturbo.configurations import SIT_CONFIGS
    from flowturbo.models import SiT
    from flowturbo.networks.load import load_network
    from flowturbo.refiner import VelocityRefiner
    from flowturbo.text_to_image.scheduler import FlowTurboScheduler
    from flowturbo.transport.guidance import Guidance
    from flowturbo.transport.samplers import FlowTurbo
    from flowturbo.transport.schedule import Schedule

__version__ = "0.2.0"

_HOMES = {
    "SIT_CONFIGS": "configurations",
    "SiT": "models",
    "VelocityRefiner": "refiner",
    "FlowTurbo": "transport.samplers",
    "FlowTurboScheduler": "text_to_image.scheduler",
    "Guidance": "transport.guidance",
    "Schedule": "transport.schedule",
    "load_network": "networks.load",
}
__all__ = ["__version__", *_HOMES]
# diffusers looks for the base class of a saved pipeline's component beside it, in the same package.
_BASES = {"SchedulerMixin": "text_to_image.scheduler"}


def __getattr__(name: str) -> Any:
    if home := _HOMES.get(name) or _BASES.get(name):
        found = getattr(import_module(f"{__name__}.{home}"), name)
        if name == "FlowTurbo":  # transport is mathematics and knows no files: what loads them is added here
            found.from_name = classmethod(import_module(f"{__name__}.sampling.bundled").from_name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
