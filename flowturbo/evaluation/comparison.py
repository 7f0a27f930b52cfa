"""All metrics of samples against a reference, as far as what is known of each side allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flowturbo.evaluation.features import FeatureSet
from flowturbo.evaluation.metrics import (
    covariance_root,
    frechet_distance,
    inception_score,
    kid,
    kid_of_subsets,
    mind,
    precision_recall,
    resample_counts,
)
from flowturbo.evaluation.statistics import Gaussian, GaussianStatistics

METRICS = ("FID", "sFID", "Inception Score", "Precision", "Recall", "KID", "MIND")


class Measurement(NamedTuple):
    """A metric's value and bootstrap standard error, or the reason why there is none."""

    value: float | None = None
    standard_error: float | None = None
    reason: str | None = None


def check_comparable(reference: FeatureSet, samples: FeatureSet) -> None:
    """ValueError when the two sides were made by unlike extractors, or from images that give unlike features."""
    if reference.extractor != samples.extractor:
        raise ValueError(
            f"unlike extractors: {reference.source} was made with '{reference.extractor}', "
            f"{samples.source} with '{samples.extractor}'"
        )
    sides = [(side.source, len(side.pool_statistics.mean)) for side in (reference, samples) if side.pool_statistics]
    if len({dimensions for _, dimensions in sides}) > 1:
        raise ValueError("unlike features: " + ", ".join(f"{source} has {size}" for source, size in sides))


def evaluate(
    reference: FeatureSet,
    samples: FeatureSet,
    *,
    bootstrap: int = 0,
    half_precision: bool = False,
    kid_subsets: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, Measurement]]:
    """Yield (name, Measurement) for each of METRICS, as they are computed.

    With bootstrap = K, standard errors come from K resamples of the sample images, drawn with replacement from
    `seed`, the reference held fixed. FID and sFID recompute mean and covariance of every resample, which costs
    about one pass over the features each; the others resample what each image contributes. Precision and
    recall keep the balls of the original images (copies of an image would shrink them), and recall resamples
    the references, whose share it is. KID is over all pairs, or over so many of torch-fidelity's subsets, which are
    not resampled. ValueError for unlike extractors.
    """
    check_comparable(reference, samples)
    device = torch.device(device)
    pooled = reference.pool_statistics, samples.pool_statistics
    yield "FID", _frechet(*pooled, samples.pool, bootstrap, seed, device)
    spatial = reference.spatial_statistics, samples.spatial_statistics
    yield "sFID", _frechet(*spatial, samples.spatial, bootstrap, seed, device)
    if samples.logits is None:
        yield "Inception Score", Measurement(reason="no logits on the sample side")
    else:
        counts = resample_counts(len(samples.logits), bootstrap, seed)
        yield "Inception Score", _measured(inception_score(samples.logits.to(device), counts=counts))

    if reference.pool is None or samples.pool is None:
        reason = f"no features on {_lacking(reference.pool, samples.pool)}"
        yield from ((name, Measurement(reason=reason)) for name in METRICS[3:])
        return
    references, generated = reference.pool.to(device), samples.pool.to(device)
    counts = resample_counts(len(generated), bootstrap, seed)
    try:
        inside = precision_recall(generated, references, half_precision=half_precision)
    except ValueError as error:  # two or three images have statistics, but no third neighbour
        yield from ((name, Measurement(reason=str(error))) for name in ("Precision", "Recall"))
    else:
        yield "Precision", _measured(inside.precision(counts))
        yield "Recall", _measured(inside.recall(resample_counts(len(references), bootstrap, seed)))
    yield (
        "KID",
        _kid_of_subsets(generated, references, kid_subsets)
        if kid_subsets
        else _measured(kid(generated, references, counts)),
    )
    yield "MIND", _measured(mind(generated, references, counts))


def _frechet(
    reference: Gaussian | None,
    samples: Gaussian | None,
    features: Tensor | None,
    bootstrap: int,
    seed: int,
    device: torch.device,
) -> Measurement:
    """The distance from stored moments, and its spread over moments recomputed from resampled features."""
    if reference is None or samples is None:
        return Measurement(reason=f"no such statistics on {_lacking(reference, samples)}")
    try:
        values = _distances(reference, samples, features, bootstrap, seed, device)
    except torch.linalg.LinAlgError:  # products of huge numbers overflow
        return Measurement(reason="it is not finite on these statistics")
    measured = _measured(values)
    if features is None and bootstrap and measured.value is not None:
        return measured._replace(reason="no standard error: the sample file keeps no such features")
    return measured


def _distances(
    reference: Gaussian, samples: Gaussian, features: Tensor | None, bootstrap: int, seed: int, device: torch.device
) -> Tensor:
    """The distance of the samples, then those of the resamples, where the features for them are there."""
    mean, covariance = (moment.to(device) for moment in reference)
    root = covariance_root(covariance)

    def distance(gaussian: Gaussian) -> float:
        sample_mean, sample_covariance = (moment.to(device) for moment in gaussian)
        return frechet_distance(mean, covariance, sample_mean, sample_covariance, root)

    distances = [distance(samples)]
    if features is None:
        return torch.tensor(distances, dtype=torch.float64)
    for counts in resample_counts(len(features), bootstrap, seed)[1:]:
        statistics = GaussianStatistics(features.shape[1], device)
        statistics.update(features, counts)
        distances.append(distance(statistics.gaussian()))
    return torch.tensor(distances, dtype=torch.float64)


def _kid_of_subsets(samples: Tensor, references: Tensor, subsets: int) -> Measurement:
    try:
        values = kid_of_subsets(samples, references, subsets)
    except ValueError as error:
        return Measurement(reason=str(error))
    deviation = values.std(correction=0).item()
    return _measured(values.mean()[None])._replace(
        reason=f"mean of {subsets} subsets, whose standard deviation is {deviation:.2g}"
    )


def _measured(values: Tensor) -> Measurement:
    """The estimate, first, and the standard deviation of the replicates after it, if any."""
    if not values[0].isfinite():
        return Measurement(reason="it is not finite on these samples")
    replicates = values[1:][values[1:].isfinite()]
    return Measurement(values[0].item(), replicates.std().item() if len(replicates) > 1 else None)


def _lacking(reference: object, samples: object) -> str:
    sides = [side for side, it in (("the reference side", reference), ("the sample side", samples)) if it is None]
    return " and ".join(sides)
