"""What a user's text names: a schedule of blocks ("H1P5R3"), "dopri5", or an SDE of N steps ("sde250").

A SamplerSpec is known before there are networks: whether it needs a refiner, what it evaluates, whether it can be
compiled. No torch is imported until it is built.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowturbo.transport.blocks import check_refiner_step
from flowturbo.transport.guidance import Guidance
from flowturbo.transport.path import DIFFUSIONS, PATHS
from flowturbo.transport.schedule import Schedule
from flowturbo.transport.solver import Solver

if TYPE_CHECKING:
    from flowturbo.transport.samplers import Decode, Engine, FlowTurbo, Network, Sampler


@dataclass(frozen=True)
class SamplerSettings:
    """What shapes a trajectory besides its sampler's name: guidance, the form of R, the path, dopri5's tolerances, the
    SDE's diffusion. Raises ValueError for values that no sampler takes."""

    guidance: Guidance = Guidance()
    refiner_step: str = "released"
    path_type: str = "linear"
    atol: float = 1e-6
    rtol: float = 1e-3
    diffusion: str = "sigma"

    def __post_init__(self) -> None:
        check_refiner_step(self.refiner_step)
        for value, known in ((self.path_type, PATHS), (self.diffusion, DIFFUSIONS)):
            if value not in known:
                raise ValueError(f"{value!r} is not one of {', '.join(known)}")
        if not (self.atol > 0 and self.rtol > 0):
            raise ValueError(f"tolerances must be positive, got atol {self.atol} and rtol {self.rtol}")


@dataclass(frozen=True)
class SamplerSpec:
    """A sampler by name. str() is the name in its shortest spelling."""

    name: str
    schedule: Schedule | Solver | None = None  # None for dopri5 and SDEs
    sde_steps: int | None = None

    @classmethod
    def parse(cls, text: str | Solver | SamplerSpec) -> SamplerSpec:
        """The sampler that a text names, or that runs a solver.

        Raises ValueError, with the grammar of schedules, for anything else.
        """
        if isinstance(text, SamplerSpec):
            return text
        if isinstance(text, Solver):
            return cls(str(text), text)
        name = text.strip().lower()
        if name == "dopri5":
            return cls(name)
        if sde := re.fullmatch(r"sde(\d{0,9})", name):
            steps = int(sde[1] or 250)
            if not 2 <= steps <= 100_000:
                raise ValueError(f"an SDE needs 2 to 100000 steps, got {steps}")
            return cls(f"sde{steps}", sde_steps=steps)
        schedule = Schedule.parse(text)
        return cls(str(schedule), schedule)

    def __str__(self) -> str:
        return self.name

    @property
    def needs_refiner(self) -> bool:
        """Whether it evaluates a refiner."""
        return self.schedule is not None and self.schedule.has_refiner

    def evaluations(self, refiner_step: str = "released") -> tuple[int, int] | None:
        """(predictor, refiner) evaluations of one trajectory; None where they are known only afterwards."""
        if self.schedule is not None:
            return self.schedule.evaluations(refiner_step)
        return None if self.sde_steps is None else (self.sde_steps, 0)

    def rows(self, settings: SamplerSettings = SamplerSettings()) -> tuple[int, int] | None:
        """(predictor, refiner) rows that one image takes: two for an evaluation with guidance; None where they are
        known only afterwards."""
        if self.schedule is None:
            return None
        times = self.schedule.times(*PATHS[settings.path_type].interval)
        return settings.guidance.rows(self.schedule.plan(settings.refiner_step, times))

    def build(
        self,
        predictor: Network,
        refiner: Network | None = None,
        settings: SamplerSettings = SamplerSettings(),
        engine: Callable[[FlowTurbo], Engine] | None = None,
        decode: Decode | None = None,
    ) -> Sampler:
        """The sampler with its networks. Raises ValueError for an `engine` where there are no blocks for it."""
        from flowturbo.transport import samplers

        common: dict[str, Any] = {"path": PATHS[settings.path_type], "decode": decode}
        if self.schedule is not None:
            shape = (self.schedule, settings.guidance, settings.refiner_step)
            return samplers.FlowTurbo(predictor, refiner, *shape, engine=engine, **common)
        if engine is not None:
            raise ValueError(f"only schedules of blocks can be compiled, not {self}")
        if self.sde_steps is not None:
            common |= {"steps": self.sde_steps, "diffusion": settings.diffusion}
            return samplers.SDESampler(predictor, settings.guidance, **common)
        return samplers.ODESampler(predictor, settings.guidance, atol=settings.atol, rtol=settings.rtol, **common)
