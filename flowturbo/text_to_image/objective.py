"""What is minimised for a flow model of diffusers, and for its refiner: transport's losses behind its conventions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowturbo.data.loader import Batch
from flowturbo.networks.precision import autocast
from flowturbo.system.distributed import World
from flowturbo.text_to_image.families import Conditions, Family, family_of, velocity
from flowturbo.training.log import RunLog
from flowturbo.training.stopping import StopRequest
from flowturbo.transport import flow_matching_loss, predictor_times, refiner_loss, refiner_times
from flowturbo.transport.grids import GRIDS


@dataclass(frozen=True)
class CaptionObjective:
    """What the objectives share. `network` is trained: its weights are in float32, and computed with in `dtype`.

    `guidance` is the range that a guidance embedding's value is drawn from.
    """

    network: nn.Module
    family: Family
    dtype: torch.dtype
    guidance: tuple[float, float]

    prepares = False  # everything is encoded already

    def prepare(self, folder: Path, ranks: World, stop: StopRequest, log: RunLog) -> bool:
        return True

    def figures(self, ema: nn.Module) -> Mapping[str, float]:
        return {}

    def conditions(self, batch: Batch) -> Conditions:
        """A prompt's embeddings by name."""
        return dict(zip(self.family.conditions, (batch.draws.states, batch.draws.summary)))

    def function(self, network: nn.Module, batch: Batch) -> Callable[..., Tensor]:
        """`answer` of a network as transport calls it: (x, t, *velocities, y, drop)."""
        low, high = self.guidance

        def call(x: Tensor, t: Tensor, *inputs: Any) -> Tensor:
            *velocities, conditions, _ = inputs
            guidance = low + (high - low) * batch.draws.uniform[:, 2]
            with autocast(x.device, self.dtype):
                return answer(network, x, t, velocities, conditions, guidance)

        return call


def answer(
    network: nn.Module, x: Tensor, t: Tensor, velocities: Sequence[Tensor], conditions: Conditions, guidance: Tensor
) -> Tensor:
    """dx/dt (N, C, h, w) of a network at times t (N,) from 0 (noise) to 1 (data); or, given a velocity, the offset of a
    refiner.

    A network's own outputs are its family's sign times dx/dsigma = -dx/dt, and so is what a refiner sees.
    """
    sign = -family_of(network).sign
    return -velocity(network, torch.cat([x, *(sign * v for v in velocities)], 1), 1 - t, conditions, guidance)


@dataclass(frozen=True)
class VelocityMatching(CaptionObjective):
    """A flow model's: velocity matching."""

    time_distribution: str = "logit-normal"

    def __call__(self, batch: Batch) -> Tensor:
        t = predictor_times(batch.draws.uniform[:, 0], self.time_distribution)
        conditions: Any = self.conditions(batch)  # in the place of labels
        return flow_matching_loss(
            self.function(self.network, batch), batch.images, conditions, x0=batch.draws.noise, t=t
        )


@dataclass(frozen=True)
class VelocityRefinement(CaptionObjective):
    """A refiner's, as the paper has it: the teacher's velocity, from the one that it had an Euler step earlier.

    t and t + Δ are drawn before the shift and then shifted, as the points of a sampler's grid are: with `max_dt` of
    1 / N and more, Δ covers the neighbouring points of N steps wherever they lie.
    """

    teacher: nn.Module
    shift: float
    max_dt: float

    def __call__(self, batch: Batch) -> Tensor:
        u, du = refiner_times(batch.draws.uniform[:, 0], batch.draws.uniform[:, 1], self.max_dt)
        t, end = (shifted(place, self.shift) for place in (u, u + du))
        refiner, teacher = (self.function(network, batch) for network in (self.network, self.teacher))
        conditions: Any = self.conditions(batch)  # in the place of labels
        return refiner_loss(refiner, teacher, batch.images, conditions, x0=batch.draws.noise, t=t, dt=end - t)


def shifted(u: Tensor, shift: float) -> Tensor:
    """Times of a grid of equal distances u, after a model's shift of noise levels."""
    return GRIDS["shift"](u, shift)  # type: ignore[arg-type,return-value]
