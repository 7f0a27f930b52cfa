"""A refiner beside the rows that need none: how far from a finer solution each of them ends, from the same noises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from flowturbo.sampling.fidelity import Draws, Fidelity, end_points, fine_end_points
from flowturbo.sampling.generate import Networks
from flowturbo.training.curves import ERROR
from flowturbo.training.log import Measured
from flowturbo.transport.schedule import Schedule
from flowturbo.transport.spec import SamplerSettings, SamplerSpec

SEED = 0  # of the noises: the same in every run, so that runs can be compared
BATCH = 32


class Row(NamedTuple):
    """A schedule and its errors."""

    schedule: Schedule
    fidelity: Fidelity


def free_rows(schedule: Schedule) -> dict[str, Schedule]:
    """The rows that a refiner has to beat, of as many evaluations of the predictor, by the names of their figures."""
    return {"rmse_free": schedule.without_refiner("L"), "rmse_without": schedule.without_refiner()}


def compare(refined: Row, rivals: Mapping[str, Row]) -> Measured:
    """End-point RMSE of a schedule with its refiner, and of its rivals, by the names that `free_rows` has."""
    rows = {"rmse": refined, **rivals}
    words = [f"{row.schedule} {row.fidelity.rmse}" for row in rows.values()]
    words += [f"{refined.schedule}/{r.schedule} {refined.fidelity.ratio(r.fidelity):.3f}" for r in rivals.values()]
    figures: dict[str, float] = {}
    for name, row in rows.items():
        figures |= {name: row.fidelity.rmse.value, name + ERROR: row.fidelity.rmse.standard_error}
    return Measured(f"end-point RMSE from {len(refined.fidelity)} noises: {', '.join(words)}", figures)


class EndPoints:
    """That of a run's schedule, for any refiner: the fine solution and the rivals are computed at the first call.

    `networks` gives what users would sample with by now; `reference` is the schedule of the fine solution.
    """

    def __init__(
        self,
        networks: Callable[[], Networks],
        schedule: Schedule,
        settings: SamplerSettings,
        reference: str,
        count: int,
    ):
        self.networks, self.schedule, self.settings = networks, schedule, settings
        self.reference, self.count = reference, count
        self.target: Tensor | None = None
        self.rivals: dict[str, Row] = {}

    def __call__(self) -> Measured:
        """Raises NotFinite where an end point is not."""
        networks = self.networks()
        draws = Draws.random(SEED, range(self.count), networks.predictor.num_classes)
        if self.target is None:
            target = fine_end_points(networks, self.settings, *draws, BATCH, self.reference)
            self.rivals = {k: self._row(networks, row, draws, target) for k, row in free_rows(self.schedule).items()}
            self.target = target
        return compare(self._row(networks, self.schedule, draws, self.target), self.rivals)

    def _row(self, networks: Networks, schedule: Schedule, draws: Draws, target: Tensor) -> Row:
        ends = end_points(networks, SamplerSpec(str(schedule), schedule), self.settings, *draws, BATCH)
        return Row(schedule, Fidelity.of(ends, target))
