"""The options of text-to-image. No torch is imported."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from flowturbo.configurations import PRECISIONS
from flowturbo.sampling.options import DEVICE_HELP
from flowturbo.system.options import AT_LEAST_0, AT_LEAST_1, PART, POSITIVE, Group, Range, option, seed
from flowturbo.training.options import HardwareOptions, Optimisation, OutputOptions
from flowturbo.training.recipe import ENDPOINT, ENDPOINT_DEFAULTS, endpoint_schedules
from flowturbo.transport.blocks import REFINER_STEPS
from flowturbo.transport.losses import MAX_DT, TIME_DISTRIBUTIONS

TARGETS = ("refiner", "predictor")
# What differs between the recipes: the paper's settings for text-to-image (section 4.1 and appendix), and endpoint's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "paper": {"global_batch_size": 16, "lr": 2e-5, "steps": 10_000, "clip_grad": 0.01},
    ENDPOINT: {**ENDPOINT_DEFAULTS, "clip_grad": 1.0},
}
OFFLOADS = ("none", "model", "sequential")
VELOCITIES = ("noise-data", "data-noise")
TRAJECTORIES = ("schedule", "refiner_step", "trajectories", "reference", "guidance_scale")  # what shapes them


@dataclass(frozen=True)
class TextSamplingOptions(Group):
    """A pipeline, and how it samples."""

    pipeline: str = option(help="a diffusers pipeline: a folder, or a name on the hub", metavar="DIR")
    refiner: str | None = option(None, "for schedules with R: a folder that train has written", metavar="DIR")
    refiner_step: str = option("single", "form of the R blocks", choices=REFINER_STEPS)
    velocity: str | None = option(
        None, "what the network answers; data-noise for InstaFlow (default: the pipeline's)", choices=VELOCITIES
    )
    guidance_scale: float | None = option(None, "(default: the pipeline's)")
    true_cfg_scale: float | None = option(None, "FLUX: guidance by a second call", within=AT_LEAST_1)
    negative_prompt: str = option("", "what guidance leads away from")
    height: int | None = option(None, "(default: the pipeline's)", within=AT_LEAST_1)
    width: int | None = option(None, "(default: the pipeline's)", within=AT_LEAST_1)
    seed: int = option(0, "image i depends on the seed and i alone", type=seed)
    batch_size: int = option(4, "images sampled at once", within=AT_LEAST_1)
    device: str = option("auto", DEVICE_HELP)
    precision: str = option("auto", "auto is bf16 on CUDA, fp32 elsewhere", choices=PRECISIONS)
    offload: str = option("none", "networks to the CPU while they rest, to save GPU memory", choices=OFFLOADS)
    compile: bool = option(False, "the network by torch.compile; takes a while first")

    def call(self, pixels: bool, factor: int) -> dict[str, Any]:
        """The pipeline's arguments that are given. A pipeline of `pixels` counts `factor` for one all the same."""
        names = ("guidance_scale", "true_cfg_scale", "height", "width")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if pixels:
            given |= {name: factor * given[name] for name in ("height", "width") if name in given}
        return given


@dataclass(frozen=True)
class PromptOptions(Group):
    """What to sample."""

    prompts: tuple[str, ...] = option((), "one or more, in quotes", metavar="PROMPT", positional=True, nargs="*")
    prompts_file: str | None = option(None, "one prompt a line, besides", metavar="FILE")
    schedule: tuple[str, ...] = option(
        ("A8",), 'one row of images for each: schedules ("H1P5R3"), or Euler8, UniPC8, DPM++8', metavar="SCHEDULE"
    )
    out: str = option("samples/text.png", "the picture", metavar="PNG")

    def all_prompts(self) -> list[str]:
        """Those given and those in the file. Raises ValueError where there are none."""
        found = [*self.prompts, *(read_lines(self.prompts_file) if self.prompts_file else ())]
        if not found:
            raise ValueError("no prompts: expected one or more, or prompts_file")
        return found

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.out).suffix.lower() != ".png":
            raise ValueError(f"out {self.out!r} must end in .png")


def read_lines(path: str) -> list[str]:
    """The lines of a text file that hold something. Raises ValueError for one that is not UTF-8, and OSError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path!r} is no text in UTF-8") from None
    return [line.strip() for line in lines if line.strip()]


@dataclass(frozen=True)
class CaptionSetOptions(Group):
    """The captions of a set of samples for evaluation."""

    prompts: str = option(help="one prompt a line; sample i takes line i, and again from the first", metavar="FILE")

    def read(self) -> tuple[str, ...]:
        """The prompts. Raises ValueError for a file without any."""
        found = tuple(
            line.strip() for line in Path(self.prompts).read_text(encoding="utf-8").splitlines() if line.strip()
        )
        if not found:
            raise ValueError(f"{self.prompts!r} holds no prompts: expected one a line")
        return found


@dataclass(frozen=True)
class MeasureOptions(Group):
    """How rows are measured."""

    reference: str | None = option("A64", "the fine solution that rows are compared with", metavar="SCHEDULE")
    repetitions: int = option(1, "of all rows, for their times", within=AT_LEAST_1)


@dataclass(frozen=True)
class CompilationOptions(Group):
    """What a benchmark compiles."""

    compiled: bool = option(True, "measure all rows with the network compiled too")


@dataclass(frozen=True)
class WhatOptions(Group):
    """What is trained, for which pipeline."""

    pipeline: str = option(help="a diffusers pipeline: a folder, or a name on the hub", metavar="DIR")
    target: str = option(
        "refiner", "its refiner, or its network itself, from where it is", choices=TARGETS, shapes=True
    )


@dataclass(frozen=True)
class CaptionOptions(Group):
    """What is trained on."""

    data_path: str | None = option(
        None, "captioned images: NAME.txt beside each, metadata.jsonl, .tar shards or .parquet files", metavar="DIR"
    )
    prompts: str | None = option(None, "recipe endpoint: one prompt a line, in place of images", metavar="FILE")
    cache: str | None = option(
        None, "where latents and embeddings are kept, encoded once (default: DATA_PATH-cache)", metavar="DIR"
    )
    height: int = option(512, "of the images", within=AT_LEAST_1, shapes=True)
    width: int | None = option(None, "(default: the height)", within=AT_LEAST_1, shapes=True)
    num_workers: int = option(min(4, os.cpu_count() or 1), "loader processes", within=AT_LEAST_0)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width or self.height

    @property
    def cache_folder(self) -> Path:
        """Where what is encoded is kept."""
        source = str(self.prompts or self.data_path)
        return Path(self.cache or source.rstrip("/") + "-cache")


@dataclass(frozen=True)
class RecipeOptions(Group):
    """How a network is trained."""

    recipe: str = option(
        "paper",
        "refiner: the paper's loss, or endpoint: on prompts alone, through the R blocks of one schedule, to where a "
        "finer solution from the same noise ends",
        choices=("paper", ENDPOINT),
        shapes=True,
    )
    max_dt: float = option(
        MAX_DT,
        "refiner: upper end of Δ before the shift; at least 1 / N for schedules of N steps",
        within=Range(lambda value: 0 < value < 1, "lie in (0, 1)"),
        shapes=True,
    )
    shift: float | None = option(
        None, "refiner: of noise levels (default: the pipeline's scheduler's)", within=POSITIVE, shapes=True
    )
    time_distribution: str = option(
        "logit-normal", "predictor: of the times trained at", choices=TIME_DISTRIBUTIONS, shapes=True
    )
    schedule: str = option("H1P5R3", "recipe endpoint: what it trains for, R blocks last; the grid is the model's")
    refiner_step: str = option("single", "recipe endpoint: form of the R blocks", choices=REFINER_STEPS)
    trajectories: int = option(
        2048, "recipe endpoint: of the network, cached once in the run's folder", within=AT_LEAST_1
    )
    reference: str = option("M32", "recipe endpoint: the schedule of the finer solutions, without R")
    guidance_scale: float | None = option(
        None, "recipe endpoint: that images will be sampled with (default: the pipeline's)", within=AT_LEAST_0
    )
    guidance: tuple[float, float] = option(
        (1.0, 5.0), "range of the guidance embedding, where the network has one", metavar=("LOW", "HIGH"), shapes=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.guidance
        if not 0 <= low <= high < math.inf:
            raise ValueError(f"guidance {low} to {high} must be a range of at least 0")
        for name, text in zip(
            ("schedule", "reference"), endpoint_schedules(self.recipe, self.schedule, self.reference)
        ):
            object.__setattr__(self, name, text)


@dataclass(frozen=True)
class CaptionOptimisation(Optimisation):
    """As of train.py; None for what differs between the recipes: TextTrainingOptions fills it in."""

    global_batch_size: int = option(
        None, "over all ranks (default: 16, recipe endpoint 64)", within=AT_LEAST_1, shapes=True
    )
    steps: int = option(None, "updates (default: 10000, recipe endpoint 2000)", within=AT_LEAST_1)
    lr: float = option(
        None,
        "learning rate (default: 2e-5, recipe endpoint 1e-3)",
        within=Range(lambda value: 0 < value < math.inf, "be positive and finite"),
        shapes=True,
    )
    warmup: int = option(100, "updates over which the learning rate rises from 0", within=AT_LEAST_0, shapes=True)
    clip_grad: float | None = option(
        None, "largest norm of the gradient (default: .01, recipe endpoint 1)", within=POSITIVE, shapes=True
    )
    class_dropout: float = option(0.1, "how often a prompt becomes the null prompt", within=PART, shapes=True)


@dataclass(frozen=True)
class TextTrainingOptions:
    """Everything about a run. Raises ValueError for what does not go together."""

    what: WhatOptions
    data: CaptionOptions
    recipe: RecipeOptions = RecipeOptions()
    optimisation: CaptionOptimisation = CaptionOptimisation()
    hardware: HardwareOptions = HardwareOptions()
    output: OutputOptions = OutputOptions(note="t2i", sample_every=0)

    def __post_init__(self) -> None:
        if self.output.sample_every:
            raise ValueError("no images are sampled while a pipeline's networks train: expected sample_every 0")
        if self.recipe.recipe == ENDPOINT and self.what.target != "refiner":
            raise ValueError(f"recipe endpoint trains a refiner: expected target refiner, got {self.what.target}")
        if self.by_end_points and (self.data.prompts is None) == (self.data.data_path is None):
            raise ValueError("recipe endpoint needs prompts, or data_path for its captions: expected one of them")
        if not self.by_end_points and (self.data.data_path is None or self.data.prompts is not None):
            raise ValueError(
                "recipe paper needs data_path, the captioned images; prompts alone are for recipe endpoint"
            )
        own = {k: v for k, v in DEFAULTS[self.recipe.recipe].items() if getattr(self.optimisation, k) is None}
        if self.optimisation.epochs is not None:
            own.pop("steps", None)
        object.__setattr__(self, "optimisation", replace(self.optimisation, **own))

    @property
    def by_end_points(self) -> bool:
        """Whether a refiner is trained on trajectories of the network, without images."""
        return self.recipe.recipe == ENDPOINT

    def settings(self) -> dict[str, Any]:
        """All fields of all groups, by name; JSON types."""
        groups = (self.what, self.data, self.recipe, self.optimisation, self.hardware, self.output)
        flat = {name: value for group in groups for name, value in asdict(group).items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    def shaping(self) -> list[str]:
        """The names of the settings that shape the run."""
        declared = [each.name for kind in KINDS.values() for each in fields(kind) if each.metadata.get("shapes")]
        return declared + (list(TRAJECTORIES) if self.by_end_points else [])


KINDS: dict[str, type] = {
    "what to train": WhatOptions,
    "data": CaptionOptions,
    "recipe": RecipeOptions,
    "optimisation": CaptionOptimisation,
    "hardware": HardwareOptions,
    "output": OutputOptions,
}
