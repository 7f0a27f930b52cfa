"""Published tables of solvers, read from Python source that is never run.

The layout is NeuralSolver's (arXiv 2505.21114), NAME = dict(step6=dict(timedeltas=[...], coeffs=[[...], ...]), ...):

    x_{k+1} = x_k + Δ_k (Σ_{j<k} a_kj v_j + (1 − Σ_{j<k} a_kj) v_k)

The Δ are rounded and add up to 1 in about four digits only: they are normalised.
"""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from flowturbo.transport.solver import Solver

_MOST_BYTES = 1 << 20
_ROUNDING = 0.01  # by which published steps may miss 1


def read_tables(path: str | os.PathLike[str]) -> dict[str, Solver]:
    """The solvers in a file, as NAME-STEPS. Raises ValueError naming a file that holds none, or a damaged one."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no such file: {os.fspath(path)}")
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{os.fspath(path)!r} is larger than {_MOST_BYTES >> 20} MiB: no table of solvers")
    try:
        tree = ast.parse(file.read_bytes())
        found = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _is_table(node.value):
                table = _literal(node.value)
                if not isinstance(table, dict):
                    raise ValueError(f"{node.targets[0].id} is no dictionary of solvers")
                for entry in table.values():
                    deltas, coefficients = entry["timedeltas"], entry["coeffs"]
                    name = f"{node.targets[0].id.lower()}-{len(deltas)}"
                    if name in found:
                        raise ValueError(f"{node.targets[0].id} has two solvers of {len(deltas)} steps")
                    found[name] = from_table(name, deltas, coefficients)
    except (SyntaxError, ValueError, TypeError, LookupError, RecursionError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{os.fspath(path)!r} cannot be read as a table of solvers: {reason}") from None
    if not found:
        raise ValueError(
            f"{os.fspath(path)!r} holds no table of solvers: expected NAME = dict(step6=dict(timedeltas=[...], "
            "coeffs=[[...]]), ...)"
        )
    return found


def from_table(name: str, deltas: Sequence[float], coefficients: Sequence[Sequence[float]]) -> Solver:
    """The solver of N steps Δ and the strict lower triangle of an N × N matrix a; its other entries are not read.

    Raises ValueError for other shapes, for numbers that are not finite, and for steps that do not add up to about 1.
    """
    steps = len(deltas)
    if len(coefficients) != steps or any(len(row) < k for k, row in enumerate(coefficients)):
        raise ValueError(f"{name}: expected {steps} rows of coefficients, as many as steps")
    if not all(math.isfinite(value) for value in (*deltas, *(a for row in coefficients for a in row))):
        raise ValueError(f"{name}: a number is not finite")
    total = math.fsum(deltas)
    if abs(total - 1) > _ROUNDING:
        raise ValueError(f"{name}: its steps add up to {total:.6g}, not to 1")
    grid = (0.0, *(t / total for t in accumulate(deltas[:-1])), 1.0)
    rows = []
    for k, (start, end) in enumerate(zip(grid, grid[1:])):
        earlier = [(end - start) * a for a in coefficients[k][:k]]
        rows.append((*earlier, end - start - math.fsum(earlier)))
    return Solver(name, grid, tuple(rows))


def _is_table(node: ast.expr) -> bool:
    """Whether an expression may be a table: a dictionary whose first value has timedeltas."""
    return any(
        (isinstance(part, ast.keyword) and part.arg == "timedeltas")
        or (isinstance(part, ast.Constant) and part.value == "timedeltas")
        for part in ast.walk(node)
    )


def _literal(node: ast.expr) -> Any:
    """The value of an expression of literals and calls of dict with keywords. Raises ValueError for any other."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {str(word.arg): _literal(word.value) for word in node.keywords}
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key): _literal(value) for key, value in zip(node.keys, node.values) if key is not None}
    return ast.literal_eval(node)
