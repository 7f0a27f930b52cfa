"""Mean and covariance of features, as float64 sums that stream and merge exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowturbo.evaluation.products import add_products


class Gaussian(NamedTuple):
    """The two moments that a Fréchet distance compares: mean (D,) and covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


class GaussianStatistics:
    """Streaming float64 sums of D-dimensional features.

    `sums` (D+1, D+1) is Σ a aᵀ over a = [1, x], upper triangle only: it holds the count, Σx and Σxxᵀ in one
    tensor, so the statistics of several processes merge with one `all_reduce(statistics.sums)`. Trim padded
    samples before `update`. Float32 sums are not good enough at 50 000 samples; these match the batch formula
    to 1e-10. Rows are gathered until there are ROWS_AT_ONCE, so the sums do not depend on how the features were
    divided into updates.
    """

    ROWS_AT_ONCE = 4096  # as many as a product needs to run at full speed; bounds the float64 copy of the features

    def __init__(self, dimensions: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(dimensions + 1, dimensions + 1, dtype=torch.float64, device=device)
        self._rows = self._sums.new_empty(self.ROWS_AT_ONCE, dimensions + 1)  # those not yet in the sums
        self._waiting = 0

    @property
    def sums(self) -> Tensor:
        """The sums over all rows seen; the tensor itself, which may be reduced in place."""
        if self._waiting:
            add_products(self._sums, self._rows[: self._waiting])
            self._waiting = 0
        return self._sums

    @property
    def count(self) -> int:
        """The number of samples seen."""
        return round(self.sums[0, 0].item())

    def update(self, features: Tensor, counts: Tensor | None = None) -> None:
        """Add features (N, D), each once or as often as counts (N,) says; ValueError unless finite (N, D)."""
        dimensions = len(self._sums) - 1
        if features.ndim != 2 or features.shape[1] != dimensions:
            raise ValueError(f"features of shape {tuple(features.shape)}: expected (N, {dimensions})")
        _check_finite(features)
        if counts is not None:
            taken = counts.to(features.device) > 0
            features, counts = features[taken], counts.to(features.device)[taken]
        start = 0
        while start < len(features):
            part = slice(start, start + self.ROWS_AT_ONCE - self._waiting)
            rows = self._rows[self._waiting :][: len(features[part])]
            rows[:, 0] = 1
            rows[:, 1:] = features[part]
            if counts is not None:
                rows *= counts[part, None].to(rows).sqrt()  # each factor of a product takes its root
            start, self._waiting = start + len(rows), self._waiting + len(rows)
            if self._waiting == self.ROWS_AT_ONCE:
                add_products(self._sums, self._rows)
                self._waiting = 0

    def merge(self, other: GaussianStatistics) -> None:
        """Add the samples that other statistics of the same dimension have seen."""
        self._sums += other.sums.to(self._sums)

    def mean(self) -> Tensor:
        """The mean (D,); ValueError without samples."""
        self._require(1)
        sums = self.sums
        return sums[0, 1:] / sums[0, 0]

    def covariance(self) -> Tensor:
        """The unbiased covariance (D, D), divided by count − 1; ValueError below two samples."""
        self._require(2)
        mean, count = self.mean(), self.sums[0, 0]
        covariance = self.sums[1:, 1:].addr(mean, mean * count, alpha=-1).triu_().div_(count - 1)
        covariance += covariance.triu(1).T
        return covariance

    def gaussian(self) -> Gaussian:
        """Both moments; ValueError below two samples."""
        return Gaussian(self.mean(), self.covariance())

    def _require(self, least: int) -> None:
        if self.count < least:
            raise ValueError(f"statistics of {self.count} samples: at least {least} are needed")


def _check_finite(features: Tensor) -> None:
    if features.sum().isfinite():
        return  # the common case, in one pass
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        raise ValueError(f"features contain NaN or infinity, first in row {bad} of {len(features)}")
