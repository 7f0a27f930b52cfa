"""The pictures of a run: what users would sample from its checkpoint."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import run

from flowturbo.data.pictures import grid
from flowturbo.models import SiT
from flowturbo.networks.autoencoder import load_autoencoder
from flowturbo.networks.load import load_network
from flowturbo.networks.precision import cast
from flowturbo.refiner import VelocityRefiner
from flowturbo.sampling.generate import ImageSampler, Networks
from flowturbo.transport import Guidance, SamplerSettings

CPU = torch.device("cpu")


def pixels(path):
    return np.asarray(Image.open(path), int)


def sampled(networks, names, classes, scale, path_type="linear"):
    """The picture of these schedules, seed 3."""
    settings = SamplerSettings(Guidance(scale), path_type=path_type)
    rows = [ImageSampler(networks, name, settings)(3, range(len(classes)), classes) for name in names]
    return np.asarray(grid(rows, [f"{name}  cfg {scale:g}" for name in names]), int)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_predictors_picture(flags, precision, vae_folder, class_folder, tmp_path):
    """In latent space, on another path, more classes than are shown; networks and autoencoder in the precision."""
    images = class_folder(tmp_path / "images", classes=10, images=1, size=(16, 16))
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[precision]
    more = ["--data-path", images, "--vae-ckpt", vae_folder, "--image-size", 16, "--path-type", "gvp", "--seed", 3]
    more += ["--steps", 2, "--sample-every", 2, "--cfg-scale", 2, "--lr", "0.05", "--precision", name]
    folder = run(tmp_path, *flags("predictor"), *more)
    predictor = cast(load_network(SiT, str(folder / "checkpoints" / "0000002.pt")), precision)
    networks = Networks(predictor, None, load_autoencoder(str(vae_folder), dtype=precision), CPU)
    shown = [0, 1, 3, 4, 5, 6, 8, 9]
    expected = sampled(networks, ["H8"], shown, 2.0, "gvp")
    assert np.array_equal(pixels(folder / "samples" / "0000002.png"), expected)
    other = load_network(SiT, str(folder / "checkpoints" / "0000002.pt"), prefer_ema=False)
    assert not np.array_equal(sampled(replace(networks, predictor=other), ["H8"], shown, 2.0, "gvp"), expected)


def test_a_refiners_picture_has_a_row_with_it_and_one_without(flags, teacher, tmp_path):
    more = ["--steps", 2, "--sample-every", 2, "--seed", 3, "--lr", "0.05"]
    folder = run(tmp_path, *flags("refiner"), *more)
    refiner = load_network(VelocityRefiner, str(folder / "checkpoints" / "0000002.pt"))
    networks = Networks(load_network(SiT, str(teacher)), refiner, load_autoencoder("none"), CPU)
    assert np.array_equal(pixels(folder / "samples" / "0000002.png"), sampled(networks, ["H8", "H1P5R3"], [0, 1], 4.0))


def test_a_picture_changes_nothing_in_the_run(flags, tmp_path):
    """It casts copies."""
    states = []
    for every in (0, 1):
        flags_of = [*flags("refiner"), "--steps", 3, "--precision", "bf16", "--sample-every", every]
        folder = run(tmp_path / str(every), *flags_of)
        states.append(torch.load(folder / "checkpoints" / "0000003.pt"))
    for part in ("model", "ema"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name])
