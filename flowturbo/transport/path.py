"""Interpolation paths between noise and data: x_t = α(t)·x1 + σ(t)·x0, with velocity u_t = dx_t/dt.

And the diffusion terms of SiT's SDE. No torch is imported, so that options can name them at once.

Source: Albergo et al., "Stochastic Interpolants", 2023; the three paths of SiT (Ma et al., 2024, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Path:
    """A path from x0 (noise, t = 0) to x1 (data, t = 1); the subclasses give its coefficients.

    Times are tensors (N,) or scalars in `interval`, the part of [0, 1] where every coefficient is finite.
    """

    interval = (0.0, 1.0)

    def alpha(self, t: Tensor) -> Tensor:
        """α(t), the share of data: 1 at t = 1."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """σ(t), the share of noise: 0 at t = 1."""
        raise NotImplementedError

    def alpha_dot(self, t: Tensor) -> Tensor:
        """dα/dt."""
        raise NotImplementedError

    def sigma_dot(self, t: Tensor) -> Tensor:
        """dσ/dt."""
        raise NotImplementedError

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, u_t) for x0, x1 (N, ...) and t (N,)."""
        t = _per_sample(t, x1)
        x_t = self.alpha(t) * x1 + self.sigma(t) * x0
        u_t = self.alpha_dot(t) * x1 + self.sigma_dot(t) * x0
        return x_t, u_t

    def score(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """∇ log p_t(x) from the velocity v at (x, t), t < 1: solves x_t and u_t for x0; the score is −x0/σ."""
        t = _per_sample(t, x)
        alpha, sigma = self.alpha(t), self.sigma(t)
        alpha_dot, sigma_dot = self.alpha_dot(t), self.sigma_dot(t)
        return (alpha * v - alpha_dot * x) / (sigma * (alpha_dot * sigma - alpha * sigma_dot))

    def end_point(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Where the straight way of data and noise leads, from the velocity v at (x, t): solves x_t and u_t for x1."""
        t = _per_sample(t, x)
        alpha, sigma = self.alpha(t), self.sigma(t)
        alpha_dot, sigma_dot = self.alpha_dot(t), self.sigma_dot(t)
        return (sigma * v - sigma_dot * x) / (alpha_dot * sigma - alpha * sigma_dot)


class LinearPath(Path):
    """x_t = t·x1 + (1 − t)·x0: SiT's and FlowTurbo's default (rectified flow)."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return t.new_ones(t.shape)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -t.new_ones(t.shape)


class GVPPath(Path):
    """Generalised variance-preserving: α = sin(πt/2), σ = cos(πt/2)."""

    def alpha(self, t: Tensor) -> Tensor:
        return (t * (math.pi / 2)).sin()

    def sigma(self, t: Tensor) -> Tensor:
        return (t * (math.pi / 2)).cos()

    def alpha_dot(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.sigma(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.alpha(t)


class VPPath(Path):
    """The variance-preserving diffusion of score SDEs (Song et al., 2021), β from 0.1 to 20.

    log α(t) = −(1−t)²·(β_max − β_min)/4 − (1−t)·β_min/2. dσ/dt is infinite at t = 1, so the interval ends before.
    """

    interval = (0.0, 1.0 - 1e-3)
    beta_min = 0.1
    beta_max = 20.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        s = 1 - t
        return -(s**2) * (self.beta_max - self.beta_min) / 4 - s * self.beta_min / 2

    def _log_alpha_dot(self, t: Tensor) -> Tensor:
        return (1 - t) * (self.beta_max - self.beta_min) / 2 + self.beta_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-(2 * self._log_alpha(t)).expm1()).sqrt()

    def alpha_dot(self, t: Tensor) -> Tensor:
        return self._log_alpha_dot(t) * self.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -self._log_alpha_dot(t) * self.alpha(t) ** 2 / self.sigma(t)


PATHS: dict[str, Path] = {"linear": LinearPath(), "gvp": GVPPath(), "vp": VPPath()}

# D(t) of the reverse SDE, at times (N,) or a scalar; its marginals are those of the ODE for any of them.
DIFFUSIONS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "sigma": lambda path, t: path.sigma(t),
    "linear": lambda path, t: 1 - t,
    "constant": lambda path, t: t.new_ones(t.shape),
    "decreasing": lambda path, t: 0.25 * ((math.pi * t).cos() + 1) ** 2,
    "increasing-decreasing": lambda path, t: (math.pi * t).sin() ** 2,
}


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, ..., 1) with the number of dimensions of `like`; scalars stay."""
    return t.reshape(-1, *[1] * (like.ndim - 1)) if t.ndim else t
