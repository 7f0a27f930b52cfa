from __future__ import annotations

import math

import pytest
import torch

from flowturbo.transport import PATHS

EACH_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def inner_times(path, n=41):
    return torch.linspace(*path.interval, n + 2, dtype=torch.float64)[1:-1]


def test_the_three_paths_of_sit_are_there():
    assert list(PATHS) == ["linear", "gvp", "vp"]


@EACH_PATH
@pytest.mark.parametrize("coefficient", ["alpha", "sigma"])
def test_derivatives_are_those_of_autograd(path, coefficient):
    t = inner_times(path).requires_grad_()
    (expected,) = torch.autograd.grad(getattr(path, coefficient)(t).sum(), t)
    torch.testing.assert_close(getattr(path, f"{coefficient}_dot")(t), expected, atol=1e-10, rtol=1e-8)


@EACH_PATH
def test_every_coefficient_is_finite_on_the_interval(path):
    t = torch.linspace(*path.interval, 101)
    for coefficient in (path.alpha, path.sigma, path.alpha_dot, path.sigma_dot):
        assert coefficient(t).isfinite().all()


@pytest.mark.parametrize(
    ("name", "t", "alpha", "sigma"),
    [
        ("linear", 0.0, 0.0, 1.0),
        ("linear", 0.25, 0.25, 0.75),
        ("linear", 1.0, 1.0, 0.0),
        ("gvp", 0.0, 0.0, 1.0),
        ("gvp", 0.5, math.sqrt(0.5), math.sqrt(0.5)),
        ("gvp", 1.0, 1.0, 0.0),
        ("vp", 0.0, math.exp(-5.025), math.sqrt(1 - math.exp(-10.05))),
        ("vp", 0.5, math.exp(-0.25 * 19.9 / 4 - 0.025), math.sqrt(1 - math.exp(-0.5 * 19.9 / 4 - 0.05))),
        ("vp", 1.0, 1.0, 0.0),
    ],
)
def test_coefficients_at_known_times(name, t, alpha, sigma):
    t = torch.tensor(t, dtype=torch.float64)
    assert float(PATHS[name].alpha(t)) == pytest.approx(alpha, abs=1e-12)
    assert float(PATHS[name].sigma(t)) == pytest.approx(sigma, abs=1e-12)


@pytest.mark.parametrize("name", ["gvp", "vp"])
def test_variance_is_preserved(name):
    t = inner_times(PATHS[name])
    torch.testing.assert_close(PATHS[name].alpha(t) ** 2 + PATHS[name].sigma(t) ** 2, torch.ones_like(t))


@EACH_PATH
def test_a_sample_moves_with_its_velocity(path):
    """Each row at its own time, by central differences."""
    t = inner_times(path, 7)
    x0, x1 = torch.randn(2, 7, 2, 3, 3, dtype=torch.float64)
    h = 1e-5
    x_t, u_t = path.sample(x0, x1, t)
    numerical = (path.sample(x0, x1, t + h)[0] - path.sample(x0, x1, t - h)[0]) / (2 * h)
    torch.testing.assert_close(u_t, numerical, atol=1e-5, rtol=1e-4)
    mixed = torch.stack([path.alpha(t[i]) * x1[i] + path.sigma(t[i]) * x0[i] for i in range(7)])
    torch.testing.assert_close(x_t, mixed)


def test_a_linear_sample_is_the_straight_line():
    x0, x1 = torch.randn(2, 5, 3, 2, 2)
    t = torch.rand(5)
    x_t, u_t = PATHS["linear"].sample(x0, x1, t)
    torch.testing.assert_close(x_t, t[:, None, None, None] * x1 + (1 - t[:, None, None, None]) * x0)
    torch.testing.assert_close(u_t, x1 - x0)


@pytest.mark.parametrize("name", PATHS)
def test_the_score_of_a_gaussian_is_its_closed_form(name, gaussian):
    flow = gaussian(mean=0.7, std=0.4, path=name)
    path = PATHS[name]
    x = torch.randn(9, 1, 4, 4, dtype=torch.float64)
    t = inner_times(path, 9)
    v = flow.velocity(x, t.reshape(-1, 1, 1, 1))
    torch.testing.assert_close(path.score(v, x, t), flow.score(x, t.reshape(-1, 1, 1, 1)))
    torch.testing.assert_close(path.score(flow.velocity(x, t[3]), x, t[3]), flow.score(x, t[3]))


def test_the_score_of_pure_noise_is_minus_the_state(gaussian):
    x, t = torch.randn(2, 1, 4, 4), torch.zeros(2)
    for name in ("linear", "gvp"):
        v = gaussian(path=name).velocity(x, torch.tensor(0.0))
        torch.testing.assert_close(PATHS[name].score(v, x, t), -x)
