from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch
from forking import Ranks
from PIL import Image

from flowturbo.models import SiT
from flowturbo.refiner import VelocityRefiner
from flowturbo.transport import PATHS

TESTS = FilePath(__file__).parent
# What is compiled here is kept apart from what the user's own runs keep.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(FilePath(tempfile.gettempdir()) / "flowturbo-tests-compiled"))
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


@pytest.fixture(scope="session")
def compiler():
    """compiler(backend): within it torch.compile takes this backend.

    "eager" traces graphs and runs them as they are: to generate code takes most of the time.
    """

    @contextmanager
    def within(backend):
        compile = torch.compile
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", lambda function, **options: compile(function, **options, backend=backend))
            yield

    return within


@pytest.fixture(scope="session")
def class_folder():
    """class_folder(root, classes=2, images=3, size=(8, 8)) -> root, with folders c0, c1, ... of random PNGs."""

    def make(root, classes=2, images=3, size=(8, 8), channels=3, seed=0):
        random = np.random.default_rng(seed)
        for k in range(classes):
            (root / f"c{k}").mkdir(parents=True)
            for i in range(images):
                pixels = random.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
                Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(root / f"c{k}" / f"{i}.png")
        return root

    return make


@pytest.fixture(scope="session")
def save_network():
    """save_network(path, kind, seed, classes, **config) -> path of a checkpoint like train.py's, random weights."""

    def save(path, kind=SiT, seed=1, classes=None, **config):
        network = randomised(kind(**{**SMALL, "depth": 1 if kind is VelocityRefiner else 2, **config}), seed)
        model = {"class": kind.__name__, **network.config}
        names = {} if classes is None else {"classes": classes, "class_counts": [1] * len(classes)}
        torch.save({"ema": network.state_dict(), "step": 1, "config": {"model": model, **names}}, path)
        return path

    return save


@pytest.fixture(scope="session")
def pixel_models(tmp_path_factory, save_network):
    """The flags of a predictor and a refiner for RGB images of 8x8 in 10 classes."""
    folder = tmp_path_factory.mktemp("pixel-models")
    predictor = save_network(folder / "predictor.pt", SiT, 1, in_channels=3)
    refiner = save_network(folder / "refiner.pt", VelocityRefiner, 2, in_channels=3)
    return ["--predictor-ckpt", str(predictor), "--refiner-ckpt", str(refiner), "--vae-ckpt", "none"]


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """A folder with a small AutoencoderKL of random weights: 16x16 images, 8x8 latents of 4 channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    network = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        scaling_factor=0.7,
        shift_factor=0.3,
    )
    folder = tmp_path_factory.mktemp("vae")
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def python():
    """python(*arguments, ranks=0, **environment) -> the finished process; with ranks, under torchrun."""

    def run(*arguments, ranks=0, timeout=120, cwd=TESTS.parent, **environment):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={ranks}"]
        return subprocess.run(
            [sys.executable, *(launcher if ranks else []), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent), **environment},
        )

    return run


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """scikit-learn's digits as a class folder of 8x8 grey PNGs."""
    from demo import write_digits

    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


@pytest.fixture
def forked(tmp_path):
    """forked(main, size, timeout=30) -> Ranks that have ended."""
    return lambda main, size, **options: Ranks(tmp_path, main, size, **options)
