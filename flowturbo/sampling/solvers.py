"""Solver files: a learned solver as JSON, with the model and the guidance that it was made for. No torch is imported.

A solver stands wherever a schedule does, by the path of its file or by its name in `FOLDER`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowturbo.system.claims import read_record, write_record
from flowturbo.system.files import sha256
from flowturbo.transport.guidance import Guidance
from flowturbo.transport.schedule import Schedule
from flowturbo.transport.solver import Solver
from flowturbo.transport.spec import SamplerSpec

FOLDER = Path("solvers")  # below the working directory
FORMAT = "flowturbo solver 1"
_NAME = r"[A-Za-z0-9][\w.+-]{0,99}"
_MOST_STEPS = 256
_MOST_BYTES = 4 << 20
_LARGEST = 1e6  # of a coefficient; also keeps sums finite


class OtherSolver(ValueError):
    """A solver was made for another model or guidance."""


@dataclass(frozen=True)
class LearnedSolver(Solver):
    """A Solver with what its file says of it; None where it says nothing.

    `model_sha256` is that of the predictor's checkpoint file, `guidance` the one of the trajectories it was made on,
    `made` says how, `error` what was measured: both JSON types.
    """

    model_sha256: str | None = None
    guidance: Guidance | None = None
    made: Mapping[str, Any] = field(default_factory=dict, compare=False)
    error: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def differences(self, predictor_sha256: Callable[[], str], guidance: Guidance) -> list[str]:
        """What it was made for that is not at hand, as texts. The digest is asked for only where it matters."""
        found = []
        if self.guidance is not None and not _alike(self.guidance, guidance):
            found.append(f"guidance {self.guidance}, not {guidance}")
        if self.model_sha256 is not None and predictor_sha256() != self.model_sha256:
            found.append(f"another model (sha256 {self.model_sha256[:12]}…)")
        return found


def parse_sampler(text: str | Solver | SamplerSpec) -> SamplerSpec:
    """The sampler that a text names: as SamplerSpec.parse, or a solver's file or name.

    Raises ValueError with the grammar of schedules for anything else, and as `read_solver`.
    """
    if not isinstance(text, str):
        return SamplerSpec.parse(text)
    if text.strip().lower().endswith(".json") or os.sep in text:
        return SamplerSpec.parse(read_solver(text.strip()))
    try:
        return SamplerSpec.parse(text)
    except ValueError as error:
        if file := named(text.strip()):
            return SamplerSpec.parse(read_solver(file))
        raise ValueError(f"{error}; or a solver: a .json file, or its name in {FOLDER}/") from None


def parse_schedule(text: str) -> Schedule | Solver:
    """As parse_sampler, for what takes steps that are known beforehand. Raises ValueError for dopri5 and SDEs too."""
    spec = parse_sampler(text)
    if spec.schedule is None:
        raise ValueError(f"{spec} is no schedule and no solver")
    return spec.schedule


def named(name: str) -> Path | None:
    """The file of the solver of that name, where there is one."""
    file = FOLDER / f"{name}.json"
    return file if re.fullmatch(_NAME, name) and file.is_file() else None


def read_solver(path: str | os.PathLike[str]) -> LearnedSolver:
    """The solver in a file, called by the file's name. Raises ValueError naming a file that holds none."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no such solver file, and no schedule of blocks: {os.fspath(path)}")
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES >> 20} MiB")
        content = read_record(file) or {}
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is {str(content.get('format'))[:40]!r}, expected {FORMAT!r}")
        return _solver_of(content, re.sub(r"[^\w.+-]", "_", file.stem)[:100])
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} holds no solver: {error}") from None


def write_solver(path: str | os.PathLike[str], solver: LearnedSolver) -> None:
    """Write a solver's file, whole or not at all.

    Raises ValueError as `check_solver_path`, and for what could not be read again, and OSError.
    """
    check_solver_path(path)
    guidance = None if solver.guidance is None else asdict(solver.guidance)
    content = {
        "format": FORMAT,
        "evaluations": len(solver),
        "times": list(solver.grid),
        "coefficients": [list(row) for row in solver.coefficients],
        "model_sha256": solver.model_sha256,
        "guidance": guidance,
        "made": dict(solver.made),
        "error": dict(solver.error),
    }
    _solver_of(content, solver.name)
    write_record(path, content)


def check_solver_path(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a path by whose name a solver could not be found: not NAME.json, or a schedule's name."""
    file = Path(path)
    if file.suffix != ".json" or not re.fullmatch(_NAME, file.stem):
        raise ValueError(f"solver file {os.fspath(path)!r}: expected NAME.json, NAME of letters, digits and . _ + -")
    try:
        SamplerSpec.parse(file.stem)
    except ValueError:
        return
    raise ValueError(f"solver file {os.fspath(path)!r}: {file.stem} names a schedule already")


def check_made_for(
    spec: SamplerSpec,
    predictor: str | os.PathLike[str],
    guidance: Guidance,
    strict: bool,
    warn: Callable[[str], object],
) -> None:
    """`warn` in one line of a solver that was made for another model, or guidance; `predictor` is a checkpoint file.

    Raises OtherSolver instead if `strict`.
    """
    if not isinstance(spec.schedule, LearnedSolver):
        return
    if found := spec.schedule.differences(lambda: sha256(predictor), guidance):
        told = f"solver {spec} was made for {' and '.join(found)}"
        if strict:
            raise OtherSolver(told)
        warn(f"{told}: measure it before you trust it")


def _alike(one: Guidance, other: Guidance) -> bool:
    return one == other or one.scale == other.scale == 1


def _solver_of(content: Mapping[str, Any], name: str) -> LearnedSolver:
    rows = content.get("coefficients")
    if not isinstance(rows, list) or not 1 <= len(rows) <= _MOST_STEPS:
        raise ValueError(f"expected coefficients: a list of 1 to {_MOST_STEPS} rows")
    times, coefficients = _numbers("times", content.get("times")), [_numbers("coefficients", row) for row in rows]
    digest, made, error = (content.get(key) for key in ("model_sha256", "made", "error"))
    if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        raise ValueError("model_sha256 is no sha256")
    return LearnedSolver(
        name,
        times,
        tuple(coefficients),
        digest,
        _guidance(content.get("guidance")),
        made if isinstance(made, dict) else {},
        error if isinstance(error, dict) else {},
    )


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    """A list of numbers as floats. Raises ValueError for anything else, and for huge ones."""
    if not isinstance(values, list) or len(values) > _MOST_STEPS + 1:
        raise ValueError(f"expected {name}: lists of at most {_MOST_STEPS + 1} numbers")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:  # also nan
            raise ValueError(f"{name} hold {str(value)[:40]!r}, expected numbers of at most {_LARGEST:g}")
    return tuple(map(float, values))


def _guidance(content: Any) -> Guidance | None:
    if content is None:
        return None
    try:
        low, high = content["interval"]
        numbers = [float(content["scale"]), float(low), float(high)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("not finite")
        return Guidance(numbers[0], content["channels"], (numbers[1], numbers[2]), content["every"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"its guidance cannot be read ({type(error).__name__}: {error})") from None
