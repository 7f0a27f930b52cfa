from __future__ import annotations

import pytest

from flowturbo.sampling.options import NetworkOptions, SamplingOptions
from flowturbo.web.options import PageOptions
from flowturbo.web.studio import Studio


@pytest.fixture(scope="session")
def studio(pixel_models):
    """Of tiny networks with random weights: RGB images of 8x8 in 10 classes."""
    _, predictor, _, refiner, *_ = pixel_models
    options = NetworkOptions(predictor, refiner, "none", device="cpu")
    return Studio.open(options, SamplingOptions(cfg_scale=2.0), PageOptions(schedule="A2"))


@pytest.fixture
def silent():
    """To be told what nothing is said of."""

    def fail(text):
        raise AssertionError(text)

    return fail
