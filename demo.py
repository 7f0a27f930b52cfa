"""FlowTurbo in a few minutes: pictures in colour, then real images, a refiner trained on the spot, and the figures.

Draws a grid of the colour model that comes with the package. Then writes scikit-learn's 1 797 handwritten digits as a
folder of classes, trains a velocity refiner for the predictor that comes with the package through torchrun, samples
Heun and FlowTurbo schedules from the same noise with sample_ddp_feature.py, measures them with evaluator.py, and draws
them side by side.

Usage:
  python demo.py                   # or: make demo
  python demo.py --from-scratch    # trains the predictor too, about ten minutes more
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flowturbo.sampling.options import NetworkOptions, SamplingOptions, SetOptions
from flowturbo.system import cli
from flowturbo.system.options import option
from flowturbo.transport.schedule import Schedule
from flowturbo.weights.registry import MODELS, PACKAGED

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from flowturbo.evaluation import FeatureSet

ROOT = Path(__file__).resolve().parent
PREDICTOR, REFINER = PACKAGED / MODELS["digits"].predictor_ckpt, PACKAGED / MODELS["digits"].refiner_ckpt
BOOTSTRAP = 50
COLOURS = ("flag", "face-smiling", "person-role", "food-sweet")  # classes of the colour model, four pictures of each

# (schedule, form of the R block). Beside each refiner stand its rivals: the line through the velocities at hand in the
# refiner's place (L), and Adams-Bashforth (A) and the staggered pseudo corrector (M) with as many evaluations in all.
ROWS = [
    ("H3", "released"),
    ("H4", "released"),
    ("H8", "released"),
    ("A6", "released"),
    ("A8", "released"),
    ("M5", "released"),
    ("M7", "released"),
    ("H1P5", "released"),
    ("H1P5L2", "released"),
    ("H1P5R2", "released"),
    ("H1P5R2", "consistent"),
    ("H1P5R2", "single"),
    ("H1P3R1", "single"),
]

# How the predictor in the package was made.
PREDICTOR_FLAGS = [
    *("--target", "predictor", "--vae-ckpt", "none", "--image-size", "8", "--channels", "1", "--no-flip"),
    *("--patch-size", "2", "--hidden-size", "96", "--depth", "6", "--num-heads", "6", "--no-learn-sigma"),
    *("--global-batch-size", "128", "--lr", "1e-3", "--warmup", "200", "--ema-decay", "0.999", "--steps", "6000"),
]
REFINER_FLAGS = [
    *("--target", "refiner", "--vae-ckpt", "none", "--no-flip", "--global-batch-size", "64", "--max-dt", "0.15"),
    *("--lr", "1e-3", "--warmup", "50", "--ema-decay", "0.99", "--steps", "700"),
]


@dataclass(frozen=True)
class Options:
    """What the demo does. Raises ValueError for impossible values."""

    from_scratch: bool = option(False, "train the predictor instead of taking the package's")
    update_assets: bool = option(False, "keep it and its refiner as the package's")
    out: str = option("demo", "everything is written here, afresh", metavar="DIR")
    num_images: int = option(1797, "samples per schedule")
    refiner_steps: int | None = option(None, "training steps of the refiner")

    def __post_init__(self) -> None:
        if self.num_images < 2 or (self.refiner_steps is not None and self.refiner_steps < 1):
            raise ValueError("num_images must be at least 2, refiner_steps at least 1")
        if self.update_assets and not self.from_scratch:
            raise ValueError("update_assets keeps the predictor that from_scratch trains: expected both")
        out = Path(self.out)
        if out.exists() and not (out / "digits").is_dir() and any(out.iterdir()):
            raise ValueError(f"out {self.out!r} holds something else than a demo: expected another folder")


class Data(NamedTuple):
    """The real images: uint8 (N, 8, 8), their labels (N,), and the statistics that samples are compared with."""

    images: np.ndarray
    labels: np.ndarray
    statistics: FeatureSet


@dataclass
class Result:
    """One line of the table."""

    name: str
    evaluations: tuple[int, int]  # predictor, refiner
    ms_per_image: float
    distance: float
    error: float  # standard error of the distance
    accuracy: float  # share of samples whose nearest real image has the class asked for

    def is_beaten_by(self, other: Result) -> bool:
        """Whether the other is nearer to the data with at most as many evaluations, the refiner's included."""
        return other.distance < self.distance and sum(other.evaluations) <= sum(self.evaluations)


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = cli.parse(cli.new_parser(__doc__, None), argv, {"demo": Options})
    out = Path(options.out)
    for old in ("digits", "runs", "samples"):
        shutil.rmtree(out / old, ignore_errors=True)
    (out / "digits").mkdir(parents=True)  # by which a next run knows the folder

    draw_colours(out / "colour.png")
    print("2. the data: 1 797 handwritten digits, 8x8 pixels, 10 classes")
    images, labels = write_digits(out / "digits")
    predictor = PREDICTOR
    if options.from_scratch:
        print("3a. training the predictor")
        predictor = train(out, "predictor", PREDICTOR_FLAGS)
        if options.update_assets:
            predictor = keep_as_asset(predictor, PREDICTOR)
    print(f"3. training a velocity refiner for {predictor}")
    steps = ["--steps", str(options.refiner_steps)] if options.refiner_steps else []
    refiner = train(out, "refiner", ["--model-teacher-ckpt", str(predictor), *REFINER_FLAGS, *steps])
    if options.update_assets:
        refiner = keep_as_asset(refiner, REFINER)

    from flowturbo.data.pictures import grid, save_png

    print(f"4. sampling {options.num_images} images with each of {len(ROWS)} schedules, all from the same noise")
    networks = NetworkOptions(str(predictor), str(refiner), vae_ckpt="none")
    results, pictures = [], []
    with open(out / "measurements.log", "w", encoding="utf-8") as log:
        with redirect_stdout(log), redirect_stderr(log):
            data = Data(images, labels, statistics_of(out / "digits"))
        for schedule, refiner_step in ROWS:
            with redirect_stdout(log), redirect_stderr(log):
                result, first = measure(options, networks, schedule, refiner_step, data)
            results.append(result)
            pictures.append(first)
            print(f"   {result.name}: Fréchet distance {result.distance:.3f}")

    picture = out / "comparison.png"
    captions = [f"{r.name}: {r.evaluations[0]} + {r.evaluations[1]} evaluations, FD {r.distance:.2f}" for r in results]
    save_png(picture, grid(pictures, captions))
    print(
        f"\nOn {options.num_images} images, cfg 1; FD: Fréchet distance on pixels, ± standard error; lower is better\n"
    )
    print(table(results))
    print("\n" + verdict(results))
    print(f"\nLook at {out / 'colour.png'} and {picture}")


def draw_colours(path: Path) -> None:
    """A grid of the colour model: nothing has to be trained or downloaded for it."""
    from flowturbo.sampling import PictureOptions, load_bundled, make_picture

    model = MODELS["colour"]
    print(f"1. the colour model, {model.about}")
    what = PictureOptions(model.schedule, classes=COLOURS, num_images=4 * len(COLOURS))
    made = make_picture(load_bundled("colour", False), what, SamplingOptions(cfg_scale=model.cfg_scale, seed=1))
    made.save(path)
    print(f"   {made.rows[0].caption()}\n   look at {path}")


def write_digits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write the digits as folder/<class>/<number>.png; returns them as uint8 (N, 8, 8) with their labels (N,)."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    for number, (image, label) in enumerate(zip(images, digits.target, strict=True)):
        path = folder / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return images, digits.target


def train(out: Path, target: str, flags: list[str]) -> Path:
    """Train through torchrun, one process; returns the last checkpoint."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=1"),
        *(str(ROOT / "train.py"), "--data-path", str(out / "digits"), "--results-dir", str(out / "runs")),
        *("--note", "demo", "--num-workers", "0", "--sample-every", "0", "--ckpt-every", "100000", *flags),
    ]
    # One thread: a model this small gains little from more, and loses much where other programs want the cores.
    if subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode:
        raise ValueError(f"training the {target} failed; the reason stands above")
    return sorted((out / "runs").glob(f"*-{target}-demo/checkpoints/*.pt"))[-1]


def keep_as_asset(checkpoint: Path, place: Path) -> Path:
    """Export a network to the package, in half precision since the file is in the repository; its place there."""
    import torch

    from flowturbo.weights.export import export_weights

    export_weights(checkpoint, place, torch.float16)
    return place


def statistics_of(folder: Path) -> FeatureSet:
    """The statistics of the pixels of a folder of images."""
    from flowturbo.evaluation import ImageFolder, extract, load_extractor

    return extract(load_extractor("pixels", "cpu", None), ImageFolder(folder))


def measure(
    options: Options, networks: NetworkOptions, schedule: str, refiner_step: str, data: Data
) -> tuple[Result, Tensor]:
    """Sample with one schedule and evaluate; returns the table's line and the first images, one of each class."""
    import torch

    from flowturbo.evaluation import FeatureSet, evaluate
    from flowturbo.sampling.sample_folder import read_archive
    from flowturbo.sampling.sample_set import make_sample_set
    from flowturbo.system.distributed import world

    name = f"{schedule} {refiner_step}" if Schedule.parse(schedule).has_refiner else schedule
    sample_set = SetOptions(
        schedule,
        options.num_images,
        per_proc_batch_size=256,
        labels="balanced",
        sample_dir=str(Path(options.out) / "samples"),
        tag=name.replace(" ", "-"),
        features="pixels",
    )
    sampling = SamplingOptions(cfg_scale=1.0, refiner_step=refiner_step)
    with world(networks.device) as ranks:
        made = make_sample_set(sample_set, networks, sampling, ranks)
    _, distance = next(evaluate(data.statistics, FeatureSet.load(made.features), bootstrap=BOOTSTRAP))  # FID is first
    assert distance.value is not None
    assert distance.standard_error is not None
    samples = read_archive(made.archive)[..., 0]
    result = Result(
        name,
        Schedule.parse(schedule).evaluations(refiner_step),
        made.ms_per_image,
        distance.value,
        distance.standard_error,
        class_accuracy(samples, data.images, data.labels),
    )
    return result, torch.from_numpy(samples[:20, None])


def class_accuracy(samples: np.ndarray, images: np.ndarray, labels: np.ndarray) -> float:
    """How often the nearest real image has the class that was asked for, number i's being i modulo 10."""
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier

    flat = [a.reshape(len(a), -1).astype(float) for a in (images, samples)]
    predicted = KNeighborsClassifier(1).fit(flat[0], labels).predict(flat[1])
    return float((predicted == np.arange(len(samples)) % 10).mean())


def table(results: list[Result]) -> str:
    lines = [f"{'schedule':<20}{'predictor':>10}{'refiner':>9}{'ms/image':>10}{'FD':>17}{'class accuracy':>16}"]
    for r in results:
        distance = f"{r.distance:.3f} ± {r.error:.3f}"
        lines.append(
            f"{r.name:<20}{r.evaluations[0]:>10}{r.evaluations[1]:>9}{r.ms_per_image:>10.2f}{distance:>17}"
            f"{r.accuracy:>16.1%}"
        )
    return "\n".join(lines)


def verdict(results: list[Result]) -> str:
    """What the table shows: the rows that no other beats at equal or fewer evaluations, and what beats the refiners."""
    lines = []
    best = [r for r in results if not any(map(r.is_beaten_by, results))]
    named = ", ".join(f"{r.name} ({sum(r.evaluations)} evaluations)" for r in best)
    lines.append(f"No row with as few evaluations is better than: {named}.")
    for r in results:
        if not r.evaluations[1]:
            continue
        better = [other for other in results if r.is_beaten_by(other)]
        rival = min(better, key=lambda other: other.distance, default=None)
        what = f"{rival.name} with {sum(rival.evaluations)} is better" if rival else "no row with as few is better"
        lines.append(f"{r.name}, {r.evaluations[0]} + {r.evaluations[1]} evaluations: {what}.")
    lines.append("Distances closer than about two standard errors cannot be told apart.")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run_script(main)
