"""What edits are judged by: the real images, a classifier that has not seen the one that was edited, and distances."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowturbo.data.pictures import from_uint8
from flowturbo.evaluation.metrics import covariance_root, frechet_distance, resample_counts
from flowturbo.evaluation.statistics import Gaussian, GaussianStatistics

if TYPE_CHECKING:
    from flowturbo.sampling.generate import Networks

FOLDS = 5
JUDGED_SIDE = 16  # pixels: larger images are classified by means over squares of pixels
MEASURED_SIDE = 8  # the same for distances: a thousand images do not tell the covariance of thousands of numbers


class Mean(NamedTuple):
    """A mean over images, or a distance, and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        digits = 3 if self.error >= 0.001 else 4
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


class Data(NamedTuple):
    """All real images, uint8 (M, C, H, W), with their labels (M,), and which of them are edited, into what."""

    images: Tensor
    labels: Tensor
    edited: Tensor  # (N,) indices
    targets: Tensor  # (N,) other classes


def read_data(folder: str | None, num_images: int, networks: Networks) -> Data:
    """The images of class folders, or digits; a choice of them, and of other classes, that is the same in every run."""
    channels, classes = networks.predictor.input_shape[0], networks.predictor.num_classes
    if folder is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))[:, None]
        labels = torch.from_numpy(digits.target)
    else:
        from flowturbo.data.folders import ClassFolder

        data = ClassFolder(folder, networks.image_size, channels, classes)
        images = torch.from_numpy(np.stack([data.read(k, False)[0] for k in range(len(data))]))
        labels = torch.tensor(data.labels)
    random = torch.Generator().manual_seed(0)
    edited = torch.randperm(len(images), generator=random)[:num_images]
    others = torch.randint(1, classes, (len(edited),), generator=random)
    return Data(images, labels, edited, (labels[edited] + others) % classes)


class Classifier:
    """Support vector machines on pixels, one for each of FOLDS parts of the real images, trained on the other parts.

    So an edit of an image is judged by one that has not seen this image.
    """

    def __init__(self, data: Data):
        from sklearn.svm import SVC

        self.parts = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0)) % FOLDS
        self.edited = data.edited
        pixels, labels = self._pixels(from_uint8(data.images)), data.labels.numpy()
        self.machines = []
        for part in range(FOLDS):
            others = (self.parts != part).numpy()
            self.machines.append(SVC(C=10).fit(pixels[others], labels[others]))

    def __call__(self, images: Tensor) -> Tensor:
        """The classes (N,) of the edited images (N, C, H, W) in [-1, 1], in the order of `data.edited`."""
        pixels, parts = self._pixels(images), self.parts[self.edited].numpy()
        found = np.empty(len(images), np.int64)
        for part, machine in enumerate(self.machines):
            if (parts == part).any():
                found[parts == part] = machine.predict(pixels[parts == part])
        return torch.from_numpy(found)

    def _pixels(self, images: Tensor) -> np.ndarray:
        return _means(images, JUDGED_SIDE).flatten(1).numpy()


class Distances:
    """The Fréchet distance of images to the real ones, with the error of its difference from that of other images."""

    def __init__(self, data: Data, bootstrap: int):
        self.bootstrap = bootstrap
        self.mean, self.covariance = _gaussian(_measured(from_uint8(data.images)))
        self.root = covariance_root(self.covariance)

    def __call__(self, images: Tensor) -> Tensor:
        """The distance of images (N, C, H, W) in [-1, 1], then those of `bootstrap` resamples, always the same ones."""
        features = _measured(images)
        gaussians = [_gaussian(features, counts) for counts in resample_counts(len(images), self.bootstrap)]
        return torch.tensor([frechet_distance(self.mean, self.covariance, *each, self.root) for each in gaussians])


def mean_of(values: Tensor) -> Mean:
    """The mean of values (N,), with its standard error."""
    return Mean(values.mean().item(), values.std().item() / len(values) ** 0.5)


def with_error(distances: Tensor) -> Mean:
    """A distance, or a difference of two, and the deviation over its resamples."""
    return Mean(distances[0].item(), distances[1:].std().item())


def background(images: Tensor) -> Tensor:
    """Where uint8 images (N, C, H, W) have the colour that most of their pixels have: bool (N, 1, H, W)."""
    colours = images.transpose(0, 1).flatten(1)
    kinds, counts = colours.unique(dim=1, return_counts=True)
    return (images == kinds[:, counts.argmax(), None, None]).all(dim=1, keepdim=True)


def change(after: Tensor, before: Tensor, where: Tensor | None = None) -> Mean:
    """The root mean square difference of images (N, C, H, W), over pixels `where` (N, 1, H, W) if given.

    Images that have none of these are left out.
    """
    square = (after - before).square().mean(dim=1, keepdim=True)
    where = torch.ones_like(square) if where is None else where.to(square)
    pixels = where.flatten(1).sum(dim=1)
    return mean_of(((square * where).flatten(1).sum(dim=1) / pixels)[pixels > 0].sqrt())


def _means(images: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(images, max(1, images.shape[-1] // side))


def _measured(images: Tensor) -> Tensor:
    return _means(images, MEASURED_SIDE).flatten(1)


def _gaussian(features: Tensor, counts: Tensor | None = None) -> Gaussian:
    statistics = GaussianStatistics(features.shape[1])
    statistics.update(features, counts)
    return statistics.gaussian()
