"""Fidelity: how near a sampler comes to the exact solution of the model's own ODE from the same noise.

It needs no reference images, and its error bars are small with 256 samples: each sample is compared with its own end
point. It judges solvers and refiners of a frozen model, not the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from flowturbo.sampling.generate import ImageSampler, Networks
from flowturbo.sampling.sample_set import class_of
from flowturbo.transport.spec import SamplerSettings, SamplerSpec

PIXEL_SPAN = 2.0  # images lie in about [-1, 1]
FINE = "D128"  # midpoint never evaluates at t = 1, where velocities are hardest; its own error: docs/planning.md


class Estimate(NamedTuple):
    """A measured number with its standard error."""

    value: float
    standard_error: float

    @classmethod
    def mean(cls, values: Tensor) -> Estimate:
        """The mean of values (N,) and its standard error, which is not known of one (nan)."""
        return cls(float(values.mean()), float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan)

    def __str__(self) -> str:
        return format(self)

    def __format__(self, form: str) -> str:
        """Both numbers in a format of floats, by default with four decimals; without an error that is not known."""
        numbers = [number for number in self if not math.isnan(number)]
        return " ± ".join(format(number, form or ".4f") for number in numbers)


@dataclass(frozen=True)
class Fidelity:
    """The errors of N end points: `squares` (N,) float64 is each one's mean squared error, over all its elements.

    `span` is the width of the values' range, which PSNR refers to. Figures are pooled over all samples and elements;
    standard errors are those of the mean over samples, to first order.
    """

    squares: Tensor
    span: float = PIXEL_SPAN

    @classmethod
    def of(cls, end_points: Tensor, reference: Tensor, span: float | None = PIXEL_SPAN) -> Fidelity:
        """Of end points against those of a fine solution, both (N, ...), from the same noise, numbers and classes.

        `span` None: the range of the reference, for latents. Raises ValueError for unlike shapes, and below 2 samples.
        """
        if end_points.shape != reference.shape or len(reference) < 2:
            raise ValueError(
                f"end points of shape {tuple(end_points.shape)} against {tuple(reference.shape)}: expected one shape, "
                "of at least 2 samples"
            )
        exact = reference.double()
        squares = (end_points.double() - exact).square().flatten(1).mean(dim=1)
        return cls(squares, float(exact.max() - exact.min()) if span is None else span)

    def __len__(self) -> int:
        """The number of samples N."""
        return len(self.squares)

    def __str__(self) -> str:
        return f"RMSE {self.rmse}, PSNR {self.psnr.value:.2f} ± {self.psnr.standard_error:.2f} dB"

    @property
    def rmse(self) -> Estimate:
        """The root of the mean squared error."""
        mean, error = Estimate.mean(self.squares)
        root = math.sqrt(mean)
        return Estimate(root, error / (2 * root) if root else 0.0)

    @property
    def psnr(self) -> Estimate:
        """20 log10(span / RMSE), in dB; infinite where there is no error."""
        mean, error = Estimate.mean(self.squares)
        if not mean:
            return Estimate(math.inf, 0.0)
        return Estimate(10 * math.log10(self.span**2 / mean), 10 / math.log(10) * error / mean)

    def ratio(self, other: Fidelity) -> Estimate:
        """This RMSE over another one's on the same samples: paired, since few samples make most of both errors.

        Raises ValueError for another number of samples.
        """
        if len(self) != len(other):
            raise ValueError(f"{len(self)} and {len(other)} samples cannot be paired")
        own, others = self.squares.mean(), other.squares.mean()
        _, error = Estimate.mean(self.squares / own - other.squares / others)
        value = math.sqrt(own / others)
        return Estimate(value, value * error / 2)


class Draws(NamedTuple):
    """Which samples of a seed: their numbers, and a class for each."""

    seed: int
    numbers: range
    classes: tuple[int, ...]

    @classmethod
    def random(cls, seed: int, numbers: range, num_classes: int) -> Draws:
        """Classes drawn by number, as sample sets have them."""
        return cls(seed, numbers, tuple(class_of(seed, i, num_classes, "random") for i in numbers))


def end_points(
    networks: Networks,
    spec: str | SamplerSpec,
    settings: SamplerSettings,
    seed: int,
    numbers: range,
    classes: Sequence[int],
    batch_size: int = 64,
) -> Tensor:
    """Where a sampler ends: latents (N, C, H, W), float32 on the CPU; for models of pixels these are the images.

    Raises ValueError as ImageSampler, and unless there is a class for each number.
    """
    if len(classes) != len(numbers):
        raise ValueError(f"{len(classes)} classes for {len(numbers)} samples")
    sampler = ImageSampler(networks, spec, settings, decode=False)
    parts = []
    for start in range(0, len(numbers), batch_size):
        rows = slice(start, start + batch_size)
        parts.append(sampler(seed, numbers[rows], classes[rows]).float().cpu())
    return torch.cat(parts)


def fine_end_points(
    networks: Networks,
    settings: SamplerSettings,
    seed: int,
    numbers: range,
    classes: Sequence[int],
    batch_size: int = 64,
    fine: str = FINE,
) -> Tensor:
    """The end points of a fine solution, with guidance at every evaluation: what others are compared with."""
    full = replace(settings, guidance=replace(settings.guidance, every=1))
    return end_points(networks, fine, full, seed, numbers, classes, batch_size)


@torch.no_grad()
def pixels(networks: Networks, latents: Tensor, batch_size: int = 64) -> Tensor:
    """Images (N, C, H, W) in about [-1, 1], float32 on the CPU, of latents: not rounded to bytes."""
    parts = latents.split(batch_size)
    return torch.cat([networks.autoencoder.decode(part.to(networks.device)).float().cpu() for part in parts])
