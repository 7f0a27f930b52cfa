"""A short table of schedules with their time and error on this device: half a minute for the package's models.

For people who choose by a budget and look at pictures; the planner measures more schedules on more samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flowturbo.planning.candidates import refined
from flowturbo.planning.costs import measure_costs
from flowturbo.planning.planner import FIRST_NUMBER, FIRST_ROUND, Candidate, Measured
from flowturbo.sampling.fidelity import Draws, Fidelity, end_points, fine_end_points
from flowturbo.sampling.generate import Networks
from flowturbo.sampling.solvers import parse_sampler
from flowturbo.transport.spec import SamplerSettings

FINE = "D32"  # its error is a tenth of the smallest in the table
EVALUATIONS = (3, 4, 5, 6, 8, 10, 12, 16)


def schedules(form: str | None) -> list[str]:
    """What the table holds: M, A and P with each number of evaluations, and with one R block where there is a refiner
    of that form."""
    found = [text for n in EVALUATIONS for text in (f"M{n - 1}", f"A{n}", f"H1P{n - 2}")]
    return found + [text for n in EVALUATIONS if form for text in refined(n, form) if text.endswith("R1")]


def measure_menu(
    networks: Networks,
    settings: SamplerSettings,
    batch_size: int,
    compile: bool = False,
    seed: int = 0,
    samples: int = FIRST_ROUND,
) -> Iterator[Measured]:
    """Measure the table's schedules one after the other, the cheapest first.

    Times are added up from the costs of evaluations in batches of `batch_size`; errors are those of the end points of
    `samples` noises, with random classes.
    """
    texts = schedules(None if networks.refiner is None else settings.refiner_step)
    costs = measure_costs(networks, settings, batch_size, compile)
    numbers = range(FIRST_NUMBER, FIRST_NUMBER + samples)
    draws = Draws.random(seed, numbers, networks.predictor.num_classes)
    fine = fine_end_points(networks, settings, *draws, fine=FINE)
    specs = map(parse_sampler, texts)
    for ms, spec in sorted(((round(costs.ms(s, settings), 6), s) for s in specs), key=lambda pair: pair[0]):
        evaluations, rows = spec.evaluations(settings.refiner_step), spec.rows(settings)
        assert evaluations is not None
        assert rows is not None
        fidelity = Fidelity.of(end_points(networks, spec, settings, *draws), fine)
        yield Measured(Candidate(spec), evaluations, rows, ms, fidelity)


def best_within(rows: Sequence[Measured], budget_ms: float) -> Measured:
    """The row of smallest error that takes at most so many milliseconds an image.

    Raises ValueError, naming the cheapest row, where there is none.
    """
    if not rows:
        raise ValueError("nothing is measured yet")
    fitting = [row for row in rows if row.ms <= budget_ms]
    if not fitting:
        cheapest = min(rows, key=lambda row: row.ms)
        raise ValueError(f"nothing fits {budget_ms:g} ms: the cheapest, {cheapest.candidate}, takes {cheapest.ms:.3g}")
    return min(fitting, key=lambda row: row.fidelity.rmse.value)
