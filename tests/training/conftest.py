import numpy as np
import pytest
import runs
import torch
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """These networks are so small that more threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Runs remember the data that they have looked at here, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWTURBO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Sixteen grey images of 8x8: the classes are a dark and a bright half."""
    root = tmp_path_factory.mktemp("data") / "images"
    random = np.random.default_rng(0)
    for label in range(2):
        (root / f"c{label}").mkdir(parents=True)
        for i in range(8):
            pixels = np.full((8, 8), 128 + (80 if label else -80)) + random.integers(-20, 20, (8, 8))
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"c{label}" / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def teacher(data, tmp_path_factory):
    """The checkpoint of a predictor trained on the data for a moment."""
    results = tmp_path_factory.mktemp("teacher")
    more = ["--steps", "300", "--lr", "3e-3", "--global-batch-size", "16", "--ckpt-every", "300"]
    folder = runs.run(results, *runs.PREDICTOR, "--data-path", data, *more)
    return folder / "checkpoints" / "0000300.pt"


@pytest.fixture(scope="session")
def flags(data, teacher):
    """flags(target) -> what trains it on the data."""
    by_target = {"predictor": runs.PREDICTOR, "refiner": [*runs.COMMON, "--model-teacher-ckpt", str(teacher)]}
    return lambda target: [*by_target[target], "--data-path", str(data)]


@pytest.fixture(scope="session")
def forks():
    """forks(folder, *flags, ranks=1, signal_at=None, **environment) -> runs.Done."""
    started = runs.Forks()
    yield started
    started.close()
