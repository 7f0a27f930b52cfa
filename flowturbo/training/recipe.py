"""How a refiner is trained: its options, and what differs between the recipes. No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowturbo.sampling.options import REFINER_STEP_HELP
from flowturbo.sampling.solvers import parse_sampler
from flowturbo.system.options import AT_LEAST_1, Group, Range, option
from flowturbo.transport.blocks import BLOCKS, REFINER_STEPS
from flowturbo.transport.losses import MAX_DT, RECIPES
from flowturbo.transport.schedule import Schedule

ENDPOINT = "endpoint"
ENDPOINT_DEFAULTS: dict[str, Any] = {"global_batch_size": 64, "lr": 1e-3, "steps": 2000}  # found on digits


@dataclass(frozen=True)
class RefinerOptions(Group):
    """How a refiner is trained."""

    model_teacher_ckpt: str | None = option(
        None, "the trained predictor that is refined: a checkpoint or a run", metavar="FILE"
    )
    recipe: str = option(
        "paper",
        "the paper's loss, the released code's, or endpoint: through the R blocks of one schedule, to where a finer "
        "solution from the same noise ends",
        choices=(*RECIPES, ENDPOINT),
        shapes=True,
    )
    max_dt: float = option(
        MAX_DT,
        "upper end of the time offset Δ",
        within=Range(lambda value: 0 < value < 1, "lie in (0, 1)"),
        shapes=True,
    )
    schedule: str = option("H1P5R3", "what recipe endpoint trains for, its R blocks last; and of the sample grids")
    refiner_step: str = option("released", REFINER_STEP_HELP, choices=REFINER_STEPS)
    trajectories: int = option(
        8192, "of the predictor, cached once in the run's folder, that recipe endpoint trains on", within=AT_LEAST_1
    )
    reference: str = option("M32", "the schedule of the finer solutions, without R")
    end_points: int = option(
        64,
        "noises from which the schedule is compared at every checkpoint, by where it ends, with the same blocks "
        "without a refiner; 0 for none. Recipe endpoint has its own",
        metavar="N",
        within=Range(lambda value: value == 0 or value >= 2, "be 0 or at least 2"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, text in zip(
            ("schedule", "reference"), endpoint_schedules(self.recipe, self.schedule, self.reference)
        ):
            object.__setattr__(self, name, text)  # in one spelling: checkpoints record them


def endpoint_schedules(recipe: str, schedule: str, reference: str) -> tuple[str, str]:
    """The schedule and the reference of a recipe, in one spelling. Raises ValueError for what it cannot train."""
    spec, fine = parse_sampler(schedule), Schedule.parse(reference)
    if fine.has_refiner:
        raise ValueError(f"reference {fine} must be of the predictor alone, without R")
    found = spec.schedule
    if recipe == ENDPOINT:
        if not isinstance(found, Schedule):
            raise ValueError(f"recipe endpoint trains the R blocks that a schedule ends with: {spec} has no blocks")
        tail = found.blocks[len(found.prefix) :]
        if any(letter != "R" and BLOCKS[letter].stages for letter in tail) or not tail:
            raise ValueError(
                f"recipe endpoint trains the R blocks that a schedule ends with: expected R, and after the first "
                f"R or L alone, got {found}"
            )
    return str(spec) if isinstance(found, Schedule) else schedule, str(fine)
