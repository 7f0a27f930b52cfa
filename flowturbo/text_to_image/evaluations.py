"""A schedule as a diffusers scheduler needs it: one evaluation after another.

A pipeline knows one state: it evaluates the network there and asks for the next. So a trajectory is told here by its
evaluations, each with the weights of the velocities that bring the state from its own point to that of the next one,
or to the end. The points of the evaluations are affine in the velocities, so their weights come from letting
`transport.blocks.integrate` run on unit vectors in place of images; no formula of a block is written again.

The state that a pipeline holds is then an ordinary one of its timestep. It may be masked, edited or noised anew between
two evaluations, and the trajectory goes on from there: nothing but velocities is remembered.

Times are noise levels sigma, from 1 (noise) to 0 (data); velocities are dx/dsigma.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flowturbo.transport.blocks import Block, Stage, Step, integrate, plan, resolve
from flowturbo.transport.schedule import Schedule
from flowturbo.transport.solver import Solver

# Rests of a trajectory that begin inside a step, where no block of the schedule does.
_FINISH = Block("finish", (Stage(0, 0),), 1)  # Euler's, to the end of the step
_REST = Block("rest", (Stage(0, 0),), 2)  # Adams-Bashforth: its evaluations may stand anywhere


@dataclass(frozen=True)
class Evaluation:
    """One call of a network, in a trajectory's order.

    `network` is "predictor" or "refiner"; a refiner sees and corrects the velocities of the evaluations numbered `seen`
    and `base`. `weights` has an entry for each velocity that moves the state from here to the next evaluation, by the
    number of its evaluation.
    """

    time: float
    weights: dict[int, float]
    network: str = "predictor"
    seen: int | None = None
    base: int | None = None

    @property
    def needs(self) -> set[int]:
        """The numbers of all the evaluations whose velocities it uses, its own among them."""
        return {*self.weights, *({self.seen, self.base} - {None})}  # type: ignore[arg-type]


def evaluations(
    schedule: Schedule | Solver, times: Sequence[float], refiner_step: str = "single"
) -> tuple[Evaluation, ...]:
    """The evaluations of a schedule of N blocks over N + 1 times. Raises ValueError as `blocks.plan`."""
    return _of_steps(schedule.plan(refiner_step, times))


def from_evaluation(
    schedule: Schedule | Solver, times: Sequence[float], start: int, refiner_step: str = "single"
) -> tuple[Evaluation, ...]:
    """The evaluations of a trajectory that begins where the evaluation `start` would stand.

    Image-to-image begins so: at the time of that evaluation, with no velocity yet. There are as many evaluations as are
    left, at the same times; the state is a plain one, not a predicted one, and the schedule's blocks go on from it.
    Raises ValueError where a block that is left needs a velocity of the predictor before it.
    """
    steps = schedule.plan(refiner_step, times)
    whole = _of_steps(steps)
    if start == 0:
        return whole
    blocks = [] if isinstance(schedule, Solver) else resolve(schedule.blocks, refiner_step)
    expected = [evaluation.time for evaluation in whole[start:]]
    n, stage = [(n, k) for n, step in enumerate(steps) for k in range(len(step.times))][start]
    time = expected[0]
    if not blocks:
        found = _rest(expected, times[-1])
    elif stage == 0 and time == times[n]:  # at the beginning of a step
        found = _of_steps(plan(blocks[n:], times[n:]))
    elif time == times[n + 1]:  # at the end of a step: a velocity for the blocks that follow is evaluated here
        found = _after_a_look(time, blocks[n + 1 :], times[n + 1 :])
    else:
        found = _of_steps(plan([_FINISH, *blocks[n + 1 :]], [time, *times[n + 1 :]]))
    if [evaluation.time for evaluation in found] != expected:
        found = _rest(expected, times[-1])
    if found[0].network != "predictor":
        raise ValueError(f"schedule {schedule} cannot be entered at its evaluation {start}: no velocity is there yet")
    return found


def _after_a_look(time: float, blocks: Sequence[Block], times: Sequence[float]) -> tuple[Evaluation, ...]:
    """An evaluation at `time`, which moves the state to where the first of the blocks evaluates."""
    if not blocks:
        return (Evaluation(time, {}),)
    return _of_steps(plan(blocks, times, [time]), [time])


def _rest(times: Sequence[float], end: float) -> tuple[Evaluation, ...]:
    """Adams-Bashforth through the evaluations' times: of those at the same time, the last one's velocity counts."""
    distinct = [time for k, time in enumerate(times) if time not in times[k + 1 :]]
    blocks = [_REST] * (len(distinct) - (distinct[-1] == end))
    own = _of_steps(plan(blocks, [*distinct, *([] if distinct[-1] == end else [end])])) if blocks else ()
    places = [k for k, time in enumerate(times) if time not in times[k + 1 :]]
    found = [Evaluation(time, {}) for time in times]
    for place, evaluation in zip(places, own):
        found[place] = replace(evaluation, weights={places[j]: w for j, w in evaluation.weights.items()})
    return tuple(found)


def _of_steps(steps: Sequence[Step], at_hand: Sequence[float] = ()) -> tuple[Evaluation, ...]:
    """The evaluations of a plan, which `at_hand` ones, at these times and at its first state, come before."""
    count = len(at_hand) + sum(len(step.times) for step in steps)
    unit, origin = np.eye(count), np.zeros(count)
    points = [origin] * len(at_hand)
    calls = [Evaluation(time, {}) for time in at_hand]

    def velocity(x: np.ndarray, t: float) -> np.ndarray:
        points.append(x)
        calls.append(Evaluation(t, {}))
        return unit[len(calls) - 1]

    def refine(x: np.ndarray, t: float, seen: np.ndarray, base: np.ndarray) -> np.ndarray:
        points.append(x)
        calls.append(Evaluation(t, {}, "refiner", int(seen.argmax()), int(base.argmax())))
        return unit[len(calls) - 1]

    x = origin
    for state in integrate(steps, origin, velocity, refine, list(unit[: len(at_hand)])):
        x = state.x
    moves = np.diff([*points, x], axis=0)
    return tuple(
        replace(call, weights={int(j): float(move[j]) for j in move.nonzero()[0]}) for call, move in zip(calls, moves)
    )
