"""Classifier-free guidance (Ho & Salimans, 2022): how far, on which channels and when. No torch is imported.

`transport.branches` applies it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Guidance:
    """How far, on which channels and when to guide.

    v = v_null + scale·(v_cond − v_null) on the first `channels` channels ("all" or a number; 3 is what SiT's and
    FlowTurbo's published numbers use: of the four latent channels the last keeps each branch's own prediction),
    while low ≤ t ≤ high of `interval` (Kynkäänniemi et al., "Guidance interval", 2024).
    With scale 1, or outside the interval, the null branch is not evaluated at all.
    Raises ValueError for a scale that is not finite or negative, and for impossible channels or intervals.
    """

    scale: float = 1.5
    channels: int | str = 3
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale < 0:
            raise ValueError(f"cfg scale {self.scale} must be a finite number of at least 0")
        if self.channels != "all" and not (isinstance(self.channels, int) and self.channels >= 1):
            raise ValueError(f"guidance channels {self.channels!r} must be 'all' or a number of at least 1")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance interval {low} to {high} must lie in 0 to 1, in this order")

    def active(self, t: float) -> bool:
        """Whether the null branch is needed at time t."""
        low, high = self.interval
        return self.scale != 1 and (self.interval == (0.0, 1.0) or low <= t <= high)
