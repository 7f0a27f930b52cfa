"""The steps of a trajectory as pure functions over an interval [t0, t1], and the loop that chains them.

A velocity function v(x, t) may return more rows than x has: guidance appends its null branch below the first N.
Only the first N move x; all of them are handed on, because a refiner sees both branches.

Source: FlowTurbo, Algorithm 1 and equations 5-7 (pseudo corrector), 8-13 (refiner).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowturbo.transport.schedule import check_refiner_step

Time = Any  # a float, a tensor, or anything else with which t1 - t0 is one, as compiled.Instant
Velocity = Callable[[Tensor, Time], Tensor]  # (x, t) -> v
Offset = Callable[[Tensor, Time, Tensor], Tensor]  # (x, t, v) -> Δv


class Step(NamedTuple):
    """What a step leaves: the state at t1, and the velocity it hands on to the next step."""

    x: Tensor
    v: Tensor | None


def euler_step(velocity: Velocity, x: Tensor, t0: Time, t1: Time) -> Step:
    """First order: x + Δ·v(x, t0). One evaluation; hands on the velocity at t0."""
    d = velocity(x, t0)
    return Step(_advance(x, t1 - t0, d), d)


def heun_step(velocity: Velocity, x: Tensor, t0: Time, t1: Time) -> Step:
    """Second order: the mean of the velocities at t0 and at the Euler point at t1. Two evaluations;
    hands on the one at t1."""
    return pseudo_corrector_step(velocity, x, t0, t1, velocity(x, t0))


def pseudo_corrector_step(velocity: Velocity, x: Tensor, t0: Time, t1: Time, v: Tensor | None) -> Step:
    """Heun's step with a velocity that is already there in place of v(x, t0): one evaluation.

    `v` is what the step before handed on; after Heun or pseudo corrector steps the method stays second order
    (FlowTurbo, appendix B). With v None, at the start of a trajectory, it evaluates v(x, t0): Heun's step.
    """
    d = velocity(x, t0) if v is None else v
    d_next = velocity(_advance(x, t1 - t0, d), t1)
    return _trapezoid(x, t1 - t0, d, d_next)


def refiner_step(offset: Offset, x: Tensor, t0: Time, t1: Time, v: Tensor, form: str = "released") -> Step:
    """Heun's step with refined velocities instead of predicted ones; `v` is what the step before handed on.

    "released" (the published code and numbers): both refinements see v, the second is added to the first;
    hands on the velocity at t0. "consistent" (as trained): the second sees and refines the first; hands on the
    velocity at t1. "single": v itself serves at t0, as in the pseudo corrector: one evaluation, not two.
    """
    dt = t1 - t0
    if form == "single":
        d = v
        d_next = _refine(offset, _advance(x, dt, d), t1, v, v)
        return _trapezoid(x, dt, d, d_next)
    d = _refine(offset, x, t0, v, v)
    d_next = _refine(offset, _advance(x, dt, d), t1, v if form == "released" else d, d)
    step = _trapezoid(x, dt, d, d_next)
    return Step(step.x, d) if form == "released" else step


def take_step(
    block: str,
    velocity: Velocity,
    offset: Offset | None,
    x: Tensor,
    t0: Time,
    t1: Time,
    v: Tensor | None,
    refiner_form: str = "released",
) -> Step:
    """The step that a block's letter names; v is what the step before handed on, None at the start."""
    if block == "E":
        return euler_step(velocity, x, t0, t1)
    if block == "H":
        return heun_step(velocity, x, t0, t1)
    if block == "P":
        return pseudo_corrector_step(velocity, x, t0, t1, v)
    assert offset is not None
    assert v is not None  # Schedule refuses a leading R
    return refiner_step(offset, x, t0, t1, v, refiner_form)


def integrate(
    velocity: Velocity,
    x: Tensor,
    blocks: str,
    times: Sequence[Time] | Tensor,
    *,
    offset: Offset | None = None,
    refiner_form: str = "released",
) -> Iterator[Step]:
    """Yield the Step after each block, e.g. of "HPPR", over the N + 1 times.

    Raises ValueError for R blocks without an `offset`, and for a number of times that is not N + 1.
    """
    check_refiner_step(refiner_form)
    if "R" in blocks and offset is None:
        raise ValueError("the schedule has R blocks: they need a refiner")
    if len(times) != len(blocks) + 1:
        raise ValueError(f"{len(blocks)} steps need {len(blocks) + 1} times, got {len(times)}")
    v = None
    for block, t0, t1 in zip(blocks, times[:-1], times[1:], strict=True):
        x, v = take_step(block, velocity, offset, x, t0, t1, v, refiner_form)
        yield Step(x, v)


def _advance(x: Tensor, dt: Time, v: Tensor) -> Tensor:
    return x + dt * v[: len(x)]


def _trapezoid(x: Tensor, dt: Time, d: Tensor, d_next: Tensor) -> Step:
    return Step(x + dt / 2 * (d[: len(x)] + d_next[: len(x)]), d_next)


def _refine(offset: Offset, x: Tensor, t: Time, seen: Tensor, base: Tensor) -> Tensor:
    """base + offset(x, t, seen), where a guidance interval may give the two unequal numbers of branches."""
    delta = offset(x, t, seen)
    return match_rows(base, len(delta)) + delta


def match_rows(v: Tensor, rows: int) -> Tensor:
    """v with its branches cut or repeated to `rows` rows, one or two branches on either side."""
    if len(v) == rows:
        return v
    return v[:rows] if len(v) > rows else torch.cat([v, v])
