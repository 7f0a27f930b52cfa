from __future__ import annotations

import pytest
from problems import curved, curved_flow


@pytest.fixture(params=["gaussian", "curved"])
def problem(request, gaussian):
    """A velocity and its exact flow map from t = 0 to 1."""
    if request.param == "curved":
        return curved, curved_flow
    flow = gaussian(mean=0.7, std=0.4)
    return flow.velocity, flow.flow
