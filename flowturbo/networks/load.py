"""Networks from checkpoint files, and what a file says of the network in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from flowturbo.configurations import WIDTHS
from flowturbo.models import SiT
from flowturbo.networks.precision import check_finite
from flowturbo.weights.checkpoint import load_checkpoint, load_weights, resolve, weights_of
from flowturbo.weights.info import CheckpointInfo, empty_network

Network = TypeVar("Network", bound=SiT)


def load_network(kind: type[Network], path: str, prefer_ema: bool = True) -> Network:
    """The SiT or VelocityRefiner in a checkpoint file, on the CPU in float32, in evaluation mode.

    A run's folder stands for its newest checkpoint, the name of a public file for the one among the downloads.
    Checkpoints of train.py carry their config; for the public ones it follows from the shapes.
    Raises MissingWeights where there is no file, ValueError naming one that is damaged or holds another network.
    """
    return load_with_info(kind, path, prefer_ema)[0]


def load_with_info(kind: type[Network], path: str, prefer_ema: bool = True) -> tuple[Network, CheckpointInfo]:
    """As load_network, with what the checkpoint says besides, from one reading of the file."""
    found = resolve(path)
    content = load_checkpoint(found)
    weights, info = weights_of(content, found, prefer_ema), CheckpointInfo.of(content, found)
    network = empty_network(kind, info.model or _config_of(kind, weights, found), weights, found)
    load_weights(network, weights, found)
    check_finite(network, f"checkpoint {str(found)!r}: ")  # what was in float64 may not be in float32
    return network.eval().requires_grad_(False), info


def _config_of(kind: type[Network], weights: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    try:
        return config_from_state(weights, kind.images_in)
    except ValueError as error:
        raise ValueError(f"checkpoint {str(path)!r} holds no {kind.__name__}: {error}") from None


def model_config(network: SiT) -> dict[str, Any]:
    """What a checkpoint keeps so that `load_network` can rebuild the network; JSON types."""
    return {"class": type(network).__name__, **network.config}


def config_from_state(state: Mapping[str, Tensor], images_in: int = 1) -> dict[str, Any]:
    """The keyword arguments of a SiT from the shapes in its state dict, for checkpoints that carry none.

    `images_in` is 2 for a velocity refiner. The number of heads leaves no trace in the weights: it is taken
    from the SiT of the same width. Raises ValueError where that is unknown or keys are missing.
    """
    try:
        hidden_size, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        tokens = state["pos_embed"].shape[1]
        rows = state["y_embedder.embedding_table.weight"].shape[0]
        out_channels = state["final_layer.linear.weight"].shape[0] // patch_size**2
        mlp_ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size
    except KeyError as error:
        raise ValueError(f"not the weights of a SiT: no {error.args[0]}") from None
    except (IndexError, ValueError, ArithmeticError):
        raise ValueError("not the weights of a SiT: their shapes are others") from None
    heads = {w["hidden_size"]: w["num_heads"] for w in WIDTHS.values()}
    side = math.isqrt(tokens)
    if hidden_size not in heads or side * side != tokens:
        raise ValueError(
            f"the checkpoint holds no config, and width {hidden_size} with {tokens} tokens is no SiT of the "
            f"family (widths {', '.join(map(str, heads))}, square inputs)"
        )
    in_channels = channels // images_in
    return {
        "input_size": side * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "num_heads": heads[hidden_size],
        "mlp_ratio": mlp_ratio,
        "class_dropout_prob": 0.1,  # every public SiT has a null class, the last row
        "num_classes": rows - 1,
        "learn_sigma": out_channels == 2 * in_channels,
    }
