"""Trained networks for others: weights and config in one file, with a model card, here or on the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowturbo.models import SiT
from flowturbo.refiner import VelocityRefiner
from flowturbo.system.cli import one_line
from flowturbo.system.files import atomic_write, sha256
from flowturbo.weights.checkpoint import check_weights, load_checkpoint, resolve, save_checkpoint, weights_of
from flowturbo.weights.info import CheckpointInfo, empty_network

FORMATS = (".safetensors", ".pt")
KINDS = {kind.__name__: kind for kind in (SiT, VelocityRefiner)}


class OutOfRange(ValueError):
    """A weight is too large for a dtype."""


class UploadFailed(OSError):
    """The hub did not take a file."""


def export_weights(
    checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> CheckpointInfo:
    """Write the EMA weights and the config of a training checkpoint, or of a run's newest, as .safetensors or .pt.

    Absolute paths in the settings are reduced to their last part. Returns what the file says of itself. Raises
    ValueError for a checkpoint without a config, for weights that do not fit it or are not finite, and for another
    ending of `out`; OutOfRange for weights that leave the range of `dtype`.
    """
    out = Path(out)
    if out.suffix not in FORMATS:
        raise ValueError(f"{str(out)!r} must end in {' or '.join(FORMATS)}")
    path = resolve(checkpoint)
    content = load_checkpoint(path)
    info = CheckpointInfo.of(content, path)
    kind = KINDS.get(str(info.model.get("class")))
    if kind is None:
        raise ValueError(f"checkpoint {str(path)!r} holds no config: only what train.py has written can be exported")
    weights = weights_of(content, path)
    network = empty_network(kind, info.model, weights, path)
    check_weights(network, weights, path)
    weights = {name: weights[name].to(dtype).contiguous() for name in network.state_dict()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise OutOfRange(f"weights of {str(path)!r} leave the range of {dtype}")
    config = {**content["config"], "training": _without_folders(info.training), "step": info.step}
    if out.suffix == ".pt":
        save_checkpoint(out, {"ema": weights, "config": config})
    else:
        from safetensors.torch import save

        with atomic_write(out) as file:
            file.write(save(weights, {"format": "pt", "config": json.dumps(config)}))
    return CheckpointInfo(out, info.step, info.model, config["training"], config)


def _without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with absolute paths reduced to their last part: an exported file tells nothing of a machine."""
    return {
        name: Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
        for name, value in settings.items()
    }


def write_card(info: CheckpointInfo, dtype: torch.dtype, usage: str) -> Path:
    """Write the model card of an exported file beside it, Markdown with the hub's front matter; returns its path.

    `usage` is the command that samples with the file.
    """
    path = info.path.with_suffix(".md")
    is_refiner = info.model["class"] == "VelocityRefiner"
    what = "FlowTurbo velocity refiner" if is_refiner else "SiT velocity predictor"
    after = "" if info.step is None else f" after {info.step} steps"
    lines = [
        "---",
        "library_name: pytorch",
        "pipeline_tag: unconditional-image-generation",
        "tags: [flowturbo, flow-matching]",
        "---",
        "",
        f"# {path.stem}",
        "",
        f"A {what}: averaged (EMA) weights{after}, {str(dtype).removeprefix('torch.')}.",
        "",
        f"`{info.path.name}`, {info.path.stat().st_size:,} bytes, sha256 `{sha256(info.path)}`",
        "",
        "## Use",
        "",
        "```bash",
        usage,
        "```",
    ]
    for title, table in (("Model", info.model), ("Training", info.training)):
        rows = [f"| {name} | {value} |" for name, value in table.items() if value is not None]
        lines += ["", f"## {title}", "", "| | |", "|---|---|", *rows]
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return path


def push(weights: Path, card: Path, repository: str, private: bool) -> str:
    """Upload an exported file and its card to a hub repository, made if need be; returns its address.

    Raises UploadFailed where the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        for source, name in ((weights, weights.name), (card, "README.md")):
            api.upload_file(path_or_fileobj=source, path_in_repo=name, repo_id=repository)
    except Exception as error:  # the hub's client raises its own and its transport's types
        raise UploadFailed(f"cannot upload {weights} to {repository}: {one_line(error)}") from error
    return f"https://huggingface.co/{repository}"
