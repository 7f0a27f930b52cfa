"""Editing a known image along a trajectory: what is edited is the velocity, never the state between steps.

An edit starts at some t0 on the known image's own path (x_t, u_t), of one fixed noise, and follows the velocity

    v'(x, t) = m·w + (1 − m)·u_t,   evaluated at   p = m·x + (1 − m)·x_t,

m being the share that is generated: 1 everywhere is SDEdit, a mask is inpainting. w is v(p, t), or FlowEdit's
v(p, t, new class) − v(x_t, t, old class) + u_t. Both are smooth where v and m are, so every sampling block keeps its
order; to overwrite the known part of the state after each step would make blocks that reuse velocities first order.

Sources: SDEdit (Meng et al., 2022); RePaint (Lugmayr et al., 2022) for the known region; Differential Diffusion (Levin
& Fried, 2023) for masks that depend on time; FlowEdit (Kulikov et al., 2024), here with one noise for the whole
trajectory, and in terms of x = z_edit + x_t − x1 (there z_edit), so that it starts and ends as the others do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowturbo.transport.branches import Guided
from flowturbo.transport.path import Path


class Known(NamedTuple):
    """What an edit knows at one time: the image on its path, its velocity there, and the share that is generated.

    `difference`: the network's rows are those of the new class, and below them those of the old one on the path.
    """

    x: Tensor
    u: Tensor
    m: Tensor | None = None  # None: all is generated
    difference: bool = False

    def points(self, x: Tensor) -> Tensor:
        """Where the network is asked for the state x (N, ...): N rows, or 2N for a difference."""
        p = x if self.m is None else self.m * x + (1 - self.m) * self.x
        return torch.cat([p, self.x]) if self.difference else p

    def moves(self, v: Tensor) -> Tensor:
        """The edit's velocity (N, ...) from the network's at those points; further rows are another branch's."""
        rows = len(self.x)
        w = v[:rows] - v[rows : 2 * rows] + self.u if self.difference else v[:rows]
        return w if self.m is None else self.m * w + (1 - self.m) * self.u


@dataclass(frozen=True)
class Source:
    """The known image of an edit, in the space of states: latents, or pixels in [-1, 1].

    image and noise (N, C, H, W), the ends of its path. mask, broadcast to them: 1 is generated, 0 is kept; None
    generates all. Between, with `ramp` 0 a value is the share m at all times. With a `ramp` in (0, 1] a value g is the
    strength there: kept until about t = 1 − g, then let go smoothly within `ramp`.
    labels (N,): the old classes, which makes the edit a FlowEdit. Raises ValueError for shapes that do not fit.
    """

    image: Tensor
    noise: Tensor
    mask: Tensor | None = None
    labels: Tensor | None = None
    ramp: float = 0.0

    def __post_init__(self) -> None:
        if self.noise.shape != self.image.shape:
            raise ValueError(f"noise {tuple(self.noise.shape)} and image {tuple(self.image.shape)} differ in shape")
        if self.mask is not None:
            object.__setattr__(self, "mask", self.mask.to(self.image).expand(self.image.shape))
        if self.labels is not None and self.labels.shape != self.image.shape[:1]:
            raise ValueError(f"{len(self.image)} images need as many labels, got {tuple(self.labels.shape)}")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp {self.ramp} must lie in 0 to 1")

    def at(self, path: Path, t: float) -> Known:
        """What is known at time t, on a path."""
        # Filled on the device: a copy from the host would wait for it, and cannot be recorded.
        time = torch.full((), t, dtype=torch.promote_types(self.image.dtype, torch.float32), device=self.image.device)
        x, u = path.sample(self.noise, self.image, time)
        return Known(x, u, self._share(t), self.labels is not None)

    def _share(self, t: float) -> Tensor | None:
        if self.mask is None or self.ramp == 0:
            return self.mask
        # White, 1, is let go before t = 0, and black, 0, after t = 1. The cubic's slope is 0 at both of its ends.
        s = (1 + (t - (1 - self.mask) * (1 + self.ramp)) / self.ramp).clamp(0, 1)
        return s * s * (3 - 2 * s)

    def all_labels(self, y: Tensor) -> Tensor:
        """The labels of all rows that the network is asked for: the new ones y (N,), and below them the old."""
        return y if self.labels is None else torch.cat([y, self.labels])

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, without those that are None."""
        named = {name: getattr(self, name) for name in ("image", "noise", "mask", "labels")}
        return {name: value for name, value in named.items() if value is not None}

    def with_tensors(self, values: Sequence[Tensor]) -> Source:
        """The same with others in place of `tensors`, in their order."""
        changes: dict[str, Any] = dict(zip(self.tensors(), values, strict=True))
        return replace(self, **changes)


class Edited:
    """The velocities and refinements of an edit, from those of guided networks: what `blocks.integrate` asks for.

    `known` gives what is known at a time, `time` the time that the networks take. What the methods return has the
    edit's velocity in its first N rows, which move the state, and below them what the network gave: a refiner then
    sees velocities of the kind that it was trained on.
    """

    def __init__(self, networks: Guided, known: Callable[[Any], Known], time: Callable[[Any], Any] = lambda t: t):
        self.networks, self.known, self.time = networks, known, time

    def velocity(self, x: Tensor, t: Any) -> Tensor:
        """v'(x, t), and the network's rows."""
        known = self.known(t)
        v = self.networks.velocity(known.points(x), self.time(t))
        return torch.cat([known.moves(v), v])

    def refine(self, x: Tensor, t: Any, seen: Tensor, base: Tensor) -> Tensor:
        """v'(x, t) of refined rows, and those rows."""
        known = self.known(t)
        v = self.networks.refine(known.points(x), self.time(t), seen[len(x) :], base[len(x) :])
        return torch.cat([known.moves(v), v])


def start_of(strength: float, path: Path) -> float:
    """Where an edit of a strength starts: t0 = 1 − strength on a path over [0, 1].

    Raises ValueError for a strength outside (0, 1].
    """
    check_strength(strength)
    low, high = path.interval
    return high - strength * (high - low)


def check_strength(strength: float) -> None:
    """Raises ValueError unless it lies in (0, 1]."""
    if not (math.isfinite(strength) and 0 < strength <= 1):
        raise ValueError(f"strength {strength:g} must lie in (0, 1]: 1 starts from noise alone")


def noise_through(x: Tensor, image: Tensor, path: Path, t: float) -> Tensor:
    """The noise whose path to `image` goes through x at time t < 1: what an inverted image is kept on."""
    time = torch.full((), t, dtype=torch.float64)
    return (x - float(path.alpha(time)) * image) / float(path.sigma(time))
