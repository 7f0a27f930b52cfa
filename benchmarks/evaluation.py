"""Time, memory and values of the metrics on this machine, beside torch-fidelity's and scipy's."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.metrics import (
    PARTS,
    READY,
    Inputs,
    float32_errors,
    product_rates,
    write_inception,
    write_inputs,
)

WARM_UP = Inputs(count=64, references=64, dimensions=4, images=2)


class Run(NamedTuple):
    """Seconds by stage, the values, and peak memory."""

    seconds: dict[str, float]
    values: np.ndarray
    peak_gb: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def compare(inputs: Inputs, repeats: int, parts: Collection[str]) -> Iterator[str]:
    """Yield a text for each part: its methods run `repeats` times in turn, each run in a process of its own.

    So the peak memory of a run is its own; it includes features and libraries. Loading and importing are not timed.
    """
    rates = _in_new_process(product_rates)
    yield "matrix products: " + "; ".join(
        f"{dtype} " + ", ".join(f"{rate / 1e9:.1f} GFLOP/s ({library})" for library, rate in found.items())
        for dtype, found in rates.items()
    )
    with tempfile.TemporaryDirectory() as name:
        folder, small = Path(name, "inputs"), Path(name, "warm-up")
        for place, size in ((folder, inputs), (small, WARM_UP)):
            place.mkdir()
            _in_new_process(write_inputs, place, size)
        if "images" in parts:
            _in_new_process(write_inception, folder / "inception.pth")
            (small / "inception.pth").symlink_to(folder / "inception.pth")
        for part in parts:
            runs: dict[str, list[Run]] = {method: [] for method in PARTS[part]}
            rounds = [method for _ in range(repeats) for method in runs]
            for method in tqdm(rounds, desc=part, unit="run", leave=False, disable=None):
                runs[method].append(_in_new_process(measure, part, method, folder, small))
            yield f"\n{part}\n{table(runs)}{_remark(part, runs, inputs, rates, folder)}"


def measure(part: str, method: str, folder: Path, small: Path) -> Run:
    """One run, after a small one that imports what there is to import."""
    for _ in PARTS[part][method](small):
        pass
    # That of the process where it has one thread, which others disturb least; but images are read by more.
    clock = time.process_time if torch.get_num_threads() == 1 and part != "images" else time.perf_counter
    stages = PARTS[part][method](folder)
    seconds: dict[str, float] = {}
    assert next(stages) == READY
    while True:
        start = clock()
        try:
            stage = next(stages)
        except StopIteration as ended:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
            return Run(seconds, ended.value, peak)
        seconds[stage] = clock() - start


def table(runs: dict[str, list[Run]]) -> str:
    """Medians, with the time as a multiple of the first method's, and the largest difference from its values."""
    first = next(iter(runs.values()))
    stages = [stage for stage in first[0].seconds if stage != "all"]
    columns = [*(f"{stage} s" for stage in stages), "s", "ratio", "peak GB", "value", "difference"]
    lines = ["".join([f"{'':22}", *(f"{column:>12}" for column in columns)])]
    for name, done in runs.items():
        parts = [f"{statistics.median(run.seconds[stage] for run in done):12.2f}" for stage in stages]
        total = statistics.median(run.total for run in done)
        ratio = total / statistics.median(run.total for run in first)
        peak = statistics.median(run.peak_gb for run in done)
        values, ours = done[0].values, first[0].values
        difference = np.abs(values - ours).max() / np.abs(ours).max()
        lines.append(
            "".join([f"{name:22}", *parts])
            + f"{total:12.2f}{ratio:11.2f}x{peak:12.2f}{values.flat[0]:12.7f}{difference:12.1e}"
        )
    return "\n".join(lines)


def _remark(
    part: str, runs: dict[str, list[Run]], inputs: Inputs, rates: dict[str, dict[str, float]], folder: Path
) -> str:
    """What a part's seconds mean."""
    ours = next(iter(runs.values()))
    if part == "frechet":
        rate = 2 * inputs.count * inputs.dimensions**2 / statistics.median(run.seconds["moments"] for run in ours)
        share = rate / max(rates["float64"].values())
        return f"\nmoments: {rate / 1e9:.1f} GFLOP/s, counting N·D² a side: {share:.2f} of the float64 products"
    if part == "images":
        return f"\n{inputs.images / statistics.median(run.total for run in ours):.2f} images/s"
    if part in ("kid", "precision-recall"):
        errors = _in_new_process(float32_errors, folder)
        found = {name: error for name, error in errors.items() if (name == "KID") == (part == "kid")}
        return "\nfloat32 against float64 products, 3000 a side: " + ", ".join(
            f"{name} {error:.1e}" for name, error in found.items()
        )
    return ""


def _in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()
