"""What is known of one side of a comparison: features of its images, their statistics, and where they come from."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowturbo.evaluation.extractors import INCEPTION_IDENTITY, Extractor
from flowturbo.evaluation.sources import Archive
from flowturbo.evaluation.statistics import Gaussian, GaussianStatistics
from flowturbo.system.files import atomic_write
from flowturbo.system.values import plain, shown

LONGEST_NAME = 500  # characters of the texts in a feature file


@dataclass(frozen=True)
class FeatureSet:
    """Features of a set of images, in index order, and their statistics; what is missing is None.

    source names the images; extractor is the identity of what made the features; count is the number of images
    behind the statistics; labels says how class labels were drawn ("random", "balanced"). pool (N, D), spatial
    (N, S) and logits (N, classes) are float32 on the CPU.
    """

    source: str
    extractor: str
    count: int | None = None
    labels: str | None = None
    pool_statistics: Gaussian | None = None
    spatial_statistics: Gaussian | None = None
    pool: Tensor | None = None
    spatial: Tensor | None = None
    logits: Tensor | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz, whole or not at all: mu, sigma, mu_s and sigma_s (the ADM suite's names), pool, logits.

        Spatial features are not kept, only their statistics.
        """
        arrays: dict[str, Any] = {"source": self.source, "extractor": self.extractor}
        for suffix, gaussian in (("", self.pool_statistics), ("_s", self.spatial_statistics)):
            if gaussian is not None:
                arrays["mu" + suffix] = gaussian.mean.cpu().numpy()
                arrays["sigma" + suffix] = gaussian.covariance.cpu().numpy()
        optional = {"count": self.count, "labels": self.labels, "pool": self.pool, "logits": self.logits}
        arrays |= {name: np.asarray(value) for name, value in optional.items() if value is not None}
        with atomic_write(path) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureSet:
        """Read a file made by `save`, or the statistics in an ADM reference .npz.

        An archive that names no extractor holds the ADM suite's Inception statistics. ValueError, naming the
        file, when arrays are missing, damaged, misshapen or not finite.
        """
        archive = Archive(path)
        if "mu" not in archive or "sigma" not in archive:
            raise ValueError(f"{path}: no mu and sigma; it holds {archive.listed}")
        statistics = _read_gaussian(archive, "")
        pool = _read_features(archive, "pool", len(statistics.mean))
        logits = _read_features(archive, "logits", None)
        count = archive.read("count") if "count" in archive else None
        if count is not None and (count.shape != () or count.dtype.kind not in "iu" or count < 2):
            raise ValueError(f"{path}: count is {shown(count)}, expected a number of at least 2")
        rows = [len(each) for each in (pool, logits) if each is not None] + ([] if count is None else [int(count)])
        if len(set(rows)) > 1:
            raise ValueError(f"{path}: pool, logits and count speak of {rows} images, expected one number")
        return cls(
            source=_read_text(archive, "source") or os.path.basename(path),
            extractor=_read_text(archive, "extractor") or INCEPTION_IDENTITY,
            count=None if count is None else int(count),
            labels=_read_text(archive, "labels"),
            pool_statistics=statistics,
            spatial_statistics=_read_gaussian(archive, "_s") if "mu_s" in archive else None,
            pool=pool,
            logits=logits,
        )


class ImageSource(Protocol):
    """Where images come from: a folder, an archive, or those at hand."""

    @property
    def path(self) -> Path: ...

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, 3), n = size but for the last."""
        ...


def extract(
    extractor: Extractor,
    images: ImageSource,
    *,
    batch_size: int = 50,
    keep: Collection[str] = (),
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> FeatureSet:
    """Statistics of the features of images, and the features named in keep ("pool", "spatial", "logits").

    Images are read and decoded in threads, a batch ahead. Statistics accumulate on `device`; progress shows on a
    terminal. ValueError, naming the images, when they are bad or features not finite.
    """
    statistics: dict[str, GaussianStatistics] = {}
    kept: dict[str, Tensor] = {}
    done = 0
    # disable=None: on a terminal only, so that an error in a log is one line
    hidden = None if progress else True
    with tqdm(total=len(images), desc=images.path.name, unit="img", leave=False, disable=hidden) as bar:
        for batch in _one_ahead(images.batches(batch_size)):
            try:
                features = extractor(torch.from_numpy(batch).permute(0, 3, 1, 2))
            except ValueError as error:  # of images that the extractor does not take
                raise ValueError(f"{images.path}: {error}") from error
            for name, value in features._asdict().items():
                if value is None:
                    continue
                if name != "logits":
                    if name not in statistics:
                        statistics[name] = GaussianStatistics(value.shape[1], device)
                    try:
                        statistics[name].update(value)
                    except ValueError as error:
                        raise ValueError(f"{images.path}: after {done} images: {error}") from error
                if name in keep:
                    if name not in kept:
                        kept[name] = torch.empty(len(images), value.shape[1])
                    kept[name][done : done + len(value)] = value
            done += len(batch)
            bar.update(len(batch))
    gaussians = {name: sums.gaussian() for name, sums in statistics.items()}
    return FeatureSet(
        source=images.path.name,
        extractor=extractor.identity,
        count=done,
        pool_statistics=gaussians.get("pool"),
        spatial_statistics=gaussians.get("spatial"),
        pool=kept.get("pool"),
        spatial=kept.get("spatial"),
        logits=kept.get("logits"),
    )


def _one_ahead(batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The batches, each read while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(next, batches, None)
        while (batch := reading.result()) is not None:
            reading = thread.submit(next, batches, None)
            yield batch


def _read_gaussian(archive: Archive, suffix: str) -> Gaussian:
    mean, covariance = (_read_finite(archive, name + suffix) for name in ("mu", "sigma"))
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{archive.path}: mu{suffix} {tuple(mean.shape)} and sigma{suffix} {tuple(covariance.shape)}: "
            "expected (D,) and (D, D)"
        )
    variances = covariance.diagonal()  # those of constant features may round to just below zero
    if (variances < -1e-6 * variances.abs().max()).any() or not torch.allclose(
        covariance, covariance.T, rtol=1e-3, atol=1e-6
    ):
        raise ValueError(f"{archive.path}: sigma{suffix} is no covariance: not symmetric, or negative variances")
    return Gaussian(mean.double(), covariance.double())


def _read_features(archive: Archive, name: str, dimensions: int | None) -> Tensor | None:
    if name not in archive:
        return None
    features = _read_finite(archive, name)
    if features.ndim != 2 or dimensions not in (None, features.shape[1]):
        raise ValueError(f"{archive.path}: {name} {tuple(features.shape)}: expected (N, {dimensions or 'classes'})")
    return features.float()


def _read_finite(archive: Archive, name: str) -> Tensor:
    array = archive.read(name)
    if array.dtype not in (np.float32, np.float64):
        raise ValueError(f"{archive.path}: {name} is {array.dtype}, expected float32 or float64")
    if not np.isfinite(array).all():
        raise ValueError(f"{archive.path}: {name} contains NaN or infinity")
    return torch.from_numpy(array)


def _read_text(archive: Archive, name: str) -> str | None:
    if name not in archive:
        return None
    array = archive.read(name)
    if array.dtype.kind != "U" or array.shape != () or not str(array):
        raise ValueError(f"{archive.path}: {name} is {shown(array)}, expected text")
    return plain(str(array), LONGEST_NAME)
