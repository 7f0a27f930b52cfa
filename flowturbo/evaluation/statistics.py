"""Mean and covariance of features, as float64 sums that stream and merge exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """The two moments that a Fréchet distance compares: mean (D,) and covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


class GaussianStatistics:
    """Streaming float64 sums of D-dimensional features.

    `sums` (D+1, D+1) is Σ a aᵀ over a = [1, x], upper triangle only: it holds the count, Σx and Σxxᵀ in one
    tensor, so the statistics of several processes merge with one `all_reduce(statistics.sums)`. Trim padded
    samples before `update`. Float32 sums are not good enough at 50 000 samples; these match the batch formula
    to 1e-10.
    """

    ROWS_AT_ONCE = 4096  # bounds the float64 copy of the features
    PANEL = 512  # the product is formed in panels of rows that begin on the diagonal: nearly half the work

    def __init__(self, dimensions: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(dimensions + 1, dimensions + 1, dtype=torch.float64, device=device)

    @property
    def count(self) -> int:
        """The number of samples seen."""
        return int(self.sums[0, 0].item())

    def update(self, features: Tensor, counts: Tensor | None = None) -> None:
        """Add features (N, D), each once or as often as counts (N,) says; ValueError unless finite (N, D)."""
        dimensions = self.sums.shape[0] - 1
        if features.ndim != 2 or features.shape[1] != dimensions:
            raise ValueError(f"features of shape {tuple(features.shape)}: expected (N, {dimensions})")
        for start in range(0, len(features), self.ROWS_AT_ONCE):
            rows = slice(start, start + self.ROWS_AT_ONCE)
            x = features[rows].to(self.sums)
            if not x.isfinite().all():
                bad = start + int((~x.isfinite().all(dim=1)).nonzero()[0])
                raise ValueError(f"features contain NaN or infinity, first in row {bad} of {len(features)}")
            weighted = x = torch.cat([x.new_ones(len(x), 1), x], dim=1)
            if counts is not None:
                weight = counts[rows].to(self.sums)
                taken = weight > 0
                x = x[taken]
                weighted = x * weight[taken, None]
            for top in range(0, dimensions + 1, self.PANEL):
                self.sums[top : top + self.PANEL, top:].addmm_(weighted[:, top : top + self.PANEL].T, x[:, top:])

    def merge(self, other: GaussianStatistics) -> None:
        """Add the samples that other statistics of the same dimension have seen."""
        self.sums += other.sums.to(self.sums)

    def mean(self) -> Tensor:
        """The mean (D,); ValueError without samples."""
        self._require(1)
        return self.sums[0, 1:] / self.sums[0, 0]

    def covariance(self) -> Tensor:
        """The unbiased covariance (D, D), divided by count − 1; ValueError below two samples."""
        self._require(2)
        mean = self.mean()
        upper = (self.sums[1:, 1:] - self.sums[0, 0] * torch.outer(mean, mean)).triu() / (self.sums[0, 0] - 1)
        return upper + upper.triu(1).T

    def gaussian(self) -> Gaussian:
        """Both moments; ValueError below two samples."""
        return Gaussian(self.mean(), self.covariance())

    def _require(self, least: int) -> None:
        if self.count < least:
            raise ValueError(f"statistics of {self.count} samples: at least {least} are needed")
