"""Schedules: which block takes each of the N steps of a trajectory, over which grid ("H1P5R3", "P8@shift2").

Grammar, counts and the rule for the first block follow from the table of blocks. No torch is imported.

Source: FlowTurbo, section 3.4; the names N_H, N_P, N_R are the paper's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from flowturbo.transport.blocks import BLOCKS, Step, plan, resolve
from flowturbo.transport.grids import GRID_GRAMMAR, Grid

_FOLLOWERS = " and ".join(letter for letter, block in BLOCKS.items() if not block.leads)
GRAMMAR = (
    f"expected blocks with their counts: {', '.join(f'{k} ({block.name})' for k, block in BLOCKS.items())}, in any "
    f'order, groups in brackets repeated by xK; {_FOLLOWERS} cannot come first. Examples: "H1P5R3", "P5R7H3", '
    f'"[H1P1R1]x2"; {GRID_GRAMMAR}'
)

_TOKEN = re.compile(rf"([{''.join(BLOCKS)}])([0-9]+)|(\[)|(\])(?:X([0-9]+))?")
_LONGEST = 10_000


@dataclass(frozen=True)
class Schedule:
    """A sequence of blocks, one letter a step, over a time grid from 0 (noise) to 1 (data).

    `blocks` is the spelled-out sequence, e.g. "HPPPPPRRR" for H1P5R3. str() gives the short form, which is
    safe in file names and parses back to an equal schedule.
    Raises ValueError for no blocks, an unknown letter, and a first block that needs a velocity before it.
    """

    blocks: str
    grid: Grid = field(default=Grid())

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError(f"a schedule needs at least one step; {GRAMMAR}")
        if set(self.blocks) - set(BLOCKS):
            raise ValueError(f"unknown blocks in {self.blocks[:40]!r}; {GRAMMAR}")
        if not BLOCKS[self.blocks[0]].leads:
            first = self.blocks[0]
            raise ValueError(
                f"a schedule cannot start with {first} ({BLOCKS[first].name}): no velocity is there yet; {GRAMMAR}"
            )

    @classmethod
    def parse(cls, text: str | Schedule) -> Schedule:
        """Read "H1P5R3", "P5R7H3", "[H1P1R1]x2", nested groups too, "P8@shift2"; any case, spaces allowed.

        Raises ValueError with the grammar for anything else.
        """
        if isinstance(text, Schedule):
            return text
        if not isinstance(text, str):
            raise ValueError(f"schedule {text!r} is not a string; {GRAMMAR}")
        letters, at, grid = "".join(text.split()).upper().partition("@")
        return cls(_spelled_out(letters, text), Grid.parse(grid) if at else Grid())

    def __str__(self) -> str:
        return "".join(f"{letter}{len(list(run))}" for letter, run in groupby(self.blocks)) + str(self.grid)

    def __len__(self) -> int:
        """The number of steps N."""
        return len(self.blocks)

    def times(self, start: float = 0.0, end: float = 1.0) -> list[float]:
        """The N + 1 times of the grid, from `start` to `end`."""
        return self.grid.times(len(self), start, end)

    def plan(self, refiner_step: str = "released", times: Sequence[float] | None = None) -> tuple[Step, ...]:
        """The steps with their weights, over the grid's times or other N + 1. Raises ValueError as `blocks.plan`."""
        return plan(resolve(self.blocks, refiner_step), self.times() if times is None else times)

    def evaluations(self, refiner_step: str = "released") -> tuple[int, int]:
        """(predictor, refiner) evaluations of one trajectory. Guidance doubles the rows of one, not their number."""
        blocks = resolve(self.blocks, refiner_step)
        predictor, refiner = (sum(b.evaluations(network) for b in blocks) for network in ("predictor", "refiner"))
        return predictor, refiner

    @property
    def prefix(self) -> str:
        """Its blocks before the first that evaluates the refiner; all where none does."""
        return self.blocks.partition("R")[0]

    def without_refiner(self, letter: str = "") -> Schedule:
        """With every R left out, or with another block in its place: what a refiner has to beat.

        "L" for one costs no evaluation either.
        """
        return Schedule(self.blocks.replace("R", letter), self.grid)

    @property
    def has_refiner(self) -> bool:
        """Whether any of its blocks evaluates the refiner."""
        return self.evaluations()[1] > 0


def _spelled_out(letters: str, text: str) -> str:
    """One letter a step for the short form in upper case, without spaces; `text` is what the user wrote."""
    groups, position = [""], 0  # the open groups, innermost last
    while position < len(letters):
        token = _TOKEN.match(letters, position)
        if token is None or (token[4] and len(groups) == 1):
            raise ValueError(f"cannot read schedule {text[:40]!r} at {letters[position:][:12]!r}; {GRAMMAR}")
        if token[3]:
            groups.append("")
        else:
            block = token[1] or groups.pop()
            count = int((token[2] or token[5] or "1").lstrip("0")[:9] or 0)
            if len(block) * count + len(groups[-1]) > _LONGEST:
                raise ValueError(f"schedule {text[:40]!r} has over {_LONGEST} steps; {GRAMMAR}")
            groups[-1] += block * count
        position = token.end()
    if len(groups) > 1:
        raise ValueError(f"schedule {text[:40]!r} has a bracket that is not closed; {GRAMMAR}")
    return groups[0]
