import dataclasses
from itertools import islice

import numpy as np
import pytest
import torch

from flowturbo.evaluation import METRICS, FeatureSet, Gaussian, GaussianStatistics, evaluate, kid_of_subsets


def feature_set(pool, logits=None):
    statistics = GaussianStatistics(pool.shape[1])
    statistics.update(pool)
    return FeatureSet("drawn", "none", len(pool), pool_statistics=statistics.gaussian(), pool=pool, logits=logits)


def test_evaluate_refuses_unlike_sides():
    ours = feature_set(torch.randn(9, 3))
    for other in (dataclasses.replace(ours, extractor="another"), feature_set(torch.randn(9, 4))):
        with pytest.raises(ValueError, match="unlike"):
            dict(evaluate(ours, other))


def test_bootstrap_errors_are_the_spread_of_fresh_draws():
    generator = torch.Generator().manual_seed(0)

    def drawn(count, shift):
        pool = torch.randn(count, 6, generator=generator) + shift
        return feature_set(pool, logits=2 * pool)

    reference = drawn(400, 0.0)
    draws = [dict(islice(evaluate(reference, drawn(300, 0.4)), 6)) for _ in range(60)]  # but for MIND, which takes long
    estimated = dict(islice(evaluate(reference, drawn(300, 0.4), bootstrap=60), 6))
    for name in ("FID", "Inception Score", "Precision", "KID"):
        spread = np.std([draw[name].value for draw in draws], ddof=1)
        assert 0.6 < estimated[name].standard_error / spread < 1.6, name


def test_what_is_missing_is_said_and_not_made_up():
    pool = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    whole = feature_set(pool, logits=pool)
    bare = dataclasses.replace(whole, pool=None, logits=None)
    found = dict(evaluate(whole, bare, bootstrap=5))
    assert tuple(found) == METRICS
    assert found["FID"].value == pytest.approx(0, abs=1e-6)
    assert found["FID"].reason == "no standard error: the sample file keeps no such features"
    assert found["sFID"].reason == "no such statistics on the reference side and the sample side"
    assert found["Inception Score"].reason == "no logits on the sample side"
    assert found["KID"].reason == "no features on the sample side"
    few = dict(evaluate(whole, feature_set(pool[:3])))
    assert few["Precision"].reason == few["Recall"].reason == "3 samples: precision and recall need more than k = 3"
    assert few["KID"].value is not None
    assert few["MIND"].value > 0


def test_kid_of_subsets_says_what_it_is():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (feature_set(torch.randn(1050, 4, generator=generator) + shift) for shift in (0, 0.1))
    found = dict(islice(evaluate(ours, theirs, kid_subsets=2), 6))["KID"]
    assert found.value == kid_of_subsets(theirs.pool, ours.pool, 2).mean().item()
    assert found.reason.startswith("mean of 2 subsets, whose standard deviation is ")
    few = dict(islice(evaluate(ours, feature_set(theirs.pool[:9]), kid_subsets=2), 6))["KID"]
    assert few.reason == "9 samples: KID of subsets needs at least 1000"


@pytest.mark.parametrize("size", [1e160, 1e308])
def test_statistics_too_large_to_multiply_have_no_distance(size):
    ours = feature_set(torch.randn(9, 3))
    huge = dataclasses.replace(
        ours,
        pool=None,
        pool_statistics=Gaussian(torch.zeros(3, dtype=torch.float64), size * torch.eye(3, dtype=torch.float64)),
    )
    for reference, samples in ((ours, huge), (huge, ours), (huge, huge)):
        found = dict(evaluate(reference, samples, bootstrap=3))["FID"]
        assert found.value is None or found.value > size
        assert found.value is not None or "not finite" in found.reason
