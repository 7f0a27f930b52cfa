"""A search for the times and coefficients of a solver: the end points of few evaluations are brought near to those of
a fine solution from the same noise.

The network stays frozen; N (N + 1) / 2 numbers are learned, so some hundred trajectories are enough. The start is the
best schedule of blocks, which is a solver too. Tested on other noise and, where the model has several classes, on
classes that were not learned from.

Sources: Bespoke Non-Stationary Solvers (Shaul et al., 2024); NeuralSolver (arXiv 2505.21114). Without gradients:
differences along random directions (Spall, 1992).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from flowturbo.data.randomness import Stream, keyed_generator, keyed_noise
from flowturbo.networks.calls import CallCounter
from flowturbo.planning.learned import Numbers
from flowturbo.planning.options import SearchOptions
from flowturbo.sampling.fidelity import Draws, Estimate, Fidelity, end_points, fine_end_points
from flowturbo.sampling.generate import Networks
from flowturbo.sampling.sample_set import class_of
from flowturbo.system.claims import check_same
from flowturbo.transport.blocks import integrate
from flowturbo.transport.path import PATHS
from flowturbo.transport.samplers import guided
from flowturbo.transport.schedule import Schedule
from flowturbo.transport.solver import Solver
from flowturbo.transport.spec import SamplerSettings, SamplerSpec
from flowturbo.weights.checkpoint import load_checkpoint, save_checkpoint

progress = partial(tqdm, leave=False, disable=None, dynamic_ncols=True)
LEARNED_FROM, TESTED_ON = 2**40, 2**41  # the first sample numbers: far from those that users sample
STARTS = ("A", "M", "F", "B", "D")
_DISTANCE = 0.02  # of the differences that stand for a gradient


@dataclass(frozen=True)
class Trajectories:
    """Noise z (N, C, H, W) and classes y (N,), with the end points of a fine solution; on the CPU."""

    draws: Draws
    z: Tensor
    y: Tensor
    ends: Tensor

    @classmethod
    def solve(cls, networks: Networks, settings: SamplerSettings, draws: Draws, steps: int, batch: int) -> Trajectories:
        """By the midpoint method with so many steps, under a progress bar."""
        planned = 2 * steps * math.ceil(len(draws.numbers) / batch)
        with (
            progress(total=planned, unit="evaluation", desc="fine solutions") as bar,
            CallCounter(networks.predictor, bar.update),
        ):
            ends = fine_end_points(networks, settings, *draws, batch_size=batch, fine=f"D{steps}")
        return cls.of(networks, draws, ends)

    @classmethod
    def of(cls, networks: Networks, draws: Draws, ends: Tensor) -> Trajectories:
        """With end points that are known."""
        z = keyed_noise(draws.seed, draws.numbers, networks.predictor.input_shape)
        return cls(draws, z, torch.tensor(draws.classes), ends)


def split_classes(seed: int, num_classes: int) -> tuple[list[int], list[int]]:
    """The classes that are learned from, and those tested on: one in five; a model of one class has it in both."""
    order = keyed_generator(seed, num_classes, Stream.ORDER).permutation(num_classes).tolist()
    held = max(1, num_classes // 5)
    return (order[held:], order[:held]) if num_classes > 1 else (order, order)


def draw(seed: int, first: int, count: int, classes: Sequence[int]) -> Draws:
    """`count` samples from number `first` on, with classes out of those given."""
    numbers = range(first, first + count)
    return Draws(seed, numbers, tuple(classes[class_of(seed, i, len(classes), "random")] for i in numbers))


def starts(evaluations: int) -> list[Solver]:
    """The schedules of one kind of block with so many evaluations, as solvers."""
    texts = [f"{letter}{steps}" for letter in STARTS for steps in range(1, evaluations + 1)]
    return [Solver.of(text) for text in texts if Schedule.parse(text).evaluations() == (evaluations, 0)]


def measure(networks: Networks, settings: SamplerSettings, solver: Solver, on: Trajectories, batch: int) -> Fidelity:
    """The fidelity of a solver's end points."""
    return Fidelity.of(end_points(networks, SamplerSpec.parse(solver), settings, *on.draws, batch_size=batch), on.ends)


@dataclass(frozen=True)
class Found:
    """What a search found, and what it is worth on the test set beside the schedules it could have started from."""

    solver: Solver
    start: Solver
    tested: dict[str, Fidelity]  # by name, "learned" and the starts

    @property
    def against_start(self) -> Estimate:
        """The learned solver's RMSE over its start's, paired."""
        return self.tested["learned"].ratio(self.tested[str(self.start)])


class Search:
    """A search under way. `state` is its file, whose content must agree with `record`, of JSON types."""

    def __init__(
        self,
        networks: Networks,
        settings: SamplerSettings,
        options: SearchOptions,
        seed: int,
        state: FilePath,
        model: str | None = None,
    ):
        self.networks, self.settings, self.options, self.seed, self.state = networks, settings, options, seed, state
        settled = {k: v for k, v in asdict(options).items() if k not in ("out", "save_every", "test_trajectories")}
        guidance = {**asdict(settings.guidance), "interval": list(settings.guidance.interval)}
        self.record: dict[str, Any] = {**settled, "seed": seed, **guidance, "path": settings.path_type, "model": model}
        self.fine_steps = max(32, 6 * options.evaluations)  # their own error is far below the one that is learned

    def run(self) -> Found:
        """Learn, or go on where the state's file says; then test. Raises OtherSettings where it was made otherwise."""
        options, networks = self.options, self.networks
        classes, others = split_classes(self.seed, networks.predictor.num_classes)
        content = load_checkpoint(self.state) if self.state.is_file() else None
        if content is not None:
            check_same(f"search state {str(self.state)!r}", content.get("record", {}), self.record)
        drawn = draw(self.seed, LEARNED_FROM, options.trajectories, classes)
        if content is None:
            pool = Trajectories.solve(networks, self.settings, drawn, self.fine_steps, options.batch_size)
        else:
            pool = Trajectories.of(networks, drawn, content["ends"])
        start = min(starts(options.evaluations), key=lambda s: self._measure(s, pool).rmse)
        learned = self._learn(start, pool, content).solver("learned")
        if self._measure(learned, pool).rmse > self._measure(start, pool).rmse:
            learned = replace(start, name="learned")  # found nothing better
        drawn = draw(self.seed, TESTED_ON, options.test_trajectories, others)
        test = Trajectories.solve(networks, self.settings, drawn, 2 * self.fine_steps, options.batch_size)
        tested = {str(solver): self._measure(solver, test) for solver in (*starts(options.evaluations), learned)}
        return Found(learned, start, tested)

    def _measure(self, solver: Solver, on: Trajectories) -> Fidelity:
        return measure(self.networks, self.settings, solver, on, self.options.batch_size)

    def _learn(self, start: Solver, pool: Trajectories, content: dict[str, Any] | None) -> Numbers:
        options = self.options
        numbers = Numbers.of(start, self.networks.device)
        optimizer = torch.optim.Adam([t.requires_grad_() for t in numbers.tensors], options.lr)
        first = 0
        if content is not None:
            first = int(content["step"])
            for tensor, saved in zip(numbers.tensors, (content["logits"], content["coefficients"])):
                tensor.data.copy_(saved)
            optimizer.load_state_dict(content["optimizer"])
        with progress(total=options.steps, initial=first, unit="step", desc="search") as bar:
            for step in range(first, options.steps):
                for group in optimizer.param_groups:
                    group["lr"] = options.lr * (1 + math.cos(math.pi * step / options.steps)) / 2
                generator = keyed_generator(self.seed, step, Stream.ORDER)
                rows = torch.from_numpy(generator.permutation(len(pool.z))[: options.batch_size])
                optimizer.zero_grad()
                loss = self._descend(numbers, pool, rows, generator)
                optimizer.step()
                bar.update()
                bar.set_postfix_str(f"RMSE {math.sqrt(loss):.4f}", refresh=False)
                if (step + 1) % options.save_every == 0:
                    self._save(step + 1, numbers, optimizer, pool)
        return numbers

    def _descend(self, numbers: Numbers, pool: Trajectories, rows: Tensor, generator: Any) -> float:
        """Leave a gradient with the numbers; returns the mean squared error (of the last trial)."""

        def error(trial: Numbers, keep: bool) -> Tensor:
            return mean_squared_error(self.networks, self.settings, trial, pool, rows, keep)

        if not self.options.forward_only:
            loss = error(numbers, True)
            loss.backward()
            return loss.item()
        for tensor in numbers.tensors:
            tensor.grad = torch.zeros_like(tensor)
        with torch.no_grad():
            for _ in range(self.options.directions):
                signs = [torch.from_numpy(generator.choice([-1.0, 1.0], tuple(t.shape))).to(t) for t in numbers.tensors]
                one, other = (
                    error(Numbers(*(t + side * _DISTANCE * s for t, s in zip(numbers.tensors, signs))), False)
                    for side in (1, -1)
                )
                slope = (one - other) / (2 * _DISTANCE * self.options.directions)
                for tensor, sign in zip(numbers.tensors, signs):
                    assert tensor.grad is not None
                    tensor.grad += slope * sign
        return one.item()

    def _save(self, step: int, numbers: Numbers, optimizer: torch.optim.Optimizer, pool: Trajectories) -> None:
        logits, coefficients = (tensor.detach() for tensor in numbers.tensors)
        content = {"record": self.record, "step": step, "logits": logits, "coefficients": coefficients}
        save_checkpoint(self.state, {**content, "optimizer": optimizer.state_dict(), "ends": pool.ends})


def mean_squared_error(
    networks: Networks, settings: SamplerSettings, numbers: Numbers, pool: Trajectories, rows: Tensor, keep: bool
) -> Tensor:
    """Of the end points of some rows of a pool; differentiable in the numbers if `keep`.

    The memory of a step is freed and computed again in the backward pass.
    """
    device, frozen = networks.device, networks.predictor
    z, y, ends = (value[rows].to(device) for value in (pool.z, pool.y, pool.ends))
    steps = numbers.plan(*PATHS[settings.path_type].interval)
    predictor: Callable[..., Tensor] = frozen
    if keep:
        predictor = lambda *inputs: checkpoint(frozen, *inputs, use_reentrant=False)  # noqa: E731
    velocities = guided(settings.guidance, y, predictor)
    timed = [replace(step, times=at) for step, at in zip(steps, settings.guidance.instants(steps))]
    *_, end = integrate(timed, z, velocities.velocity)
    return (end.x.float() - ends).square().mean()
