"""The options of plan.py, shared by the command line and Python. No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from flowturbo.system.options import option


@dataclass(frozen=True)
class ImportOptions:
    """Which published tables become solver files."""

    table: str = option(positional=True, metavar="FILE")
    out: str = option("solvers", "the folder that they are written to", metavar="DIR")
    name: str | None = option(None, "NAME-STEPS.json is written (default: the table's name in the file)")
    predictor_ckpt: str | None = option(None, "the model that they were made for, to be noted in them", metavar="FILE")
    cfg_scale: float | None = option(None, "the guidance that they were made for, to be noted in them")


@dataclass(frozen=True)
class SearchOptions:
    """How a solver is learned. Raises ValueError for impossible values."""

    evaluations: int = option(6, "of the predictor in one trajectory")
    steps: int = option(100, "updates")
    batch_size: int = option(32, "trajectories in each of them")
    trajectories: int = option(256, "that are learned from, each with a fine solution")
    test_trajectories: int = option(256, "that the result is measured on, of other classes and other noise")
    lr: float = option(0.02, "learning rate, falling along a cosine")
    forward_only: bool = option(
        False, "without gradients through the network: less memory, more evaluations, a worse result"
    )
    directions: int = option(4, "with --forward-only: differences that a gradient is estimated from")
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
