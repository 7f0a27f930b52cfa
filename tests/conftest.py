from __future__ import annotations

import json
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch

from models import SiT
from refiner import VelocityRefiner
from transport import PATHS

TESTS = FilePath(__file__).parent
SMALL = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 10}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randomised(network, seed, std=0.2):
    """The network with every trainable weight drawn anew: adaLN-Zero's own would make it return zero."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std, generator=generator)
    return network.eval()


@pytest.fixture(scope="session")
def randomise():
    return randomised


@pytest.fixture
def predictor():
    """A small SiT with random weights: 4 channels of 8x8, 10 classes."""
    return randomised(SiT(**SMALL), 1)


@pytest.fixture
def refiner():
    """A velocity refiner that goes with `predictor`."""
    return randomised(VelocityRefiner(**{**SMALL, "depth": 1}), 2)


@pytest.fixture
def batch():
    """batch(n) -> noise (n, 4, 8, 8) and labels (n,) for `predictor`."""

    def draw(n, seed=0):
        generator = seeded(seed)
        return torch.randn(n, 4, 8, 8, generator=generator), torch.randint(0, 10, (n,), generator=generator)

    return draw


@pytest.fixture(scope="session")
def golden():
    """golden(name) -> the arrays of tests/golden/<name>.npz as tensors, and the configuration in it."""

    def load(name):
        with np.load(TESTS / "golden" / f"{name}.npz") as arrays:
            config = json.loads(str(arrays["config_json"]))
            return {k: torch.from_numpy(arrays[k]) for k in arrays.files if k != "config_json"}, config

    return load


@pytest.fixture(scope="session")
def golden_networks(golden):
    """(predictor, refiner) of golden/flowturbo.npz, their weights loaded strictly."""
    arrays, config = golden("flowturbo")
    networks = SiT(**config), VelocityRefiner(**{**config, "depth": 1})
    for network, name in zip(networks, ("predictor/", "refiner/")):
        state = {k.removeprefix(name): v for k, v in arrays.items() if k.startswith(name)}
        network.load_state_dict(state, strict=True)
        network.eval()
    return networks


@pytest.fixture(scope="session")
def manifest():
    """manifest(name) -> {key: shape} of a public checkpoint."""

    def load(name):
        return {k: tuple(v) for k, v in json.loads((TESTS / "manifests" / f"{name}.json").read_text()).items()}

    return load


class Gaussian:
    """The flow between standard normal noise and data from N(mean, std²), in closed form."""

    def __init__(self, mean=0.7, std=0.4, path="linear"):
        self.mean, self.std, self.path = mean, std, PATHS[path]

    def _moments(self, t):
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return alpha * self.mean, (alpha * self.std) ** 2 + sigma**2

    def velocity(self, x, t):
        t = torch.as_tensor(t, dtype=x.dtype)
        mean, variance = self._moments(t)
        path = self.path
        slope = path.alpha(t) * path.alpha_dot(t) * self.std**2 + path.sigma(t) * path.sigma_dot(t)
        return path.alpha_dot(t) * self.mean + slope / variance * (x - mean)

    def score(self, x, t):
        mean, variance = self._moments(torch.as_tensor(t, dtype=x.dtype))
        return -(x - mean) / variance

    def flow(self, x, t0=0.0, t1=1.0):
        """Where the flow takes x at t0 by t1: Gaussians are mapped by their quantiles."""
        mean0, variance0 = self._moments(torch.as_tensor(t0, dtype=x.dtype))
        mean1, variance1 = self._moments(torch.as_tensor(t1, dtype=x.dtype))
        return mean1 + (variance1 / variance0).sqrt() * (x - mean0)

    def network(self, x, t, y, drop=None):
        """The velocity with a predictor's signature."""
        return self.velocity(x, t.reshape(-1, *[1] * (x.ndim - 1)))


@pytest.fixture(scope="session")
def gaussian():
    return Gaussian


class Recorder:
    """Wraps a network and keeps the arguments of every call."""

    def __init__(self, network):
        self.network, self.calls = network, []

    def __call__(self, *args):
        self.calls.append(args)
        return self.network(*args)

    def __len__(self):
        return len(self.calls)


@pytest.fixture(scope="session")
def recorder():
    return Recorder
