"""Training a refiner for a pipeline, or the pipeline's network itself: train.py's runs with captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowturbo.networks.compiled import check_compiler
from flowturbo.networks.precision import pick_precision
from flowturbo.system.claims import differences, write_record
from flowturbo.system.code import made_by
from flowturbo.system.distributed import World, world
from flowturbo.text_to_image.captions import encode_folder, open_samples
from flowturbo.text_to_image.families import family_of, network_of
from flowturbo.text_to_image.objective import VelocityMatching, VelocityRefinement
from flowturbo.text_to_image.options import TextTrainingOptions
from flowturbo.text_to_image.pipelines import load_pipeline
from flowturbo.text_to_image.refined import FlowRefiner, refiner_from
from flowturbo.training.resume import TrainedOtherwise, claimed
from flowturbo.training.run import AnyRun
from flowturbo.training.step import State
from flowturbo.training.stopping import StopRequest

CaptionLoss = VelocityMatching | VelocityRefinement
NETWORK = "network"  # the folder, in a run's, of what it has trained


@dataclass
class CaptionRun(AnyRun):
    """A run of text_to_image.py."""

    options: TextTrainingOptions

    def export(self) -> Path:
        """Write the EMA's weights as diffusers has them; returns the folder."""
        folder, ema = self.folder / NETWORK, self.state.ema
        made = {name: self.record["training"][name] for name in ("pipeline", "lr", "global_batch_size", "max_dt")}
        if self.options.what.target == "refiner":
            FlowRefiner(ema).save_pretrained(folder, {**made, "steps": self.state.step})
        else:
            ema.save_pretrained(folder)  # type: ignore[operator]
        return folder


@contextmanager
def begin(
    options: TextTrainingOptions, ranks: World, network: nn.Module, data: Mapping[str, Any], images: int
) -> Iterator[CaptionRun]:
    """Within it a run that begins with this network, or goes on from the checkpoint that the options name.

    Rank 0 holds the folder's lock. Raises TrainedOtherwise where what shapes the run has changed since, unless the
    options allow it.
    """
    dtype = pick_precision(options.hardware.precision, ranks.device)
    optimisation = options.optimisation.over(images)
    state = State.new(network, ranks.device, optimisation, fp16=dtype == torch.float16)
    record = {
        "model": {"class": type(network).__name__, **network.config},  # type: ignore[dict-item]
        "training": options.settings(),
        "data": dict(data),
        "made_by": made_by(),
    }
    name = f"{options.what.target}-{options.output.note}"
    with ranks.hold(lambda: claimed(options.output, name)) as (folder, checkpoint):
        if checkpoint is not None:
            before = state.load(checkpoint)
            changed = differences(before.get("training", {}), record["training"], options.shaping())
            changed += differences(before.get("data", {}), record["data"])
            if changed and not options.output.allow_changes:
                raise TrainedOtherwise(f"checkpoint {str(checkpoint)!r} was trained otherwise: {'; '.join(changed)}")
        ranks.agree(lambda: write_record(folder / "config.json", record))
        yield CaptionRun(optimisation, options.output, ranks, state, folder, record, options)


def objective_for(
    options: TextTrainingOptions, network: nn.Module, teacher: nn.Module, shift: float, dtype: torch.dtype
) -> CaptionLoss:
    """What the run minimises."""
    shared: dict[str, Any] = {
        "network": network,
        "family": family_of(network),
        "dtype": dtype,
        "guidance": options.recipe.guidance,
    }
    if options.what.target == "predictor":
        return VelocityMatching(**shared, time_distribution=options.recipe.time_distribution)
    return VelocityRefinement(**shared, teacher=teacher, shift=shift, max_dt=options.recipe.max_dt)


def train(options: TextTrainingOptions, stop: StopRequest) -> tuple[Path, bool]:
    """Train; returns the run's folder, and whether it is done. Raises what `begin` and the readers of data raise."""
    with world(options.hardware.device) as ranks:
        torch.manual_seed(options.optimisation.seed)
        dtype = pick_precision(options.hardware.precision, ranks.device)
        pipe = load_pipeline(options.what.pipeline, torch.float32, ranks.device)
        cache = Path(options.data.cache or options.data.data_path.rstrip("/") + "-cache")
        encode = partial(encode_folder, pipe, options.data.data_path, cache, options.data.size)
        data = ranks.agree(encode)
        teacher: Any = network_of(pipe).requires_grad_(False).eval()
        network = teacher
        if options.what.target == "refiner":
            network = refiner_from(teacher).network.to(ranks.device)
            teacher.to(dtype)
        network.requires_grad_(True)
        optimisation = options.optimisation
        samples = open_samples(
            cache, list(family_of(network).conditions), optimisation.seed, optimisation.class_dropout
        )
        shift = options.recipe.shift or float(pipe.scheduler.config.get("shift") or 1)
        del pipe, encode  # autoencoder and text encoders have done their work
        if options.hardware.compile:
            ranks.agree(lambda: check_compiler(ranks.device))
            for each in {network, teacher}:
                each.compile()
        objective = objective_for(options, network, teacher, shift, dtype)
        with begin(options, ranks, network, data, len(samples)) as run:
            count = sum(p.numel() for p in network.parameters())
            said = f"{options.what.target}: {count:,} parameters, {len(samples):,} captioned images"
            done = run.make_steps(run.loader_of(samples, options.data.num_workers), objective, stop, [said])
            if done and ranks.is_main:
                print(f"network: {run.export()}")
            return run.folder, done
