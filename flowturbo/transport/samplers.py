"""Samplers: networks in, noise in, latents out.

FlowTurbo (Zhao et al., 2024, Algorithm 1), and the two that SiT (Ma et al., 2024) samples with: the adaptive
ODE solver dopri5 and the Euler-Maruyama SDE. All share `sample(z, y)`, and `decode`, applied to what it returns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from flowturbo.transport.blocks import State, Step, integrate
from flowturbo.transport.branches import Guided, Network, label_branches
from flowturbo.transport.editing import Edited, Source
from flowturbo.transport.guidance import Guidance
from flowturbo.transport.path import DIFFUSIONS, PATHS, Path
from flowturbo.transport.schedule import Schedule
from flowturbo.transport.solver import Solver

Noise = Callable[[int], Tensor]  # step -> standard normal noise of the state's shape
Decode = Callable[[Tensor], Tensor]


class Engine(Protocol):
    """How a FlowTurbo evaluates its steps: `Eager` here, static graphs in flowturbo.networks.compiled.

    With a `source` it edits: y are the labels of what is generated.
    """

    def sample(self, z: Tensor, y: Tensor, source: Source | None = None) -> Tensor:
        """The latents at the end, or what the sampler's `decode` makes of them."""
        ...

    def trajectory(self, z: Tensor, y: Tensor, source: Source | None = None) -> Iterator[State]:
        """The State after each step, its tensors shaped as images."""
        ...


class FlowTurbo:
    """Samples along a schedule of blocks.

    `predictor(x, t, y, drop)` and `refiner(x, t, v, y, drop)` are SiT and VelocityRefiner or anything like them;
    a schedule without R needs no refiner, and a Solver may stand in its place; `path` is the one they were trained on.
    `cfg_scale` is a number, or a Guidance that also says on which channels, when and how often. `refiner_step` is one
    of `blocks.REFINER_STEPS`. `engine` makes what evaluates the steps, from this sampler.
    Raises ValueError for a schedule with R but no refiner, and for what Schedule, Guidance and the engine refuse.
    """

    from_name: ClassVar[Callable[..., FlowTurbo]]  # set by `from flowturbo import FlowTurbo`: sampling/bundled.py

    def __init__(
        self,
        predictor: Network,
        refiner: Network | None = None,
        schedule: str | Schedule | Solver = "H1P5R3",
        cfg_scale: float | Guidance = 1.5,
        refiner_step: str = "released",
        *,
        path: Path = PATHS["linear"],
        engine: Callable[[FlowTurbo], Engine] | None = None,
        decode: Decode | None = None,
    ):
        self.schedule = schedule if isinstance(schedule, Solver) else Schedule.parse(schedule)
        self.steps = self.schedule.plan(refiner_step, self.schedule.times(*path.interval))
        if self.schedule.has_refiner and refiner is None:
            raise ValueError(f"schedule {self.schedule} has R blocks: they need a refiner")
        self.predictor, self.refiner, self.refiner_step = predictor, refiner, refiner_step
        self.guidance = cfg_scale if isinstance(cfg_scale, Guidance) else Guidance(cfg_scale)
        self.path, self.decode = path, decode
        self._engine_of = engine or Eager
        self.engine = self._engine_of(self)

    def __str__(self) -> str:
        return str(self.schedule)

    def evaluations(self) -> tuple[int, int]:
        """(predictor, refiner) evaluations of one trajectory."""
        return self.schedule.evaluations(self.refiner_step)

    def rows(self) -> tuple[int, int]:
        """(predictor, refiner) rows that it evaluates for one image: guidance needs two where both branches are."""
        return self.guidance.rows(self.steps)

    def over(self, start: float, end: float) -> FlowTurbo:
        """The same sampler along another part of time, in either direction: (1, 0) inverts, from images to noise."""
        other = copy.copy(self)
        other.steps = self.schedule.plan(self.refiner_step, self.schedule.times(start, end))
        other.engine = other._engine_of(other)
        return other

    @torch.no_grad()
    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        """Latents at t = 1 from noise z (N, C, H, W) and labels y (N,) int64; the shape and dtype of z.

        With `decode`, what it makes of them. Raises ValueError as `check_batch`.
        """
        check_batch(z, y, self.predictor)
        return self.engine.sample(z, y)

    @torch.no_grad()
    def trajectory(self, z: Tensor, y: Tensor) -> Iterator[State]:
        """As `sample`, but yields the State (x and velocities, not decoded) after each step."""
        check_batch(z, y, self.predictor)
        yield from self.engine.trajectory(z, y)

    def going_on(self, state: State, y: Tensor, first: int = 0) -> Iterator[State]:
        """The State after each step from number `first` on, of trajectories that the steps before have brought here.

        Not decoded, without the engine, and with gradients. Where guidance is at some evaluations only, the first of
        the predictor's must be one that has its null branch.
        """
        networks = guided(self.guidance, y, self.predictor, self.refiner)
        return integrate(self.guided_steps()[first:], state.x, networks.velocity, networks.refine, state.velocities)

    @torch.no_grad()
    def edit(self, y: Tensor, source: Source) -> Tensor:
        """As `sample`, an edit of a known image: from where it is on its path when the first step starts."""
        return self.engine.sample(self._start(y, source), y, source)

    @torch.no_grad()
    def edit_trajectory(self, y: Tensor, source: Source) -> Iterator[State]:
        """As `trajectory`, of an edit."""
        yield from self.engine.trajectory(self._start(y, source), y, source)

    def _start(self, y: Tensor, source: Source) -> Tensor:
        for labels in (y, source.labels):
            if labels is not None:
                check_batch(source.image, labels, self.predictor, null=True)
        return source.at(self.path, self.steps[0].start).x

    def guided_steps(self) -> list[Step]:
        """The steps with Instants in place of their times."""
        return [replace(step, times=at) for step, at in zip(self.steps, self.guidance.instants(self.steps))]


class Eager:
    """Evaluates one operation after another."""

    def __init__(self, sampler: FlowTurbo):
        self.sampler = sampler

    def sample(self, z: Tensor, y: Tensor, source: Source | None = None) -> Tensor:
        x = z
        for state in self.trajectory(z, y, source):
            x = state.x
        return x if self.sampler.decode is None else self.sampler.decode(x)

    def trajectory(self, z: Tensor, y: Tensor, source: Source | None = None) -> Iterator[State]:
        sampler = self.sampler
        if source is None:
            return sampler.going_on(State(z, ()), y)
        networks = guided(sampler.guidance, source.all_labels(y), sampler.predictor, sampler.refiner)
        edited = Edited(networks, lambda at: source.at(sampler.path, at.t))
        return integrate(sampler.guided_steps(), z, edited.velocity, edited.refine)


class ODESampler:
    """The adaptive Runge-Kutta solver dopri5 of torchdiffeq on the guided velocity, SiT's default.

    The step size is chosen for the batch as a whole, so samples depend on the batch they are in (within the
    tolerances), and the number of evaluations is known only afterwards.
    Raises ValueError for tolerances that are not positive.
    """

    def __init__(
        self,
        predictor: Network,
        guidance: Guidance = Guidance(),
        *,
        path: Path = PATHS["linear"],
        atol: float = 1e-6,
        rtol: float = 1e-3,
        decode: Decode | None = None,
    ):
        self.predictor, self.guidance, self.path = predictor, guidance, path
        self.atol, self.rtol, self.decode = atol, rtol, decode
        check_every(guidance)
        if not (atol > 0 and rtol > 0):
            raise ValueError(f"tolerances must be positive, got atol {atol} and rtol {rtol}")

    def __str__(self) -> str:
        return "dopri5"

    @torch.no_grad()
    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        """Latents from noise z (N, C, H, W) and labels y (N,)."""
        from torchdiffeq import odeint

        check_batch(z, y, self.predictor)
        networks = guided(self.guidance, y, self.predictor)
        times = torch.tensor(self.path.interval, dtype=z.dtype, device=z.device)
        x = odeint(
            lambda t, x: networks.velocity(x, self.guidance.instant(t))[: len(x)],
            z,
            times,
            method="dopri5",
            atol=self.atol,
            rtol=self.rtol,
            # Land on the last time: it would step past it, where the network was never trained, and interpolate.
            options={"step_t": times[-1:]},
        )[-1]
        return x if self.decode is None else self.decode(x)


class SDESampler:
    """Euler-Maruyama on SiT's reverse SDE: dx = (v + D·score) dt + √(2D) dW, then one step along the drift.

    `steps` evaluations; `diffusion` names D(t) in DIFFUSIONS; the last step, of `last_step` in t, adds no noise
    (SiT, section 3.4 and its "Mean" last step). The marginals are those of the ODE for any D.
    Raises ValueError for an unknown diffusion, and for impossible steps.
    """

    def __init__(
        self,
        predictor: Network,
        guidance: Guidance = Guidance(),
        *,
        path: Path = PATHS["linear"],
        steps: int = 250,
        diffusion: str = "sigma",
        last_step: float = 0.04,
        decode: Decode | None = None,
    ):
        if diffusion not in DIFFUSIONS:
            raise ValueError(f"diffusion {diffusion!r} is not one of {', '.join(DIFFUSIONS)}")
        check_every(guidance)
        if not (2 <= steps <= 100_000 and 0 < last_step < 1):
            raise ValueError(f"an SDE needs 2 to 100000 steps and a last step in (0, 1), got {steps} and {last_step}")
        self.predictor, self.guidance, self.path = predictor, guidance, path
        self.steps, self.diffusion, self.last_step, self.decode = steps, diffusion, last_step, decode

    def __str__(self) -> str:
        return f"sde{self.steps}"

    @torch.no_grad()
    def sample(self, z: Tensor, y: Tensor, noise: Noise | None = None) -> Tensor:
        """Latents from noise z (N, C, H, W) and labels y (N,); noise(k) is the Brownian increment of step k
        divided by √dt, by default drawn from torch's generator."""
        check_batch(z, y, self.predictor)
        noise = noise or (lambda k: torch.randn_like(z))
        networks = guided(self.guidance, y, self.predictor)
        start, end = self.path.interval
        times = torch.linspace(start, end - self.last_step, self.steps, dtype=torch.float64)
        dt = float(times[1] - times[0])
        x = z
        for k, t in enumerate(times):
            t = t.to(z.device, torch.promote_types(z.dtype, torch.float32))
            v = networks.velocity(x, self.guidance.instant(t))[: len(x)]
            d = DIFFUSIONS[self.diffusion](self.path, t)
            drift = v + d * self.path.score(v, x, t)
            last = k == self.steps - 1
            x = x + self.last_step * drift if last else x + dt * drift + (2 * d * dt).sqrt() * noise(k).to(x)
        return x if self.decode is None else self.decode(x)


Sampler = FlowTurbo | ODESampler | SDESampler


def guided(guidance: Guidance, y: Tensor, predictor: Network, refiner: Network | None = None) -> Guided:
    """The networks with their labels y (N,) bound, guided."""
    networks = {"predictor": predictor, **({} if refiner is None else {"refiner": refiner})}
    branches = {name: label_branches(network, y) for name, network in networks.items()}
    return Guided(branches, guidance.scale, guidance.channels, differences=[] if guidance.every > 1 else None)


def check_every(guidance: Guidance) -> None:
    """Raises ValueError for guidance at some of the evaluations only, for which the times must be known beforehand."""
    if guidance.every > 1:
        raise ValueError(f"guidance at every {guidance.every} evaluations is for schedules of blocks alone")


def check_batch(z: Tensor, y: Tensor, predictor: Network, null: bool = False) -> None:
    """Raises ValueError unless y (N,) is a tensor of one label for each row of z, within the predictor's classes.

    With `null` also the null class, if the predictor has one, whose index is the number of classes.
    Labels on another device than the CPU are not read, since that would wait for the device: they are checked where
    they are made.
    """
    for value, what in ((z, "noise"), (y, "labels")):
        if not isinstance(value, Tensor):
            raise ValueError(f"{what} of type {type(value).__name__}: expected a tensor")
    if y.shape != z.shape[:1] or y.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"labels of shape {tuple(y.shape)} and {y.dtype} do not go with noise of shape {tuple(z.shape)}: "
            "expected one int64 for each row"
        )
    classes = getattr(predictor, "num_classes", None)
    if y.device.type != "cpu" or classes is None or not len(y):
        return
    known = classes + (null and getattr(predictor, "class_dropout_prob", 0) > 0)
    if int(y.min()) < 0 or int(y.max()) >= known:
        raise ValueError(f"labels {int(y.min())} to {int(y.max())} must lie in 0 to {classes - 1}")
