"""How flow models of diffusers count time, noise and velocity, and which of its schedulers' configs are of flow models.

diffusers: sigma = 1 is noise, 0 data; x_sigma = (1 - sigma)·data + sigma·noise; the network gets 1000·sigma, and its
output is dx/dsigma = noise - data. Here: t = 1 - sigma, v = dx/dt = data - noise. InstaFlow's U-Net is asked as
diffusers' models are, but answers as ours do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a network's output is, and what it is multiplied by to be dx/dsigma.
VELOCITIES = {"noise-data": 1, "data-noise": -1}


def flow_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config in terms of FlowMatchEulerDiscreteScheduler.

    Raises ValueError for the config of a model that predicts something else than a velocity; where it says
    "velocity", the caller knows better: InstaFlow is published with the config of the epsilon model it was made from.
    """
    prediction = config.get("prediction_type", "flow_prediction")
    if prediction != "flow_prediction" and "velocity" not in config:
        raise ValueError(
            f"this scheduler's config is of a model that predicts {prediction!r}, not of a flow model: expected a "
            "flow-matching one, or velocity='data-noise' for InstaFlow"
        )
    if config.get("stochastic_sampling"):
        raise ValueError("this scheduler's config asks for stochastic sampling: expected a deterministic one")
    found = dict(config)
    if "flow_shift" in config and "shift" not in config:  # what diffusers' UniPC and DPM-Solver++ call it
        found["shift"] = config["flow_shift"]
    return found
