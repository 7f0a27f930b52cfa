"""Checkpoints: weights, EMA, optimizer, step and config, as tensors and JSON types; nothing is ever unpickled
but tensors and plain containers."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.files import atomic_write


def save_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a checkpoint whole or not at all; makes the folder. Raises OSError naming a path that takes none."""
    try:
        with atomic_write(path) as file:
            torch.save(dict(content), file)
    except RuntimeError as error:  # torch's word for a disk that is full
        raise OSError(f"cannot write {os.fspath(path)!r}: {error}") from error


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU. Raises ValueError naming a file that is not one.

    Checkpoints of the original SiT and FlowTurbo scripts carry an argparse.Namespace: just that is let in. A
    .safetensors file gives {"ema", "config"} where its metadata hold a config, else its tensors.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f"checkpoint {path!r} does not exist")
    try:
        if path.endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                config = json.loads((file.metadata() or {}).get("config", "null"))
            return {"ema": weights, "config": config} if isinstance(config, dict) else weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file raises nearly anything; nine types were seen
        unsafe = isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error)
        reason = "it holds Python objects, which are not loaded" if unsafe else "no checkpoint, or a damaged one"
        raise ValueError(f"cannot read checkpoint {path!r}: {reason} ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {path!r} holds a {type(content).__name__}, expected weights by name")
    return content


def weights_of(
    content: Mapping[str, Any], path: str | os.PathLike[str], prefer_ema: bool = True
) -> dict[str, Tensor]:
    """The weights in a checkpoint: its EMA where it has one, else its model, else itself.

    Prefixes left by DistributedDataParallel and torch.compile are removed. Raises ValueError if there are none.
    """
    order = ("ema", "model") if prefer_ema else ("model", "ema")
    state = next((content[key] for key in order if isinstance(content.get(key), Mapping)), content)
    weights = {
        re.sub(r"^(module\.|_orig_mod\.)+", "", key): value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    if not weights:
        raise ValueError(f"checkpoint {os.fspath(path)!r} holds no weights")
    return weights


def load_weights(module: torch.nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load weights strictly. Raises ValueError that lists missing, unknown, misshapen and non-finite ones."""
    expected = module.state_dict()
    problems = [f"no {key}" for key in expected.keys() - weights.keys()]
    problems += [f"unknown {key}" for key in weights.keys() - expected.keys()]
    for key in sorted(expected.keys() & weights.keys()):
        if expected[key].shape != weights[key].shape:
            problems.append(f"{key} is {tuple(weights[key].shape)}, expected {tuple(expected[key].shape)}")
        elif not torch.isfinite(weights[key]).all():
            problems.append(f"{key} is not finite")
    if problems:
        shown = "; ".join(sorted(problems)[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ValueError(f"checkpoint {os.fspath(path)!r} does not fit this {type(module).__name__}: {shown}")
    module.load_state_dict(dict(weights), strict=True)


def newest_checkpoint(results: str | os.PathLike[str], pattern: str = "*") -> Path | None:
    """The checkpoint of the highest step in the newest run under `results` that has one, or None."""
    runs = sorted((p for p in Path(results).glob(pattern) if p.is_dir()), key=lambda p: p.name, reverse=True)
    for run in runs:
        found = sorted((run / "checkpoints").glob("[0-9]*.pt"), key=lambda p: int(p.stem))
        if found:
            return found[-1]
    return None
