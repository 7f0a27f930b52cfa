"""The table of sampling blocks, the plan of a trajectory, and the one function that takes a step.

A step brings x from t0 to t1. It evaluates a network at one or two places, and moves x by a weighted sum of
velocities: those that it evaluates, and those that earlier steps handed on. Both the point of an evaluation and the
move follow from one formula, the integral of the polynomial through the last few (time, velocity) pairs. So a block
is a row of data, and the weights of a whole trajectory are plain floats, worked out before anything is evaluated:

    for stage, weights, t in zip(block.stages, step.weights, step.times):
        evaluate at x + Σ weights · velocities
    x + Σ weights · velocities

The same plan drives the eager sampler, static graphs and a diffusers scheduler. No torch is imported: velocities are
whatever adds up.

Sources: FlowTurbo, Algorithm 1 and equations 5-13 (H, P, R); Adams-Bashforth with variable steps (Hairer, Norsett &
Wanner, "Solving Ordinary Differential Equations I", III.5; A, B); FireFlow (Deng et al., 2024; F). P with equal steps
evaluates exactly where Adams-Bashforth 2 does: it is A with the trapezoid in place of A's last move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Weights = tuple[float | None, ...]  # one for each velocity, oldest first; None: not used


@dataclass(frozen=True)
class Stage:
    """One evaluation of a step.

    `place` is where, from 0 at t0 to 1 at t1; `order` is how many velocities predict the state there, 0 for x itself.
    A refiner corrects `base`, seeing `sees`: "old", the velocity that the step before handed on, or "new", the last.
    """

    place: float
    order: int
    network: str = "predictor"
    sees: str = "old"
    base: str = "old"


@dataclass(frozen=True)
class Block:
    """A kind of step: its evaluations, how many velocities the move is made with, and what it hands on.

    `keeps` are the evaluations whose velocities go to later steps, all by default. `start` are the letters that stand
    in for the first blocks of a trajectory, where there is nothing to reuse yet. `as_end`: its velocity is evaluated
    at t0, and yet a block with `trapezoid` takes it for the velocity at t1, as the published pseudo corrector does.
    """

    name: str
    stages: tuple[Stage, ...]
    order: int
    keeps: tuple[int, ...] = (0, 1)
    start: str = ""
    trapezoid: bool = False
    as_end: bool = False

    @property
    def reuses(self) -> int:
        """How many velocities of earlier steps its weights reach back to; with fewer at hand its order is lower."""
        return max(0, self.order - len(self.stages), *(stage.order - k for k, stage in enumerate(self.stages)))

    @property
    def leads(self) -> bool:
        """Whether it can be a trajectory's first block, by itself or by what stands in for it."""
        first = self.stages[0] if self.stages else Stage(0, self.order)
        return bool(self.start) or (first.order == 0 and first.network == "predictor")

    def evaluations(self, network: str) -> int:
        """How often it evaluates the "predictor" or the "refiner"."""
        return sum(stage.network == network for stage in self.stages)


def _refiner(place: float, order: int, sees: str = "old", base: str = "old") -> Stage:
    return Stage(place, order, "refiner", sees, base)


# The forms of the R block. "released" is the published code's: both refinements see the old velocity, the second is
# added to the first, which is handed on. "consistent" is as trained: the second sees and corrects the first, and is
# handed on. "single" is P, "midpoint" M and "adams" A with the refiner as evaluator: each belongs after that block,
# where the velocity that it sees is one step old.
REFINER_BLOCKS: dict[str, Block] = {
    "released": Block("refiner", (_refiner(0, 0), _refiner(1, 1, base="new")), 2, keeps=(0,), as_end=True),
    "consistent": Block("refiner", (_refiner(0, 0), _refiner(1, 1, "new", "new")), 2),
    "single": Block("refiner", (_refiner(1, 1),), 2, trapezoid=True),
    "midpoint": Block("refiner", (_refiner(0.5, 2),), 1),
    "adams": Block("refiner", (_refiner(0, 0),), 2),
}
REFINER_STEPS = tuple(REFINER_BLOCKS)

BLOCKS: dict[str, Block] = {
    "E": Block("Euler", (Stage(0, 0),), 1, as_end=True),
    "H": Block("Heun", (Stage(0, 0), Stage(1, 1)), 2),
    "P": Block("pseudo corrector", (Stage(1, 1),), 2, start="H", trapezoid=True),
    "R": REFINER_BLOCKS["released"],
    "A": Block("Adams-Bashforth 2", (Stage(0, 0),), 2),
    "B": Block("Adams-Bashforth 3", (Stage(0, 0),), 3, start="DA"),
    "D": Block("midpoint", (Stage(0, 0), Stage(0.5, 1)), 1),
    "F": Block("midpoint with the last velocity", (Stage(0.5, 1),), 1, start="D"),
    "M": Block("staggered pseudo corrector", (Stage(0.5, 2),), 1, start="D"),
    "L": Block("line through the last velocities, no evaluation", (), 2),
}


def resolve(letters: str, refiner_step: str = "released") -> list[Block]:
    """The blocks that a schedule's letters stand for, the first ones replaced where their `start` says so.

    Raises ValueError for another form of R.
    """
    check_refiner_step(refiner_step)
    blocks = []
    for k, letter in enumerate(letters):
        start = BLOCKS[letter].start
        letter = start[k] if k < len(start) else letter
        blocks.append(REFINER_BLOCKS[refiner_step] if letter == "R" else BLOCKS[letter])
    return blocks


def check_refiner_step(refiner_step: str) -> None:
    """Raises ValueError for a name that is not one of the forms of the R block."""
    if refiner_step not in REFINER_STEPS:
        raise ValueError(f"refiner_step {refiner_step!r} is not one of {', '.join(REFINER_STEPS)}")


@dataclass(frozen=True)
class Step:
    """A block at its place in a trajectory, with everything that its times decide.

    `times` are those of its evaluations, floats or what the networks take in their place; `weights` has a row for the
    point of each evaluation and one for the move. `takes` are the velocities, by their places among those at hand,
    that it works with; `keeps` are those, by their places among those at hand and its own after them, that are at hand
    afterwards.
    """

    block: Block
    start: float
    end: float
    times: tuple[Any, ...]
    weights: tuple[Weights, ...]
    takes: tuple[int, ...]
    keeps: tuple[int, ...]


class _Pair(NamedTuple):
    """What is known of a velocity before it is evaluated."""

    time: float
    trapezoid_time: float  # what a block with `trapezoid` takes for its time


def plan(blocks: Sequence[Block], times: Sequence[float], at_hand: Sequence[float] = ()) -> tuple[Step, ...]:
    """The steps of a trajectory over N + 1 times, in either direction and from anywhere.

    `at_hand` are the times of velocities that are there before the first step, oldest first.

    Raises ValueError unless there is one time more than blocks, and each step goes on in the direction of the first.
    """
    if len(times) != len(blocks) + 1:
        raise ValueError(f"{len(blocks)} steps need {len(blocks) + 1} times, got {len(times)}")
    moves = [end - start for start, end in zip(times, times[1:])]
    if not all(move * moves[0] > 0 for move in moves):
        raise ValueError(f"times must go one way, without standing still: {', '.join(f'{t:g}' for t in times[:8])}")
    longest = 1 + max(block.reuses for block in blocks)  # one of them may be evaluated again
    history = [_Pair(time, time) for time in at_hand]
    steps = []
    for block, start, end in zip(blocks, times, times[1:]):
        step, history = _plan_step(block, start, end, history, longest)
        steps.append(step)
    return tuple(steps)


def _plan_step(block: Block, start: float, end: float, history: list[_Pair], longest: int) -> tuple[Step, list[_Pair]]:
    """The step, and what is at hand after it: at most `longest` pairs of different times."""
    places = tuple(end if stage.place == 1 else start + stage.place * (end - start) for stage in block.stages)
    # A velocity evaluated at a time that is at hand already takes the old one's place: one more is then looked at.
    again = block.reuses > 0 and bool(history) and history[-1].time in places
    reach = max(block.reuses + again, block.evaluations("refiner") > 0)
    takes = range(max(0, len(history) - reach), len(history))
    nodes: list[float | None] = [history[k].time for k in takes]
    if block.trapezoid and takes:
        nodes[-1] = history[-1].trapezoid_time
    weights = []
    for stage, place in zip(block.stages, places):
        weights.append(lagrange_weights(nodes, stage.order, start, place))
        nodes = [None if node == place else node for node in nodes] + [place]
    weights.append(lagrange_weights(nodes, block.order, start, end))

    own = [_Pair(place, end if block.as_end else place) for place in places]
    kept = [k for k in block.keeps if k < len(own)]
    old = [k for k, pair in enumerate(history) if pair.time not in [own[k].time for k in kept]]
    keeps = [*old, *(len(history) + k for k in kept)][-longest:]
    pairs = [*history, *own]
    step = Step(block, start, end, places, tuple(weights), tuple(takes), tuple(keeps))
    return step, [pairs[k] for k in keeps]


def lagrange_weights(nodes: Sequence[float | None], order: int, start: float, end: float) -> Weights:
    """Weights w with Σ w·v = ∫ from start to end of the polynomial through the last `order` velocities.

    nodes: the times of the velocities, None for one that is not to be used. With fewer than `order` of them the
    polynomial goes through those there are. Order 1: Δ of the last velocity. Order 2 over equal steps: Adams-Bashforth
    2 from (t0 - Δ, t0), the trapezoid from (t0, t1).
    """
    used = [k for k, node in enumerate(nodes) if node is not None][-order:] if order else []
    weights: list[float | None] = [None] * len(nodes)
    for k in used:
        others = [nodes[j] - start for j in used if j != k]  # type: ignore[operator]
        here = nodes[k] - start  # type: ignore[operator]
        # The numerator of the Lagrange polynomial, Π (s - other), by its coefficients from the constant up.
        coefficients = [1.0]
        denominator = 1.0
        for other in others:
            shifted = [0.0, *coefficients]
            coefficients = [a - other * b for a, b in zip(shifted, [*coefficients, 0.0])]
            denominator *= here - other
        length = end - start
        integral = sum(c * length ** (power + 1) / (power + 1) for power, c in enumerate(coefficients))
        weights[k] = integral / denominator
    return tuple(weights)


Velocity = Callable[[Any, Any], Any]  # (x, t) -> v
Refine = Callable[[Any, Any, Any, Any], Any]  # (x, t, seen, base) -> v


def take_step(
    block: Block,
    weights: Sequence[Sequence[Any]],
    times: Sequence[Any],
    x: Any,
    handed: Sequence[Any],
    velocity: Velocity,
    refine: Refine | None = None,
) -> tuple[Any, list[Any]]:
    """One step: the state at its end, and the velocities that it evaluated.

    weights and times as in a Step, of floats or tensors; `handed` are the velocities that the step takes. A velocity
    may have more rows than x, as guidance's have: the first of them move x, all of them are handed on.
    """
    velocities = list(handed)
    for stage, row, t in zip(block.stages, weights, times):
        point = _moved(x, row, velocities)
        if stage.network == "predictor":
            velocities.append(velocity(point, t))
        else:
            assert refine is not None
            old, new = handed[-1], velocities[-1]
            seen, base = (old if which == "old" else new for which in (stage.sees, stage.base))
            velocities.append(refine(point, t, seen, base))
    return _moved(x, weights[-1], velocities), velocities[len(handed) :]


def _moved(x: Any, weights: Sequence[Any], velocities: Sequence[Any]) -> Any:
    """x + Σ weights · velocities."""
    for weight, v in zip(weights, velocities):
        if weight is not None:
            x = x + weight * v[: len(x)]
    return x


class State(NamedTuple):
    """Where a trajectory is after a step."""

    x: Any
    velocities: tuple[Any, ...]  # those at hand, oldest first

    @property
    def v(self) -> Any:
        """The velocity that was evaluated last, of those at hand; None where none is."""
        return self.velocities[-1] if self.velocities else None


def integrate(
    steps: Sequence[Step], x: Any, velocity: Velocity, refine: Refine | None = None, velocities: Sequence[Any] = ()
) -> Iterator[State]:
    """Yield the State after each step of a plan; or of the rest of one, from x and the velocities at hand there.

    Raises ValueError where refiner blocks have no `refine`.
    """
    if refine is None and any(step.block.evaluations("refiner") for step in steps):
        raise ValueError("the schedule has R blocks: they need a refiner")
    state = State(x, tuple(velocities))
    for step in steps:
        handed = [state.velocities[k] for k in step.takes]
        x, new = take_step(step.block, step.weights, step.times, state.x, handed, velocity, refine)
        at_hand = (*state.velocities, *new)
        state = State(x, tuple(at_hand[k] for k in step.keeps))
        yield state
