"""The options of plan.py, shared by the command line and Python. No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flowturbo.sampling.solvers import parse_schedule
from flowturbo.system.options import option
from flowturbo.transport.blocks import REFINER_STEPS


@dataclass(frozen=True)
class ImportOptions:
    """Which published tables become solver files."""

    table: str = option(positional=True, metavar="FILE")
    out: str = option("solvers", "the folder that they are written to", metavar="DIR")
    name: str | None = option(None, "NAME-STEPS.json is written (default: the table's name in the file)")
    predictor_ckpt: str | None = option(None, "the model that they were made for, to be noted in them", metavar="FILE")
    cfg_scale: float | None = option(None, "the guidance that they were made for, to be noted in them")


@dataclass(frozen=True)
class PlannerOptions:
    """The budget of one image, and what is chosen from. Raises ValueError for impossible values."""

    budget_ms: float | None = option(None, "milliseconds for one image, decoding included", metavar="MS")
    evaluations: int | None = option(None, "of the predictor, and of the refiner if there is one, in all", metavar="N")
    rows: int | None = option(None, "of a batch, for one image; guidance takes two for an evaluation", metavar="N")
    refiners: tuple[str, ...] = option(
        (), f"refiners, each with its form of the R block ({', '.join(REFINER_STEPS)})", metavar="FORM:FILE"
    )
    solvers: tuple[str, ...] = option((), "files or names of solvers, or further schedules", metavar="SOLVER")
    num_images: int = option(256, "samples that the best are measured on")
    batch_size: int = option(32, "samples at once, and images in the batch that is timed")
    exhaustive: bool = option(False, "measure every candidate on all samples, in place of the promising ones")
    plot: str | None = option(None, "also draw the candidates and the best ones", metavar="PNG")

    def __post_init__(self) -> None:
        given = [value for value in (self.budget_ms, self.evaluations, self.rows) if value is not None]
        if len(given) != 1 or not 0 < given[0] < 1e9:
            raise ValueError("expected one positive budget: budget_ms, evaluations or rows")
        if self.num_images < 16 or self.batch_size < 1:
            raise ValueError("num_images must be at least 16, batch_size at least 1")
        for text in self.refiners:
            form, colon, file = text.partition(":")
            if form not in REFINER_STEPS or not colon or not file:
                raise ValueError(f"refiner {text!r}: expected FORM:FILE, FORM of {', '.join(REFINER_STEPS)}")
        for text in self.solvers:
            parse_schedule(text)
        if self.plot and Path(self.plot).suffix.lower() != ".png":
            raise ValueError(f"plot {self.plot!r} must end in .png")

    @property
    def budget(self) -> str:
        """Such as "8 evaluations"."""
        if self.budget_ms is not None:
            return f"{self.budget_ms:g} ms"
        return f"{self.rows} rows" if self.evaluations is None else f"{self.evaluations} evaluations"


@dataclass(frozen=True)
class SearchOptions:
    """How a solver is learned. Raises ValueError for impossible values."""

    evaluations: int = option(6, "of the predictor in one trajectory")
    steps: int = option(100, "updates")
    batch_size: int = option(32, "trajectories in each of them")
    trajectories: int = option(128, "that are learned from, each with a fine solution")
    test_trajectories: int = option(128, "that the result is measured on, of other classes and other noise")
    lr: float = option(0.02, "learning rate, falling along a cosine")
    forward_only: bool = option(
        False, "without gradients through the network: less memory, more evaluations, a worse result"
    )
    directions: int = option(
        4, "differences that a gradient is estimated from, where there is none through the network"
    )
    save_every: int = option(20, "steps between saves, from which the same command goes on")
    out: str | None = option(None, "(default: solvers/learned-EVALUATIONS-cfgSCALE.json)", metavar="JSON")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "directions", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if not 1 <= self.evaluations <= 128:
            raise ValueError(f"evaluations {self.evaluations} must lie in 1 to 128")
        if self.trajectories < self.batch_size:
            raise ValueError(f"trajectories {self.trajectories} must be at least batch_size {self.batch_size}")
        if self.test_trajectories < 2:
            raise ValueError(f"test_trajectories {self.test_trajectories} must be at least 2")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr {self.lr} must lie in (0, 1)")
