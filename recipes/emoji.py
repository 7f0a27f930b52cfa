"""The model "colour" that comes with the package: pictures of Noto Color Emoji, a predictor, its refiner, the figures.

Usage:
  python -m recipes.emoji                  # renders the pictures and trains: hours on one core; goes on if interrupted
  python -m recipes.emoji --small          # the same from nothing in minutes: four classes, a smaller model
  python -m recipes.emoji --pictures       # the pictures alone, a folder for each class (docs/recipes.md)
  python -m recipes.emoji --figures        # measures the package's model: docs/colour-model.md
  python -m recipes.emoji --update-assets  # keeps what was trained as the package's model

The pictures need two packages of Debian or Ubuntu: apt install fonts-noto-color-emoji unicode-data
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flowturbo.system import cli
from flowturbo.system.options import option
from flowturbo.weights.registry import MODELS, PACKAGED

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = ["--vae-ckpt", "none", "--no-flip", "--num-workers", "0", "--sample-every", "0"]
ALWAYS += ["--keep-last", "2", "--keep-every", "0"]


@dataclass(frozen=True)
class Recipe:
    """What is trained, and on which classes (all where there are none)."""

    predictor: tuple[str, ...]  # train.py's flags
    refiner: tuple[str, ...]
    classes: tuple[str, ...] = ()


FULL = Recipe(
    predictor=(
        *("--image-size", "32", "--patch-size", "4", "--hidden-size", "160", "--depth", "5", "--num-heads", "5"),
        *("--no-learn-sigma", "--global-batch-size", "32", "--lr", "2e-3", "--warmup", "500"),
        *("--lr-schedule", "cosine", "--time-distribution", "logit-normal", "--ema-decay", "0.9995"),
        *("--steps", "14000", "--ckpt-every", "500"),
    ),
    refiner=(
        *("--recipe", "endpoint", "--schedule", "M4R1", "--refiner-step", "midpoint", "--cfg-scale", "3"),
        *("--trajectories", "1536", "--reference", "M16", "--hidden-size", "128", "--num-heads", "4"),
        *("--global-batch-size", "64", "--warmup", "100", "--lr-schedule", "cosine", "--ema-decay", "0.99"),
        *("--steps", "1500", "--ckpt-every", "500"),
    ),
)
SMALL = Recipe(
    predictor=(
        *("--image-size", "32", "--patch-size", "4", "--hidden-size", "96", "--depth", "3", "--num-heads", "3"),
        *("--no-learn-sigma", "--global-batch-size", "32", "--lr", "2e-3", "--warmup", "100"),
        *("--lr-schedule", "cosine", "--time-distribution", "logit-normal", "--ema-decay", "0.99"),
        *("--steps", "1200", "--ckpt-every", "200"),
    ),
    refiner=(
        *("--recipe", "endpoint", "--schedule", "M4R1", "--refiner-step", "midpoint", "--cfg-scale", "3"),
        *("--trajectories", "128", "--reference", "M8", "--warmup", "20", "--ema-decay", "0.98", "--steps", "200"),
    ),
    classes=("face-smiling", "flag", "heart", "plant"),
)


@dataclass(frozen=True)
class Options:
    """What to do, and where."""

    out: str = option("results/emoji", "everything is written here", metavar="DIR")
    pictures: bool = option(False, "write the pictures, and train nothing")
    small: bool = option(False, "four classes and a smaller model")
    figures: bool = option(False, "measure the model that comes with the package, and train none")
    update_assets: bool = option(False, "keep the trained networks as those of the package")

    def __post_init__(self) -> None:
        if self.pictures + self.small + self.figures + self.update_assets > 1:
            raise ValueError("pictures, small, figures and update_assets are four things: expected one of them")


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = cli.parse(cli.new_parser(__doc__), argv, {"what to do": Options})
    out, recipe = Path(options.out), SMALL if options.small else FULL

    from recipes.emoji_pictures import CLASSES, render

    pictures = out / "pictures"
    count = render(pictures, classes=recipe.classes or tuple(CLASSES))
    print(f"{count} pictures in {len(recipe.classes or CLASSES)} classes: {pictures}")
    if options.pictures:
        return
    if not options.figures:
        predictor = train(out, "predictor", ("--data-path", str(pictures), *recipe.predictor))
        refiner = train(out, "refiner", ("--model-teacher-ckpt", str(predictor), *recipe.refiner))
        networks = {"predictor": predictor, "refiner": refiner}
        files = export(networks, PACKAGED if options.update_assets else out)
        print("python sample.py --vae-ckpt none " + " ".join(f"--{name}-ckpt {file}" for name, file in files.items()))
        return

    from recipes.emoji_figures import report

    print(report(pictures, out))


def train(out: Path, target: str, flags: Sequence[str]) -> Path:
    """Train with train.py, or go on with a training that was interrupted; returns the folder of the run."""
    command = [
        *(sys.executable, str(ROOT / "train.py"), "--target", target, *ALWAYS, *flags),
        *("--results-dir", str(out / "runs"), "--note", "emoji", "--resume", "auto"),
    ]
    # One thread: a model this small gains little from more, and loses much where other programs want the cores.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    if subprocess.run(command, env=environment).returncode:
        raise ValueError(f"training the {target} failed; the reason stands above")
    return sorted((out / "runs").glob(f"*-{target}-emoji"))[-1]


def export(runs: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Write the networks in half precision, under the names that the package has for them; their places."""
    import torch

    from flowturbo.weights.export import export_weights

    names = {"predictor": MODELS["colour"].predictor_ckpt, "refiner": MODELS["colour"].refiner_ckpt}
    files = {network: folder / names[network] for network in runs}
    for network, run in runs.items():
        export_weights(run, files[network], torch.float16)
    return files


if __name__ == "__main__":
    cli.run_script(main)
