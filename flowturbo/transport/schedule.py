"""Schedules: which block takes each of the N steps of a trajectory ("H1P5R3").

Source: FlowTurbo, section 3.4; the names N_H, N_P, N_R are the paper's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

REFINER_STEPS = ("released", "consistent", "single")

GRAMMAR = (
    "expected blocks with their counts: H (Heun), P (pseudo corrector), R (refiner), E (Euler), in any order, "
    'groups in brackets repeated by xK; R needs a block before it. Examples: "H1P5R3", "P5R7H3", "[H1P1R1]x2"'
)

_TOKEN = re.compile(r"([HPRE])([0-9]+)|(\[)|(\])(?:X([0-9]+))?")
_LONGEST = 10_000


@dataclass(frozen=True)
class Schedule:
    """A sequence of blocks, one letter a step, over a uniform time grid on [0, 1].

    `blocks` is the spelled-out sequence, e.g. "HPPPPPRRR" for H1P5R3. str() gives the short form, which is
    safe in file names and parses back to an equal schedule.
    Raises ValueError for no blocks, an unknown letter, or a leading R (it refines a velocity that is not there).
    """

    blocks: str

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError(f"a schedule needs at least one step; {GRAMMAR}")
        if set(self.blocks) - set("HPRE"):
            raise ValueError(f"unknown blocks in {self.blocks!r}; {GRAMMAR}")
        if self.blocks[0] == "R":
            raise ValueError(f"a schedule cannot start with R: there is no velocity to refine yet; {GRAMMAR}")

    @classmethod
    def parse(cls, text: str | Schedule) -> Schedule:
        """Read "H1P5R3", "P5R7H3", "[H1P1R1]x2", nested groups too; upper or lower case, spaces allowed.

        Raises ValueError with the grammar for anything else.
        """
        if isinstance(text, Schedule):
            return text
        if not isinstance(text, str):
            raise ValueError(f"schedule {text!r} is not a string; {GRAMMAR}")
        letters = "".join(text.split()).upper()
        groups, position = [""], 0  # the open groups, innermost last
        while position < len(letters):
            token = _TOKEN.match(letters, position)
            if token is None or (token[4] and len(groups) == 1):
                raise ValueError(f"cannot read schedule {text!r} at {letters[position:][:12]!r}; {GRAMMAR}")
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
            raise ValueError(f"schedule {text!r} has a bracket that is not closed; {GRAMMAR}")
        return cls(groups[0])

    def __str__(self) -> str:
        return "".join(f"{letter}{len(list(run))}" for letter, run in groupby(self.blocks))

    def __len__(self) -> int:
        """The number of steps N."""
        return len(self.blocks)

    def times(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """The grid of N + 1 times from 0 (noise) to 1 (data), uniform."""
        return torch.linspace(0, 1, len(self) + 1, dtype=dtype, device=device)

    def evaluations(self, refiner_step: str = "released") -> tuple[int, int]:
        """(predictor, refiner) evaluations of one trajectory.

        H takes two, E one, P one and one more where it comes first; R takes two of the refiner, or one in
        the "single" form. Guidance doubles the rows of an evaluation, not their number.
        """
        check_refiner_step(refiner_step)
        predictor = 2 * self.blocks.count("H") + self.blocks.count("P") + self.blocks.count("E")
        predictor += self.blocks[0] == "P"
        return predictor, self.blocks.count("R") * (1 if refiner_step == "single" else 2)


def check_refiner_step(refiner_step: str) -> None:
    """Raises ValueError for a name that is not one of the three forms of the R block."""
    if refiner_step not in REFINER_STEPS:
        raise ValueError(f"refiner_step {refiner_step!r} is not one of {', '.join(REFINER_STEPS)}")
