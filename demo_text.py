"""FlowTurbo for text-to-image in a few minutes, on a real small model that needs no model hub.

Two handwritten digits side by side (scikit-learn's, 8x16 pixels) under captions such as "a three next to a seven", a
small SD3 transformer under assets/ that was trained on 90 of the 100 pairs, and MiniLM as its text encoder.

Usage:
  python demo_text.py                   # or: make demo-text
  python demo_text.py --from-scratch    # trains the transformer too
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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

# How the transformer under assets/ was made.
TRANSFORMER = {
    "sample_size": 16, "patch_size": 2, "in_channels": 1, "out_channels": 1, "num_layers": 4, "attention_head_dim": 32,
    "num_attention_heads": 3, "joint_attention_dim": 384, "caption_projection_dim": 96, "pooled_projection_dim": 384,
    "pos_embed_max_size": 8,
}  # fmt: skip
SIZE_FLAGS = ["--height", "8", "--width", "16"]
PREDICTOR_FLAGS = [
    *("--target", "predictor", *SIZE_FLAGS, "--global-batch-size", "48", "--lr", "1e-3", "--warmup", "200"),
    *("--clip-grad", "1", "--ema-decay", "0.999", "--time-distribution", "uniform"),
    *("--steps", "3600"),
]


def caption(left: int, right: int, template: str) -> str:
    return template.format(a=WORDS[left], b=WORDS[right])


def write_pairs(folder: Path) -> None:
    """Write pairs of digits with their captions: NUMBER.png and metadata.jsonl."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for left, right in ((a, b) for a in range(10) for b in range(10) if (a, b) not in HELD_OUT):
        for _ in range(IMAGES_PER_PAIR):
            parts = [images[random.choice(np.flatnonzero(digits.target == digit))] for digit in (left, right)]
            name = f"{len(lines):05d}.png"
            Image.fromarray(np.concatenate(parts, 1)).save(folder / name)
            template = TEMPLATES[random.integers(len(TEMPLATES))]
            lines.append(json.dumps({"file_name": name, "text": caption(left, right, template)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def new_pipeline(folder: Path) -> None:
    """Write an SD3 pipeline without autoencoder and text encoders, its transformer's weights random."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    parts: dict[str, Any] = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    transformer = SD3Transformer2DModel(**TRANSFORMER)
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
