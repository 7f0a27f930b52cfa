"""The planner: which schedule comes nearest to the exact solution within a budget of time, evaluations or rows.

Candidates are measured in rounds: all on a few samples, the promising ones on more, the last ones on all. Errors are
paired, over the same samples, so that few are enough to see which candidates lag behind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from flowturbo.planning.candidates import candidates, refined
from flowturbo.planning.costs import Costs, caller, longest, measure_costs, time_calls
from flowturbo.planning.options import PlannerOptions
from flowturbo.sampling.fidelity import Draws, Fidelity, end_points, fine_end_points
from flowturbo.sampling.generate import Networks, find_files, load_networks
from flowturbo.sampling.options import NetworkOptions, SamplingOptions
from flowturbo.sampling.solvers import check_made_for, parse_sampler
from flowturbo.system.cli import warn
from flowturbo.transport.spec import SamplerSettings, SamplerSpec

FINE = "D64"  # four times the error of fidelity's, far below that of any candidate, at half the price
FIRST_ROUND = 16  # samples; each later round has four times as many
_LEAST = 4  # candidates at each cost that stay in, whatever a round finds
_RIVALS = 8  # the best ones, that a candidate is compared with
_DOUBT = 2.0  # standard errors by which a candidate must lag behind to be left out
FIRST_NUMBER = 3 * 2**40  # of the samples: far from those that users sample, and from those of a search


@dataclass(frozen=True)
class Candidate:
    """A schedule or solver, with the refiner that it goes with: its form of R and its file."""

    spec: SamplerSpec
    form: str | None = None
    refiner: str | None = None

    def __str__(self) -> str:
        return f"{self.spec} {self.form}" if self.form else str(self.spec)


@dataclass(frozen=True)
class Measured:
    """What is known of a candidate: evaluations and rows (predictor, refiner), milliseconds an image, and fidelity.

    `ms` is added up from the costs of evaluations, and so the same for all of equal cost; `timed` is measured.
    """

    candidate: Candidate
    evaluations: tuple[int, int]
    rows: tuple[int, int]
    ms: float
    fidelity: Fidelity
    timed: float | None = None


class Planner:
    """Measures the device when it is made, candidates when it runs. `seen` are all that were measured, on as many
    samples as their last round had."""

    def __init__(self, options: PlannerOptions, network_options: NetworkOptions, sampling: SamplingOptions):
        self.options, self.compile = options, network_options.compile
        files = find_files(network_options, refiner=False)
        for text in options.solvers:
            check_made_for(parse_sampler(text), files.predictor, sampling.guidance, sampling.strict, warn)
        self.networks = load_networks(network_options, files)
        self.settings = sampling.settings(self.networks.path_type or "linear")
        self.seed = sampling.seed
        self.forms = [text.partition(":")[::2] for text in options.refiners]
        self.refined: dict[str, Networks] = {}
        for _, file in self.forms:
            loaded = load_networks(
                replace(network_options, refiner_ckpt=file), replace(files, refiner=_resolved(network_options, file))
            )
            self.refined[file] = replace(self.networks, refiner=loaded.refiner)
        timed = next(iter(self.refined.values()), self.networks)
        self.costs: Costs = measure_costs(timed, self.settings, options.batch_size, self.compile)
        numbers = range(FIRST_NUMBER, FIRST_NUMBER + options.num_images)
        self.draws = Draws.random(self.seed, numbers, self.networks.predictor.num_classes)
        self.seen: dict[Candidate, Measured] = {}

    def run(self) -> list[Measured]:
        """The Pareto front within the budget, cheapest first: its last one is the best. Raises ValueError where the
        budget is too small for anything."""
        found = self.candidates()
        if not found:
            raise ValueError(f"nothing can be sampled within {self.options.budget}")
        batch = self.options.batch_size
        fine = fine_end_points(self.networks, self.settings, *self.draws, batch_size=batch, fine=FINE)
        self.seen = {}
        last = self.options.num_images
        sizes = [last] if self.options.exhaustive else _sizes(last)
        kept = found
        bar = tqdm(desc="candidates", unit="candidate", leave=False, disable=None, dynamic_ncols=True)
        with bar, torch.no_grad():
            for size in sizes:
                bar.reset(len(kept))
                bar.set_description(f"candidates, {size} samples each")
                for candidate in kept:
                    self.seen[candidate] = self.measure(candidate, fine, size)
                    bar.update()
                kept = promising([self.seen[candidate] for candidate in kept])
        return self.timed(front([row for row in self.seen.values() if len(row.fidelity) == last]))

    def candidates(self) -> list[Candidate]:
        """All that fit the budget; thoroughly for the largest number of evaluations that does."""
        most = longest(lambda spec: self.fits(Candidate(spec)))
        specs = [text for n in range(1, most + 1) for text in candidates(n, thorough=n == most)]
        found = [Candidate(parse_sampler(text)) for text in (*specs, *self.options.solvers)]
        for form, file in self.forms:
            texts = [text for n in range(2, most + 8) for text in refined(n, form)]
            found += [Candidate(parse_sampler(text), form, file) for text in texts]
        return [candidate for candidate in dict.fromkeys(found) if self.fits(candidate)]

    def fits(self, candidate: Candidate) -> bool:
        """Whether a candidate is within the budget."""
        options, settings = self.options, self.settings_of(candidate)
        if options.evaluations is not None:
            return sum(candidate.spec.evaluations(settings.refiner_step) or (math.inf,)) <= options.evaluations
        if options.rows is not None:
            return sum(candidate.spec.rows(settings) or (math.inf,)) <= options.rows
        assert options.budget_ms is not None
        return self.costs.ms(candidate.spec, settings) <= options.budget_ms

    def settings_of(self, candidate: Candidate) -> SamplerSettings:
        """What a candidate is sampled with."""
        return replace(self.settings, refiner_step=candidate.form) if candidate.form else self.settings

    def networks_of(self, candidate: Candidate) -> Networks:
        """The networks that a candidate is sampled with."""
        return self.refined[candidate.refiner] if candidate.refiner else self.networks

    def measure(self, candidate: Candidate, fine: Tensor, size: int) -> Measured:
        """On the first `size` samples."""
        settings, spec = self.settings_of(candidate), candidate.spec
        draws = Draws(self.seed, self.draws.numbers[:size], self.draws.classes[:size])
        ends = end_points(self.networks_of(candidate), spec, settings, *draws, batch_size=self.options.batch_size)
        evaluations, rows = spec.evaluations(settings.refiner_step), spec.rows(settings)
        assert evaluations is not None
        assert rows is not None
        ms = round(self.costs.ms(spec, settings), 9)  # sums of the same parts in another order are equal
        return Measured(candidate, evaluations, rows, ms, Fidelity.of(ends, fine[:size]))

    def timed(self, rows: Sequence[Measured]) -> list[Measured]:
        """The same, each timed as a whole; what then is over the budget is left out, but for the first."""
        size = self.options.batch_size
        calls = {
            k: caller(self.networks_of(c), c.spec, self.settings_of(c), size, self.compile)
            for k, c in enumerate(row.candidate for row in rows)
        }
        ms = time_calls(calls, self.networks.device, size)
        timed = [replace(row, timed=ms[k]) for k, row in enumerate(rows)]
        limit = self.options.budget_ms
        return [row for k, row in enumerate(timed) if limit is None or ms[k] <= limit] or timed[:1]


def _sizes(last: int) -> list[int]:
    sizes = [FIRST_ROUND]
    while sizes[-1] * 4 <= last:
        sizes.append(sizes[-1] * 4)
    return [*sizes[:-1], last] if sizes[-1] * 2 > last else [*sizes, last]


def promising(rows: Sequence[Measured]) -> list[Candidate]:
    """Those that no candidate of equal or lower cost is better than, beyond doubt; and the best few at each cost."""
    ordered = sorted(rows, key=lambda row: row.fidelity.rmse.value)
    kept = []
    for k, row in enumerate(ordered):
        rivals = [other for other in ordered[:k] if other.ms <= row.ms][:_RIVALS]
        if len(rivals) < _LEAST or not any(_lags(row, other) for other in rivals):
            kept.append(row.candidate)
    return kept


def _lags(row: Measured, other: Measured) -> bool:
    """Whether one is worse than another beyond doubt."""
    ratio = row.fidelity.ratio(other.fidelity)
    return ratio.value - _DOUBT * ratio.standard_error > 1


def front(rows: Sequence[Measured]) -> list[Measured]:
    """Those that are better than everything that costs no more, cheapest first."""
    found: list[Measured] = []
    for row in sorted(rows, key=lambda row: (row.ms, row.fidelity.rmse.value)):
        if not found or row.fidelity.rmse.value < found[-1].fidelity.rmse.value:
            found.append(row)
    return found


def _resolved(network_options: NetworkOptions, file: str) -> str:
    found = find_files(replace(network_options, refiner_ckpt=file), refiner=True).refiner
    assert found is not None
    return found
