"""Schedules worth measuring for a number of evaluations. No torch is imported."""

from __future__ import annotations

from collections.abc import Iterator

from flowturbo.transport.schedule import Schedule

LETTERS = "EHPABDFM"
GRIDS = ("", "@shift1.5", "@shift2", "@shift0.67", "@power1.25", "@power0.8")
MIXED = ("MA", "ME", "MB", "AE", "AM", "PE", "PA", "FA", "FE", "DM", "DA", "AP", "BE")  # one kind first, then another
# The kind of block before an R of each form: where the velocity that it sees is one step old.
BEFORE = {"released": "P", "consistent": "P", "single": "P", "midpoint": "M", "adams": "A"}
MOST_REFINED = 3  # R blocks at the end


def candidates(evaluations: int, thorough: bool) -> list[str]:
    """Schedules with exactly so many evaluations of the predictor: each kind of block on some grids; and if `thorough`
    two kinds, one after the other, on two grids."""
    grids = GRIDS if thorough else GRIDS[:2]
    found = [text + grid for letter in LETTERS for text in _exactly(letter, evaluations) for grid in grids]
    if thorough:
        for pair in MIXED:
            for text in _two_kinds(pair[0], pair[1], evaluations):
                found += [text + grid for grid in GRIDS[:2]]
    return list(dict.fromkeys(str(Schedule.parse(text)) for text in found))


def refined(evaluations: int, form: str) -> list[str]:
    """Schedules with at most so many evaluations in all, of which a refiner of that form takes the last."""
    found = []
    for blocks in range(1, MOST_REFINED + 1):
        for steps in range(1, evaluations):
            letter = BEFORE[form]
            prefix = f"H1P{steps - 1}" if letter == "P" and steps > 1 else "H1" if letter == "P" else f"{letter}{steps}"
            text = f"{prefix}R{blocks}"
            if sum(Schedule.parse(text).evaluations(form)) == evaluations:
                found.append(text)
    return found


def _exactly(letter: str, evaluations: int) -> Iterator[str]:
    for steps in range(1, evaluations + 1):
        if Schedule.parse(f"{letter}{steps}").evaluations() == (evaluations, 0):
            yield f"{letter}{steps}"


def _two_kinds(first: str, second: str, evaluations: int) -> Iterator[str]:
    for ahead in range(1, evaluations):
        for behind in range(1, evaluations):
            text = f"{first}{ahead}{second}{behind}"
            if Schedule.parse(text).evaluations() == (evaluations, 0):
                yield text
