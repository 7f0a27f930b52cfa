"""Guidance at work: the branches of a network with its conditions bound, and velocities guided from both.

A branch pair is one call: branches(x, t, *velocities, null=...) gives N rows, the conditional branch, or 2N, the null
branch below it. What the conditions are, class labels or prompts, and in which space x lives, its maker alone knows; so
the eager sampler and static graphs share the functions here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flowturbo.transport.guidance import Instant

Network = Callable[..., Tensor]


class Branches(Protocol):
    """A network's conditional branch, or both branches, at x (N, ...) and time t."""

    def __call__(self, x: Tensor, t: Any, *velocities: Tensor, null: bool) -> Tensor:
        """N rows, or with `null` 2N; a refiner's `velocities` have as many rows as are asked for."""
        ...


class Guided:
    """Velocities of a "predictor", and refinements by a "refiner", guided where their Instants say so.

    `scale` and `channels` as in Guidance; channels lie along `dim`. `differences` are the last two v_cond − v_null of
    the predictor, oldest first, for the instants whose null branch is not evaluated; None where there are none such.
    What the methods return has N rows, or 2N where guided: those of both branches.
    """

    def __init__(
        self,
        branches: Mapping[str, Branches],
        scale: float | Tensor,
        channels: int | str,
        dim: int = 1,
        differences: Sequence[Tensor] | None = None,
    ):
        self.branches, self.differences = branches, differences
        self.scale, self.channels, self.dim = scale, channels, dim

    def velocity(self, x: Tensor, at: Instant) -> Tensor:
        """v(x, t)."""
        output = self._evaluate("predictor", x, at)
        if at.null and self.differences is not None:
            condition, null = output.chunk(2)
            self.differences = [*self.differences, condition - null][-2:]
        elif at.weights:
            assert self.differences is not None
            known = zip(reversed(at.weights), reversed(self.differences))
            difference = sum(weight * value for weight, value in known)
            output = torch.cat([output, output - difference]).to(x.dtype)
        return self._guide(output, x)

    def refine(self, x: Tensor, at: Instant, seen: Tensor, base: Tensor) -> Tensor:
        """base + r(x, t, seen): the offset is guided, then added."""
        offset = self._guide(self._evaluate("refiner", x, at, seen), x)
        return match_rows(base, len(offset)) + offset

    def _evaluate(self, network: str, x: Tensor, at: Instant, *velocities: Tensor) -> Tensor:
        rows = 2 * len(x) if at.null else len(x)
        given = (match_rows(v, rows) for v in velocities)
        return self.branches[network](x, at.t, *given, null=at.null).to(x.dtype)

    def _guide(self, output: Tensor, x: Tensor) -> Tensor:
        return output if len(output) == len(x) else guide(output, self.scale, self.channels, self.dim)


def guide(both: Tensor, scale: float | Tensor, channels: int | str, dim: int = 1) -> Tensor:
    """Guided predictions of both branches from those of each, (2N, ...), conditional first; channels along `dim`.

    The first `channels` are guided and the same in both; the others keep each branch's own prediction.
    """
    condition, null = both.chunk(2)
    channels = both.shape[dim] if channels == "all" else min(int(channels), both.shape[dim])
    c, n = (half.narrow(dim, 0, channels) for half in (condition, null))
    guided = n + scale * (c - n)
    rest = both.shape[dim] - channels
    return torch.cat([torch.cat([guided, half.narrow(dim, channels, rest)], dim) for half in (condition, null)])


def match_rows(v: Tensor, rows: int) -> Tensor:
    """v with its branches cut or repeated to `rows` rows: a guidance interval may end between two evaluations."""
    if len(v) == rows:
        return v
    return v[:rows] if len(v) > rows else torch.cat([v, v])


def label_branches(network: Network, y: Tensor) -> Branches:
    """The branches of a network(x, t, *velocities, y, drop) for class labels y (N,); t is a float or a 0-d tensor."""

    def branches(x: Tensor, t: Any, *velocities: Tensor, null: bool) -> Tensor:
        if not null:
            return network(x, _rows(t, x), *velocities, y, None)
        x, labels = torch.cat([x, x]), torch.cat([y, y])
        drop = torch.arange(len(labels), device=y.device) >= len(y)
        return network(x, _rows(t, x), *velocities, labels, drop)

    return branches


def _rows(t: float | Tensor, x: Tensor) -> Tensor:
    """The time as a vector, one entry a row of x, in full precision whatever the dtype of x."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    if isinstance(t, float | int):  # filled on the device: a copy from the host would wait for it
        return torch.full((len(x),), t, dtype=dtype, device=x.device)
    return torch.as_tensor(t, dtype=dtype, device=x.device).expand(len(x))
