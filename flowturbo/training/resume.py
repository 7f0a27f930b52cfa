"""Where a run goes on, and whether it may: its folder, its record, and what has changed since."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowturbo.data.folders import TrainingData, class_names
from flowturbo.data.identity import data_changes
from flowturbo.models import SiT
from flowturbo.networks.load import model_config
from flowturbo.system.claims import OtherSettings, differences, shown, write_record
from flowturbo.system.code import made_by
from flowturbo.system.distributed import World
from flowturbo.system.files import LOCK, exclusive, remove_leftovers, sha256
from flowturbo.training.build import FrozenNetworks
from flowturbo.training.options import OutputOptions, TrainingOptions
from flowturbo.training.run import Run
from flowturbo.training.step import State
from flowturbo.weights.cache import locate
from flowturbo.weights.checkpoint import CHECKPOINTS, CheckpointFolder, is_run, resolve
from flowturbo.weights.info import without_folders

PATIENCE = 20  # seconds to wait for a folder's lock: a killed run's workers linger, and one that stops still saves


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
        "autoencoder": frozen.autoencoder.fingerprint(),
        "made_by": made_by(),
    }


@contextmanager
def begin(
    options: TrainingOptions, ranks: World, frozen: FrozenNetworks, model: SiT, data: TrainingData
) -> Iterator[Run]:
    """Within it a run that begins with this model, or goes on from the checkpoint that the options name.

    Rank 0 holds the folder's lock from before a checkpoint is chosen until the end, and writes config.json. Raises
    TrainedOtherwise where what shapes the run has changed since, unless the options allow it, InUse where another
    process trains in the folder, and ValueError naming a checkpoint that cannot be taken.
    """
    optimisation = options.optimisation.over(len(data))
    state = State.new(model, ranks.device, optimisation, fp16=frozen.dtype == torch.float16)
    record = ranks.agree(lambda: record_of(options, frozen, model, data))
    with ranks.hold(lambda: claimed(options.output, options.target)) as (folder, checkpoint):
        if checkpoint is not None:
            before = state.load(checkpoint)
            if not options.output.allow_changes:
                ranks.agree(lambda: refuse_changes(before, record, options, data, checkpoint))
            if ranks.is_main and of_other_code(before):
                print("note: the code has changed since the checkpoint was made: results may differ from its own")
        ranks.agree(lambda: remove_leftovers(folder))  # of pictures too
        ranks.agree(lambda: write_record(folder / "config.json", record))
        yield Run(optimisation, options.output, ranks, state, folder, record, options, frozen)


@contextmanager
def claimed(
    output: OutputOptions, target: str, warn: Callable[[str], object] = lambda text: print(f"warning: {text}")
) -> Iterator[tuple[Path, Path | None]]:
    """Holds the lock of a run's folder; gives it, and the checkpoint that the run goes on from, if any.

    A run goes on in its own folder from its latest checkpoint: which that is, is looked up under the lock, since who
    held it may have saved. From an earlier one that is named a new run begins: what came after it stays as it is.
    `warn` is told of damaged checkpoints that are passed over. Raises MissingWeights where what is named is not there,
    InUse where the folder stays locked.
    """
    name = f"{target}-{output.note}"
    for folder in homes(output, name):
        with exclusive(folder, PATIENCE):
            checkpoint = latest(folder, output.resume, warn)
            if checkpoint is not None:
                yield folder, checkpoint
                return
    checkpoint = None if output.resume in (None, "auto") else resolve(str(output.resume), "resume", warn)
    folder = new_folder(Path(output.results_dir), name)
    try:
        with exclusive(folder, PATIENCE):  # one that resumes may be looking into it
            yield folder, checkpoint
    finally:
        if os.listdir(folder) == [LOCK]:  # the run was refused
            shutil.rmtree(folder)


def homes(output: OutputOptions, name: str) -> list[Path]:
    """The folders of the runs that may go on, in the order in which they are tried."""
    if output.resume == "auto":
        runs = {int(p.name.partition("-")[0]): p for p in Path(output.results_dir).glob("*-*") if is_run(p.name, name)}
        return [runs[number] for number in sorted(runs, reverse=True)]
    found = locate(output.resume) if output.resume else None
    if found is None:
        return []
    found = found.resolve()
    if found.is_dir():
        return [found] if (found / CHECKPOINTS).is_dir() else []
    home = CheckpointFolder(found.parent)
    return [home.folder.parent] if home.is_latest(found) else []


def latest(folder: Path, resume: str | None, warn: Callable[[str], object]) -> Path | None:
    """The checkpoint that a run goes on from in its folder; None where a later one came after the one that is named."""
    home = CheckpointFolder(folder / CHECKPOINTS)
    if resume == "auto":
        return home.newest(warn)
    checkpoint = resolve(str(resume), "resume", warn).resolve()
    return checkpoint if home.is_latest(checkpoint) else None


def new_folder(results: Path, name: str) -> Path:
    """Make a run's folder, NUMBER-name with a number that no other run has, in any name.

    Where two make one of the same number at once, at least the later sees the other, and takes another number.
    """
    results.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [path.name.partition("-")[0] for path in results.glob("[0-9]*-*")]
        number = max((int(text) for text in numbers if text.isdigit()), default=-1) + 1
        folder = results / f"{number:03d}-{name}"
        with suppress(FileExistsError):
            folder.mkdir()
            if not [path for path in results.glob(f"{number:03d}-*") if path != folder]:
                return folder
            folder.rmdir()
        time.sleep(random.uniform(0, 0.05))  # not in step with the other


def refuse_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], options: TrainingOptions, data: TrainingData, checkpoint: Path
) -> None:
    """Raises TrainedOtherwise naming what differs between the records of a checkpoint and of this run.

    A setting that the checkpoint does not have was made later than it: it had its default.
    """
    settings, network, data_record = before.get("training", {}), before.get("model", now["model"]), before.get("data")
    rules = data_record.get("rules") if isinstance(data_record, Mapping) else None
    tables = isinstance(settings, Mapping) and isinstance(network, Mapping)
    if not tables or any(map(_holds_tensors, (settings, network, data_record, rules, before))):
        raise TrainedOtherwise(f"checkpoint {str(checkpoint)!r} is damaged: its config holds no settings")
    changed, shaping = [], options.shaping()
    if settings:
        settings = {**{name: default for name, default in shaping.items() if default is not None}, **settings}
        names = [name for name in shaping if name in settings]
        changed = differences(_last_parts(settings), _last_parts(now["training"]), names)
    changed += data_changes(data_record, data)
    changed += content_changes(before, now)
    if other := [name for name, value in now["model"].items() if network.get(name) != value]:
        changed.append(f"the network has another {', '.join(other)}")
    if changed:
        raise TrainedOtherwise(f"checkpoint {str(checkpoint)!r} was trained otherwise: {'; '.join(changed)}")


def _last_parts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the last parts of paths, which is what checkpoints hold of them; texts alone are looked at."""
    return {name: without_folders(v, name) if isinstance(v, str) else v for name, v in settings.items()}


def of_other_code(before: Mapping[str, Any]) -> bool:
    """Whether a record says that other code has made it. That refuses no run: most changes of code change no result."""
    maker = before.get("made_by")
    return isinstance(maker, Mapping) and maker.get("code") != made_by()["code"]


def content_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed in files and versions that shape a run. A record that lacks one is of an earlier version."""
    changed = []
    if isinstance(before.get("teacher"), str) and before["teacher"] != now["teacher"]:
        changed.append("the teacher has other weights")
    settings = before.get("training", {})
    if "autoencoder" in before:
        if before["autoencoder"] != now["autoencoder"]:
            changed.append("the autoencoder has other weights")
    elif settings:
        changed += differences(_last_parts(settings), _last_parts(now["training"]), ["vae_ckpt"])
    if settings and not _has_labels(before.get("data")):
        changed += differences(_last_parts(settings), _last_parts(now["training"]), ["class_map"])
    maker = before.get("made_by")
    if isinstance(maker, Mapping) and maker.get("torch") != now["made_by"]["torch"]:
        changed.append(f"torch was {shown(maker.get('torch'))}, is {shown(now['made_by']['torch'])}")
    return changed


def _has_labels(data_record: object) -> bool:
    return isinstance(data_record, Mapping) and isinstance(data_record.get("labels"), str)


def _holds_tensors(part: object) -> bool:
    """Whether a part of a damaged config holds tensors, which cannot be compared."""
    values = part.values() if isinstance(part, Mapping) else [part]
    return any(isinstance(value, Tensor) for value in values)
