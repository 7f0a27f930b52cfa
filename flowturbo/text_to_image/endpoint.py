"""Recipe endpoint for a pipeline's refiner: on prompts alone, through the R blocks of one schedule.

The loss, the cache of trajectories and the figures are those of `training.endpoint`; labels are numbers of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowturbo.networks.precision import autocast
from flowturbo.text_to_image.encoded import Prompts
from flowturbo.text_to_image.objective import answer
from flowturbo.training.endpoint import EndpointMatching
from flowturbo.training.trajectories import BATCH, Trajectories
from flowturbo.transport import FlowTurbo, Guidance


@dataclass(frozen=True)
class Conditioning:
    """What the networks of a run are given besides states: prompts, guidance, and the precision they compute in.

    `embedded`: the networks are asked for `scale` by an embedding of it; otherwise by the null prompt's branch.
    """

    prompts: Prompts
    scale: float
    embedded: bool
    dtype: torch.dtype

    @property
    def guides(self) -> bool:
        """Whether there are two branches."""
        return not self.embedded and self.scale > 1


@dataclass(frozen=True)
class Prompted:
    """A network of diffusers, or its refiner, as transport calls one: (x, t, *velocities, y, drop), with the numbers of
    prompts for labels.

    Under guidance the state has 2C channels: x as the prompt's own velocity moves it, and below it x as the null
    prompt's does; `merged` makes of them the state where the networks are asked. Velocities too are of both branches,
    none of them guided: each is refined from its own, as pipelines do it.
    """

    network: nn.Module
    given: Conditioning

    def __call__(self, x: Tensor, t: Tensor, *inputs: Any) -> Tensor:
        *velocities, y, _ = inputs
        rows = y + 1  # row 0 is the null prompt
        if self.given.guides:
            x = merged(x, self.given.scale)
            x, t, rows = torch.cat([x, x]), torch.cat([t, t]), torch.cat([rows, torch.zeros_like(rows)])
            velocities = [torch.cat(v.chunk(2, 1)) for v in velocities]
        guidance = torch.full_like(t, self.given.scale)
        with autocast(x.device, self.given.dtype):
            v = answer(self.network, x, t, velocities, self.given.prompts.rows(rows, x), guidance).to(x.dtype)
        return torch.cat(v.chunk(2), 1) if self.given.guides else v


def merged(x: Tensor, scale: float) -> Tensor:
    """The state (N, C, h, w) of both branches' (N, 2C, h, w): guidance is linear, in states as in velocities."""
    condition, null = x.chunk(2, 1)
    return null + scale * (condition - null)


class PromptTrajectories(Trajectories):
    """Trajectories of prompts by number; where there are two branches, both begin at one noise."""

    branches = 1

    def starts(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        noise, labels = super().starts(numbers)
        return noise[:, : self.shape[0] // self.branches].repeat(1, self.branches, 1, 1), labels


class PromptEndpoint(EndpointMatching):
    """The loss of a pipeline's refiner on whole trajectories."""

    def __init__(self, sampler: FlowTurbo, reference: FlowTurbo, trajectories: Trajectories, given: Conditioning):
        self.given = given
        super().__init__(sampler, reference, trajectories, given.dtype)

    def called(self, refiner: Any) -> Callable[..., Tensor]:
        return Prompted(refiner, self.given)

    def outcome(self, x: Tensor) -> Tensor:
        return merged(x, self.given.scale) if self.given.guides else x


def endpoint_objective(
    networks: tuple[nn.Module, nn.Module],
    given: Conditioning,
    trajectories: PromptTrajectories,
    schedules: tuple[str, str],
    refiner_step: str,
    at_once: int,
) -> PromptEndpoint:
    """The objective of a refiner for `networks`, the pipeline's and the refiner's; `schedules` are the one that is
    trained for and the reference's. `at_once` trajectories are computed at a time."""
    network, refiner = networks
    teacher, (schedule, reference), unguided = Prompted(network, given), schedules, Guidance(1.0)
    sampler = FlowTurbo(teacher, refiner, schedule, unguided, refiner_step)
    objective = PromptEndpoint(sampler, FlowTurbo(teacher, None, reference, unguided), trajectories, given)
    objective.at_once = min(BATCH, at_once)
    return objective
