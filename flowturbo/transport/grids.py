"""Time grids: where the steps of a trajectory begin and end. Plain Python floats, no torch.

Each grid is a function g of u in [0, 1] with g(0) = 0 (noise) and g(1) = 1 (data), taken at N + 1 equal distances.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

# "shift": σ' = Sσ / (1 + (S − 1)σ) for σ = 1 − u, as diffusers' flow schedulers; S > 1 is finer near noise.
# "power": t = u^S; S > 1 is finer near noise.
GRIDS: dict[str, Callable[[float, float], float]] = {
    "uniform": lambda u, _: u,
    "shift": lambda u, shift: 1 - shift * (1 - u) / (1 + (shift - 1) * (1 - u)),
    "power": lambda u, exponent: u**exponent,
}
GRID_GRAMMAR = 'a grid follows as "@shift2" (2 > 1: finer near noise) or "@power1.4"; without one it is uniform'


@dataclass(frozen=True)
class Grid:
    """A named grid and its number. str() is "" for the uniform one, else such as "@shift2": safe in file names.

    Raises ValueError for an unknown name and for numbers that are not positive and finite.
    """

    name: str = "uniform"
    value: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in GRIDS or not (math.isfinite(self.value) and 1e-3 <= self.value <= 1e3):
            raise ValueError(f"impossible grid {self.name}{self.value:g}; {GRID_GRAMMAR}; from .001 to 1000")

    @classmethod
    def parse(cls, text: str) -> Grid:
        """The grid of a text such as "shift2" or "power1.4". Raises ValueError with the grammar."""
        found = re.fullmatch(r"(shift|power)([0-9]+(?:\.[0-9]+)?)", text.lower())
        if found is None:
            raise ValueError(f"cannot read grid {text[:40]!r}; {GRID_GRAMMAR}")
        return cls(found[1], float(found[2]))

    def __str__(self) -> str:
        return "" if self.name == "uniform" else f"@{self.name}{self.value:.15g}"

    def times(self, steps: int, start: float = 0.0, end: float = 1.0) -> list[float]:
        """The steps + 1 times of the whole grid, brought into `start` to `end`, which may lie in either order."""
        places = (GRIDS[self.name](k / steps, self.value) for k in range(steps + 1))
        return [start + (end - start) * u for u in places]
