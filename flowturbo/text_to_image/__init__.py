"""FlowTurbo inside the flow pipelines of diffusers: any text-to-image model that predicts a velocity.

`FlowTurboScheduler` brings the sampling blocks into a pipeline, `apply_flowturbo` a refiner too, `refiner_from` makes
one for a transformer. Names load when they are first used.
"""

# ruff: noqa: F401

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowturbo.text_to_image.apply import apply_flowturbo, remove_flowturbo
    from flowturbo.text_to_image.refined import FlowRefiner, refiner_from
    from flowturbo.text_to_image.scheduler import FlowTurboScheduler

_HOMES = {
    "FlowRefiner": "refined",
    "FlowTurboScheduler": "scheduler",
    "apply_flowturbo": "apply",
    "refiner_from": "refined",
    "remove_flowturbo": "apply",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
