"""What `evaluator.py benchmark` runs: the metrics of this package beside torch-fidelity's, on the same inputs.

A method takes the folder that `write_inputs` has filled and is a generator: it loads what it needs, yields "ready",
yields the name of each stage that is done, and returns its values. What comes before "ready" is not timed.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowturbo.evaluation import (
    GaussianStatistics,
    ImageFolder,
    InceptionExtractor,
    extract,
    frechet_distance,
    kid,
    kid_of_subsets,
    precision_recall,
    resample_counts,
)

READY = "ready"
RESAMPLES = 20
Method = Callable[[Path], Generator[str, None, np.ndarray]]


@dataclass(frozen=True)
class Inputs:
    """How large they are: samples and references (count, dimensions), of which `references` for pairs; images."""

    count: int
    references: int
    dimensions: int
    images: int


def write_inputs(folder: Path, inputs: Inputs) -> None:
    """Correlated, non-negative features with a decaying spectrum, the two sides a little apart; and images."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, inputs.dimensions + 1) ** -0.5
    mixing = torch.randn(inputs.dimensions, inputs.dimensions, generator=generator) * scale
    for side, spread in (("reference", 1.0), ("samples", 1.05)):
        features = torch.randn(inputs.count, inputs.dimensions, generator=generator) @ mixing.T
        np.save(folder / f"{side}.npy", (features.relu() * (0.1 * spread)).numpy())
    np.save(folder / "few.npy", np.load(folder / "reference.npy", mmap_mode="r")[: inputs.references])
    (folder / "images").mkdir()
    for k in range(inputs.images):  # smooth, as photographs are: noise takes longer to decode
        coarse = torch.randint(256, (1, 3, 32, 32), generator=generator).float()
        pixels = torch.nn.functional.interpolate(coarse, (256, 256), mode="bicubic").clamp(0, 255).byte()
        Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(folder / "images" / f"{k:05d}.png")


def write_inception(path: Path) -> None:
    """Random weights in torch-fidelity's format: time does not depend on their values."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object) -> None:  # type: ignore[override]
            pass

    torch.manual_seed(0)
    torch.save({}, path)
    torch.save(Random("random", ["2048"], feature_extractor_weights_path=str(path)).state_dict(), path)


def product_rates(size: int = 2048, rounds: int = 5) -> dict[str, dict[str, float]]:
    """FLOP/s of this machine's matrix products by dtype and library, the best of some rounds."""
    rates: dict[str, dict[str, float]] = {}
    for dtype in (torch.float64, torch.float32):
        x = torch.rand(size, size, dtype=dtype)
        calls: dict[str, Callable[[], object]] = {
            "torch": partial(torch.mm, x, x),
            "numpy": partial(np.matmul, x.numpy(), x.numpy()),
        }
        name = str(dtype).removeprefix("torch.")
        rates[name] = {library: 2 * size**3 / min(map(_seconds, [call] * rounds)) for library, call in calls.items()}
    return rates


def frechet(folder: Path) -> Generator[str, None, np.ndarray]:
    samples, references = _load(folder, "samples", "reference")
    yield READY
    gaussians = []
    for side in (references, samples):
        statistics = GaussianStatistics(side.shape[1])
        statistics.update(side)
        gaussians.append(statistics.gaussian())
    yield "moments"
    value = frechet_distance(*gaussians[0], *gaussians[1])
    yield "distance"
    return np.array([value])


def frechet_torch_fidelity(folder: Path) -> Generator[str, None, np.ndarray]:
    from torch_fidelity import metric_fid

    sides = _load(folder, "samples", "reference")
    yield READY
    moments = [metric_fid.fid_features_to_statistics(side) for side in sides]
    yield "moments"
    value = metric_fid.fid_statistics_to_metric(*moments, False)[metric_fid.KEY_METRIC_FID]
    yield "distance"
    return np.array([value])


def frechet_scipy(folder: Path) -> Generator[str, None, np.ndarray]:
    import scipy.linalg

    sides = [side.numpy() for side in _load(folder, "samples", "reference")]
    yield READY
    (m1, c1), (m2, c2) = ((side.mean(axis=0, dtype=np.float64), np.cov(side, rowvar=False)) for side in sides)
    yield "moments"
    root = scipy.linalg.sqrtm(c1 @ c2)
    value = ((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * np.trace(root).real
    yield "distance"
    return np.array([value])


def kid_of_all_pairs(folder: Path, resamples: int = 0) -> Generator[str, None, np.ndarray]:
    samples, references = _load(folder, "samples", "few")
    yield READY
    values = kid(samples, references, resample_counts(len(samples), resamples))
    yield "all"
    return values[:1].numpy()


def kid_resampled(folder: Path) -> Generator[str, None, np.ndarray]:
    return kid_of_all_pairs(folder, RESAMPLES)


def kid_subsets(folder: Path) -> Generator[str, None, np.ndarray]:
    samples, references = _load(folder, "samples", "few")
    yield READY
    values = kid_of_subsets(samples, references, size=_subset(references))
    yield "all"
    return np.array([values.mean(), values.std(correction=0)])


def kid_subsets_torch_fidelity(folder: Path) -> Generator[str, None, np.ndarray]:
    from torch_fidelity import metric_kid

    samples, references = _load(folder, "samples", "few")
    yield READY
    found = metric_kid.kid_features_to_metric(samples, references, kid_subset_size=_subset(references), verbose=False)
    yield "all"
    return np.array([found[metric_kid.KEY_METRIC_KID_MEAN], found[metric_kid.KEY_METRIC_KID_STD]])


def inside(folder: Path, resamples: int = 0) -> Generator[str, None, np.ndarray]:
    samples, references = _load(folder, "samples", "few")
    yield READY
    found = precision_recall(samples, references)
    precision, recall = (
        share(resample_counts(len(side), resamples))
        for share, side in ((found.precision, samples), (found.recall, references))
    )
    yield "all"
    return np.array([precision[0], recall[0]])


def inside_resampled(folder: Path) -> Generator[str, None, np.ndarray]:
    return inside(folder, RESAMPLES)


def inside_torch_fidelity(folder: Path) -> Generator[str, None, np.ndarray]:
    from torch_fidelity import metric_prc

    samples, references = _load(folder, "samples", "few")
    yield READY  # the other way of computing it holds all distances of 50 000 samples, 10 GB, several times
    found = metric_prc.prc_features_to_metric(samples, references, save_cpu_ram=True, verbose=False)
    yield "all"
    return np.array([found[metric_prc.KEY_METRIC_PRECISION], found[metric_prc.KEY_METRIC_RECALL]])


def images(folder: Path) -> Generator[str, None, np.ndarray]:
    weights = folder / "inception.pth"
    extractor = InceptionExtractor(weights, expected_sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    source = ImageFolder(folder / "images")
    extractor(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))
    yield READY
    found = extract(extractor, source, keep=("pool", "logits"), progress=False)
    yield "all"
    assert found.pool is not None
    return found.pool.numpy()


def images_torch_fidelity(folder: Path, *more: str, workers: bool = False) -> Generator[str, None, np.ndarray]:
    from torch_fidelity import utils

    network = utils.create_feature_extractor(
        "inception-v3-compat", ["2048", *more], cuda=False,
        feature_extractor_weights_path=str(folder / "inception.pth"), verbose=False,
    )  # fmt: skip
    source = utils.prepare_input_from_descriptor({"input": str(folder / "images")}, verbose=False)
    network(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))
    yield READY
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its four workers are more than the cores
        found = utils.get_featuresdict_from_dataset(source, network, 50, False, not workers, False)
    yield "all"
    return found["2048"].numpy()


def images_torch_fidelity_all(folder: Path) -> Generator[str, None, np.ndarray]:
    return images_torch_fidelity(folder, "logits_unbiased")


def images_torch_fidelity_workers(folder: Path) -> Generator[str, None, np.ndarray]:
    return images_torch_fidelity(folder, "logits_unbiased", workers=True)


PARTS: dict[str, dict[str, Method]] = {
    "frechet": {"ours": frechet, "torch-fidelity": frechet_torch_fidelity, "scipy sqrtm": frechet_scipy},
    "kid": {"ours": kid_of_all_pairs, f"ours, {RESAMPLES} resamples": kid_resampled},
    "kid-subsets": {"ours": kid_subsets, "torch-fidelity": kid_subsets_torch_fidelity},
    "precision-recall": {
        "ours": inside,
        f"ours, {RESAMPLES} resamples": inside_resampled,
        "torch-fidelity": inside_torch_fidelity,
    },
    "images": {
        "ours, all features": images,
        "torch-fidelity, pool": images_torch_fidelity,
        "torch-fidelity, all": images_torch_fidelity_all,
        "the same, workers": images_torch_fidelity_workers,  # its default; starting them takes seconds
    },
}


def float32_errors(folder: Path, count: int = 3000) -> dict[str, float]:
    """How far the float32 products move the metrics of pairs from float64's, on the first features of each side."""
    samples, references = (side[:count] for side in _load(folder, "samples", "few"))
    found, exact = precision_recall(samples, references), precision_recall(samples.double(), references.double())
    value, truth = kid(samples, references).item(), kid(samples.double(), references.double()).item()
    return {
        "KID": abs(value / truth - 1),
        "precision": abs(found.precision() - exact.precision()).item(),
        "recall": abs(found.recall() - exact.recall()).item(),
    }


def _subset(references: Tensor) -> int:
    return min(1000, len(references))


def _load(folder: Path, *names: str) -> list[Tensor]:
    return [torch.from_numpy(np.load(folder / f"{name}.npy")) for name in names]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
