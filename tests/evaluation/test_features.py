import contextlib
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowturbo.evaluation import (
    Archive,
    Features,
    FeatureSet,
    GaussianStatistics,
    ImageArchive,
    ImageFolder,
    extract,
    load_extractor,
)
from flowturbo.evaluation.extractors import INCEPTION_IDENTITY, PixelExtractor

OLD = Path(__file__).parents[1] / "compatibility" / "v0.1.0" / "features"


def feature_set(count=6, **changes):
    pool = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    statistics = GaussianStatistics(4)
    statistics.update(pool)
    known = {"pool": pool, "logits": pool[:, :3], "pool_statistics": statistics.gaussian(), "count": count}
    return FeatureSet(**{"source": "made up", "extractor": "pixels", "labels": "random"} | known | changes)


def noise_images(count=5, size=(6, 7), channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, *size, channels), dtype=np.uint8)


def test_images_are_read_a_batch_ahead(tmp_path):
    reading = [threading.Event() for _ in range(3)]

    class Images:
        path = tmp_path

        def __len__(self):
            return 9

        def batches(self, size):
            for k, event in enumerate(reading):
                event.set()
                yield noise_images(min(size, 9 - k * size))

    class Pixels(PixelExtractor):
        def __call__(self, images):
            assert reading[min(len(used) + 1, 2)].wait(timeout=20)
            used.append(len(images))
            return super().__call__(images)

    used: list[int] = []
    assert extract(Pixels(), Images(), batch_size=4).count == 9
    assert used == [4, 4, 1]


def test_damage_raises_value_errors_only(tmp_path):
    path = tmp_path / "whole.npz"
    feature_set().save(path)
    whole, noise, accepted = path.read_bytes(), random.Random(0), 0
    damaged = tmp_path / "damaged.npz"
    for trial in range(200):
        content = bytearray(whole)
        if trial % 2:
            content[noise.randrange(len(content))] ^= 1 << noise.randrange(8)
        else:
            del content[noise.randrange(len(content)) :]
        damaged.write_bytes(content)
        with contextlib.suppress(ValueError):
            FeatureSet.load(damaged)
            accepted += 1
    assert accepted < 30  # some bits, such as dates, mean nothing


def test_feature_set_round_trip(tmp_path):
    saved = feature_set()
    saved.save(tmp_path / "f.npz")
    loaded = FeatureSet.load(tmp_path / "f.npz")
    assert (loaded.source, loaded.extractor, loaded.count, loaded.labels) == ("made up", "pixels", 6, "random")
    assert torch.equal(loaded.pool, saved.pool)
    assert torch.equal(loaded.logits, saved.logits)
    assert torch.equal(loaded.pool_statistics.covariance, saved.pool_statistics.covariance)
    assert loaded.spatial_statistics is None
    assert [file.name for file in tmp_path.iterdir()] == ["f.npz"]


def test_reference_of_the_adm_suite(tmp_path):
    mu, sigma = np.arange(4, dtype=np.float32), np.eye(4)
    np.savez(tmp_path / "ref.npz", arr_0=noise_images(), mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=sigma[:2, :2])
    loaded = FeatureSet.load(tmp_path / "ref.npz")
    assert loaded.extractor == INCEPTION_IDENTITY
    assert loaded.count is None
    assert loaded.pool_statistics.mean.dtype == torch.float64
    assert torch.equal(loaded.spatial_statistics.covariance, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": np.array([0, np.nan, 0, 0])}, "mu contains NaN"),
        ({"mu": np.zeros(3)}, r"mu \(3,\) and sigma \(4, 4\)"),
        ({"mu": np.zeros(4, np.int64)}, "mu is int64"),
        ({"pool": np.full((6, 4), np.nan, np.float32)}, "pool contains NaN"),
        ({"pool": np.zeros((6, 5), np.float32)}, r"pool \(6, 5\): expected \(N, 4\)"),
        ({"pool": np.zeros((5, 4), np.float32)}, r"pool, logits and count speak of \[5, 6, 6\] images"),
        ({"logits": np.zeros(6, np.float32)}, r"logits \(6,\)"),
        ({"count": np.array(1)}, "count is .* at least 2"),
        ({"count": np.array([6, 6])}, "count is"),
        ({"extractor": np.array(7)}, r"extractor is array\(7\), expected text"),
        ({"extractor": np.array("")}, "extractor is .* expected text"),
    ],
)
def test_bad_feature_files_are_refused(tmp_path, changes, message):
    feature_set().save(tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz") as arrays:
        np.savez(tmp_path / "bad.npz", **{**arrays, **changes})
    with pytest.raises(ValueError, match=rf"bad\.npz: .*{message}"):
        FeatureSet.load(tmp_path / "bad.npz")


def test_features_measured_by_version_0_1_load_and_are_measured_again(tmp_path):
    before = FeatureSet.load(OLD / "stats.npz")
    assert (before.source, before.extractor, before.count, before.labels) == ("images.npz", "pixels", 12, "random")
    for index, image in enumerate(Archive(OLD / "images.npz").read("arr_0")):
        Image.fromarray(image).save(tmp_path / f"{index:02d}.png")
    for images in (ImageArchive(OLD / "images.npz"), ImageFolder(tmp_path)):
        now = extract(load_extractor("pixels"), images, keep=["pool"], progress=False)
        assert torch.equal(now.pool, before.pool)
        assert torch.equal(now.pool_statistics.mean, before.pool_statistics.mean)
        covariances = now.pool_statistics.covariance, before.pool_statistics.covariance
        torch.testing.assert_close(*covariances, rtol=0, atol=1e-14)  # summed in another order


def test_extraction_does_not_depend_on_the_batch_size(tmp_path):
    images = torch.from_numpy(noise_images(7, (8, 8)))
    np.savez(tmp_path / "images.npz", arr_0=images.numpy())
    archive = ImageArchive(tmp_path / "images.npz")

    def extracted(size, keep):
        return extract(PixelExtractor(), archive, batch_size=size, keep=keep, progress=False)

    whole, parts = extracted(50, ["pool"]), extracted(3, [])
    assert torch.equal(whole.pool, PixelExtractor()(images.permute(0, 3, 1, 2)).pool)
    assert parts.pool is None
    assert (parts.count, parts.source, parts.extractor) == (7, "images.npz", "pixels")
    torch.testing.assert_close(
        parts.pool_statistics.covariance, whole.pool_statistics.covariance, rtol=1e-10, atol=1e-10
    )


class NotANumber:
    identity = "none"

    def __call__(self, images):
        return Features(images.float().mean(dim=(2, 3)) / torch.zeros(3))


def test_features_that_are_not_finite_name_their_images(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=noise_images())
    with pytest.raises(ValueError, match=r"images\.npz: after 0 images: features contain NaN"):
        extract(NotANumber(), ImageArchive(tmp_path / "images.npz"), progress=False)
