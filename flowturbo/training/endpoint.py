"""The recipe `endpoint`: a refiner is trained through the R blocks of one schedule, to where a finer solution ends.

The predictor's part of the schedule, up to the first R, is computed once for every trajectory and cached, with the end
of a finer solution from the same noise. A step then evaluates the refiner alone, and needs no images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowturbo.data.loader import Batch
from flowturbo.networks.precision import autocast
from flowturbo.sampling.fidelity import Fidelity
from flowturbo.system.distributed import World
from flowturbo.training.log import Measured, RunLog
from flowturbo.training.rivals import Row, compare, free_rows
from flowturbo.training.stopping import StopRequest
from flowturbo.training.trajectories import BATCH, HELD_OUT, Trajectories
from flowturbo.transport import FlowTurbo, Schedule, endpoint_loss
from flowturbo.transport.blocks import State


class NoDraws(NamedTuple):
    """A trajectory needs no random numbers but its start."""


def no_draws(numbers: Sequence[int]) -> NoDraws:
    return NoDraws()


class EndpointMatching:
    """The loss of a refiner on whole trajectories, an Objective.

    `sampler` runs along the schedule with the frozen predictor and the refiner that is trained, which computes in
    `dtype` under autocast; `reference` makes the finer solutions.
    """

    draw = staticmethod(no_draws)
    prepares = True
    at_once = BATCH  # trajectories

    def __init__(self, sampler: FlowTurbo, reference: FlowTurbo, trajectories: Trajectories, dtype: torch.dtype):
        assert isinstance(sampler.schedule, Schedule)
        self.schedule, self.reference, self.trajectories, self.dtype = sampler.schedule, reference, trajectories, dtype
        self.sampler = self._with_refiner(sampler, sampler.refiner)
        self.first = len(self.schedule.prefix)  # the number of the first step that is trained
        self.branches = branches_at_hand(sampler, self.first)
        self.rivals: dict[str, Row] = {}  # on rank 0; they do not change while the refiner is trained

    def __call__(self, batch: Batch) -> Tensor:
        """The mean squared error (N,) of where the trajectories end."""
        return self._errors(self.sampler, batch.images, batch.labels)

    def prepare(self, folder: Path, ranks: World, stop: StopRequest, log: RunLog) -> bool:
        """Cache the trajectories in the run's folder, or go on with that; whether they are all there."""
        data, channels = self.trajectories, (2 + sum(self.branches)) * self.trajectories.shape[0]
        place = folder / ranks.agree(lambda: f"trajectories-{data.fingerprint()[:12]}")
        evaluations = sum(self.reference.evaluations()) + sum(s.block.evaluations("predictor") for s in self._prefix)
        log.say(
            f"caching {HELD_OUT + len(data):,} trajectories, {evaluations} evaluations for each: "
            f"{data.bytes(channels) / 2**20:,.1f} MiB in {place}"
        )
        if not data.cache(place, channels, lambda numbers: self.records(numbers, ranks.device), ranks, stop):
            return False
        if ranks.is_main:
            for name, rival in free_rows(self.schedule).items():
                self.rivals[name] = Row(rival, self._fidelity_of(rival, ranks.device))
                log.say(f"held-out end-point RMSE of {rival}, {name} in the log: {self.rivals[name].fidelity.rmse}")
        return True

    def figures(self, ema: nn.Module) -> Mapping[str, float]:
        """End-point RMSE on the held-out noises with these weights and of the rivals, with standard errors."""
        return self.measure(ema).figures

    @torch.no_grad()
    def measure(self, ema: nn.Module) -> Measured:
        """The same with words."""
        sampler = self._with_refiner(self.sampler, ema)
        device = next(ema.parameters()).device
        records, labels = self.trajectories.held_out()
        errors = [
            self._errors(sampler, part.to(device), y.to(device))
            for part, y in zip(records.split(self.at_once), labels.split(self.at_once))
        ]
        return compare(Row(self.schedule, _fidelity(errors)), self.rivals)

    def records(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """What is cached of trajectories: where the prefix has come to, and the end of the finer solution."""
        found = []
        for start in range(0, len(numbers), self.at_once):
            z, y = (value.to(device) for value in self.trajectories.starts(numbers[start : start + self.at_once]))
            *_, state = islice(self.sampler.trajectory(z, y), self.first)
            found.append(pack(state, self.reference.sample(z, y)))
        return torch.cat(found)

    def called(self, refiner: Any) -> Callable[..., Tensor]:
        """A refiner as transport calls it, computing in the run's precision."""

        def refine(x: Tensor, *inputs: Tensor | None) -> Tensor:
            with autocast(x.device, self.dtype):
                return refiner(x, *inputs)

        return refine

    def outcome(self, x: Tensor) -> Tensor:
        """What of a state at the end is compared."""
        return x

    @property
    def _prefix(self) -> Sequence[Any]:
        return self.sampler.steps[: self.first]

    def _errors(self, sampler: FlowTurbo, records: Tensor, labels: Tensor) -> Tensor:
        state, target = unpack(records, self.branches)
        *_, end = sampler.going_on(state, labels, self.first)
        return endpoint_loss(self.outcome(end.x), self.outcome(target))

    def _with_refiner(self, sampler: FlowTurbo, refiner: Any) -> FlowTurbo:
        refine = self.called(refiner)
        return FlowTurbo(sampler.predictor, refine, sampler.schedule, sampler.guidance, sampler.refiner_step)

    def _fidelity_of(self, schedule: Schedule, device: torch.device) -> Fidelity:
        """The errors of the predictor alone along a schedule, on the held-out noises."""
        sampler = FlowTurbo(self.sampler.predictor, None, schedule, self.sampler.guidance)
        records, _ = self.trajectories.held_out()
        errors = []
        for start, part in zip(range(0, HELD_OUT, self.at_once), records.split(self.at_once)):
            z, y = (value.to(device) for value in self.trajectories.starts(range(start, start + len(part))))
            target = unpack(part.to(device), self.branches)[1]
            errors.append(endpoint_loss(self.outcome(sampler.sample(z, y)), self.outcome(target)))
        return _fidelity(errors)


def branches_at_hand(sampler: FlowTurbo, first: int) -> tuple[int, ...]:
    """How many branches each velocity has that is at hand before step number `first`."""
    at_hand: list[int] = []
    for step, instants in zip(sampler.steps[:first], sampler.guidance.instants(sampler.steps)):
        new = [2 if instant.null or instant.weights else 1 for instant in instants]
        at_hand = [(at_hand + new)[k] for k in step.keeps]
    return tuple(at_hand)


def pack(state: State, target: Tensor) -> Tensor:
    """Records (N, channels, h, w): x, the branches of each velocity, and the target, one below another."""
    branches = [branch for v in state.velocities for branch in v.split(len(state.x))]
    return torch.cat([state.x, *branches, target], dim=1)


def unpack(records: Tensor, branches: Sequence[int]) -> tuple[State, Tensor]:
    """The state and the target of records; `branches` as of `branches_at_hand`."""
    x, *rest, target = records.chunk(2 + sum(branches), dim=1)
    parts = iter(rest)
    return State(x, tuple(torch.cat(list(islice(parts, count))) for count in branches)), target


def _fidelity(errors: Sequence[Tensor]) -> Fidelity:
    return Fidelity(torch.cat(list(errors)).double().cpu())
