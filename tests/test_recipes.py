"""The README's recipes that need no downloads, each as a user would run it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import evaluator
import sample
import sample_ddp_feature
import train
from flowturbo.networks.load import load_network
from flowturbo.refiner import VelocityRefiner
from flowturbo.training.stopping import EXIT_STOPPED
from flowturbo.weights.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """Bright disks and dark crosses, 20 each, RGB of 12x10 and 12x9."""
    root = tmp_path_factory.mktemp("recipe") / "data"
    random = np.random.default_rng(0)
    y, x = np.mgrid[:10, :12]
    for name, shape, level in (("cross", (x == 6) | (y == 5), 60), ("disk", (x - 6) ** 2 + (y - 5) ** 2 < 12, 200)):
        (root / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.where(shape[..., None], level, 10) + random.integers(0, 20, (10, 12, 3))
            pixels = pixels[: 9 + i % 2]
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def test_both_models_on_a_two_class_folder_then_samples_and_their_evaluation(two_classes, tmp_path, capsys):
    common = [
        "--data-path",
        str(two_classes),
        "--vae-ckpt",
        "none",
        "--results-dir",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    common += ["--num-workers", "0", "--global-batch-size", "16", "--lr", "2e-3", "--sample-every", "0"]
    small = ["--image-size", "8", "--hidden-size", "48", "--depth", "2", "--num-heads", "4", "--ema-decay", "0.98"]
    train.main(["--target", "predictor", *common, *small, "--steps", "150", "--note", "mine"])
    predictor = tmp_path / "000-predictor-mine" / "checkpoints" / "0000150.pt"
    train.main([*common, "--model_teacher_ckpt", str(predictor), "--steps", "40", "--note", "mine"])
    refiner = tmp_path / "001-refiner-mine" / "checkpoints" / "0000040.pt"
    assert load_network(VelocityRefiner, str(refiner)).num_classes == 2

    networks = ["--predictor-ckpt", str(predictor), "--refiner-ckpt", str(refiner), "--vae-ckpt", "none"]
    picture = tmp_path / "samples.png"
    sample.main([*networks, "--compare", "H8", "H1P5R2", "--cfg-scale", "2", "--out", str(picture)])
    assert Image.open(picture).size[0] > 60
    made = sample_ddp_feature.main(
        [
            *(*networks, "--num-fid-samples", "40", "--per-proc-batch-size", "16", "--schedule", "H1P5R2"),
            *("--labels", "balanced", "--cfg-scale", "1.5", "--sample-dir", str(tmp_path), "--tag", "forty"),
        ]
    )
    images = np.load(made.archive)["arr_0"]
    assert images.shape == (40, 8, 8, 3)
    # The two classes differ in brightness by more than anything else: guided samples must show it.
    assert images[1::2].mean() > images[0::2].mean() + 15

    statistics, report = tmp_path / "mine.npz", tmp_path / "report.json"
    with pytest.raises(ValueError, match="expected images of one size"):
        evaluator.main(["stats", str(two_classes), "-o", str(statistics), "--extractor", "pixels"])
    evaluator.main(["stats", str(two_classes), "-o", str(statistics), "--extractor", "pixels", "--image-size", "8"])
    evaluator.main([str(statistics), str(made.archive), "--extractor", "pixels", "--json", str(report)])
    assert json.loads(report.read_text())["metrics"]["FID"]["value"] > 0
    assert "N = 40, labels balanced" in capsys.readouterr().out


def test_a_session_limit_stops_with_a_checkpoint_and_auto_resumes(two_classes, tmp_path):
    arguments = ["--target", "predictor", "--data-path", str(two_classes), "--vae-ckpt", "none", "--device", "cpu"]
    arguments += ["--results-dir", str(tmp_path), "--image-size", "8", "--hidden-size", "32", "--depth", "1"]
    arguments += ["--num-heads", "4", "--num-workers", "0", "--global-batch-size", "4", "--sample-every", "0"]
    arguments += ["--subset", "0.5", "--resume", "auto"]
    with pytest.raises(SystemExit, match=str(EXIT_STOPPED)):
        train.main([*arguments, "--steps", "100000", "--max-hours", "0.0002"])
    run = tmp_path / "000-predictor-no-note"
    (first,) = (run / "checkpoints").glob("*.pt")
    stopped = int(first.stem)
    assert 0 < stopped < 100_000
    train.main([*arguments, "--steps", str(stopped + 3)])
    assert [path.name for path in tmp_path.iterdir()] == [run.name]
    content = load_checkpoint(run / "checkpoints" / f"{stopped + 3:07d}.pt")
    assert content["step"] == stopped + 3
    assert all(torch.isfinite(value).all() for value in content["ema"].values())
