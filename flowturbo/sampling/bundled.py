"""The models that come with the package, by name; no network is touched."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, TypeVar

from flowturbo.sampling.generate import Networks, find_files, load_networks
from flowturbo.sampling.options import NetworkOptions
from flowturbo.sampling.solvers import parse_schedule
from flowturbo.transport.guidance import Guidance
from flowturbo.transport.samplers import FlowTurbo
from flowturbo.transport.schedule import Schedule
from flowturbo.transport.solver import Solver
from flowturbo.weights.registry import MODELS, Model

Sampler = TypeVar("Sampler", bound=FlowTurbo)


def find_bundled(name: str) -> Model:
    """What is known of the model called `name`. Raises ValueError, with the names there are, for another name."""
    if name not in MODELS:
        near = get_close_matches(name, MODELS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no model {name!r} comes with the package, which has {', '.join(MODELS)}{hint}")
    return MODELS[name]


def load_bundled(name: str, refiner: bool = True, device: str = "auto") -> Networks:
    """The networks of the model called `name`, with the names of its classes. Raises ValueError for another name."""
    model = find_bundled(name)
    options = NetworkOptions(model.predictor_ckpt, model.refiner_ckpt, model.vae_ckpt, device=device)
    return load_networks(options, find_files(options, refiner))


def from_name(
    kind: type[Sampler],
    name: str,
    schedule: str | Schedule | Solver | None = None,
    cfg_scale: float | Guidance | None = None,
    refiner_step: str | None = None,
    *,
    device: str = "auto",
    **settings: Any,
) -> Sampler:
    """A sampler of the model called `name`, along its own schedule and with its own guidance unless others are given.

    `refiner_step` is by default the form of R that the refiner was trained for; `settings` are FlowTurbo's. It samples
    pixels, about [-1, 1]. `flowturbo.FlowTurbo.from_name` is this function.
    Raises ValueError for an unknown name, and as FlowTurbo does.
    """
    model = find_bundled(name)
    chosen = model.schedule if schedule is None else schedule
    steps = parse_schedule(chosen) if isinstance(chosen, str) else chosen
    networks = load_bundled(name, steps.has_refiner, device)
    scale = model.cfg_scale if cfg_scale is None else cfg_scale
    form = refiner_step or networks.refiner_step or "released"
    return kind(networks.predictor, networks.refiner, steps, scale, form, **settings)
