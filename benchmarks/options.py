"""What benchmark.py measures, as options, and what is sensible on a device where they say nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowturbo.configurations import PRECISIONS, SIT_CONFIGS
from flowturbo.sampling.options import DEVICE_HELP, EXTRACTORS
from flowturbo.sampling.solvers import parse_schedule
from flowturbo.system.options import option
from flowturbo.transport.guidance import Guidance
from flowturbo.transport.schedule import Schedule

if TYPE_CHECKING:
    import torch

# Heun and FlowTurbo schedules of the paper's tables.
SCHEDULES = ("H8", "H11", "H15", "H24", "H1P5R3", "H2P4R2", "H2P8R2", "H5P7R3", "H8P9R5")
SHORT_LIST = ("H8", "H1P5R3", "H2P4R2")


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure. Raises ValueError for impossible values, and where two kinds of measurement are asked for."""

    ablate: bool = option(False, "one optimisation at a time, on the first schedule")
    train: bool = option(False, "steps of refiner training")
    ranks: int = option(1, "with --train and 2 or more: processes that train a predictor, and ways to sum gradients")
    startup: bool = option(False, "CPU seconds of every script's --help, and of imports, beside `import torch`")
    quality: bool = option(
        False, "samplers of a trained model at equal evaluations: error of the end points, time, Fréchet distance"
    )
    model: str = option("SiT-XL/2", "size of the predictor", choices=tuple(SIT_CONFIGS))
    depth: int | None = option(None, "its blocks (default: the named size's; on a CPU 3)")
    image_size: int = option(256, "side of the images")
    batch_sizes: tuple[int, ...] | None = option(None, "(default: 1 8 32; on a CPU 1)", metavar="N")
    schedules: tuple[str, ...] | None = option(
        None,
        f"(default: the paper's nine; on a CPU {' '.join(SHORT_LIST)}; with --ablate H1P5R3; with --quality those of "
        "--evaluations)",
        metavar="SCHEDULE",
    )
    decode: bool | None = option(None, "only with, or only without decoding (default: both)")
    cfg_scale: float = option(1.5, "guidance")
    repeats: int | None = option(None, "timed rounds (default: 20; on a CPU 3)")
    threads: int = option(1, "of a CPU")
    device: str = option("auto", DEVICE_HELP)
    precision: str = option("auto", "as in sample.py: auto is bf16 on CUDA, fp32 elsewhere", choices=PRECISIONS)
    json: str | None = option(None, "also write the figures here", metavar="FILE")
    plot: str | None = option(None, "also draw them: latencies, and what they are made of", metavar="PNG")

    def __post_init__(self) -> None:
        counts = (*(self.batch_sizes or ()), *(n for n in (self.depth, self.repeats) if n is not None), self.threads)
        if min(*counts, self.ranks) < 1:
            raise ValueError("batch_sizes, repeats, depth, threads and ranks must be at least 1")
        if self.image_size < 64 or self.image_size % 64:
            raise ValueError(f"image_size {self.image_size} must be a multiple of 64")
        kinds = self.ablate + self.train + self.startup + self.quality
        if kinds > 1:
            raise ValueError("ablate, train, startup and quality are four measurements: expected one of them")
        for text in () if self.quality else self.schedules or ():
            parse_schedule(text)
        if Guidance(self.cfg_scale).scale == 1 and not self.quality:
            raise ValueError("cfg_scale 1 leaves nothing to compare with: the released code cannot do without guidance")
        if self.train and (self.schedules or self.decode is not None):
            raise ValueError("train has no schedules and no decode")
        if self.ranks > 1 and not self.train:
            raise ValueError("ranks are for train alone")
        plotted = not kinds
        if self.plot and not (plotted and Path(self.plot).suffix.lower() == ".png"):
            raise ValueError("plot is for the table of schedules, and its name must end in .png")


@dataclass(frozen=True)
class QualityOptions:
    """What the table of samplers compares. Raises ValueError for impossible values."""

    predictor_ckpt: str = option("digits-predictor.pt", "of the table: a checkpoint", metavar="FILE")
    vae_ckpt: str = option("none", "its autoencoder", metavar="NAME")
    evaluations: tuple[int, ...] = option((6, 8, 12), "of each group of rows: even numbers", metavar="N")
    refiners: tuple[str, ...] = option(
        (), "rows with a refiner, each after the same schedule with L", metavar="SCHEDULE:FORM:FILE"
    )
    cfg_every: int = option(1, "further rows with the null branch at each K-th evaluation only", metavar="K")
    num_images: int = option(512, "samples that errors are measured on")
    compile: bool = option(False, "blocks, and the peers' networks, as static graphs")
    reference: str | None = option(None, "images, or their features, for the Fréchet distance", metavar="PATH")
    extractor: str = option("inception", "of that distance", choices=EXTRACTORS)

    def __post_init__(self) -> None:
        if self.extractor not in EXTRACTORS:
            raise ValueError(f"extractor {self.extractor!r} must be one of {', '.join(EXTRACTORS)}")
        if any(n < 4 or n % 2 for n in self.evaluations):
            raise ValueError("evaluations must be even numbers of at least 4")
        if self.num_images < 2 or self.cfg_every < 1:
            raise ValueError("num_images must be at least 2, cfg_every at least 1")


@dataclass(frozen=True)
class ReproduceOptions:
    """What is measured anew of the paper. Raises ValueError for impossible values."""

    reproduce: bool = option(False, "the paper's rows and the fair table's: FID, FD-DINOv2, ms; goes on if run again")
    num_samples: int = option(50_000, "images of each row")
    schedules: tuple[str, ...] | None = option(None, "rows (default: the paper's, A, M and P)", metavar="SCHEDULE")
    extractors: tuple[str, ...] = option(("inception", "dinov2"), "of the Fréchet distances", choices=EXTRACTORS)
    cfg_scale: float = option(1.5, "guidance")
    predictor_ckpt: str = option("SiT-XL-2-256x256.pt", "file or registered name", metavar="FILE")
    refiner_ckpt: str = option("SiT-XL-2-Refiner.pt", "the same", metavar="FILE")
    vae_ckpt: str = option("vae-ema", "the same, or none for a model of pixels", metavar="NAME")
    reference: str = option("adm-imagenet-256", "images to measure from, or a registered name", metavar="PATH")
    results_dir: str = option("reproduced", "where figures and samples go", metavar="DIR")
    keep_samples: bool = option(False, "keep the images of a row once it is measured, 10 GB at 50 000 of 256 pixels")
    ranks: int | None = option(None, "processes that sample (default: one for each GPU)")
    batch_size: int = option(32, "images sampled at once by each")
    repeats: int = option(20, "timed rounds")
    compile: bool = option(True, "sample and time with static graphs; times without them are measured too")
    device: str = option("auto", DEVICE_HELP)
    precision: str = option("auto", "as in sample.py: auto is bf16 on CUDA, fp32 elsewhere", choices=PRECISIONS)

    def __post_init__(self) -> None:
        if self.num_samples < 2 or min(self.batch_size, self.repeats, 1 if self.ranks is None else self.ranks) < 1:
            raise ValueError("num_samples must be at least 2; batch_size, repeats and ranks at least 1")
        for text in self.schedules or ():
            parse_schedule(text)


@dataclass(frozen=True)
class Plan:
    """The networks by name and size, what is done with them, and how often."""

    device: torch.device
    dtype: torch.dtype
    model: str
    depth: int
    image_size: int
    batch_sizes: tuple[int, ...]
    schedules: tuple[str, ...]
    decode: tuple[bool, ...]  # without, with, or both
    cfg_scale: float
    repeats: int

    def __str__(self) -> str:
        size = f"{self.image_size} x {self.image_size} pixels"
        return f"{self.model} with {self.depth} blocks, {size}, {self.dtype}, cfg {self.cfg_scale:g}"

    @property
    def is_papers(self) -> bool:
        """Whether these are the networks and images of the paper's tables."""
        whole = self.depth == SIT_CONFIGS[self.model]["depth"]
        return (self.model, self.image_size) == ("SiT-XL/2", 256) and whole

    @property
    def warm_up(self) -> int:
        """Rounds before those that are timed, after a first call of everything."""
        return 3 if self.device.type == "cuda" else 0


def plan_of(options: BenchmarkOptions) -> Plan:
    """What to measure, by what is sensible on this device where the options say nothing."""
    from flowturbo.networks.precision import pick_precision
    from flowturbo.system.distributed import pick_device

    device = pick_device(options.device)
    gpu = device.type == "cuda"
    schedules = ("H1P5R3",) if options.ablate else SCHEDULES if gpu else SHORT_LIST
    return Plan(
        device=device,
        dtype=pick_precision(options.precision, device),
        model=options.model,
        depth=options.depth or (SIT_CONFIGS[options.model]["depth"] if gpu else 3),
        image_size=options.image_size,
        batch_sizes=options.batch_sizes or ((1, 8, 32) if gpu else (1,)),
        schedules=tuple(spelled(text) for text in options.schedules or schedules),
        decode=(False, True) if options.decode is None else (options.decode,),
        cfg_scale=options.cfg_scale,
        repeats=options.repeats or (20 if gpu else 3),
    )


def spelled(text: str) -> str:
    """A schedule in its short form; a solver as it was called."""
    schedule = parse_schedule(text)
    return str(schedule) if isinstance(schedule, Schedule) else text
