"""Classifier-free guidance (Ho & Salimans, 2022): the one place that knows of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowturbo.transport.integrators import Offset, Time, Velocity, match_rows


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

    def active(self, t: Time) -> bool:
        """Whether the null branch is needed at time t."""
        low, high = self.interval
        return self.scale != 1 and (self.interval == (0.0, 1.0) or low <= float(t) <= high)

    def combine(self, both: Tensor) -> Tensor:
        """Predictions of both branches (2N, C, H, W), conditional first -> the guided ones, in the same layout."""
        return guide(both, self.scale, self.channels)

    def velocity(self, predictor: Callable[..., Tensor], y: Tensor) -> Velocity:
        """The guided v(x, t) of a predictor(x, t, y, drop) for labels y (N,): N rows, or 2N where guided."""

        def v(x: Tensor, t: Time) -> Tensor:
            if not self.active(t):
                return predictor(x, _rows(t, x), y, None).to(x.dtype)
            x, labels, drop = _both(x, y)
            return self.combine(predictor(x, _rows(t, x), labels, drop).to(x.dtype))

        return v

    def offset(self, refiner: Callable[..., Tensor], y: Tensor) -> Offset:
        """The guided Δv(x, t, v) of a refiner(x, t, v, y, drop); v may have one or both branches."""

        def delta(x: Tensor, t: Time, v: Tensor) -> Tensor:
            if not self.active(t):
                return refiner(x, _rows(t, x), match_rows(v, len(x)), y, None).to(x.dtype)
            x, labels, drop = _both(x, y)
            return self.combine(refiner(x, _rows(t, x), match_rows(v, len(x)), labels, drop).to(x.dtype))

        return delta


def guide(both: Tensor, scale: float | Tensor, channels: int | str, dim: int = 1) -> Tensor:
    """`Guidance.combine` with the channels along `dim`, and a scale that may be a tensor."""
    condition, null = both.chunk(2)
    channels = both.shape[dim] if channels == "all" else min(int(channels), both.shape[dim])
    c, n = (half.narrow(dim, 0, channels) for half in (condition, null))
    guided = n + scale * (c - n)
    rest = both.shape[dim] - channels
    return torch.cat([torch.cat([guided, half.narrow(dim, channels, rest)], dim) for half in (condition, null)])


def _both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of both branches: state and labels twice, and which rows drop the label."""
    drop = torch.arange(2 * len(y), device=y.device) >= len(y)
    return torch.cat([x, x]), torch.cat([y, y]), drop


def _rows(t: Time, x: Tensor) -> Tensor:
    """The time as a vector, one entry a row of x, in full precision whatever the dtype of x."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    if isinstance(t, float | int):  # filled on the device: a copy from the host would wait for it
        return torch.full((len(x),), t, dtype=dtype, device=x.device)
    return torch.as_tensor(t, dtype=dtype, device=x.device).expand(len(x))
