"""FlowTurbo for text-to-image in a few minutes, on a real small model that needs no model hub.

Two handwritten digits side by side (scikit-learn's, 8x16 pixels) under captions such as "a three next to a seven", a
small SD3 transformer under flowturbo/assets/ that was trained on 90 of the 100 pairs, and MiniLM as its text encoder.

Usage:
  python demo_text.py                   # or: make demo-text
  python demo_text.py --from-scratch    # trains the transformer too
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flowturbo.system import cli
from flowturbo.system.options import option

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from flowturbo.text_to_image.comparison import Measured

ROOT = Path(__file__).resolve().parent
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "{a} then {b}", "a {a} and a {b}", "a {a} next to a {b}", "{a} on the left, {b} on the right", "the digits {a} {b}",
    "{a}, {b}", "first {a}, then {b}", "a {a} followed by a {b}", "a picture of a {a} and a {b}", "handwritten {a} {b}",
    "the number {a} beside the number {b}", "left {a}, right {b}", "a {a} before a {b}", "{a} and {b}",
    "a {a} to the left of a {b}", "two digits: {a} and {b}", "the pair {a}, {b}", "a {a} with a {b} behind it",
    "someone wrote {a} and {b}", "{a} is left and {b} is right",
)  # fmt: skip
HELD_OUT = frozenset((k, (k + 3) % 10) for k in range(10))  # pairs that no training sees
IMAGES_PER_PAIR = 60

ASSET = ROOT / "flowturbo" / "assets" / "digit-pairs"
# Rows of the table: as many evaluations of the predictor in each part, R beside the same without evaluations (L).
ROWS = (
    *("Euler7", "UniPC7", "DPM++7", "H1P5", "A7", "M6"),
    *("H1P5L2", "H1P5R2", "H1P5L1", "H1P5R1"),
    *("H5", "H8"),
)
GUIDANCE = 2.0

# How the transformer under flowturbo/assets/ was made.
TRANSFORMER = {
    "sample_size": 16, "patch_size": 2, "in_channels": 1, "out_channels": 1, "num_layers": 4, "attention_head_dim": 32,
    "num_attention_heads": 3, "joint_attention_dim": 384, "caption_projection_dim": 96, "pooled_projection_dim": 384,
    "pos_embed_max_size": 8,
}  # fmt: skip
SIZE_FLAGS = ["--height", "8", "--width", "16"]
PREDICTOR_FLAGS = [
    *("--target", "predictor", *SIZE_FLAGS, "--global-batch-size", "48", "--lr", "1e-3", "--warmup", "200"),
    *("--clip-grad", "1", "--ema-decay", "0.999", "--time-distribution", "uniform"),
    *("--steps", "800"),
]
REFINER_FLAGS = [
    *("--target", "refiner", *SIZE_FLAGS, "--global-batch-size", "48", "--lr", "1e-3", "--warmup", "50"),
    *("--clip-grad", "1", "--ema-decay", "0.99", "--max-dt", "0.15", "--steps", "300"),
]


@dataclass(frozen=True)
class Options:
    """What the demo does. Raises ValueError for impossible values."""

    from_scratch: bool = option(False, "train the transformer instead of taking assets/")
    update_assets: bool = option(False, "keep that transformer as the one under assets/")
    out: str = option("demo-text", "everything is written here, afresh", metavar="DIR")
    per_pair: int = option(2, "samples of each of the 100 pairs in every row")
    refiner_steps: int | None = option(None, "training steps of the refiner")

    def __post_init__(self) -> None:
        if self.per_pair < 2 or (self.refiner_steps is not None and self.refiner_steps < 1):
            raise ValueError("per_pair must be at least 2, refiner_steps at least 1")
        if self.update_assets and not self.from_scratch:
            raise ValueError("update_assets keeps a transformer that from_scratch trains: expected both")
        out = Path(self.out)
        if out.exists() and not (out / "pairs").is_dir() and any(out.iterdir()):
            raise ValueError(f"out {self.out!r} holds something else than a demo: expected another folder")


class Scores(NamedTuple):
    """How often both digits, the left and the right one are those of the caption, and the Fréchet distance on pixels
    from as many real pairs."""

    both: float
    left: float
    right: float
    held_out: float
    distance: float


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = cli.parse(cli.new_parser(__doc__, None), argv, {"demo": Options})
    out = Path(options.out)
    for old in ("pairs", "pairs-cache", "runs", "pipeline"):
        shutil.rmtree(out / old, ignore_errors=True)

    print(f"1. the data: {(100 - len(HELD_OUT)) * IMAGES_PER_PAIR} pairs of handwritten digits with captions")
    write_pairs(out / "pairs")
    new_pipeline(out / "pipeline", None if options.from_scratch else ASSET)
    if options.from_scratch:
        print("2a. training the transformer")
        network = train(out, out / "pipeline", PREDICTOR_FLAGS)
        if options.update_assets:
            keep_as_asset(network)
        new_pipeline(out / "pipeline", network)
    print("2. training a velocity refiner for the transformer")
    steps = ["--steps", str(options.refiner_steps)] if options.refiner_steps else []
    refiner = train(out, out / "pipeline", [*REFINER_FLAGS, *steps])

    pairs = [(a, b) for a in range(10) for b in range(10) for _ in range(options.per_pair)]
    print(f"3. sampling {len(pairs)} captions in {len(ROWS)} ways, all from the same noise, guidance {GUIDANCE}")
    rows = sample(out, refiner, [caption(a, b, TEMPLATES[k % len(TEMPLATES)]) for k, (a, b) in enumerate(pairs)])
    print(table(rows, [score(row.images, pairs) for row in rows]))
    picture = save_picture(out, rows, pairs)
    print(f"\nLook at {picture}")


def caption(left: int, right: int, template: str) -> str:
    return template.format(a=WORDS[left], b=WORDS[right])


def write_pairs(folder: Path) -> None:
    """Write pairs of digits with their captions: NUMBER.png and metadata.jsonl."""
    import numpy as np
    from PIL import Image

    images, labels = real_digits()
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for left, right in ((a, b) for a in range(10) for b in range(10) if (a, b) not in HELD_OUT):
        for _ in range(IMAGES_PER_PAIR):
            parts = [images[random.choice(np.flatnonzero(labels == digit))] for digit in (left, right)]
            name = f"{len(lines):05d}.png"
            Image.fromarray(np.concatenate(parts, 1)).save(folder / name)
            template = TEMPLATES[random.integers(len(TEMPLATES))]
            lines.append(json.dumps({"file_name": name, "text": caption(left, right, template)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def new_pipeline(folder: Path, weights: Path | None) -> None:
    """Write an SD3 pipeline without autoencoder and text encoders, its weights random or from a folder."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of every part that is None
    torch.manual_seed(0)
    parts: dict[str, Any] = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    if weights is None:
        transformer = SD3Transformer2DModel(**TRANSFORMER)
    else:
        transformer = SD3Transformer2DModel.from_pretrained(weights, dtype=torch.float32)
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipe.save_pretrained(folder)


def train(out: Path, pipeline: Path, flags: list[str]) -> Path:
    """Train with text_to_image.py; returns the folder of the network."""
    command = [
        *(sys.executable, str(ROOT / "text_to_image.py"), "train", "--pipeline", str(pipeline)),
        *("--data-path", str(out / "pairs"), "--results-dir", str(out / "runs"), "--num-workers", "0", *flags),
    ]
    if subprocess.run(command).returncode:
        raise ValueError("training failed; the reason stands above")
    return sorted((out / "runs").glob("*/network"))[-1]


def keep_as_asset(network: Path) -> None:
    """Keep a transformer under assets/, in half precision since the file is in the repository."""
    import torch
    from diffusers import SD3Transformer2DModel

    SD3Transformer2DModel.from_pretrained(network).to(torch.float16).save_pretrained(ASSET)


def sample(out: Path, refiner: Path, captions: list[str]) -> list[Measured]:
    """Every row's images, with the distance from 64 steps of Adams-Bashforth 2."""
    import torch

    from flowturbo.text_to_image.comparison import measure
    from flowturbo.text_to_image.options import TextSamplingOptions
    from flowturbo.text_to_image.refined import FlowRefiner
    from flowturbo.text_to_image.sampling import Row, TextSampler, open_pipeline

    options = TextSamplingOptions(str(out / "pipeline"), guidance_scale=GUIDANCE, height=8, width=16)
    pipe = open_pipeline(options, torch.device("cpu"), torch.float32)
    network = FlowRefiner.from_pretrained(refiner)
    samplers = [TextSampler(pipe, Row.parse(name), options, network) for name in ROWS]
    return measure(samplers, 0, captions, 50, reference=TextSampler(pipe, Row.parse("A32"), options))


def score(images: Tensor, pairs: Sequence[tuple[int, int]]) -> Scores:
    """The scores of samples (N, 1, 8, 16) uint8 of pairs, by the nearest real digit of each half."""
    import numpy as np
    import torch

    from flowturbo.evaluation.metrics import frechet_distance
    from flowturbo.evaluation.statistics import GaussianStatistics

    digits, labels = real_digits()
    wanted = np.array(pairs)
    halves = [images[:, 0, :, side].reshape(len(images), -1).numpy() for side in (slice(0, 8), slice(8, 16))]
    found = np.stack([nearest(half, digits.reshape(len(digits), -1), labels) for half in halves], 1)
    right = found == wanted
    held = np.array([pair in HELD_OUT for pair in pairs])

    random = np.random.default_rng(1)
    real = [np.concatenate([digits[random.choice(np.flatnonzero(labels == d))] for d in pair], 1) for pair in pairs]
    statistics = []
    for pixels in (images[:, 0], torch.from_numpy(np.stack(real))):
        gathered = GaussianStatistics(128)
        gathered.update(pixels.flatten(1).double() / 127.5 - 1)
        statistics.append(gathered.gaussian())
    both = right.all(1)
    return Scores(
        float(both[~held].mean()), float(right[~held, 0].mean()), float(right[~held, 1].mean()),
        float(both[held].mean()), float(frechet_distance(*statistics[0], *statistics[1])),
    )  # fmt: skip


def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as uint8 (1797, 8, 8), and their labels."""
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


def nearest(samples: np.ndarray, digits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The label of the nearest digit for each sample."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(1).fit(digits.astype(float), labels).predict(samples.astype(float))


def table(rows: Sequence[Measured], scores: Sequence[Scores]) -> str:
    lines = [
        f"\n{'row':<10}{'predictor':>10}{'refiner':>8}{'ms/image':>10}{'both':>8}{'left':>8}{'right':>8}"
        f"{'held out':>10}{'FD':>8}{'error':>16}"
    ]
    for row, s in zip(rows, scores):
        assert row.distance is not None
        error = f"{row.distance[0]:.2f} ± {row.distance[1]:.2f}"
        lines.append(
            f"{row.name:<10}{row.evaluations[0]:>10}{row.evaluations[1]:>8}{row.ms:>10.1f}{s.both:>8.1%}{s.left:>8.1%}"
            f"{s.right:>8.1%}{s.held_out:>10.1%}{s.distance:>8.2f}{error:>16}"
        )
    lines.append(
        "\nboth, left, right: samples of trained pairs whose nearest real digits are the caption's\n"
        "held out: both, of the 10 pairs that were never trained on\n"
        "FD: Fréchet distance on pixels; error: rms distance from A32, in grey levels"
    )
    return "\n".join(lines)


def save_picture(out: Path, rows: Sequence[Measured], pairs: Sequence[tuple[int, int]]) -> Path:
    """Samples of a held-out pair, of the same digits swapped, and of others, a row for each way to sample."""
    from flowturbo.data.pictures import grid, save_png

    wanted = [(0, 3), (3, 0), (4, 7), (7, 4), (1, 2), (2, 1), (9, 2), (5, 5)]
    columns = [pairs.index(pair) for pair in wanted]
    said = ", ".join(f"{WORDS[a]} {WORDS[b]}" for a, b in wanted)
    captions = [f"{row.name}: {said}" if k == 0 else row.name for k, row in enumerate(rows)]
    path = out / "comparison.png"
    save_png(path, grid([row.images[columns] for row in rows], captions))
    return path


if __name__ == "__main__":
    cli.run_script(main)
