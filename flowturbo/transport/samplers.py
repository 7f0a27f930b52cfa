"""Samplers: noise and labels in, latents out.

FlowTurbo (Zhao et al., 2024, Algorithm 1), and the two that SiT (Ma et al., 2024) samples with: the adaptive
ODE solver dopri5 and the Euler-Maruyama SDE. All share `sample(z, y)`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flowturbo.networks.compiled import CompiledTrajectory
from flowturbo.transport.guidance import Guidance
from flowturbo.transport.integrators import Step, integrate
from flowturbo.transport.path import PATHS, Path
from flowturbo.transport.schedule import Schedule, check_refiner_step

Network = Callable[..., Tensor]
Noise = Callable[[int], Tensor]  # step -> standard normal noise of the state's shape

DIFFUSIONS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "sigma": lambda path, t: path.sigma(t),
    "linear": lambda path, t: 1 - t,
    "constant": lambda path, t: torch.ones_like(t),
    "decreasing": lambda path, t: 0.25 * (torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda path, t: torch.sin(math.pi * t) ** 2,
}


class FlowTurbo:
    """Samples along a schedule of Heun, pseudo corrector, refiner and Euler blocks.

    `predictor(x, t, y, drop)` and `refiner(x, t, v, y, drop)` are SiT and VelocityRefiner or anything like them;
    a schedule without R needs no refiner; `path` is the one they were trained on. `refiner_step` is one of
    "released", "consistent", "single" (`transport.integrators.refiner_step`). Guidance arguments as in `Guidance`.
    `compile` makes every block a static graph, and on CUDA the whole trajectory one (`transport.compiled`), for
    networks that offer what `PatchNetwork` lists; the first batch of a shape then takes longer. `decode`, a function
    of latents, is applied to what `sample` returns, within the same graph.
    Raises ValueError for a schedule with R but no refiner, for networks that cannot be compiled, and for what
    Schedule and Guidance refuse.
    """

    def __init__(
        self,
        predictor: Network,
        refiner: Network | None = None,
        schedule: str | Schedule = "H1P5R3",
        cfg_scale: float = 1.5,
        refiner_step: str = "released",
        cfg_channels: int | str = 3,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        path: Path = PATHS["linear"],
        compile: bool = False,
        decode: Callable[[Tensor], Tensor] | None = None,
    ):
        self.schedule = Schedule.parse(schedule)
        check_refiner_step(refiner_step)
        if "R" in self.schedule.blocks and refiner is None:
            raise ValueError(f"schedule {self.schedule} has R blocks: they need a refiner")
        self.predictor, self.refiner, self.refiner_step = predictor, refiner, refiner_step
        self.guidance = Guidance(cfg_scale, cfg_channels, cfg_interval)
        self.path, self.decode = path, decode
        # Python floats: exact, and the networks' inputs are made from them without waiting for a device.
        start, end = path.interval
        self.times = [start + (end - start) * t for t in self.schedule.times(torch.float64).tolist()]
        self.compiled: CompiledTrajectory | None = None
        if compile:
            self.compiled = CompiledTrajectory(
                predictor, refiner, self.schedule.blocks, self.times, self.guidance, refiner_step, decode
            )

    def __str__(self) -> str:
        return str(self.schedule)

    def evaluations(self) -> tuple[int, int]:
        """(predictor, refiner) evaluations of one trajectory."""
        return self.schedule.evaluations(self.refiner_step)

    @torch.no_grad()
    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        """Latents at t = 1 from noise z (N, C, H, W) and labels y (N,) int64; the shape and dtype of z.

        With `decode`, what it makes of them. Raises ValueError for labels that are not one int64 in the predictor's
        classes for each row of z, and with `compile` where this machine cannot.
        """
        if self.compiled is not None:
            check_batch(z, y, self.predictor)
            return self.compiled.sample(z, y)
        for step in self.trajectory(z, y):
            z = step.x
        return z if self.decode is None else self.decode(z)

    @torch.no_grad()
    def trajectory(self, z: Tensor, y: Tensor) -> Iterator[Step]:
        """As `sample`, but yields the Step (state and velocity, not decoded) after each block."""
        check_batch(z, y, self.predictor)
        if self.compiled is not None:
            yield from self.compiled.trajectory(z, y)
            return
        yield from integrate(
            self.guidance.velocity(self.predictor, y),
            z,
            self.schedule.blocks,
            self.times,
            offset=self.guidance.offset(self.refiner, y) if self.refiner is not None else None,
            refiner_form=self.refiner_step,
        )


class ODESampler:
    """The adaptive Runge-Kutta solver dopri5 of torchdiffeq on the guided velocity, SiT's default.

    The step size is chosen for the batch as a whole, so samples depend on the batch they are in (within the
    tolerances), and the number of evaluations is known only afterwards.
    """

    def __init__(
        self,
        predictor: Network,
        guidance: Guidance,
        *,
        path: Path = PATHS["linear"],
        atol: float = 1e-6,
        rtol: float = 1e-3,
    ):
        self.predictor, self.guidance, self.path = predictor, guidance, path
        self.atol, self.rtol = atol, rtol
        if not (atol > 0 and rtol > 0):
            raise ValueError(f"tolerances must be positive, got atol {atol} and rtol {rtol}")

    def __str__(self) -> str:
        return "dopri5"

    @torch.no_grad()
    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        """Latents from noise z (N, C, H, W) and labels y (N,)."""
        from torchdiffeq import odeint

        check_batch(z, y, self.predictor)
        velocity = self.guidance.velocity(self.predictor, y)
        times = torch.tensor(self.path.interval, dtype=z.dtype, device=z.device)
        return odeint(
            lambda t, x: velocity(x, t)[: len(x)],
            z,
            times,
            method="dopri5",
            atol=self.atol,
            rtol=self.rtol,
            # Land on the last time: it would step past it, where the network was never trained, and interpolate.
            options={"step_t": times[-1:]},
        )[-1]


class SDESampler:
    """Euler-Maruyama on SiT's reverse SDE: dx = (v + D·score) dt + √(2D) dW, then one step along the drift.

    `steps` evaluations; `diffusion` names D(t) in DIFFUSIONS; the last step, of `last_step` in t, adds no noise
    (SiT, section 3.4 and its "Mean" last step). The marginals are those of the ODE for any D.
    """

    def __init__(
        self,
        predictor: Network,
        guidance: Guidance,
        *,
        path: Path = PATHS["linear"],
        steps: int = 250,
        diffusion: str = "sigma",
        last_step: float = 0.04,
    ):
        if diffusion not in DIFFUSIONS:
            raise ValueError(f"diffusion {diffusion!r} is not one of {', '.join(DIFFUSIONS)}")
        if not (2 <= steps <= 100_000 and 0 < last_step < 1):
            raise ValueError(f"an SDE needs 2 to 100000 steps and a last step in (0, 1), got {steps} and {last_step}")
        self.predictor, self.guidance, self.path = predictor, guidance, path
        self.steps, self.diffusion, self.last_step = steps, diffusion, last_step

    def __str__(self) -> str:
        return f"sde{self.steps}"

    @torch.no_grad()
    def sample(self, z: Tensor, y: Tensor, noise: Noise | None = None) -> Tensor:
        """Latents from noise z (N, C, H, W) and labels y (N,); noise(k) is the Brownian increment of step k
        divided by √dt, by default drawn from torch's generator."""
        check_batch(z, y, self.predictor)
        noise = noise or (lambda k: torch.randn_like(z))
        velocity = self.guidance.velocity(self.predictor, y)
        start, end = self.path.interval
        times = torch.linspace(start, end - self.last_step, self.steps, dtype=torch.float64)
        x = z
        for k, t in enumerate(times):
            t = t.to(z.device, torch.promote_types(z.dtype, torch.float32))
            v = velocity(x, t)[: len(x)]
            d = DIFFUSIONS[self.diffusion](self.path, t)
            drift = v + d * self.path.score(v, x, t)
            if k == self.steps - 1:
                return x + self.last_step * drift
            dt = float(times[1] - times[0])
            x = x + dt * drift + (2 * d * dt).sqrt() * noise(k).to(x)
        raise AssertionError("unreachable")


Sampler = FlowTurbo | ODESampler | SDESampler


def make_sampler(
    text: str,
    predictor: Network,
    refiner: Network | None = None,
    guidance: Guidance | None = None,
    *,
    refiner_step: str = "released",
    path: Path = PATHS["linear"],
    atol: float = 1e-6,
    rtol: float = 1e-3,
    diffusion: str = "sigma",
    compile: bool = False,
) -> Sampler:
    """The sampler that a user's text names: a schedule ("H1P5R3"), "dopri5", or "sde" with its steps ("sde250").

    Raises ValueError for anything else, with the grammar, and for `compile` with other samplers than schedules.
    """
    guidance = guidance or Guidance()
    name = text.strip().lower()
    if compile and (name == "dopri5" or name.startswith("sde")):
        raise ValueError(f"only schedules of blocks can be compiled, not {name}")
    if name == "dopri5":
        return ODESampler(predictor, guidance, path=path, atol=atol, rtol=rtol)
    if sde := re.fullmatch(r"sde(\d{0,9})", name):
        return SDESampler(predictor, guidance, path=path, steps=int(sde[1] or 250), diffusion=diffusion)
    shape = (guidance.scale, refiner_step, guidance.channels, guidance.interval)
    return FlowTurbo(predictor, refiner, text, *shape, path=path, compile=compile)


def check_batch(z: Tensor, y: Tensor, predictor: Network) -> None:
    """Raises ValueError unless y (N,) holds one integer label for each row of z, within the predictor's classes."""
    if y.shape != z.shape[:1] or y.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"labels of shape {tuple(y.shape)} and {y.dtype} do not go with noise of shape {tuple(z.shape)}: "
            "expected one int64 for each row"
        )
    classes = getattr(predictor, "num_classes", None)
    if classes is not None and len(y) and not (int(y.min()) >= 0 and int(y.max()) < classes):
        raise ValueError(f"labels {int(y.min())} to {int(y.max())} must lie in 0 to {classes - 1}")
