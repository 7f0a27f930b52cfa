"""The formulas: Fréchet distance, Inception Score, precision and recall, KID, MIND, and resampling for error bars.

Every metric that averages over images takes `counts` (K, N): how often each image is taken in each of K
resamples. The default takes each once, and row 0 of `resample_counts` does too, so that an estimate and its
bootstrap replicates come from one formula and one pass. Results are float64 of shape (K,).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowturbo.evaluation.precision import full_precision
from flowturbo.evaluation.products import congruence, own_products, pair_products


def resample_counts(count: int, resamples: int, seed: int = 0) -> Tensor:
    """How often each of `count` images occurs: once each in row 0, then in bootstrap draws (1+resamples, count)."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(count, (count,), generator=generator) for _ in range(resamples)]
    return torch.stack([torch.ones(count), *(draw.bincount(minlength=count).float() for draw in draws)])


def covariance_root(covariance: Tensor) -> Tensor:
    """R with R Rᵀ = covariance (D, D), float64; also for a singular covariance."""
    covariance = covariance.double()
    root, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return root  # ten times faster than the eigenvectors
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def frechet_distance(
    mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor, root1: Tensor | None = None
) -> float:
    """Squared Fréchet distance of two Gaussians: |μ₁−μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), in float64.

    tr (Σ₁Σ₂)^½ is the sum of the square roots of the eigenvalues of Rᵀ Σ₂ R with Σ₁ = R Rᵀ: a symmetric
    problem, real without an epsilon, and valid with fewer samples than dimensions. root1, from
    covariance_root(covariance1), spares the factorisation when one reference meets many samples.
    ValueError when the dimensions differ. (Heusel et al. 2017, arXiv:1706.08500, eq. 6.)
    """
    if mean1.shape != mean2.shape or covariance1.shape != covariance2.shape:
        raise ValueError(f"statistics of {len(mean1)} and of {len(mean2)} dimensions cannot be compared")
    mean1, covariance1, mean2, covariance2 = (m.double() for m in (mean1, covariance1, mean2, covariance2))
    root = covariance_root(covariance1) if root1 is None else root1
    spectrum = torch.linalg.eigvalsh(congruence(root, covariance2), UPLO="U")
    trace_of_root = spectrum.clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * trace_of_root
    return max(distance.item(), 0.0)  # rounding may leave −1e-13 between equal Gaussians


def inception_score(logits: Tensor, split_size: int = 5000, counts: Tensor | None = None) -> Tensor:
    """Inception Score of logits (N, classes): the mean over splits, in file order, of exp E KL(p(y|x) ‖ p(y)).

    The last split may be shorter. Samples sorted by class ruin the score. (Salimans et al. 2016,
    arXiv:1606.03498; splits as in the ADM suite.)
    """
    counts = logits.new_ones(1, len(logits)) if counts is None else counts
    scores = []
    for part, weights in zip(logits.split(split_size), counts.split(split_size, dim=1)):
        log_p = part.double().log_softmax(dim=1)
        p = log_p.exp()
        weights = weights.to(p)
        weights = weights / weights.sum(dim=1, keepdim=True)  # a resample may leave a short split empty: NaN
        marginal = weights @ p
        negative_entropy = weights @ (p * log_p).sum(dim=1)
        scores.append((negative_entropy - torch.xlogy(marginal, marginal).sum(dim=1)).exp())
    return torch.stack(scores).nanmean(dim=0)


class PrecisionRecall(NamedTuple):
    """Per image: does a sample lie inside a reference's ball (N,), a reference inside a sample's ball (M,)?"""

    samples_inside: Tensor
    references_inside: Tensor

    def precision(self, counts: Tensor | None = None) -> Tensor:
        """The share of samples inside; counts (K, N)."""
        return _share(self.samples_inside, counts)

    def recall(self, counts: Tensor | None = None) -> Tensor:
        """The share of references inside; counts (K, M)."""
        return _share(self.references_inside, counts)


@full_precision()
def precision_recall(
    samples: Tensor, references: Tensor, k: int = 3, half_precision: bool = False, block: int = 2048
) -> PrecisionRecall:
    """Manifold precision and recall of samples (N, D) against references (M, D).

    A ball reaches to its centre's k-th nearest neighbour of the same set, border included. Distances are
    squared L2 in float32, or as the ADM suite computes them on a GPU in half precision (differs by .001 to
    .002). Memory is a few block × block matrices. ValueError with k images or fewer on a side.
    (Kynkäänniemi et al. 2019, arXiv:1904.06991.)
    """
    for images, side in ((samples, "samples"), (references, "references")):
        if len(images) <= k:
            raise ValueError(f"{len(images)} {side}: precision and recall need more than k = {k}")
    sample_radii = _squared_radii(samples, k, half_precision, block)
    reference_radii = _squared_radii(references, k, half_precision, block)
    samples_inside = torch.zeros_like(sample_radii, dtype=torch.bool)
    references_inside = torch.zeros_like(reference_radii, dtype=torch.bool)
    for rows in _blocks(len(samples), block):
        for columns in _blocks(len(references), block):
            distances = _squared_distances(samples[rows], references[columns], half_precision)
            samples_inside[rows] |= (distances <= reference_radii[columns]).any(dim=1)
            references_inside[columns] |= (distances <= sample_radii[rows, None]).any(dim=0)
    return PrecisionRecall(samples_inside, references_inside)


@full_precision()
def kid(samples: Tensor, references: Tensor, counts: Tensor | None = None, block: int = 2048) -> Tensor:
    """Kernel Inception Distance of samples (N, D) and references (M, D): unbiased squared MMD over all pairs.

    The kernel is (x·y/D + 1)³, in the precision of the features; its sums are float64. All pairs instead of random
    subsets: the same expectation, less variance, no seed. counts (K, N) weigh the samples; an image never pairs with
    itself, nor with its own copies, so resampling keeps the estimate unbiased.
    (Bińkowski et al. 2018, arXiv:1801.01401.)
    """
    for images, side in ((samples, "samples"), (references, "references")):
        if len(images) < 2:
            raise ValueError(f"{len(images)} {side}: KID needs at least 2")
    counts = samples.new_ones(1, len(samples)) if counts is None else counts
    weights = counts.to(samples.device, torch.float64)
    once = weights.new_ones(1, len(references))
    cross = _kernel_sum(samples, weights, references, once, block) / (weights.sum(dim=1) * len(references))
    return _kernel_mean(samples, weights, block) + _kernel_mean(references, once, block) - 2 * cross


def kid_of_subsets(
    samples: Tensor, references: Tensor, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> Tensor:
    """KID (subsets,) of random subsets of `size` images of each side: torch-fidelity's, which reports their mean.

    The same subsets as torch-fidelity's, by the same defaults. ValueError where a side has fewer images.
    """
    for images, side in ((samples, "samples"), (references, "references")):
        if len(images) < size:
            raise ValueError(f"{len(images)} {side}: KID of subsets needs at least {size}")
    draws = np.random.RandomState(seed)  # theirs, drawn in their order
    x, y = (side.new_empty(size, side.shape[1]) for side in (samples, references))
    values = []
    for _ in range(subsets):
        for features, chosen in ((samples, x), (references, y)):
            numbers = torch.from_numpy(draws.choice(len(features), size, replace=False))
            torch.index_select(features, 0, numbers.to(features.device), out=chosen)
        values.append(kid(x, y))
    return torch.cat(values)


@full_precision()
def mind(
    samples: Tensor, references: Tensor, counts: Tensor | None = None, directions: int = 1000, block: int = 50
) -> Tensor:
    """Monge Inception Distance of samples (N, D) and references (M, D): a sliced Wasserstein distance.

    D times the mean, over random directions, of the squared Wasserstein-2 distance between the projections, which
    sorting gives exactly, for unlike N and M too. With the factor D a shift δ of all features counts |δ|², as in FID.
    The directions are the same in every call. counts (K, N), whole numbers of one sum in all rows, say how often each
    sample is taken. Few samples bias it upwards, less than FID. (Berthet et al. 2026, arXiv:2605.06797.)
    """
    for images, side in ((samples, "samples"), (references, "references")):
        if len(images) < 2:
            raise ValueError(f"{len(images)} {side}: MIND needs at least 2")
    counts = torch.ones(1, len(samples)) if counts is None else counts
    counts = counts.to(samples.device, torch.int64)
    sizes = counts.sum(dim=1)
    if (sizes != sizes[0]).any():
        raise ValueError("MIND needs resamples of one size")
    widths, at_samples, at_references = (
        value.to(samples.device) for value in _common_steps(int(sizes[0]), len(references))
    )
    generator = torch.Generator().manual_seed(0)
    rays = torch.randn(directions, samples.shape[1], generator=generator)
    rays = torch.nn.functional.normalize(rays, dim=1).to(samples)
    total = torch.zeros(len(counts), dtype=torch.float64, device=samples.device)
    for part in rays.split(block):
        projected, order = (part @ samples.T).double().sort(dim=1)
        known = (part @ references.T).double().sort(dim=1).values[:, at_references]
        for k, taken in enumerate(counts):
            resample = projected.flatten().repeat_interleave(taken[order].flatten()).view(len(part), -1)
            total[k] += ((resample[:, at_samples] - known).square() @ widths).sum()
    return total * samples.shape[1] / directions


def _common_steps(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the quantile functions of n and of m values are both constant: widths, and which value of each it is."""
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()  # in units of 1 / (n m)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return (ends - starts).double() / (n * m), starts // m, starts // n


def _kernel_mean(x: Tensor, weights: Tensor, block: int) -> Tensor:
    """The weighted mean (K,) of the kernel over pairs of different images."""
    total = weights.new_zeros(len(weights))
    for rows in _blocks(len(x), block):
        kernel = _cubic(own_products(x[rows], rest=-x.shape[1]), x.shape[1])  # 0 in the rest
        total += ((weights[:, rows] @ kernel) * weights[:, rows]).sum(dim=1)
        rest = slice(rows.stop, None)
        total += _kernel_sum(x[rows], weights[:, rows], x[rest], weights[:, rest], block)
    pairs = weights.sum(dim=1).square() - weights.square().sum(dim=1)
    return 2 * total / pairs


def _kernel_sum(x: Tensor, x_weights: Tensor, y: Tensor, y_weights: Tensor, block: int) -> Tensor:
    """Σᵢⱼ wᵢ k(xᵢ, yⱼ) wⱼ (K,)."""
    total = x_weights.new_zeros(len(x_weights))
    for rows in _blocks(len(x), block):
        for columns in _blocks(len(y), block):
            kernel = _cubic(pair_products(x[rows], y[columns]), x.shape[1])
            total += ((x_weights[:, rows] @ kernel) * y_weights[:, columns]).sum(dim=1)
    return total


def _cubic(products: Tensor, dimensions: int) -> Tensor:
    return products.div_(dimensions).add_(1).pow_(3).double()


def _share(inside: Tensor, counts: Tensor | None) -> Tensor:
    weights = inside.new_ones(1, len(inside)) if counts is None else counts
    weights = weights.to(inside.device, torch.float64)
    return weights @ inside.double() / weights.sum(dim=1)


def _squared_radii(x: Tensor, k: int, half_precision: bool, block: int) -> Tensor:
    """The squared distance (N,) from each row to its k-th nearest other row; each pair is looked at once."""
    nearest = x.new_full((len(x), k + 1), torch.inf, dtype=torch.float32)  # k + 1: itself too
    for rows in _blocks(len(x), block):
        for columns in _blocks(len(x), block):
            if columns.start < rows.start:
                continue
            distances = _squared_distances(x[rows], x[columns], half_precision)
            _keep_smallest(nearest[rows], distances)
            if columns.start > rows.start:
                _keep_smallest(nearest[columns], distances.T)
    return nearest.amax(dim=1)


def _keep_smallest(smallest: Tensor, values: Tensor) -> None:
    """Let smallest (N, k) hold the k smallest of what it holds and of values (N, M), row by row, in any order."""
    count, width = smallest.shape[1], 64
    if values.shape[1] > count * width and values.shape[1] % width == 0:
        # The k smallest values lie in the k groups with the smallest minima, which are fast to find.
        groups = values.unflatten(1, (-1, width))
        chosen = groups.amin(dim=2).topk(count, largest=False).indices
        values = groups.gather(1, chosen[:, :, None].expand(-1, -1, width)).flatten(1)
    smallest.copy_(torch.cat([smallest, values], dim=1).topk(count, largest=False).values)


def _squared_distances(x: Tensor, y: Tensor, half_precision: bool) -> Tensor:
    """|x|² − 2 x·y + |y|² (rows of x, rows of y), not below 0; each step rounded to half precision if asked.

    Products accumulate in float32 either way, as on a GPU. Like the ADM suite, a block that overflows in half
    precision is computed in float32.
    """

    def rounded(value: Tensor) -> Tensor:
        return value.half() if half_precision else value

    u, v = rounded(x).float(), rounded(y).float()
    u_norm, v_norm = rounded(u.square().sum(dim=1)), rounded(v.square().sum(dim=1))
    distances = rounded(pair_products(u, v)).mul_(-2).add_(u_norm[:, None]).add_(v_norm)
    if half_precision and not distances.isfinite().all():
        return _squared_distances(x, y, half_precision=False)
    return distances.float().clamp_(min=0)


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
