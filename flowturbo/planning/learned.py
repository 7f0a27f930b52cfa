"""A solver as tensors that can be learned: N logits of its steps, and the coefficients of velocities before the last.

    Δ = softmax(logits),   x_{k+1} = x_k + Δ_k (Σ_{j<k} a_kj v_j + (1 − Σ_{j<k} a_kj) v_k)

Whatever the numbers are, times rise from 0 to 1 and rows add up to their steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowturbo.transport.blocks import Step
from flowturbo.transport.solver import STEP, Solver


class Numbers:
    """The `logits` (N,) and `coefficients` a (N, N), of which the strict lower triangle counts; float32 on a device."""

    def __init__(self, logits: Tensor, coefficients: Tensor):
        self.logits, self.coefficients = logits, coefficients

    @classmethod
    def of(cls, solver: Solver, device: torch.device | str = "cpu") -> Numbers:
        """Those of a solver."""
        steps = torch.tensor(solver.grid, dtype=torch.float64).diff()
        a = torch.zeros(len(steps), len(steps), dtype=torch.float64)
        for k, row in enumerate(solver.coefficients):
            a[k, :k] = torch.tensor(row[:k], dtype=torch.float64) / steps[k]
        return cls(*(value.to(device, torch.float32) for value in (steps.log(), a)))

    @property
    def tensors(self) -> list[Tensor]:
        """What is learned."""
        return [self.logits, self.coefficients]

    def rows(self) -> tuple[Tensor, Tensor]:
        """Times (N + 1,) and rows of coefficients (N, N), lower triangular, differentiable; dtype of the numbers."""
        steps = self.logits.softmax(0)
        times = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
        a = self.coefficients.tril(-1)
        return times, steps[:, None] * (a + torch.diag(1 - a.sum(1)))

    def plan(self, start: float = 0.0, end: float = 1.0) -> list[Step]:
        """The steps of a trajectory, as Solver.plan, with tensors for times and weights."""
        times, rows = self.rows()
        times, rows = start + (end - start) * times, (end - start) * rows
        steps = []
        for k, row in enumerate(rows):
            weights = ((None,) * k, tuple(row[: k + 1]))
            ends = float(times[k].detach()), float(times[k + 1].detach())
            steps.append(Step(STEP, *ends, (times[k],), weights, tuple(range(k)), tuple(range(k + 1))))
        return steps

    def solver(self, name: str) -> Solver:
        """As plain numbers, rows adding up to their steps exactly."""
        times, rows = Numbers(*(value.detach().cpu().double() for value in self.tensors)).rows()
        grid = [0.0, *times[1:-1].tolist(), 1.0]
        coefficients = []
        for k, row in enumerate(rows.tolist()):
            earlier = row[:k]
            coefficients.append((*earlier, grid[k + 1] - grid[k] - sum(earlier)))
        return Solver(name, tuple(grid), tuple(coefficients))
