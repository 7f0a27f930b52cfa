"""Training a refiner for a pipeline, or the pipeline's network itself: train.py's runs with captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from flowturbo.data.loader import TrainingSamples
from flowturbo.networks.compiled import check_compiler
from flowturbo.networks.precision import pick_precision
from flowturbo.system.claims import differences, write_record
from flowturbo.system.code import made_by
from flowturbo.system.distributed import World, world
from flowturbo.text_to_image.captions import read_folder
from flowturbo.text_to_image.encoded import Prompts, encode_folder, encode_texts, open_samples
from flowturbo.text_to_image.endpoint import Conditioning, PromptEndpoint, PromptTrajectories, endpoint_objective
from flowturbo.text_to_image.families import family_of, network_of
from flowturbo.text_to_image.objective import VelocityMatching, VelocityRefinement
from flowturbo.text_to_image.options import TRAJECTORIES, TextTrainingOptions, read_lines
from flowturbo.text_to_image.pipelines import fingerprint, guidance_of, latent_shape, load_pipeline, shift_of
from flowturbo.text_to_image.refined import FlowRefiner, refiner_from
from flowturbo.training.resume import TrainedOtherwise, claimed
from flowturbo.training.run import AnyRun
from flowturbo.training.step import State
from flowturbo.training.stopping import StopRequest
from flowturbo.transport import Grid, Schedule

CaptionLoss = VelocityMatching | VelocityRefinement
NETWORK = "network"  # the folder, in a run's, of what it has trained


@dataclass
class CaptionRun(AnyRun):
    """A run of text_to_image.py."""

    options: TextTrainingOptions

    def export(self) -> Path:
        """Write the EMA's weights as diffusers has them; returns the folder."""
        folder, ema = self.folder / NETWORK, self.state.ema
        kept = TRAJECTORIES if self.options.by_end_points else ("max_dt",)
        names = ("pipeline", "recipe", "lr", "global_batch_size", *kept)
        made = {name: self.record["training"][name] for name in names}
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


class Work(NamedTuple):
    """What a run trains on, and what it minimises. `shown` says how much there is of it."""

    samples: Any
    objective: CaptionLoss | PromptEndpoint
    data: dict[str, Any]  # what is recorded of it
    images: int  # or trajectories: what an epoch is
    shown: str


class Trained(NamedTuple):
    """What is trained of a pipeline: its `network` itself, or a refiner for it, which `trained` then is."""

    pipe: Any
    network: Any
    trained: Any
    dtype: torch.dtype


def on_captions(options: TextTrainingOptions, what: Trained, ranks: World) -> Work:
    """Captioned images, encoded once."""
    optimisation, recipe, folder = options.optimisation, options.recipe, options.data.cache_folder
    size, family = options.data.size, family_of(what.network)
    data = ranks.agree(lambda: encode_folder(what.pipe, str(options.data.data_path), folder, size))
    samples = open_samples(folder, list(family.conditions), optimisation.seed, optimisation.class_dropout)
    shared: dict[str, Any] = {
        "network": what.trained,
        "family": family,
        "dtype": what.dtype,
        "guidance": recipe.guidance,
    }
    objective: CaptionLoss
    if options.what.target == "predictor":
        objective = VelocityMatching(**shared, time_distribution=recipe.time_distribution)
    else:
        shift = recipe.shift or shift_of(what.pipe, size)
        objective = VelocityRefinement(**shared, teacher=what.network, shift=shift, max_dt=recipe.max_dt)
    return Work(samples, objective, data, len(samples), f"{len(samples):,} captioned images")


def on_prompts(options: TextTrainingOptions, what: Trained, ranks: World) -> Work:
    """Recipe endpoint: trajectories of the network, of prompts that are encoded once."""
    optimisation, recipe, source = options.optimisation, options.recipe, options.data
    texts = read_lines(source.prompts) if source.prompts else _captions(str(source.data_path))
    if not texts:
        raise ValueError(f"{source.prompts!r} holds no prompts: expected one a line")
    folder = source.cache_folder / "prompts"
    data = ranks.agree(lambda: encode_texts(what.pipe, texts, folder))
    schedule = Schedule.parse(recipe.schedule)
    shift = recipe.shift or shift_of(what.pipe, source.size, sum(schedule.evaluations(recipe.refiner_step)))
    on_grid = [
        str(each if str(each.grid) else replace(each, grid=Grid("shift", shift)))
        for each in (schedule, Schedule.parse(recipe.reference))
    ]
    given = Conditioning(
        Prompts.open(folder, list(family_of(what.network).conditions)),
        guidance_of(what.pipe) if recipe.guidance_scale is None else recipe.guidance_scale,
        bool(what.network.config.get("guidance_embeds")),
        what.dtype,
    )
    channels, *sides = latent_shape(what.pipe, source.size)
    settings = {
        **data,
        "network": fingerprint(what.network),
        "schedules": on_grid,
        "refiner_step": recipe.refiner_step,
        "guidance_scale": given.scale,
        "dtype": str(what.dtype),
    }
    branches, count = 1 + given.guides, recipe.trajectories
    trajectories = PromptTrajectories((branches * channels, *sides), len(texts), settings, optimisation.seed, count)
    trajectories.branches = branches
    objective = endpoint_objective(
        (what.network, what.trained),
        given,
        trajectories,
        (on_grid[0], on_grid[1]),
        recipe.refiner_step,
        optimisation.global_batch_size,
    )
    samples = TrainingSamples(trajectories, optimisation.seed, objective.draw, flip=False)
    shown = f"{count:,} trajectories of {len(texts):,} prompts, {on_grid[0]}, guidance {given.scale:g}"
    return Work(samples, objective, settings, count, shown)


def _captions(folder: str) -> list[str]:
    """The captions of a folder of images, each once."""
    return sorted({item.caption for item in read_folder(folder)})


def train(options: TextTrainingOptions, stop: StopRequest) -> tuple[Path, bool]:
    """Train; returns the run's folder, and whether it is done. Raises what `begin` and the readers of data raise."""
    with world(options.hardware.device) as ranks:
        torch.manual_seed(options.optimisation.seed)
        dtype = pick_precision(options.hardware.precision, ranks.device)
        pipe = load_pipeline(options.what.pipeline, torch.float32, ranks.device)
        teacher: Any = network_of(pipe).requires_grad_(False).eval()
        network = teacher
        if options.what.target == "refiner":
            network = refiner_from(teacher).network.to(ranks.device)
            if dtype != torch.float32:
                teacher.to(dtype)
        network.requires_grad_(True)
        prepare = on_prompts if options.by_end_points else on_captions
        work = prepare(options, Trained(pipe, teacher, network, dtype), ranks)
        del pipe  # autoencoder and text encoders have done their work
        if options.hardware.compile:
            ranks.agree(lambda: check_compiler(ranks.device))
            for each in {network, teacher}:
                each.compile()
        with begin(options, ranks, network, work.data, work.images) as run:
            count = sum(p.numel() for p in network.parameters())
            said = f"{options.what.target}: {count:,} parameters, {work.shown}"
            loader = run.loader_of(work.samples, options.data.num_workers)
            done = run.make_steps(loader, work.objective, stop, [said])
            if done and ranks.is_main:
                print(f"network: {run.export()}")
            return run.folder, done
