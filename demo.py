"""FlowTurbo in a few minutes: real images, a trained predictor, a refiner trained on the spot, and the figures.

Writes scikit-learn's 1 797 handwritten digits as a folder of classes, trains a velocity refiner for the predictor
under assets/ through torchrun, samples Heun and FlowTurbo schedules from the same noise with
sample_ddp_feature.py, measures them with evaluator.py, and draws them side by side.

Usage:
  python demo.py                   # or: make demo
  python demo.py --from-scratch    # trains the predictor too, about ten minutes more
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import download
import evaluator
import pipeline
import sample_ddp_feature
from flowturbo.data.pictures import grid, save_png
from flowturbo.sampling.sample_folder import read_archive
from flowturbo.system import cli

ROOT = Path(__file__).resolve().parent
PREDICTOR = ROOT / "assets" / "digits-predictor.pt"
BOOTSTRAP = 50

# (schedule, form of the R block), Heun first.
ROWS = [
    ("H3", "released"),
    ("H4", "released"),
    ("H8", "released"),
    ("H1P5", "released"),
    ("H1P5R2", "released"),
    ("H1P5R2", "consistent"),
    ("H1P5R2", "single"),
    ("H1P3R1", "single"),
]

# How the predictor under assets/ was made.
PREDICTOR_FLAGS = [
    *("--target", "predictor", "--vae-ckpt", "none", "--image-size", "8", "--channels", "1", "--no-flip"),
    *("--patch-size", "2", "--hidden-size", "96", "--depth", "6", "--num-heads", "6", "--no-learn-sigma"),
    *("--global-batch-size", "128", "--lr", "1e-3", "--warmup", "200", "--ema-decay", "0.999", "--steps", "6000"),
]
REFINER_FLAGS = [
    *("--target", "refiner", "--vae-ckpt", "none", "--no-flip", "--global-batch-size", "64", "--max-dt", "0.15"),
    *("--lr", "1e-3", "--warmup", "50", "--ema-decay", "0.99", "--steps", "700"),
]


@dataclass
class Result:
    """One line of the table."""

    name: str
    evaluations: tuple[int, int]  # predictor, refiner
    ms_per_image: float
    distance: float
    error: float  # standard error of the distance
    accuracy: float  # share of samples whose nearest real image has the class asked for

    @property
    def is_heun(self) -> bool:
        return set(self.name) <= set("H0123456789")


def main(argv: list[str] | None = None) -> None:
    parser = cli.new_parser(__doc__.strip())
    parser.add_argument("--from-scratch", action="store_true", help="train the predictor instead of taking assets/")
    parser.add_argument("--update-assets", action="store_true", help="keep that predictor as the one under assets/")
    parser.add_argument("--out", default="demo", metavar="DIR", help="everything is written here, afresh")
    parser.add_argument("--num-images", type=int, default=1797, help="samples per schedule")
    parser.add_argument("--refiner-steps", type=int, help="training steps of the refiner")
    args = parser.parse_args(cli.hyphenate(argv))
    out = Path(args.out)
    if out.exists() and not (out / "digits").is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {args.out!r} holds something else than a demo: choose another folder")
    for old in ("digits", "runs", "samples"):
        shutil.rmtree(out / old, ignore_errors=True)

    print("1. the data: 1 797 handwritten digits, 8x8 pixels, 10 classes")
    images, labels = write_digits(out / "digits")
    predictor = PREDICTOR
    if args.from_scratch:
        print("2a. training the predictor")
        predictor = train(out, "predictor", PREDICTOR_FLAGS)
        if args.update_assets:  # half precision: the file is in the repository
            download.export_weights(predictor, PREDICTOR, torch.float16)
            predictor = PREDICTOR
    print(f"2. training a velocity refiner for {predictor}")
    steps = ["--steps", str(args.refiner_steps)] if args.refiner_steps else []
    refiner = train(out, "refiner", ["--model-teacher-ckpt", str(predictor), *REFINER_FLAGS, *steps])

    print(f"3. sampling {args.num_images} images with each of {len(ROWS)} schedules, all from the same noise")
    statistics = out / "digits-statistics.npz"
    results, pictures = [], []
    with open(out / "measurements.log", "w") as log:
        with redirect_stdout(log), redirect_stderr(log):
            evaluator.main(["stats", str(out / "digits"), "-o", str(statistics), "--extractor", "pixels"])
        for schedule, form in ROWS:
            with redirect_stdout(log), redirect_stderr(log):
                result, first = measure(args, out, predictor, refiner, statistics, schedule, form, images, labels)
            results.append(result)
            pictures.append(first)
            print(f"   {result.name}: Fréchet distance {result.distance:.3f}")

    picture = out / "comparison.png"
    captions = [
        f"{r.name}: {r.evaluations[0]} + {r.evaluations[1]} evaluations, FD {r.distance:.2f}" for r in results
    ]
    save_png(picture, grid(pictures, captions))
    print(
        f"\nOn {args.num_images} images, cfg 1; FD: Fréchet distance on pixels, ± standard error; lower is better\n"
    )
    print(table(results))
    print("\n" + verdict(results))
    print(f"\nLook at {picture}")


def write_digits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write the digits as folder/<class>/<number>.png; returns them as uint8 (N, 8, 8) with their labels (N,)."""
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


def measure(
    args, out: Path, predictor: Path, refiner: Path, statistics: Path, schedule: str, form: str, images, labels
) -> tuple[Result, torch.Tensor]:
    """Sample with one schedule and evaluate; returns the table's line and the first images, one of each class."""
    has_refiner = pipeline.needs_refiner(schedule)
    tag = f"{schedule}-{form}" if has_refiner else schedule
    summary = sample_ddp_feature.main(
        [
            *("--predictor-ckpt", str(predictor), "--refiner-ckpt", str(refiner), "--vae-ckpt", "none"),
            *("--schedule", schedule, "--refiner-step", form, "--cfg-scale", "1", "--labels", "balanced"),
            *("--num-fid-samples", str(args.num_images), "--per-proc-batch-size", "256", "--features", "pixels"),
            *("--sample-dir", str(out / "samples"), "--tag", tag),
        ]
    )
    report = out / "samples" / f"{tag}.json"
    evaluator.main([str(statistics), str(summary.features), "--json", str(report), "--bootstrap", str(BOOTSTRAP)])
    fid = json.loads(report.read_text())["metrics"]["FID"]
    samples = read_archive(summary.archive)[..., 0]
    result = Result(
        tag.replace("-", " "),
        pipeline.parse_sampler(schedule).schedule.evaluations(form),
        summary.ms_per_image,
        fid["value"],
        fid["standard_error"],
        class_accuracy(samples, images, labels),
    )
    return result, torch.from_numpy(samples[:20, None])


def class_accuracy(samples: np.ndarray, images: np.ndarray, labels: np.ndarray) -> float:
    """How often the nearest real image has the class that was asked for, number i's being i modulo 10."""
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
    """Which FlowTurbo rows beat every Heun row of as many evaluations in all, or more; and which do not."""
    lines = []
    for r in results:
        if r.is_heun:
            continue
        beaten = [h for h in results if h.is_heun and h.distance > r.distance]
        rivals = [h for h in results if h.is_heun and h.evaluations[0] <= sum(r.evaluations)]
        ahead = bool(rivals) and all(h in beaten for h in rivals)
        most = max(beaten, key=lambda h: h.evaluations[0], default=None)
        what = f"beats {most.name}, which takes {most.evaluations[0]}" if most else "beats no Heun row"
        state = "better than" if ahead else "NOT better than"
        lines.append(
            f"{r.name}, {r.evaluations[0]} + {r.evaluations[1]} evaluations: {state} Heun at equal or fewer; {what}."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run_script(main)
