"""Trained networks for others: weights and config in one file, with a model card, here or on the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from flowturbo.models import SiT
from flowturbo.refiner import VelocityRefiner
from flowturbo.system.cli import one_line
from flowturbo.system.files import atomic_write, sha256
from flowturbo.system.values import plain, shown
from flowturbo.weights.checkpoint import check_weights, load_checkpoint, resolve, save_checkpoint, weights_of
from flowturbo.weights.info import CheckpointInfo, empty_network, without_folders

FORMATS = (".safetensors", ".pt")
KINDS = {kind.__name__: kind for kind in (SiT, VelocityRefiner)}


class OutOfRange(ValueError):
    """A weight is too large for a dtype."""


class UploadFailed(OSError):
    """The hub did not take a file."""


def export_weights(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    leave_out: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> CheckpointInfo:
    """Write the EMA weights and the config of a training checkpoint, or of a run's newest, as .safetensors or .pt.

    Paths in the settings are reduced to their last part; `leave_out` names settings of training that say nothing of a
    network, by its class. Returns what the file says of itself. Raises ValueError for a checkpoint without a config,
    for weights that do not fit it or are not finite, and for another ending of `out`; OutOfRange for weights that
    leave the range of `dtype`.
    """
    out = Path(out)
    if out.suffix not in FORMATS:
        raise ValueError(f"{str(out)!r} must end in {' or '.join(FORMATS)}")
    path = resolve(checkpoint)
    content = load_checkpoint(path)
    info = CheckpointInfo.of(content, path)
    kind = KINDS.get(info.kind or "")
    if kind is None:
        raise ValueError(f"checkpoint {str(path)!r} holds no config: only what train.py has written can be exported")
    weights = weights_of(content, path)
    network = empty_network(kind, info.model, weights, path)
    check_weights(network, weights, path)
    weights = {name: weights[name].to(dtype).contiguous() for name in network.state_dict()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise OutOfRange(f"weights of {str(path)!r} leave the range of {dtype}")
    left_out = leave_out.get(kind.__name__, ())
    training = {name: value for name, value in info.training.items() if name not in left_out}
    config = without_folders({**info.config, "model": info.model, "training": training, "step": info.step})
    if out.suffix == ".pt":
        save_checkpoint(out, {"ema": weights, "config": config})
    else:
        from safetensors.torch import save

        with atomic_write(out) as file:
            file.write(save(weights, {"format": "pt", "config": json.dumps(config)}))
    return CheckpointInfo(out, info.step, config["model"], config["training"], config)


def write_card(info: CheckpointInfo, dtype: torch.dtype, usage: str) -> Path:
    """Write the model card of an exported file beside it, Markdown with the hub's front matter; returns its path.

    `usage` is the command that samples with the file.
    """
    path = info.path.with_suffix(".md")
    what = "FlowTurbo velocity refiner" if info.kind == "VelocityRefiner" else "SiT velocity predictor"
    after = "" if info.step is None else f" after {info.step} steps"
    count = int(info.model["num_classes"])
    task = "class-conditional-image-generation" if count > 1 else "unconditional-image-generation"
    lines = [
        "---",
        "library_name: pytorch",
        *([] if count > 1 else [f"pipeline_tag: {task}"]),  # the hub has no such task for classes
        f"tags: [flowturbo, flow-matching, {task}]",
        "---",
        "",
        f"# {_escaped(path.stem)}",
        "",
        f"A {what}: averaged (EMA) weights{after}, {str(dtype).removeprefix('torch.')}.",
        f"It makes images of {count} classes." if count > 1 else "It makes images without classes.",
        "",
        f"`{info.path.name}`, {info.path.stat().st_size:,} bytes, sha256 `{sha256(info.path)}`",
        "",
        "## Use",
        "",
        "```bash",
        plain(usage),
        "```",
    ]
    for title, table in (("Model", info.model), ("Training", info.training), ("Classes", _classes(info, count))):
        rows = [f"| {_escaped(name)} | {_escaped(value)} |" for name, value in table.items() if value is not None]
        lines += ["", f"## {title}", "", "| | |", "|---|---|", *rows] if rows else []
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return path


def _classes(info: CheckpointInfo, count: int) -> dict[str, str]:
    """What each class is called and how many images of it there were, where the config says so and they are few."""
    names, counts = info.config.get("classes"), info.config.get("class_counts")
    if not isinstance(names, list) or not isinstance(counts, list) or not len(names) == len(counts) == count <= 1000:
        return {}
    return {
        f"{index}: {shown(name)[1:-1]}": f"{number} images" for index, (name, number) in enumerate(zip(names, counts))
    }


def _escaped(value: object) -> str:
    """A value as the text of a cell in a table of Markdown, where it is no markup."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", plain(value, 200) if isinstance(value, str) else shown(value))


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
