"""Solvers given by numbers: times and a triangle of coefficients, as a search finds them. No torch is imported.

    x_{k+1} = x_k + Σ_{j ≤ k} c_kj v_j,   v_k = v(x_k, t_k),   Σ_j c_kj = t_{k+1} − t_k

One evaluation a step, and every velocity so far may be used again. Each schedule of blocks whose evaluations come at
later and later times is one of them: A6, M5, D3 are.

Sources: Bespoke Non-Stationary Solvers (Shaul et al., 2024); NeuralSolver (arXiv 2505.21114).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowturbo.transport.blocks import Block, Stage, Step
from flowturbo.transport.schedule import Schedule

STEP = Block("learned", (Stage(0, 0),), 1)  # its weights come from the solver
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Solver:
    """N + 1 `grid` times from 0 (noise) to 1 (data), and N rows of `coefficients`, row k with k + 1 numbers.

    str() is its name. Raises ValueError for times that do not rise from 0 to 1, and for rows of another length or
    that do not add up to their step.
    """

    name: str
    grid: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        steps = len(self.grid) - 1
        if steps < 1 or self.grid[0] != 0 or self.grid[-1] != 1 or not all(a < b for a, b in _pairs(self.grid)):
            raise ValueError(f"the times of solver {self.name!r} must rise from 0 to 1")
        if [len(row) for row in self.coefficients] != list(range(1, steps + 1)):
            raise ValueError(f"solver {self.name!r} has {steps} steps: expected rows of 1 to {steps} coefficients")
        for k, (row, (start, end)) in enumerate(zip(self.coefficients, _pairs(self.grid))):
            total, step = math.fsum(row), end - start
            if not abs(total - step) <= _TOLERANCE:  # also for nan
                raise ValueError(f"row {k} of solver {self.name!r} adds up to {total:.6g}, not to its step {step:.6g}")

    @classmethod
    def of(cls, schedule: str | Schedule) -> Solver:
        """A schedule of blocks as a solver. Raises ValueError where it evaluates a refiner, or a time twice."""
        schedule = Schedule.parse(schedule)
        if schedule.has_refiner:
            raise ValueError(f"schedule {schedule} has R blocks: a solver evaluates the predictor alone")
        moved: list[float] = []  # x − x_0 by the velocities so far
        points: list[list[float]] = []  # the same where each of them is evaluated
        times: list[float] = []
        at_hand: list[int] = []
        for step in schedule.plan():
            used = [at_hand[k] for k in step.takes]
            for t, row in zip(step.times, step.weights):
                points.append(_added(moved, used, row))
                times.append(t)
                used.append(len(times) - 1)
            moved = _added(moved, used, step.weights[-1])
            own = range(len(times) - len(step.times), len(times))
            at_hand = [[*at_hand, *own][k] for k in step.keeps]
        if not all(a < b for a, b in _pairs(times)):
            raise ValueError(f"schedule {schedule} evaluates a time twice: no solver of one evaluation a step")
        rows = []
        for k, (before, after) in enumerate(_pairs([*points, moved])):
            rows.append(tuple(_at(after, j) - _at(before, j) for j in range(k + 1)))
        return cls(str(schedule), (*times, 1.0), tuple(rows))

    def __str__(self) -> str:
        return self.name

    def __len__(self) -> int:
        """The number of steps N."""
        return len(self.coefficients)

    @property
    def has_refiner(self) -> bool:
        """Never: it evaluates the predictor alone."""
        return False

    def evaluations(self, refiner_step: str = "released") -> tuple[int, int]:
        """(predictor, refiner) evaluations of one trajectory."""
        return len(self), 0

    def times(self, start: float = 0.0, end: float = 1.0) -> list[float]:
        """The N + 1 times, from `start` to `end`."""
        return [start + (end - start) * t for t in self.grid]

    def plan(self, refiner_step: str = "released", times: Sequence[float] | None = None) -> tuple[Step, ...]:
        """The steps with their weights, over its own times or other N + 1, to which each row is scaled."""
        times = self.times() if times is None else times
        steps = []
        for k, (row, own, (start, end)) in enumerate(zip(self.coefficients, _pairs(self.grid), _pairs(times))):
            scale = (end - start) / (own[1] - own[0])
            weights = ((None,) * k, tuple(scale * c for c in row))
            steps.append(Step(STEP, start, end, (start,), weights, tuple(range(k)), tuple(range(k + 1))))
        return tuple(steps)


def _pairs(values: Sequence) -> list[tuple]:
    return list(zip(values, values[1:]))


def _at(row: Sequence[float], index: int) -> float:
    return row[index] if index < len(row) else 0.0


def _added(moved: Sequence[float], used: Sequence[int], weights: Sequence[float | None]) -> list[float]:
    """The coefficients `moved`, with these weights of the velocities `used` added."""
    total = [*moved, *([0.0] * (1 + max(used, default=-1) - len(moved)))]
    for index, weight in zip(used, weights):
        total[index] += weight or 0.0
    return total
