"""Where a run goes on, and whether it may: its folder, its record, and what has changed since."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowturbo.data.folders import TrainingData, class_names
from flowturbo.data.identity import data_changes
from flowturbo.models import SiT
from flowturbo.networks.load import model_config
from flowturbo.system.claims import OtherSettings, differences, write_record
from flowturbo.system.distributed import World
from flowturbo.system.files import sha256
from flowturbo.training.build import FrozenNetworks
from flowturbo.training.options import OutputOptions, TrainingOptions
from flowturbo.training.run import Run
from flowturbo.training.step import State
from flowturbo.weights.checkpoint import CheckpointFolder, newest_checkpoint, resolve


class TrainedOtherwise(OtherSettings):
    """A checkpoint is of a run with other settings, data or networks."""


def record_of(options: TrainingOptions, frozen: FrozenNetworks, model: SiT, data: TrainingData) -> dict[str, Any]:
    """What a run's config.json and its checkpoints say of it, as JSON types."""
    return {
        "model": model_config(model),
        "training": options.settings(),
        "data": data.identity().record(),
        **class_names(data, model.num_classes).config(),
        "teacher": None if frozen.teacher_file is None else sha256(frozen.teacher_file),
    }


def begin(options: TrainingOptions, ranks: World, frozen: FrozenNetworks, model: SiT, data: TrainingData) -> Run:
    """A run that begins with this model, or goes on from the checkpoint that the options name.

    Rank 0 chooses the folder for all, and writes config.json. Raises TrainedOtherwise where what shapes the run has
    changed since, unless the options allow it, and ValueError naming a checkpoint that cannot be taken.
    """
    optimisation = options.optimisation.over(len(data))
    state = State.new(model, ranks.device, optimisation, fp16=frozen.dtype == torch.float16)
    record = ranks.agree(lambda: record_of(options, frozen, model, data))
    folder, checkpoint = ranks.agree(lambda: choose_folder(options.output, options.target))
    if checkpoint is not None:
        before = state.load(checkpoint)
        if not options.output.allow_changes:
            ranks.agree(lambda: refuse_changes(before, record, options, data, checkpoint))
    ranks.agree(lambda: write_record(folder / "config.json", record))
    return Run(optimisation, options.output, ranks, state, folder, record, options, frozen)


def choose_folder(
    output: OutputOptions, target: str, warn: Callable[[str], object] = lambda text: print(f"warning: {text}")
) -> tuple[Path, Path | None]:
    """A run's folder, and the checkpoint that it goes on from, if any; a run that is named stands for its newest.

    `warn` is told of damaged ones that are passed over. Raises MissingWeights where what is named is not there.

    A run goes on in its own folder from its latest checkpoint. From an earlier one that is named a new run begins:
    what came after it stays as it is.
    """
    results, name = Path(output.results_dir), f"{target}-{output.note}"
    checkpoint: Path | None = None
    if output.resume == "auto":
        checkpoint = newest_checkpoint(results, name, warn)
    elif output.resume:
        checkpoint = resolve(output.resume, "resume", warn)
    if checkpoint is not None:
        home = CheckpointFolder(checkpoint.resolve().parent)
        if output.resume == "auto" or home.is_latest(checkpoint):
            return home.folder.parent, checkpoint
    numbers = [path.name.partition("-")[0] for path in results.glob("[0-9]*-*")]
    number = max((int(text) for text in numbers if text.isdigit()), default=-1) + 1
    return results / f"{number:03d}-{name}", checkpoint


def refuse_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], options: TrainingOptions, data: TrainingData, checkpoint: Path
) -> None:
    """Raises TrainedOtherwise naming what differs between the records of a checkpoint and of this run.

    A setting that the checkpoint does not have was made later than it: it had its default.
    """
    settings, network, data_record = before.get("training", {}), before.get("model", now["model"]), before.get("data")
    rules = data_record.get("rules") if isinstance(data_record, Mapping) else None
    tables = isinstance(settings, Mapping) and isinstance(network, Mapping)
    if not tables or any(map(_holds_tensors, (settings, network, data_record, rules))):
        raise TrainedOtherwise(f"checkpoint {str(checkpoint)!r} is damaged: its config holds no settings")
    changed, shaping = [], options.shaping()
    if settings:
        settings = {**{name: default for name, default in shaping.items() if default is not None}, **settings}
        changed = differences(settings, now["training"], [name for name in shaping if name in settings])
    changed += data_changes(data_record, data)
    if isinstance(before.get("teacher"), str) and before["teacher"] != now["teacher"]:
        changed.append("the teacher has other weights")
    if other := [name for name, value in now["model"].items() if network.get(name) != value]:
        changed.append(f"the network has another {', '.join(other)}")
    if changed:
        raise TrainedOtherwise(f"checkpoint {str(checkpoint)!r} was trained otherwise: {'; '.join(changed)}")


def _holds_tensors(part: object) -> bool:
    """Whether a part of a damaged config holds tensors, which cannot be compared."""
    values = part.values() if isinstance(part, Mapping) else [part]
    return any(isinstance(value, Tensor) for value in values)
