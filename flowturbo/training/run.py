"""A run: its updates, one batch after another, and what it saves on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from flowturbo.data.classes import ClassNames, class_label
from flowturbo.data.folders import TrainingData
from flowturbo.data.loader import Batch, TrainingSamples, ahead, training_loader
from flowturbo.data.parts import held_out_of
from flowturbo.data.pictures import grid, save_png
from flowturbo.data.report import contact_sheet
from flowturbo.data.workers import LoaderFailed
from flowturbo.models import SiT
from flowturbo.networks.precision import cast
from flowturbo.sampling.generate import ImageSampler, Networks, NotFinite
from flowturbo.sampling.solvers import parse_sampler
from flowturbo.system.cli import MISTAKES, one_line
from flowturbo.system.distributed import World
from flowturbo.training.build import FrozenNetworks, described, images_of
from flowturbo.training.endpoint import EndpointMatching
from flowturbo.training.held_out import HeldOutLoss
from flowturbo.training.log import Measured, RunLog
from flowturbo.training.objective import Loss, Objective
from flowturbo.training.options import Optimisation, OutputOptions, TrainingOptions
from flowturbo.training.rivals import EndPoints
from flowturbo.training.step import State, Update, update
from flowturbo.training.stopping import StopRequest
from flowturbo.transport.guidance import Guidance
from flowturbo.transport.schedule import Schedule
from flowturbo.transport.spec import SamplerSettings
from flowturbo.weights.checkpoint import CHECKPOINTS, CheckpointFolder
from flowturbo.weights.info import without_folders

CLASSES, OF_EACH = 8, 4  # at most so many classes in a grid, and the pictures of each
SIDE = 96  # pixels of a picture in a grid, at least

Measure = Callable[[], Measured]


@dataclass
class AnyRun:
    """A run under way, of whatever network. `optimisation` has its steps in all; `record` is what its checkpoints say
    of it."""

    optimisation: Optimisation
    output: OutputOptions
    ranks: World
    state: State
    folder: Path
    record: dict[str, Any]

    @property
    def is_done(self) -> bool:
        """Whether all steps have been made."""
        return self.state.step >= self.optimisation.steps

    def loader_of(self, samples: Dataset, workers: int) -> DataLoader:
        """Batches for the steps that are left, of this rank's share."""
        return training_loader(
            samples,
            self.optimisation.global_batch_size,
            self.ranks,
            first=self.state.step,
            last=self.optimisation.steps,
            workers=workers,
            exact=self.optimisation.exact,
        )

    @property
    def title(self) -> str:
        """What loss.png is headed with."""
        return self.folder.name

    def make_steps(
        self,
        loader: DataLoader,
        objective: Loss,
        stop: StopRequest,
        notes: Sequence[str] = (),
        measures: Sequence[Measure] = (),
    ) -> bool:
        """Make the steps that are left, and log them; whether all have been made when it ends.

        Raises LoaderFailed, with the state saved, where the data cannot be read on.
        """
        ranks, folder = self.ranks, self.folder if self.ranks.is_main else None
        config = without_folders(self.record) if self.output.wandb else None
        with RunLog(folder, self.optimisation.steps, self.state.step, config) as log:
            for note in notes:
                log.say(note)
            failure = self.fit(loader, objective, stop, log, measures)
            ranks.barrier()
            step = self.state.step
            if failure is not None:
                raise LoaderFailed(f"{failure}; the run stopped after step {step}, saved", failure.cause)
            if self.is_done:
                log.say(f"done: {self.folder}")
            else:
                why = stop.signal or ("the time limit" if stop.late else "another rank")
                log.say(f"stopped by {why} after step {step}; go on with the same settings and resume 'auto'")
        return self.is_done

    def fit(
        self,
        batches: Iterable[Batch],
        objective: Loss,
        stop: StopRequest,
        log: RunLog,
        measures: Sequence[Measure] = (),
    ) -> LoaderFailed | None:
        """Update on every batch; rank 0 saves, measures and samples when it is time. Ends early, saved, when a stop is
        wanted.

        Where a batch cannot be read the run stops as for a signal, on every rank, and what was raised is returned.
        What a step tells is read while the next one runs, or at once where it is needed: nothing is logged, saved or
        sampled before every step so far was found finite.
        """
        state, output, main = self.state, self.output, self.ranks.is_main
        if self.is_done:
            return None
        if objective.prepares and main and state.step == 0:
            self.save()  # by which a run that is stopped or killed while it prepares is found again
        if not objective.prepare(self.folder, self.ranks, stop, log):
            return None
        before: Update | None = None
        for batch, failure in ahead(batches):
            wanted = stop.wanted or failure is not None
            told = update(state, self.ranks, batch.to(self.ranks.device), objective, self.optimisation, wanted)
            log.advance(state.step, self.optimisation.global_batch_size)
            logs, saves = (self.is_done or state.step % every == 0 for every in (output.log_every, output.ckpt_every))
            samples = output.samples_at(state.step) or (self.is_done and output.sample_every > 0)
            stopping = before is not None and before.stop
            if stopping or logs or saves or samples:
                stopping |= told.stop
            before = told
            if logs or stopping:
                figures = objective.figures(state.ema) if main else {}
                log.scalars(self.optimisation.rate(state.step), loss=told.loss, gradient=told.norm, **figures)
            if main and (saves or stopping):
                log.say(f"step {state.step}: loss {told.loss:.4g}, saved {self.save()}")
                for measure in measures:
                    if not stop.wanted and not stopping:  # who asks for a stop will not wait
                        self.tell(measure, log)
                log.draw(self.title)
            if stopping:
                return failure
            if main and samples:
                self.show(log, saved=saves)
        return None

    def tell(self, measure: Measure, log: RunLog) -> None:
        """Log what a measurement comes to. Where it fails, that is said, and the training goes on."""
        try:
            log.tell(measure)
        except (*MISTAKES, torch.OutOfMemoryError) as error:
            log.say(f"step {self.state.step}: could not measure: {one_line(error)}")

    def save(self) -> Path:
        """Write a checkpoint of the state, and drop those that are no longer to be kept; returns its path.

        Its config has the last parts of paths: checkpoints are handed on, the run's config.json stays here.
        """
        output = self.output
        checkpoints = CheckpointFolder(self.folder / CHECKPOINTS, output.keep_last, output.kept_steps)
        path = checkpoints.path(self.state.step)
        checkpoints.record(path, self.state.save(path, without_folders(self.record)))
        return path

    def show(self, log: RunLog, saved: bool) -> None:
        """Write the step's picture; where it cannot be written, that is said. Raises NotFinite where it is not finite,
        the state saved by then."""
        try:
            save_png(self.folder / "samples" / f"{self.state.step:07d}.png", self.picture())
        except OSError as error:
            log.say(f"step {self.state.step}: no grid: {one_line(error)}")
        except NotFinite as error:
            path = self.folder / CHECKPOINTS if saved else self.save()
            raise NotFinite(f"step {self.state.step}: {error}; the run is saved in {path}") from None

    def picture(self) -> Image.Image:
        """What the network can do by now."""
        raise NotImplementedError


@dataclass
class Run(AnyRun):
    """A run of train.py."""

    options: TrainingOptions
    frozen: FrozenNetworks

    @property
    def ema(self) -> SiT:
        """The averaged weights."""
        return self.state.ema  # type: ignore[return-value]

    def loader(self, data: TrainingData, objective: Objective) -> DataLoader:
        """Batches for the steps that are left, of this rank's share."""
        samples = TrainingSamples(data, self.optimisation.seed, objective.draw, flip=self.options.data.flip)
        return self.loader_of(samples, self.options.data.num_workers)

    def execute(self, data: TrainingData, objective: Objective, stop: StopRequest, notes: Sequence[str] = ()) -> bool:
        """Make the steps that are left on the data, as `make_steps`."""
        ranks, loader = self.ranks, self.loader(data, objective)
        trained = sum(p.numel() for p in self.state.model.parameters() if p.requires_grad)
        first, total = self.state.step, self.optimisation.steps
        said = [
            f"{self.options.target}: {trained:,} parameters, {described(data)}",
            *notes,
            f"{ranks.size} x {ranks.device}, {self.frozen.dtype}, steps {first} to {total}, writing to {self.folder}",
        ]
        if ranks.is_main and (images := images_of(data)) is not None:
            save_png(self.folder / "data.png", contact_sheet(images))
        return self.make_steps(loader, objective, stop, said, self.measures(data, objective) if ranks.is_main else ())

    def measures(self, data: TrainingData, objective: Objective) -> list[Measure]:
        """What is measured of the averaged weights at every checkpoint: held-out loss, and a refiner's end points."""
        measures: list[Measure] = []
        if (held := held_out_of(data)) is not None:
            measures.append(HeldOutLoss(self.options, self.frozen, self.ema, held))
        if isinstance(objective, EndpointMatching):
            return [*measures, lambda: objective.measure(self.ema)]
        refiner, schedule = self.options.refiner, parse_sampler(self.options.refiner.schedule).schedule
        if self.frozen.teacher is not None and isinstance(schedule, Schedule) and schedule.has_refiner:
            ends = EndPoints(self.networks, schedule, self.settings, refiner.reference, refiner.end_points)
            measures += [ends] if refiner.end_points else []
        return measures

    @property
    def title(self) -> str:
        schedule = f", {self.options.refiner.schedule}" if self.frozen.teacher is not None else ""
        return f"{self.folder.name}{schedule}"

    @property
    def settings(self) -> SamplerSettings:
        """How this run's networks are sampled with: unguided where the predictor has no null class."""
        predictor = self.frozen.teacher or self.ema
        guidance = self.options.guidance.guidance if predictor.class_dropout_prob else Guidance(1.0)
        return SamplerSettings(guidance, self.options.refiner.refiner_step, self.options.predictor.path_type)

    def networks(self) -> Networks:
        """As users sample with them by now: the EMA's blocks and the autoencoder in the run's precision, in copies."""
        frozen, teacher, dtype = self.frozen, self.frozen.teacher, self.frozen.dtype
        ema: Any = deepcopy(self.ema)
        cast(ema, dtype)
        return Networks(
            ema if teacher is None else teacher,
            None if teacher is None else ema,
            frozen.autoencoder if dtype == torch.float32 else deepcopy(frozen.autoencoder).to(dtype),
            frozen.device,
        )

    def picture(self) -> Image.Image:
        """OF_EACH of each of at most CLASSES classes, their names below: of Heun's H8, and with a refiner also of the
        schedule that the options name, from the same noise."""
        networks, settings = self.networks(), self.settings
        classes = self.shown_classes()
        names = ["H8"] if self.frozen.teacher is None else ["H8", self.options.refiner.schedule]
        samplers = [ImageSampler(networks, parse_sampler(name), settings) for name in names]
        numbers = [range(k * len(classes), (k + 1) * len(classes)) for k in range(OF_EACH)]
        rows = [sampler(self.optimisation.seed, row, list(classes)).cpu() for sampler in samplers for row in numbers]
        blank: list[Any] = [""] * (OF_EACH - 1)
        captions = [text for name in samplers for text in (f"{name}  {settings.guidance}", *blank)]
        return grid(rows, captions, [*blank, list(classes.values())] * len(samplers), least_side=SIDE)

    def shown_classes(self) -> dict[int, str]:
        """The classes of the grids, from all over those that have images, with their names."""
        count = self.ema.num_classes
        own = ClassNames.from_config(self.record, count)
        if own is None or not any(own.names):
            own = self.frozen.class_names
        seen = [k for k, images in enumerate(own.counts) if images] if own is not None else []
        seen = seen or list(range(count))
        places = torch.linspace(0, len(seen) - 1, min(CLASSES, len(seen))).round().int().tolist()
        return {seen[place]: class_label(seen[place], count, own) for place in places}
