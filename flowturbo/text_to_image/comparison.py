"""Rows side by side: images from the same noise, evaluations, time, and the distance from a fine solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from flowturbo.system.values import plus
from flowturbo.text_to_image.sampling import Made, TextSampler, sample_all


@dataclass
class Measured:
    """One row of a table. `distance` is the rms difference of pixels, 0 to 255, from the reference's, with its standard
    error over the images; None without a reference."""

    name: str
    evaluations: tuple[int, int]
    images: Tensor
    ms: float  # per image, the median of the repetitions
    spread: tuple[float, float]  # the least and the most
    distance: tuple[float, float] | None

    def line(self) -> str:
        """The row as text."""
        low, high = self.spread
        time = f"{self.ms:.3g} ms/image" + (f" ({low:.3g} to {high:.3g})" if low < high else "")
        value, error = self.distance or (None, 0.0)
        known = f" ± {error:.2f}" if error else ""  # of one image there is none
        far = "" if value is None else f"   {value:.2f}{known} from the reference"
        return f"{self.name:<12} {plus(*self.evaluations):>7} evaluations   {time}{far}"


def measure(
    samplers: Sequence[TextSampler],
    seed: int,
    prompts: Sequence[str],
    batch_size: int,
    *,
    repetitions: int = 1,
    reference: TextSampler | None = None,
) -> list[Measured]:
    """The rows, sampled in turn so that a drift of the machine meets all alike; before the first of
    several, one batch of each is thrown away."""
    for sampler in samplers if len(samplers) * repetitions > 1 else ():
        sample_all(sampler, seed, prompts[:batch_size], batch_size)
    fine = None if reference is None else sample_all(reference, seed, prompts, batch_size).images
    made: list[list[Made]] = [[] for _ in samplers]
    for _ in range(repetitions):
        for sampler, runs in zip(samplers, made):
            runs.append(sample_all(sampler, seed, prompts, batch_size))
    rows = []
    for sampler, runs in zip(samplers, made):
        times = [run.ms for run in runs]
        images = runs[0].images
        far = None if fine is None else distance(images, fine)
        rows.append(Measured(str(sampler), sampler.evaluations, images, median(times), (min(times), max(times)), far))
    return rows


def distance(images: Tensor, reference: Tensor) -> tuple[float, float]:
    """Root mean square difference of uint8 images (N, C, H, W), and its standard error over the N images."""
    squares = (images.double() - reference.double()).square().flatten(1).mean(1)
    value = squares.mean().sqrt()
    error = squares.std() / len(squares) ** 0.5 / (2 * value) if len(squares) > 1 else torch.zeros(())
    return float(value), float(error.nan_to_num())


def ratios(rows: Sequence[Measured], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """How much less time the second row of each pair takes than the first, and how far both end from the reference, as
    lines; pairs that lack a row are left out."""
    found = {row.name: row for row in rows}
    lines = []
    for slow, fast in pairs:
        if slow in found and fast in found:
            a, b = found[slow], found[fast]
            line = f"{fast} against {slow}: {1 - b.ms / a.ms:+.1%} of the time saved"
            if a.distance and b.distance:
                line += f", error {b.distance[0]:.2f} against {a.distance[0]:.2f}"
            lines.append(line)
    return lines
