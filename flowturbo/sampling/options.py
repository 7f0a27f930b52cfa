"""The options of sampling, shared by the command line, Python and the web page. No torch is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from flowturbo.configurations import PRECISIONS, QUANTIZATIONS
from flowturbo.sampling.solvers import parse_sampler
from flowturbo.system.cli import Presets
from flowturbo.system.options import option, seed
from flowturbo.transport.blocks import REFINER_STEPS
from flowturbo.transport.guidance import Guidance
from flowturbo.transport.path import DIFFUSIONS, PATHS
from flowturbo.transport.spec import SamplerSettings
from flowturbo.weights.registry import MODELS

EXTRACTORS = ("inception", "pixels", "dinov2")
DEVICE_HELP = "auto, cuda, cuda:K or cpu"
MODEL_PRESETS = Presets(
    "model",
    "a model that comes with the package; sets the defaults of networks, schedule, guidance and classes",
    {name: model.options() for name, model in MODELS.items()},
)


@dataclass(frozen=True)
class NetworkOptions:
    """Which networks sample, and how they are held."""

    predictor_ckpt: str = option("SiT-XL-2-256x256.pt", "the SiT's weights", metavar="FILE")
    refiner_ckpt: str = option("SiT-XL-2-Refiner.pt", "the refiner's, for schedules with R", metavar="FILE")
    vae_ckpt: str = option(
        "vae-ema",
        "autoencoder: vae-ema (stabilityai/sd-vae-ft-ema), vae-mse, a hub id, a local folder, or none for a model of "
        "pixels",
        metavar="NAME",
    )
    device: str = option("auto", DEVICE_HELP)
    precision: str = option(
        "auto",
        "of the blocks' weights and the autoencoder; auto is bf16 on CUDA, fp32 elsewhere",
        choices=PRECISIONS,
    )
    quantize: str | None = option(
        None,
        "the blocks' largest matrix products in 8 bits, with torchao; tells the error that it makes",
        choices=QUANTIZATIONS,
    )
    compile: bool = option(
        False, "each sampling block as a static graph, on CUDA the whole trajectory; takes up to a minute first"
    )


@dataclass(frozen=True)
class GuidanceOptions:
    """How far, on which channels, when and how often to guide. Raises ValueError for impossible values."""

    cfg_scale: float = option(4.0, "guidance; 1 is none, at half the cost")
    cfg_channels: str = option("3", "guide the first so many channels, or all; 3 as published for SiT")
    cfg_interval: tuple[float, float] = option((0.0, 1.0), "guide only while LOW <= t <= HIGH", metavar=("LOW", "HIGH"))
    cfg_every: int = option(
        1,
        "evaluate the null branch at each K-th evaluation only, and extrapolate in between: fewer rows; good up to a "
        "scale of about 2",
        metavar="K",
    )

    def __post_init__(self) -> None:
        if self.cfg_channels != "all" and not re.fullmatch("[0-9]{1,9}", self.cfg_channels):
            raise ValueError(f"cfg_channels {self.cfg_channels!r} must be 'all' or a number")
        _ = self.guidance  # refuses what is impossible

    @property
    def guidance(self) -> Guidance:
        """As the mathematics takes it."""
        channels = self.cfg_channels if self.cfg_channels == "all" else int(self.cfg_channels)
        return Guidance(self.cfg_scale, channels, self.cfg_interval, self.cfg_every)


REFINER_STEP_HELP = (
    "R blocks as in the published code, consistent with the training, or with a single evaluation: single after P, "
    "midpoint after M, adams after A"
)


@dataclass(frozen=True)
class SamplingOptions(GuidanceOptions):
    """What shapes a trajectory, besides its schedule. Raises ValueError for impossible values."""

    refiner_step: str | None = option(
        None,
        f"{REFINER_STEP_HELP} (default: what the refiner was trained for, if its checkpoint says so, or released)",
        choices=REFINER_STEPS,
    )
    path_type: str | None = option(
        None,
        "path the predictor was trained on (default: what its checkpoint says, or linear)",
        choices=tuple(PATHS),
    )
    atol: float = option(1e-6, "absolute tolerance of dopri5")
    rtol: float = option(1e-3, "relative tolerance of dopri5")
    diffusion: str = option("sigma", "diffusion term of the SDE", choices=tuple(DIFFUSIONS))
    seed: int = option(0, "image i depends on the seed and i alone", type=seed)
    strict: bool = option(False, "refuse a solver that was made for another model or guidance, in place of a warning")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settings()

    def settings(self, path_type: str | None = None, refiner_step: str | None = None) -> SamplerSettings:
        """What a SamplerSpec is built with; the arguments are what the checkpoints say of how they were trained."""
        return SamplerSettings(
            self.guidance,
            self.refiner_step or refiner_step or "released",
            self.path_type or path_type or "linear",
            self.atol,
            self.rtol,
            self.diffusion,
        )


@dataclass(frozen=True)
class SetOptions:
    """A set of samples for evaluation: what, how many, and where they go. Raises ValueError for impossible values."""

    schedule: str = option("H1P5R3", "as in sample.py: blocks with counts, a solver, dopri5 or sdeN")
    num_fid_samples: int = option(50_000, "how many images")
    per_proc_batch_size: int = option(32, "images sampled at once by each rank")
    labels: str = option(
        "random",
        "classes drawn at random, as the field reports FID, or all in turn (about 0.1 lower FID)",
        choices=("random", "balanced"),
    )
    threads: int = option(
        1, "of each rank on a CPU. Another number changes the last bits; more cores are better used by more ranks"
    )
    sample_dir: str = option("samples", "where everything is written", metavar="DIR")
    tag: str | None = option(None, "name of this set (default: from schedule, scale and seed)", metavar="NAME")
    png: bool = option(False, "also a folder of PNGs")
    features: str | None = option(
        None,
        "also extract features on the fly: inception, pixels, dinov2 or a TorchScript file, which is a program",
        metavar="EXTRACTOR",
    )
    features_weights: str | None = option(None, "local weights of inception or dinov2", metavar="FILE")

    def __post_init__(self) -> None:
        for name in ("num_fid_samples", "per_proc_batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.features not in (None, *EXTRACTORS) and not Path(self.features).is_file():
            raise ValueError(f"features {self.features!r}: expected {', '.join(EXTRACTORS)} or a TorchScript file")
        if self.features and self.num_fid_samples < 2:
            raise ValueError("features need at least 2 images")
        if self.tag is not None and (not self.tag or "/" in self.tag or self.tag.startswith(".")):
            raise ValueError(f"tag {self.tag!r} must be a word for a folder name")
        if self.tag is not None and self.tag.endswith("-features"):
            raise ValueError(f"tag {self.tag!r} would write where another tag's features go")
        parse_sampler(self.schedule)

    def folder(self, sampling: SamplingOptions) -> Path:
        """Where the set is made."""
        schedule = parse_sampler(self.schedule)
        return Path(self.sample_dir) / (self.tag or f"{schedule}-cfg{sampling.cfg_scale:g}-seed{sampling.seed}")
