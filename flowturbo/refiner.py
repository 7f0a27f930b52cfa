"""The velocity refiner: one SiT block that corrects a velocity instead of predicting it.

Source: Zhao et al., "FlowTurbo: Towards Real-time Flow-Based Image Generation with Velocity Refiner",
NeurIPS 2024, section 3.2.
"""

from __future__ import annotations

from torch import Tensor

from flowturbo.models import SiT

__all__ = ["VelocityRefiner"]


class VelocityRefiner(SiT):
    """r(x_t, v, t | y): the offset that turns an earlier velocity v into the velocity at (x_t, t).

    Takes SiT's keyword arguments with depth 1 by default; of SiT-XL/2's width it has 29.4 M trainable parameters.
    `in_channels` counts x alone: the input layer sees x and v side by side. A new refiner returns zero.
    """

    images_in = 2  # x and v

    def __init__(self, *, depth: int = 1, **kwargs):
        super().__init__(depth=depth, **kwargs)

    def forward(  # type: ignore[override]  # it sees a velocity too
        self, x: Tensor, t: Tensor, v: Tensor, y: Tensor, drop: Tensor | None = None
    ) -> Tensor:
        """Offset Δv with v + Δv ≈ the predictor's velocity at (x, t).

        x, v (N, C, H, W); t (N,) in [0, 1]; y (N,) int64; drop (N,) bool, True puts the null class.
        Returns (N, C, H, W). Raises ValueError for an x or v of another shape.
        """
        return self.evaluate((x, v), t, y, drop)
