"""What a run shows on its way: grids of what users would sample, measurements, the checkpoints that stay."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_same_bits, checkpoint, metrics, run

from flowturbo.data.pictures import grid
from flowturbo.models import SiT
from flowturbo.networks.autoencoder import load_autoencoder
from flowturbo.networks.load import load_network
from flowturbo.networks.precision import cast
from flowturbo.refiner import VelocityRefiner
from flowturbo.sampling.generate import ImageSampler, Networks, NotFinite
from flowturbo.training.held_out import HeldOutLoss
from flowturbo.training.run import Run
from flowturbo.transport import Guidance, SamplerSettings

CPU = torch.device("cpu")


def pixels(path):
    return np.asarray(Image.open(path), int)


def sampled(networks, names, classes, scale, path_type="linear"):
    """The picture of these schedules, seed 3: four of each class, whose names are below."""
    settings, count = SamplerSettings(Guidance(scale), path_type=path_type), len(classes)
    rows, captions, below = [], [], []
    for name in names:
        sampler = ImageSampler(networks, name, settings)
        rows += [sampler(3, range(k * count, (k + 1) * count), list(classes)) for k in range(4)]
        captions += [f"{name}  cfg {scale:g}", "", "", ""]
        below += ["", "", "", list(classes.values())]
    return np.asarray(grid(rows, captions, below, least_side=96), int)


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
    shown = {k: f"c{k}" for k in (0, 1, 3, 4, 5, 6, 8, 9)}
    expected = sampled(networks, ["H8"], shown, 2.0, "gvp")
    assert np.array_equal(pixels(folder / "samples" / "0000002.png"), expected)
    other = load_network(SiT, str(folder / "checkpoints" / "0000002.pt"), prefer_ema=False)
    assert not np.array_equal(sampled(replace(networks, predictor=other), ["H8"], shown, 2.0, "gvp"), expected)


def test_a_refiners_picture_has_a_row_with_it_and_one_without(flags, teacher, tmp_path):
    more = ["--steps", 2, "--sample-every", 2, "--seed", 3, "--lr", "0.05"]
    folder = run(tmp_path, *flags("refiner"), *more)
    refiner = load_network(VelocityRefiner, str(folder / "checkpoints" / "0000002.pt"))
    networks = Networks(load_network(SiT, str(teacher)), refiner, load_autoencoder("none"), CPU)
    expected = sampled(networks, ["H8", "H1P5R3"], {0: "c0", 1: "c1"}, 4.0)
    assert np.array_equal(pixels(folder / "samples" / "0000002.png"), expected)
    assert expected.shape == (8 * 99 + 4 * 19 + 3, 2 * 99 + 3, 3)  # eight rows of 96 pixels, two captions, two of names


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


def test_the_classes_of_a_grid_are_those_that_have_images(flags, class_folder, tmp_path):
    (tmp_path / "map.json").write_text('{"c0": 4, "c1": 9}')
    images = class_folder(tmp_path / "images", classes=2, images=1, channels=1)
    more = ["--data-path", images, "--class-map", tmp_path / "map.json", "--num-classes", 11, "--steps", 1]
    folder = run(tmp_path, *flags("predictor"), *more, "--sample-every", 1)
    picture = Image.open(folder / "samples" / "0000001.png")
    assert picture.size == (2 * 99 + 3, 4 * 99 + 2 * 19 + 3)


@pytest.mark.parametrize("target", ["predictor", "refiner"])
def test_the_first_grid_comes_with_the_first_checkpoint(flags, target, tmp_path):
    folder = run(tmp_path, *flags(target), "--steps", 5, "--ckpt-every", 2, "--sample-every", 1000, "--end-points", 2)
    assert sorted(path.stem for path in (folder / "samples").iterdir()) == ["0000002", "0000005"]


def test_a_grid_that_cannot_be_written_ends_nothing(flags, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("cannot write 'a.png': No space left on device")

    monkeypatch.setattr(Run, "picture", full)
    folder = run(tmp_path, *flags("predictor"), "--steps", 2, "--sample-every", 1)
    text = (folder / "log.txt").read_text()
    assert text.count("no grid: cannot write 'a.png': No space left on device") == 2
    assert checkpoint(folder, 2)["step"] == 2


# ---- measurements


def test_measuring_changes_no_bit_of_a_run_and_no_random_state(flags, tmp_path, monkeypatch):
    """Not of its checkpoints, nor of torch, numpy and random; a resumed run measures the same as a whole one."""
    states, tell = [], Run.tell

    def now():
        return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002

    def told(self, measure, log):
        before = now()
        tell(self, measure, log)
        states.append(now() == before)

    monkeypatch.setattr(Run, "tell", told)
    common = [*flags("refiner"), "--holdout", "0.6", "--ckpt-every", 2, "--schedule", "H1P2R1", "--seed", 5]
    plain = run(tmp_path / "plain", *common, "--steps", 6, "--end-points", 0)
    assert len(states) == 3  # the held-out loss alone
    whole = run(tmp_path / "whole", *common, "--steps", 6, "--end-points", 8)
    assert states == [True] * 9
    assert_same_bits(checkpoint(plain, 6), checkpoint(whole, 6))
    assert_same_bits(checkpoint(plain, 4), checkpoint(whole, 4))
    run(tmp_path / "parts", *common, "--steps", 3, "--end-points", 8)
    parts = run(tmp_path / "parts", *common, "--steps", 6, "--end-points", 8, "--resume", "auto")
    assert_same_bits(checkpoint(parts, 6), checkpoint(whole, 6))

    def measured(folder, name, step):
        (found,) = {record[name] for record in metrics(folder) if name in record and record["step"] == step}
        return found

    for name in ("holdout", "holdout_error", "rmse", "rmse_error", "rmse_free", "rmse_without", "rmse_without_error"):
        assert measured(whole, name, 6) == measured(parts, name, 6)
    assert measured(whole, "rmse_free", 2) == measured(whole, "rmse_free", 6)
    assert measured(whole, "rmse", 2) != measured(whole, "rmse", 6)
    assert measured(whole, "holdout", 2) != measured(whole, "holdout", 6)
    assert measured(plain, "holdout", 2) == measured(whole, "holdout", 2)
    log = (whole / "log.txt").read_text()
    assert "held out" in log
    assert "step 2: held-out loss 0." in log
    assert "step 6: end-point RMSE from 8 noises: H1P2R1 0." in log
    assert (whole / "loss.png").is_file()


def test_what_cannot_be_measured_is_said_and_ends_nothing(flags, tmp_path, monkeypatch):
    for error in (ValueError("cannot read image 'a.png'"), NotFinite("sample 3: not finite"), torch.OutOfMemoryError()):

        def broken(self, error=error):
            raise error

        monkeypatch.setattr(HeldOutLoss, "__call__", broken)
        folder = run(tmp_path / type(error).__name__, *flags("predictor"), "--steps", 2, "--holdout", "0.6")
        assert f"step 2: could not measure: {str(error) or 'OutOfMemoryError'}" in (folder / "log.txt").read_text()
        assert checkpoint(folder, 2)["step"] == 2


def test_two_ranks_measure_what_one_process_measures(flags, forks, tmp_path):
    common = [*flags("refiner"), "--exact", "--global-batch-size", 12, "--steps", 2, "--ckpt-every", 1]
    common += ["--holdout", "0.6", "--end-points", 4, "--schedule", "H1P1R1", "--sample-every", 2]
    one = run(tmp_path / "one", *common)
    done = forks(tmp_path / "out", *common, "--results-dir", tmp_path / "two", ranks=2)
    assert done.codes == [0, 0], done.text
    (two,) = (tmp_path / "two").iterdir()
    names = ("step", "holdout", "holdout_error", "rmse", "rmse_error", "rmse_free", "rmse_without")
    of_one, of_two = ([{k: v for k, v in r.items() if k in names} for r in metrics(f)] for f in (one, two))
    assert of_one == of_two
    assert done.text.count("held-out loss") == 2
    assert sorted(path.name for path in two.iterdir() if path.suffix == ".png") == ["data.png", "loss.png"]


# ---- the checkpoints that stay


def test_the_last_three_checkpoints_and_every_fifth_stay(flags, tmp_path):
    def kept(folder):
        return sorted(int(path.stem) for path in (folder / "checkpoints").glob("*.pt"))

    common = [*flags("predictor"), "--ckpt-every", 2]
    folder = run(tmp_path / "a", *common, "--steps", 29)
    assert kept(folder) == [10, 20, 26, 28, 29]
    (folder / "checkpoints" / "best.pt").write_bytes(b"of a user")
    run(tmp_path / "a", *common, "--steps", 33, "--resume", "auto")
    assert (folder / "checkpoints" / "best.pt").read_bytes() == b"of a user"
    (folder / "checkpoints" / "best.pt").unlink()
    assert kept(folder) == [10, 20, 30, 32, 33]
    assert kept(run(tmp_path / "b", *common, "--steps", 9, "--keep-last", 0)) == [2, 4, 6, 8, 9]
    assert kept(run(tmp_path / "c", *common, "--steps", 12, "--keep-last", 1, "--keep-every", 0)) == [12]
    assert kept(run(tmp_path / "d", *common, "--steps", 12, "--keep-last", 1, "--keep-every", 4)) == [4, 8, 12]
