"""What a checkpoint says of the network in it, and of how that was trained."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from flowturbo.system.values import check_json, plain, shown, typed
from flowturbo.transport.blocks import REFINER_STEPS
from flowturbo.transport.path import PATHS

Module = TypeVar("Module", bound=torch.nn.Module)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of its weights; empty where it says nothing, as the public ones.

    `model`: the class of the network and its keyword arguments; `training`: the settings of the run; `config`: all
    that there is, these two included.
    """

    path: Path
    step: int | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Mapping[str, Any], path: str | os.PathLike[str]) -> CheckpointInfo:
        """From a checkpoint's content. Raises ValueError for a config that is none."""
        config = content.get("config", {})
        parts = [config.get(name, {}) for name in ("model", "training")] if isinstance(config, Mapping) else [config]
        if not all(isinstance(part, Mapping) for part in parts):
            raise ValueError(f"checkpoint {os.fspath(path)!r} is damaged: its config is no table of settings")
        check_json(config, f"checkpoint {os.fspath(path)!r} is damaged: its config")
        step, (model, training) = content.get("step", config.get("step")), parts
        return cls(Path(path), step if isinstance(step, int) else None, model, training, config)

    @property
    def kind(self) -> str | None:
        """The class of the network; None where that is not known."""
        found = self.model.get("class")
        return found if isinstance(found, str) else None

    @property
    def path_type(self) -> str | None:
        """The interpolation path that the network was trained on; None where that is not known."""
        found = self.training.get("path_type")
        return found if isinstance(found, str) and found in PATHS else None

    @property
    def refiner_step(self) -> str | None:
        """The form of the R block that a refiner was trained for; None where it was for none in particular."""
        found = self.training.get("refiner_step") if self.training.get("recipe") == "endpoint" else None
        return found if isinstance(found, str) and found in REFINER_STEPS else None


FILES = ("data_path", "class_map", "vae_ckpt", "model_teacher_ckpt", "results_dir", "resume")  # settings that are paths
ON_THE_HUB = re.compile(r"\w[\w.-]*/[\w.-]+")


def without_folders(value: Any, name: str = "") -> Any:
    """Settings (JSON types) with paths reduced to their last part: a shared file tells nothing of a machine.

    Paths are those that are absolute or begin with a dot or ~, and all in the settings FILES but names on the hub.
    """
    if isinstance(value, Mapping):
        return {key: without_folders(part, key) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(part, name) for part in value]
    if not isinstance(value, str) or (name == "vae_ckpt" and ON_THE_HUB.fullmatch(value) and not Path(value).exists()):
        return value
    is_path = name in FILES or re.match(r"[./~\\]|[A-Za-z]:[/\\]", value)
    parts = [part for part in re.split(r"[/\\]", value) if part.strip(".")]
    return parts[-1] if is_path and parts else value


def empty_network(
    kind: type[Module], config: Mapping[str, Any], weights: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> Module:
    """A network of that kind by its config, without memory for its weights: on the meta device.

    Raises ValueError naming the checkpoint where its config describes none, or another one.
    """
    try:
        arguments = dict(config)
        name = typed(arguments.pop("class", kind.__name__), str, "its class")
        if name != kind.__name__:
            raise ValueError(f"it holds a {plain(name, 80)}, expected a {kind.__name__}")
        for argument, value in arguments.items():
            pair = argument == "input_size" and isinstance(value, (list, tuple)) and len(value) == 2
            for number in value if pair else [value]:
                typed(number, (int, float, bool), f"its {plain(argument, 80)}")
        if arguments.get("depth", 1) > len(weights):  # a block has many weights; building it would take forever
            raise ValueError(f"its config has {shown(arguments['depth'])} blocks, its weights have not")
        with torch.device("meta"):  # no time for an initialisation that is overwritten
            return kind(**arguments)
    except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = plain(" ".join(str(error).split()), 300)
        raise ValueError(f"checkpoint {os.fspath(path)!r} holds no {kind.__name__}: {reason}") from None
