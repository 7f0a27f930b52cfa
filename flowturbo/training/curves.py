"""loss.png: the figures of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo.system.files import atomic_write

PICTURE, METRICS = "loss.png", "metrics.jsonl"
ERROR = "_error"  # what the name of a figure's standard error ends with
RIVALS = {  # end-point RMSE, by its names in metrics.jsonl
    "rmse": "with the refiner",
    "rmse_free": "L in place of R",
    "rmse_without": "without R",
}
POINTS = 1000  # a curve of more is drawn through means over equal numbers of them

Curve = Mapping[int, float]  # a figure by step


def draw(folder: Path, title: str) -> None:
    """Draw what there is of loss, held-out loss and end-point errors; no picture where there is nothing yet.

    Needs matplotlib. Raises OSError where the picture cannot be written; the one before stays.
    """
    from matplotlib.figure import Figure  # without pyplot, which keeps figures and asks for a display

    curves = read_curves(folder / METRICS)
    panels = [bool(curves.get("loss") or curves.get("holdout")), any(map(curves.get, RIVALS))]
    if not any(panels):
        return
    figure = Figure(figsize=(8, 3.5 * sum(panels) + 0.3), layout="constrained")
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)
    axes = iter(np.atleast_1d(figure.subplots(sum(panels), 1)))
    if panels[0]:
        _draw_losses(next(axes), curves)
    if panels[1]:
        _draw_end_points(next(axes), curves)
    with atomic_write(folder / PICTURE) as file:
        figure.savefig(file, format="png", dpi=100)


def read_curves(path: Path) -> dict[str, dict[int, float]]:
    """The finite figures in a metrics.jsonl by name and step, in the order of the steps.

    Where a run was killed and went on, a step comes twice: the later line counts. Lines that a kill or a full disk
    cut off are passed over.
    """
    curves: dict[str, dict[int, float]] = {}
    for record in _records(path):
        for name, value in record.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(name, {})[record["step"]] = value
            elif value is None:  # what was no number takes the place of an earlier one too
                curves.get(name, {}).pop(record["step"], None)
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def _records(path: Path) -> Iterable[dict[str, Any]]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def _draw_losses(axes: Any, curves: Mapping[str, Curve]) -> None:
    loss, holdout = curves.get("loss", {}), curves.get("holdout", {})
    if loss:
        steps, values = thinned(list(loss), list(loss.values()))
        count = max(1, len(values) // 25)
        alpha, label = (0.35, None) if count > 1 else (1.0, "loss")
        mark = "o" if len(values) == 1 else None  # a line of one point shows nothing
        axes.plot(steps, values, color="C0", alpha=alpha, label=label, marker=mark)
        if count > 1:
            smooth = np.convolve(values, np.ones(count) / count, "valid")
            axes.plot(steps[count // 2 :][: len(smooth)], smooth, color="C0", label=f"loss, mean of {count} points")
    if holdout:
        _draw_curve(axes, curves, "holdout", "held-out images, averaged weights", "C1")
    shown = [*loss.values(), *holdout.values()]
    if min(shown) > 0 and max(shown) > 4 * min(shown):
        axes.set_yscale("log")
    _finish(axes, "loss")


def _draw_end_points(axes: Any, curves: Mapping[str, Curve]) -> None:
    for colour, (name, label) in enumerate(RIVALS.items()):
        if curves.get(name):
            _draw_curve(axes, curves, name, label, f"C{colour}", style="-" if name == "rmse" else "--")
    axes.set_ylim(bottom=0)
    _finish(axes, "end-point RMSE, lower is better")


def _draw_curve(axes: Any, curves: Mapping[str, Curve], name: str, label: str, colour: str, style: str = "-") -> None:
    """A figure with its standard errors, where they are known."""
    curve, errors = curves[name], curves.get(name + ERROR, {})
    steps, values = thinned(list(curve), list(curve.values()))
    bars = thinned(list(curve), [errors.get(step, 0.0) for step in curve])[1]
    axes.errorbar(steps, values, yerr=bars, fmt=f"o{style}", markersize=3, capsize=2, color=colour, label=label)


def _finish(axes: Any, what: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(what)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The means of steps and values over at most POINTS groups of neighbours."""
    groups = np.array_split(np.arange(len(steps)), min(len(steps), POINTS))
    places, figures = np.asarray(steps, float), np.asarray(values, float)
    return np.array([places[g].mean() for g in groups]), np.array([figures[g].mean() for g in groups])
