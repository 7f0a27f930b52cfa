"""The options of training: a frozen dataclass for each group of flags, and all of them together. No torch is imported.

A field with `shapes=True` shapes a run: one that goes on must share it with its checkpoint. What shapes it by its
content (images, class map, networks) is compared by that, not by its path.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from flowturbo.configurations import PRECISIONS, SIT_CONFIGS
from flowturbo.data.options import BACKGROUND_HELP, parse_background
from flowturbo.sampling.options import DEVICE_HELP, GuidanceOptions
from flowturbo.system.options import AT_LEAST_0, AT_LEAST_1, PART, POSITIVE, Group, Range, option, seed
from flowturbo.training.output import OutputOptions
from flowturbo.training.recipe import ENDPOINT, ENDPOINT_DEFAULTS, RefinerOptions
from flowturbo.transport.losses import TIME_DISTRIBUTIONS
from flowturbo.transport.path import PATHS

# What differs between the targets; the refiner's are the paper's (section 4.1), the predictor's SiT's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "refiner": {"global_batch_size": 18, "lr": 5e-5, "steps": 30_000},
    "predictor": {"global_batch_size": 256, "lr": 1e-4, "steps": 400_000},
}
LR_SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Target(Group):
    """What is trained."""

    target: str = option("refiner", "which network to train", choices=tuple(DEFAULTS), shapes=True)


@dataclass(frozen=True)
class DataOptions(Group):
    """What is trained on."""

    data_path: str | None = option(
        None,
        "one folder of images per class, packed images (zip, tar or parquet: a file, a folder of such, or a pattern "
        "with *), or a folder of cached latents; recipe endpoint needs none",
        metavar="DIR",
    )
    class_map: str | None = option(None, 'which class each folder is, like {"tabby": 281}', metavar="JSON")
    check_data: bool = option(False, "look at every image, report on the data, and end")
    subset: float = option(
        1.0, "train on this share of every class", within=Range(lambda value: 0 < value <= 1, "lie in (0, 1]")
    )
    holdout: float = option(
        0.0,
        "keep this share of the images out of training, chosen by their names, and measure the loss on them at every "
        "checkpoint",
        within=PART,
        metavar="SHARE",
        shapes=True,
    )
    image_size: int | None = option(
        None, "side of the square crop (default: the model's; 256)", within=AT_LEAST_1, shapes=True
    )
    flip: bool = option(True, "random horizontal flips", shapes=True)
    background: str = option("white", BACKGROUND_HELP, metavar="COLOUR")
    num_workers: int = option(min(4, os.cpu_count() or 1), "loader processes", within=AT_LEAST_0)
    vae_ckpt: str = option(
        "vae-ema",
        "autoencoder: vae-ema (stabilityai/sd-vae-ft-ema), vae-mse, a hub id, a local folder, or none to work on "
        "pixels",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_background(self.background)


SIZE_HELP = "in place of the named size's (of a refiner: of its predictor's)"


@dataclass(frozen=True)
class PredictorOptions(Group):
    """Which predictor is trained, and how. What is None is the named size's; of a refiner, its predictor's."""

    model: str = option("SiT-XL/2", "named size", choices=tuple(SIT_CONFIGS))
    hidden_size: int | None = option(None, SIZE_HELP, within=AT_LEAST_1)
    depth: int | None = option(None, "in place of the named size's (of a refiner: of 1)", within=AT_LEAST_1)
    num_heads: int | None = option(None, SIZE_HELP, within=AT_LEAST_1)
    patch_size: int | None = option(None, SIZE_HELP, within=AT_LEAST_1)
    channels: int = option(3, "of the images, where there is no autoencoder", choices=(1, 3))
    num_classes: int | None = option(None, "(default: the number of class folders)", within=AT_LEAST_1)
    learn_sigma: bool = option(True, "the unused second half of output channels that public SiT checkpoints have")
    path_type: str = option("linear", "interpolation path", choices=tuple(PATHS), shapes=True)
    time_distribution: str = option(
        "uniform",
        "of the times trained at; logit-normal, the sigmoid of a standard normal, has more in the middle",
        choices=TIME_DISTRIBUTIONS,
        shapes=True,
    )

    def given_size(self) -> dict[str, int]:
        """SiT's keywords that are given."""
        given = {name: getattr(self, name) for name in ("hidden_size", "depth", "num_heads", "patch_size")}
        return {name: value for name, value in given.items() if value is not None}

    def size(self) -> dict[str, int]:
        """SiT's keywords: those of the named size, and what stands in their place."""
        return {**SIT_CONFIGS[self.model], **self.given_size()}


@dataclass(frozen=True)
class Optimisation(Group):
    """How the weights are updated, how often, and from which randomness.

    None for what differs between the targets stands for the target's own: TrainingOptions fills it in.
    """

    global_batch_size: int = option(
        None, "over all ranks (default: refiner 18, recipe endpoint 64, predictor 256)", within=AT_LEAST_1, shapes=True
    )
    steps: int = option(
        None, "updates (default: refiner 30000, recipe endpoint 2000, predictor 400000)", within=AT_LEAST_1
    )
    max_hours: float | None = option(None, "stop cleanly, with a checkpoint, after so many hours", within=POSITIVE)
    epochs: int | None = option(None, "passes over the data, in place of steps", within=AT_LEAST_1)
    lr: float = option(
        None,
        "(default: refiner 5e-5, recipe endpoint 1e-3, predictor 1e-4)",
        within=Range(lambda value: 0 < value < math.inf, "be positive and finite"),
        shapes=True,
    )
    lr_schedule: str = option("constant", "cosine falls to 0 at the last step", choices=LR_SCHEDULES, shapes=True)
    warmup: int = option(0, "updates over which the learning rate rises from 0", within=AT_LEAST_0, shapes=True)
    wd: float = option(
        0.0,
        "AdamW's weight decay",
        flags=("--weight-decay",),
        within=Range(lambda value: 0 <= value < math.inf, "be finite and at least 0"),
        shapes=True,
    )
    clip_grad: float | None = option(None, "largest norm of the gradient", within=POSITIVE, shapes=True)
    accumulate: int = option(1, "split each rank's share into so many passes", within=AT_LEAST_1, shapes=True)
    exact: bool = option(
        False,
        "results that do not depend on the number of ranks, bit for bit: gradients of 12 fixed parts of the batch are "
        "added in a fixed order (slower, and 12 times the gradient's memory)",
        shapes=True,
    )
    class_dropout: float = option(0.1, "how often the label becomes null", within=PART, shapes=True)
    ema_decay: float = option(0.9999, "of the weights' moving average, once warm", within=PART, shapes=True)
    seed: int = option(0, "sample k depends on the seed and k alone", flags=("--global-seed",), type=seed, shapes=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are two ways to say one thing: expected one of them")

    def over(self, images: int) -> Optimisation:
        """With `steps` in place of `epochs`, for so many images."""
        if self.epochs is None:
            return self
        return replace(self, steps=math.ceil(self.epochs * images / self.global_batch_size), epochs=None)

    def rate(self, step: int) -> float:
        """The learning rate of update number `step`, from 1."""
        return self.lr * lr_factor(step, self.steps, self.warmup, self.lr_schedule)


def lr_factor(step: int, total: int, warmup: int = 0, schedule: str = "constant") -> float:
    """What the learning rate of update number `step` (1 to total) is multiplied by.

    It rises linearly to 1 at update number `warmup`; "cosine" then falls along half a cosine, to 0 at the last.
    """
    if step < warmup:
        return step / warmup
    if schedule == "constant" or step == warmup:
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


@dataclass(frozen=True)
class HardwareOptions(Group):
    """What computes, and how."""

    device: str = option("auto", f"{DEVICE_HELP}; under torchrun each rank takes its own")
    precision: str = option("auto", "auto is bf16 on CUDA", choices=PRECISIONS, shapes=True)
    compile: bool = option(
        False, "the networks as static graphs, one for all blocks of each; takes up to a minute first", shapes=True
    )


@dataclass(frozen=True)
class TrainingOptions:
    """Everything about a run. Raises ValueError for what does not go together."""

    target: str
    data: DataOptions
    refiner: RefinerOptions = RefinerOptions()
    predictor: PredictorOptions = PredictorOptions()
    optimisation: Optimisation = Optimisation()
    hardware: HardwareOptions = HardwareOptions()
    output: OutputOptions = OutputOptions()
    guidance: GuidanceOptions = GuidanceOptions()  # of recipe endpoint's trajectories, and of the sample grids

    def __post_init__(self) -> None:
        Target(self.target)
        if self.data.data_path is None and not self.by_end_points:
            raise ValueError(f"target {self.target} needs data_path, the images; only recipe endpoint does without")
        if self.target == "refiner":
            if not self.refiner.model_teacher_ckpt and not self.data.check_data:
                raise ValueError("target refiner needs model_teacher_ckpt, the trained predictor")
            if self.predictor.path_type != "linear":
                raise ValueError("target refiner works on the linear path: expected path_type linear")
            if self.predictor.time_distribution != "uniform":
                raise ValueError("target refiner draws its times by its recipe: expected time_distribution uniform")
        defaults = ENDPOINT_DEFAULTS if self.by_end_points else DEFAULTS[self.target]
        own = {name: value for name, value in defaults.items() if getattr(self.optimisation, name) is None}
        if self.optimisation.epochs is not None:
            own.pop("steps", None)
        object.__setattr__(self, "optimisation", replace(self.optimisation, **own))

    @property
    def by_end_points(self) -> bool:
        """Whether a refiner is trained on trajectories of its predictor, without images."""
        return self.target == "refiner" and self.refiner.recipe == ENDPOINT

    @property
    def groups(self) -> tuple[Any, ...]:
        """The groups that have a field each."""
        return (self.data, self.refiner, self.predictor, self.optimisation, self.hardware, self.output, self.guidance)

    def settings(self) -> dict[str, Any]:
        """All fields of all groups, by name; JSON types. What a checkpoint's config holds as "training"."""
        flat = {name: value for group in self.groups for name, value in asdict(group).items()}
        return {"target": self.target, **flat, "cfg_interval": list(self.guidance.cfg_interval)}

    def trajectory_settings(self) -> dict[str, Any]:
        """The settings that shape recipe endpoint's trajectories, besides the seed and the predictor."""
        named = ("schedule", "refiner_step", "trajectories", "reference", *asdict(self.guidance))
        return {name: value for name, value in self.settings().items() if name in named}

    def shaping(self) -> dict[str, Any]:
        """The settings that shape the run, with their defaults; its length too where the learning rate follows it."""
        declared = [each for kind in KINDS.values() for each in fields(kind) if each.metadata.get("shapes")]
        shaping = {each.name: each.default for each in declared}
        if self.optimisation.exact:  # its parts of the batch are others
            del shaping["accumulate"]
        if self.by_end_points:
            shaping |= dict.fromkeys(self.trajectory_settings())
        if self.optimisation.lr_schedule != "constant":
            shaping |= dict.fromkeys(["epochs"] if self.optimisation.epochs is not None else ["epochs", "steps"])
        return shaping


KINDS: dict[str, type] = {  # by their titles in the help
    "what to train": Target,
    "data": DataOptions,
    "refiner": RefinerOptions,
    "predictor": PredictorOptions,
    "optimisation": Optimisation,
    "hardware": HardwareOptions,
    "output": OutputOptions,
    "guidance of recipe endpoint and of sample grids": GuidanceOptions,
}
