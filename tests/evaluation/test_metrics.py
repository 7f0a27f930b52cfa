import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from flowturbo.evaluation import (
    frechet_distance,
    inception_score,
    kid,
    kid_of_subsets,
    mind,
    precision_recall,
    resample_counts,
)
from flowturbo.evaluation.metrics import _squared_radii, covariance_root
from flowturbo.evaluation.precision import full_precision


def features_of(count, dimensions=16, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 2, dimensions)
    return torch.randn(count, dimensions, generator=generator) * scale + shift


def moments(features):
    features = features.double()
    return features.mean(dim=0), features.T.cov()


def test_frechet_distance_matches_scipy():
    ours, theirs = moments(features_of(900, 64)), moments(features_of(700, 64, seed=1, shift=0.2).relu())
    root = scipy.linalg.sqrtm(ours[1].numpy() @ theirs[1].numpy())
    expected = (ours[0] - theirs[0]).square().sum() + ours[1].trace() + theirs[1].trace() - 2 * np.trace(root).real
    assert frechet_distance(*ours, *theirs) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(*theirs, *ours) == pytest.approx(expected.item(), rel=1e-6)
    cached = covariance_root(ours[1])
    assert frechet_distance(*ours, *theirs, root1=cached) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("n1", "n2"), [(40, 700), (700, 40), (40, 30)])
def test_frechet_distance_with_fewer_samples_than_dimensions(n1, n2):
    x, y = features_of(n1, 64).double(), features_of(n2, 64, seed=1, shift=0.2).double()
    (mean1, cov1), (mean2, cov2) = moments(x), moments(y)
    # tr (Σ₁Σ₂)^½ is the nuclear norm of the product of the centred features: no square root of a matrix
    nuclear = np.linalg.svd(((x - mean1) @ (y - mean2).T).numpy(), compute_uv=False).sum()
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()
    expected = expected.item() - 2 * nuclear / math.sqrt((n1 - 1) * (n2 - 1))
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_against_long_double():
    """Newton–Schulz iterations for the square root, in extended precision."""
    (mean1, cov1), (mean2, cov2) = moments(features_of(200, 8)), moments(features_of(300, 8, seed=1, shift=0.3))
    product = cov1.numpy().astype(np.longdouble) @ cov2.numpy().astype(np.longdouble)
    norm = np.sqrt((product**2).sum())
    identity = np.eye(8, dtype=np.longdouble)
    y, z = product / norm, identity
    for _ in range(60):
        step = (3 * identity - z @ y) / 2
        y, z = y @ step, step @ z
    root = y * np.sqrt(norm)
    assert np.abs(root @ root - product).max() < 1e-12
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * float(np.trace(root))
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_of_equals_is_zero_and_unlike_sizes_are_refused():
    gaussian = moments(features_of(50, 8))
    assert 0 <= frechet_distance(*gaussian, *gaussian) < 1e-6
    with pytest.raises(ValueError, match="8 and of 9 dimensions"):
        frechet_distance(*gaussian, *moments(features_of(50, 9)))


def direct_inception_score(logits, split_size):
    scores = []
    for start in range(0, len(logits), split_size):
        part = logits[start : start + split_size].astype(np.float64)
        p = np.exp(part - part.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    return np.mean(scores)


@pytest.mark.parametrize("split_size", [5000, 50, 32])  # whole, even and uneven splits
def test_inception_score_matches_direct_computation(split_size):
    logits = 3 * torch.randn(150, 20, generator=torch.Generator().manual_seed(0))
    expected = direct_inception_score(logits.numpy(), split_size)
    assert inception_score(logits, split_size).item() == pytest.approx(expected, rel=1e-10)
    assert inception_score(logits.sort(dim=0).values, 50).item() != pytest.approx(expected, rel=1e-3)
    counts = torch.arange(150) % 4
    repeated = direct_inception_score(logits.repeat_interleave(counts, dim=0).numpy(), 5000)
    assert inception_score(logits, counts=counts[None]).item() == pytest.approx(repeated, rel=1e-10)


@pytest.mark.parametrize("block", [64, 320, 100_000])  # 320: nearest neighbours are sought in groups
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_precision_recall_matches_torch_fidelity(block, shift):
    samples, references = features_of(500, seed=1, shift=shift), features_of(330)
    expected = prc_features_to_metric(samples, references, verbose=False)
    found = precision_recall(samples, references, block=block)
    assert 0.2 < expected["precision"] < 1
    assert found.precision().item() == pytest.approx(expected["precision"], abs=1e-7)
    assert found.recall().item() == pytest.approx(expected["recall"], abs=1e-7)


def test_nearest_neighbours_are_those_of_all_distances():
    x = features_of(900, seed=2)
    x[450:] = x[:450]  # ties
    radii = _squared_radii(x, k=3, half_precision=False, block=320)
    exact = torch.cdist(x.double(), x.double()).square().sort(dim=1).values[:, 3]
    torch.testing.assert_close(radii.double(), exact, rtol=1e-4, atol=1e-4)


def test_float32_and_float64_give_one_precision_and_recall():
    samples, references = features_of(800, 256, seed=1, shift=0.03), features_of(600, 256)
    found, exact = precision_recall(samples, references), precision_recall(samples.double(), references.double())
    assert torch.equal(found.samples_inside, exact.samples_inside)
    assert torch.equal(found.references_inside, exact.references_inside)
    assert 0 < found.precision() < 1


def test_precision_recall_on_the_border():
    references = torch.arange(5.0)[:, None]  # squared radii 9, 4, 4, 4, 9
    samples = torch.tensor([[-3.0], [-3.5], [7.0], [100.0], [101.0]])  # squared radii 10.5², 104², ...
    found = precision_recall(samples, references, block=2)
    assert found.samples_inside.tolist() == [True, False, True, False, False]
    assert found.precision().tolist() == pytest.approx([0.4])
    with pytest.raises(ValueError, match="3 samples: precision and recall need more than k = 3"):
        precision_recall(samples[:3], references)


def test_half_precision_rounds_as_the_suite_does():
    samples, references = features_of(300, 64, seed=1, shift=3.1), features_of(200, 64, shift=3.0)

    def dense(u, v):
        u, v = u.numpy().astype(np.float16), v.numpy().astype(np.float16)
        norms = [(w.astype(np.float32) ** 2).sum(axis=1).astype(np.float16) for w in (u, v)]
        products = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
        return np.maximum(norms[0][:, None] - 2 * products + norms[1], 0)

    def inside(u, v):
        return (dense(u, v) <= np.sort(dense(v, v), axis=1)[:, 3]).any(axis=1)

    found = precision_recall(samples, references, half_precision=True, block=77)
    np.testing.assert_array_equal(found.samples_inside.numpy(), inside(samples, references))
    np.testing.assert_array_equal(found.references_inside.numpy(), inside(references, samples))
    full = precision_recall(samples, references)
    assert not torch.equal(full.samples_inside, found.samples_inside)
    assert found.precision().item() == pytest.approx(full.precision().item(), abs=0.1)
    overflowing = precision_recall(samples * 1024, references * 1024, half_precision=True)
    assert torch.equal(overflowing.samples_inside, full.samples_inside)


@pytest.mark.parametrize("block", [48, 100_000])
def test_kid_matches_torch_fidelity(block):
    samples, references = features_of(200, seed=1, shift=0.2).double(), features_of(200).double()
    expected = kid_features_to_metric(samples, references, kid_subsets=1, kid_subset_size=200, verbose=False)
    expected = expected["kernel_inception_distance_mean"]
    assert kid(samples, references, block=block).item() == pytest.approx(expected, rel=1e-9)
    assert kid(samples.float(), references.float(), block=block).item() == pytest.approx(expected, rel=1e-4)


def test_kid_of_subsets_is_torch_fidelitys():
    samples, references = features_of(200, seed=1, shift=0.2), features_of(150)
    expected = kid_features_to_metric(samples, references, kid_subsets=7, kid_subset_size=90, verbose=False)
    values = kid_of_subsets(samples, references, subsets=7, size=90)
    assert values.mean().item() == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert values.std(correction=0).item() == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-4)
    with pytest.raises(ValueError, match="150 references: KID of subsets needs at least 151"):
        kid_of_subsets(samples, references, size=151)


def test_float32_products_move_kid_little():
    samples, references = features_of(900, 512, seed=1).relu(), features_of(700, 512, shift=0.05).relu()
    exact = kid(samples.double(), references.double()).item()
    assert kid(samples, references, block=256).item() == pytest.approx(exact, rel=1e-5)


def test_kid_with_counts_skips_pairs_of_copies():
    samples, references = features_of(20, 4, seed=1).double(), features_of(30, 4, seed=2).double()
    counts = torch.tensor([[1.0] * 20, [2.0, 0.0] * 10])

    def kernel(x, y):
        return (x @ y.T / 4 + 1) ** 3

    chosen = torch.arange(0, 20, 2).repeat_interleave(2)
    unlike = chosen[:, None] != chosen
    within = kernel(samples[chosen], samples[chosen])[unlike].mean()
    others = kernel(references, references)[~torch.eye(30, dtype=bool)].mean()
    expected = within + others - 2 * kernel(samples[chosen], references).mean()
    values = kid(samples, references, counts, block=7)
    assert values[1].item() == pytest.approx(expected.item(), rel=1e-9)
    assert values[0].item() == pytest.approx(kid(samples, references).item(), rel=1e-12)


def test_mind_of_a_shift_is_its_square():
    """As FID: a factor of the dimensions makes up for the part of a shift that a direction sees."""
    references = features_of(400)
    shift = torch.linspace(0, 0.5, 16)
    value = mind(references[torch.randperm(400)] + shift, references, directions=2000).item()
    assert value == pytest.approx(shift.square().sum().item(), rel=0.06)
    assert mind(references, references).item() == pytest.approx(0, abs=1e-9)


def test_mind_of_one_dimension_is_the_transport_cost():
    x, y = torch.randn(30, 1), torch.randn(40, 1) * 2 + 1
    # Each of 30 repeated 4 times, each of 40 repeated 3 times: 120 pairs in order.
    expected = (x.sort(0).values.repeat_interleave(4) - y.sort(0).values.repeat_interleave(3)).square().mean()
    assert mind(x, y, directions=3).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("count", [25, 60])
def test_mind_matches_scipy_on_every_direction(count):
    from scipy.optimize import linear_sum_assignment

    samples, references = features_of(60, 3, seed=1, shift=0.3).double(), features_of(60, 3).double()
    counts = torch.zeros(60)
    counts[:count] = 1
    if count == 25:
        counts[:5] += 7  # 25 + 35: 60 in all
    chosen = samples.repeat_interleave(counts.long(), dim=0)
    rays = torch.nn.functional.normalize(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), dim=1).double()
    costs = []
    for ray in rays:
        cost = ((chosen @ ray)[:, None] - (references @ ray)).square()
        costs.append(cost[linear_sum_assignment(cost)].mean())
    expected = 3 * torch.stack(costs).mean().item()
    assert mind(samples, references, counts[None], directions=40, block=7).item() == pytest.approx(expected, rel=1e-9)
    assert mind(chosen, references, directions=40).item() == pytest.approx(expected, rel=1e-9)


def test_the_bootstrap_error_of_mind_is_the_spread_of_fresh_draws():
    references = features_of(400, 6)
    draws = torch.cat([mind(features_of(300, 6, seed, 0.4), references, directions=50) for seed in range(1, 41)])
    resampled = mind(features_of(300, 6, 99, 0.4), references, resample_counts(300, 40), directions=50)
    assert 0.6 < (resampled[1:].std() / draws.std()).item() < 1.6


def test_mind_takes_resamples_of_one_size():
    with pytest.raises(ValueError, match="one size"):
        mind(features_of(3), features_of(3), torch.tensor([[1, 1, 1], [1, 1, 0]]))


def test_mind_of_a_single_image_is_refused():
    with pytest.raises(ValueError, match="1 samples: MIND needs at least 2"):
        mind(features_of(1), features_of(5))


def test_resampling():
    counts = resample_counts(500, 200, seed=3)
    assert counts.shape == (201, 500)
    assert torch.equal(counts[0], torch.ones(500))
    assert torch.equal(counts.sum(dim=1), torch.full((201,), 500.0))
    assert counts[1:].var(dim=0).mean().item() == pytest.approx(1, rel=0.1)  # multinomial, one draw per image
    assert torch.equal(counts, resample_counts(500, 200, seed=3))
    assert not torch.equal(counts, resample_counts(500, 200, seed=4))


def test_full_precision_holds_inside_and_leaves_settings_as_they_were():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    x, y = features_of(100, seed=1), features_of(90)
    try:
        matmul.fp32_precision = "tf32"
        with full_precision():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = kid(x, y)
            assert (x @ y.T).dtype == torch.bfloat16
    finally:
        matmul.fp32_precision = before
    assert torch.equal(under_autocast, kid(x, y))
