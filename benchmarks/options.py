"""What benchmark.py measures, as options, and what is sensible on a device where they say nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowturbo.configurations import PRECISIONS, SIT_CONFIGS
from flowturbo.sampling.options import DEVICE_HELP
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
    startup: bool = option(False, "CPU seconds of every script's --help, and of imports, beside `import torch`")
    model: str = option("SiT-XL/2", "size of the predictor", choices=tuple(SIT_CONFIGS))
    depth: int | None = option(None, "its blocks (default: the named size's; on a CPU 3)")
    image_size: int = option(256, "side of the images")
    batch_sizes: tuple[int, ...] | None = option(None, "(default: 1 8 32; on a CPU 1)", metavar="N")
    schedules: tuple[str, ...] | None = option(
        None,
        f"(default: the paper's nine; on a CPU {' '.join(SHORT_LIST)}; with --ablate H1P5R3)",
        metavar="SCHEDULE",
    )
    decode: bool | None = option(None, "only with, or only without decoding (default: both)")
    cfg_scale: float = option(1.5, "guidance")
    repeats: int | None = option(None, "timed rounds (default: 20; on a CPU 3)")
    threads: int = option(1, "of a CPU")
    device: str = option("auto", DEVICE_HELP)
    precision: str = option(
        "auto", "auto is bf16 where the device, CPU or GPU, multiplies it itself", choices=PRECISIONS
    )
    json: str | None = option(None, "also write the figures here", metavar="FILE")
    plot: str | None = option(None, "also draw them: latencies, and what they are made of", metavar="PNG")

    def __post_init__(self) -> None:
        counts = (*(self.batch_sizes or ()), *(n for n in (self.depth, self.repeats) if n is not None), self.threads)
        if min(counts) < 1:
            raise ValueError("batch_sizes, repeats, depth and threads must be at least 1")
        if self.image_size < 64 or self.image_size % 64:
            raise ValueError(f"image_size {self.image_size} must be a multiple of 64")
        for text in self.schedules or ():
            Schedule.parse(text)
        if Guidance(self.cfg_scale).scale == 1:
            raise ValueError("cfg_scale 1 leaves nothing to compare with: the released code cannot do without guidance")
        if self.ablate + self.train + self.startup > 1:
            raise ValueError("ablate, train and startup are three measurements: expected one of them")
        if self.train and (self.schedules or self.decode is not None):
            raise ValueError("train has no schedules and no decode")
        plotted = not (self.train or self.ablate or self.startup)
        if self.plot and not (plotted and Path(self.plot).suffix.lower() == ".png"):
            raise ValueError("plot is for the table of schedules, and its name must end in .png")


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
    def warm_up(self) -> int:
        """Rounds before those that are timed, after a first call of everything."""
        return 3 if self.device.type == "cuda" else 0


def plan_of(options: BenchmarkOptions) -> Plan:
    """What to measure, by what is sensible on this device where the options say nothing."""
    import torch

    from flowturbo.networks.precision import has_bf16, pick_precision
    from flowturbo.system.distributed import pick_device

    device = pick_device(options.device)
    gpu = device.type == "cuda"
    auto = torch.bfloat16 if has_bf16(device) else torch.float32
    schedules = ("H1P5R3",) if options.ablate else SCHEDULES if gpu else SHORT_LIST
    return Plan(
        device=device,
        dtype=auto if options.precision == "auto" else pick_precision(options.precision, device),
        model=options.model,
        depth=options.depth or (SIT_CONFIGS[options.model]["depth"] if gpu else 3),
        image_size=options.image_size,
        batch_sizes=options.batch_sizes or ((1, 8, 32) if gpu else (1,)),
        schedules=tuple(str(Schedule.parse(text)) for text in options.schedules or schedules),
        decode=(False, True) if options.decode is None else (options.decode,),
        cfg_scale=options.cfg_scale,
        repeats=options.repeats or (20 if gpu else 3),
    )
