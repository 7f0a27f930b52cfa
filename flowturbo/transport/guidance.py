"""Classifier-free guidance (Ho & Salimans, 2022): how far, on which channels, when and how often. No torch is imported.

`transport.branches` applies it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from flowturbo.transport.blocks import Step


class Instant(NamedTuple):
    """One evaluation under guidance: when, and where its null branch comes from.

    `null`: it is evaluated. `weights`: it is not, and these times the last differences v_cond − v_null that were
    evaluated, oldest first, add up to the one here. Neither: there is no guidance at t.
    """

    t: Any
    null: bool
    weights: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Guidance:
    """How far, on which channels, when and how often to guide.

    v = v_null + scale·(v_cond − v_null) on the first `channels` channels ("all" or a number; 3 is what SiT's and
    FlowTurbo's published numbers use: of the four latent channels the last keeps each branch's own prediction),
    while low ≤ t ≤ high of `interval` (Kynkäänniemi et al., "Guidance interval", 2024).
    With scale 1, or outside the interval, the null branch is not evaluated at all. The predictor's is evaluated at
    each `every`-th guided evaluation only; in between v_cond − v_null is extrapolated linearly in time.
    Raises ValueError for a scale that is not finite or negative, and for impossible channels, intervals or `every`.
    """

    scale: float = 1.5
    channels: int | str = 3
    interval: tuple[float, float] = (0.0, 1.0)
    every: int = 1

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale < 0:
            raise ValueError(f"cfg scale {self.scale} must be a finite number of at least 0")
        if self.channels != "all" and not (isinstance(self.channels, int) and self.channels >= 1):
            raise ValueError(f"guidance channels {self.channels!r} must be 'all' or a number of at least 1")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance interval {low} to {high} must lie in 0 to 1, in this order")
        if not (isinstance(self.every, int) and self.every >= 1):
            raise ValueError(f"guidance at every {self.every!r} evaluations: expected a whole number of at least 1")

    def __str__(self) -> str:
        """Such as "cfg 4" or "cfg 1.5 every 2"."""
        low, high = self.interval
        parts = [f"cfg {self.scale:g}"]
        if self.scale != 1:
            parts += [f"every {self.every}"] if self.every > 1 else []
            parts += [f"for t in {low:g} to {high:g}"] if (low, high) != (0, 1) else []
        return " ".join(parts)

    def active(self, t: float) -> bool:
        """Whether there is guidance at time t."""
        low, high = self.interval
        return self.scale != 1 and (self.interval == (0.0, 1.0) or low <= t <= high)

    def instant(self, t: float) -> Instant:
        """An evaluation at t with its null branch, where there is guidance."""
        return Instant(t, self.active(t))

    def instants(self, steps: Sequence[Step]) -> list[tuple[Instant, ...]]:
        """The evaluations of each step of a trajectory. A refiner's null branch is always evaluated: it is cheap."""
        known: list[float] = []  # the times of the last two differences that are evaluated
        guided = 0
        trajectory = []
        for step in steps:
            row = []
            for stage, t in zip(step.block.stages, step.times):
                instant = self.instant(t)
                if instant.null and self.every > 1 and stage.network == "predictor":
                    if guided % self.every:
                        instant = Instant(t, False, _line(known, t))
                    else:
                        known = [*known, t][-2:]
                    guided += 1
                row.append(instant)
            trajectory.append(tuple(row))
        return trajectory

    def rows(self, steps: Sequence[Step]) -> tuple[int, int]:
        """(predictor, refiner) rows that a trajectory evaluates for one image: two where both branches are needed."""
        rows = {"predictor": 0, "refiner": 0}
        for step, instants in zip(steps, self.instants(steps)):
            for stage, instant in zip(step.block.stages, instants):
                rows[stage.network] += 1 + instant.null
        return rows["predictor"], rows["refiner"]


def _line(known: Sequence[float], t: float) -> tuple[float, float]:
    """Weights of the values at the last two times in the value at t of the line through them; the last value where
    there is but one."""
    if len(known) < 2 or known[0] == known[1]:
        return 0.0, 1.0
    place = (t - known[0]) / (known[1] - known[0])
    return 1 - place, place
