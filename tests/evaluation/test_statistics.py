import numpy as np
import pytest
import torch

from flowturbo.evaluation import GaussianStatistics


def features_of(count, dimensions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator)
    return torch.randn(count, dimensions, generator=generator) @ mixing + 3


def streamed(features, sizes):
    statistics = GaussianStatistics(features.shape[1])
    for part in features.split(sizes):
        statistics.update(part)
    return statistics


@pytest.mark.parametrize("dimensions", [1, 7, 600])  # 600: more than one panel
def test_streaming_equals_batch(dimensions):
    features = features_of(999, dimensions)
    statistics = streamed(features, [1, 500, 97, 401])
    batch = features.double().numpy()
    covariance = np.cov(batch, rowvar=False).reshape(dimensions, dimensions)
    assert statistics.count == 999
    np.testing.assert_allclose(statistics.mean(), batch.mean(axis=0), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(statistics.covariance(), covariance, rtol=1e-10, atol=1e-10 * covariance.max())


def test_more_rows_than_fit_at_once():
    features = features_of(GaussianStatistics.ROWS_AT_ONCE + 5, 3)
    np.testing.assert_allclose(
        streamed(features, len(features)).covariance(), np.cov(features.double().numpy(), rowvar=False), rtol=1e-10
    )


def test_how_the_features_are_divided_changes_no_bit(monkeypatch):
    monkeypatch.setattr(GaussianStatistics, "ROWS_AT_ONCE", 128)
    features = features_of(300, 20)
    whole = streamed(features, 300).sums
    for sizes in (1, 50, [128, 0, 172], [127, 2, 171]):
        assert torch.equal(streamed(features, sizes).sums, whole)


def test_uneven_parts_merge():
    features = features_of(700, 20)
    whole = streamed(features, 700)
    parts = [streamed(part, 64) for part in features.split([1, 0, 612, 87])]
    merged, *others = parts
    for other in others:
        merged.merge(other)
    reduced = GaussianStatistics(20)  # what one all_reduce(SUM) over the ranks leaves
    reduced.sums.copy_(sum(part.sums for part in [streamed(part, 64) for part in features.split([1, 0, 612, 87])]))
    for got in (merged, reduced):
        assert got.count == 700
        torch.testing.assert_close(got.mean(), whole.mean(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got.covariance(), whole.covariance(), rtol=1e-10, atol=1e-10)


def test_counts_repeat_rows():
    features = features_of(50, 6)
    counts = torch.arange(50) % 4
    weighted = GaussianStatistics(6)
    weighted.update(features, counts)
    repeated = streamed(features.repeat_interleave(counts, dim=0), 13)
    assert weighted.count == repeated.count
    torch.testing.assert_close(weighted.covariance(), repeated.covariance(), rtol=1e-10, atol=1e-10)


def test_covariance_is_symmetric():
    covariance = streamed(features_of(300, 520), 100).covariance()
    assert torch.equal(covariance, covariance.T)


def test_bad_features_are_refused():
    statistics = GaussianStatistics(4)
    bad = torch.zeros(6, 4)
    bad[3, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity, first in row 3 of 6"):
        statistics.update(bad)
    with pytest.raises(ValueError, match=r"shape \(6, 5\): expected \(N, 4\)"):
        statistics.update(torch.zeros(6, 5))
    assert statistics.count == 0
    statistics.update(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="of 1 samples: at least 2"):
        statistics.gaussian()
