"""Time and memory of the Fréchet distance on this machine: ours, torch-fidelity's, and scipy.linalg.sqrtm's."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from flowturbo.evaluation.metrics import frechet_distance
from flowturbo.evaluation.statistics import GaussianStatistics


class Run(NamedTuple):
    """Seconds for the moments of both sides and for the distance between them, the distance, and peak memory."""

    moments: float
    distance: float
    value: float
    peak_gb: float


def compare_frechet(count: int = 50_000, dimensions: int = 2048, repeats: int = 3) -> dict[str, list[Run]]:
    """Run each method `repeats` times, interleaved, on two float32 feature sets (count, dimensions).

    Every run has a process of its own, so that its peak memory is its own; that includes both feature sets and
    the imported libraries. Loading and importing are not timed.
    """
    runs: dict[str, list[Run]] = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        _in_new_process(_write_features, folder, count, dimensions)
        for _ in range(repeats):
            for name, done in runs.items():
                done.append(_in_new_process(_measure, name, folder))
    return runs


def summary(runs: dict[str, list[Run]]) -> str:
    """A table of medians, with ratios to ours and relative differences of the values from ours."""
    lines = [
        f"{'':16}{'moments s':>11}{'distance s':>12}{'ratio':>8}{'both s':>9}{'ratio':>8}{'peak GB':>9}"
        f"{'value':>14}{'difference':>12}"
    ]
    medians = {name: Run(*(statistics.median(column) for column in zip(*done))) for name, done in runs.items()}
    ours = next(iter(medians.values()))
    for name, run in medians.items():
        both, our_both = run.moments + run.distance, ours.moments + ours.distance
        lines.append(
            f"{name:16}{run.moments:11.2f}{run.distance:12.2f}{run.distance / ours.distance:7.1f}x"
            f"{both:9.2f}{both / our_both:7.1f}x{run.peak_gb:9.2f}{run.value:14.8f}"
            f"{abs(run.value / ours.value - 1):12.1e}"
        )
    return "\n".join(lines)


def _write_features(folder: str, count: int, dimensions: int) -> None:
    """Correlated, non-negative features with a decaying spectrum, the two sides a little apart."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, dimensions + 1) ** -0.5
    mixing = torch.randn(dimensions, dimensions, generator=generator) * scale
    for side, spread in (("reference", 1.0), ("samples", 1.05)):
        features = torch.randn(count, dimensions, generator=generator) @ mixing.T
        np.save(Path(folder, f"{side}.npy"), (features.relu() * (0.1 * spread)).numpy())


def _ours(samples: np.ndarray, reference: np.ndarray) -> tuple[Any, Any, Callable[[Any, Any], float]]:
    def moments(features: np.ndarray) -> Any:
        streamed = GaussianStatistics(features.shape[1])
        streamed.update(torch.from_numpy(features))
        return streamed.gaussian()

    return moments(samples), moments(reference), lambda s, r: frechet_distance(*r, *s)


def _torch_fidelity(samples: np.ndarray, reference: np.ndarray) -> tuple[Any, Any, Callable[[Any, Any], float]]:
    from torch_fidelity import metric_fid

    def distance(s: Any, r: Any) -> float:
        return metric_fid.fid_statistics_to_metric(s, r, False)[metric_fid.KEY_METRIC_FID]

    s, r = (metric_fid.fid_features_to_statistics(torch.from_numpy(side)) for side in (samples, reference))
    return s, r, distance


def _scipy_sqrtm(samples: np.ndarray, reference: np.ndarray) -> tuple[Any, Any, Callable[[Any, Any], float]]:
    import scipy.linalg

    def distance(s: Any, r: Any) -> float:
        root = scipy.linalg.sqrtm(s[1] @ r[1])
        return ((s[0] - r[0]) ** 2).sum() + np.trace(s[1]) + np.trace(r[1]) - 2 * np.trace(root).real

    s, r = ((side.mean(axis=0, dtype=np.float64), np.cov(side, rowvar=False)) for side in (samples, reference))
    return s, r, distance


METHODS: dict[str, Callable[..., Any]] = {
    "ours": _ours,
    "torch-fidelity": _torch_fidelity,
    "scipy sqrtm": _scipy_sqrtm,
}


def _measure(name: str, folder: str) -> Run:
    samples, reference = (np.load(Path(folder, f"{side}.npy")) for side in ("samples", "reference"))
    samples_4, reference_4, distance = METHODS[name](samples[:8, :4], reference[:8, :4])
    distance(samples_4, reference_4)  # imports, and starts the threads
    start = time.perf_counter()
    sample_moments, reference_moments, distance = METHODS[name](samples, reference)
    middle = time.perf_counter()
    value = float(distance(sample_moments, reference_moments))
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return Run(middle - start, end - middle, value, peak)


def _in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()
