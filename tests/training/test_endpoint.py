"""The recipe endpoint: trajectories in place of images, and the loss at their end."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import COMMON, assert_same_bits, checkpoint, metrics, run

import train
from flowturbo.data.loader import Batch
from flowturbo.models import SiT
from flowturbo.networks.autoencoder import NoAutoencoder
from flowturbo.networks.load import load_network
from flowturbo.refiner import VelocityRefiner
from flowturbo.sampling.options import GuidanceOptions
from flowturbo.system.distributed import World
from flowturbo.training import trajectories
from flowturbo.training.build import FrozenNetworks, open_data
from flowturbo.training.endpoint import no_draws, unpack
from flowturbo.training.objective import make_objective
from flowturbo.training.options import DataOptions, RefinerOptions, TrainingOptions
from flowturbo.training.trajectories import HELD_OUT
from flowturbo.transport import FlowTurbo, Guidance

CPU = torch.device("cpu")
SIZE = {"input_size": 8, "patch_size": 4, "hidden_size": 32, "depth": 1, "num_heads": 4, "num_classes": 10}
NUMBERS = range(300, 305)
CASES = [
    ("M4R1", "midpoint", GuidanceOptions(1.0)),
    ("H1P2R1", "single", GuidanceOptions(2.0)),
    ("A3R2@shift2", "adams", GuidanceOptions(1.5, "all", (0.0, 1.0), 2)),
    ("H1P1R2", "released", GuidanceOptions(4.0, "3", (0.0, 0.4))),  # guidance ends within the prefix
    ("H1P1R2L1", "consistent", GuidanceOptions(4.0, "3", (0.7, 1.0))),  # and begins within the tail
]


def made(randomise, schedule="M4R1", step="midpoint", guidance=GuidanceOptions(1.0), count=40):
    """An objective with its networks, of four channels: guidance leaves the last alone."""
    options = TrainingOptions(
        "refiner",
        DataOptions(),
        RefinerOptions("t", "endpoint", schedule=schedule, refiner_step=step, trajectories=count, reference="M6"),
        guidance=guidance,
    )
    teacher = randomise(SiT(**SIZE, in_channels=4), 0).requires_grad_(False)
    refiner = randomise(VelocityRefiner(**SIZE, in_channels=4), 1)
    frozen = FrozenNetworks(teacher, NoAutoencoder(), CPU, torch.float32)
    data = open_data(options, frozen)
    objective = make_objective(options, frozen, refiner, data)
    sampler = FlowTurbo(teacher, refiner, schedule, guidance.guidance, step)
    return SimpleNamespace(teacher=teacher, refiner=refiner, data=data, objective=objective, sampler=sampler)


def batch_of(case, numbers=NUMBERS):
    return Batch(
        case.objective.records(numbers, CPU), case.data.starts(numbers)[1], torch.tensor(numbers), no_draws(numbers)
    )


@pytest.mark.parametrize(("schedule", "step", "guidance"), CASES)
def test_a_record_is_the_samplers_own_state_and_the_loss_its_end_point_error(randomise, schedule, step, guidance):
    case = made(randomise, schedule, step, guidance)
    batch = batch_of(case)
    state, target = unpack(batch.images, case.objective.branches)
    z, y = case.data.starts(NUMBERS)
    states = list(case.sampler.trajectory(z, y))
    own = states[case.objective.first - 1]
    assert torch.equal(state.x, own.x)
    assert [v.shape for v in state.velocities] == [v.shape for v in own.velocities]
    assert all(map(torch.equal, state.velocities, own.velocities))
    full = Guidance(guidance.cfg_scale, guidance.guidance.channels, guidance.cfg_interval)
    assert torch.equal(target, FlowTurbo(case.teacher, None, "M6", full).sample(z, y))
    error = (states[-1].x - target).square().mean((1, 2, 3))
    torch.testing.assert_close(case.objective(batch), error, rtol=1e-5, atol=0)
    assert error.min() > 0


@pytest.mark.parametrize(("schedule", "step", "guidance"), [CASES[0], CASES[3]])
def test_the_gradient_is_that_of_the_end_point_and_reaches_the_refiner_alone(randomise, schedule, step, guidance):
    case = made(randomise, schedule, step, guidance)
    batch, weight = batch_of(case), case.refiner.final_layer.linear.bias
    case.objective(batch).sum().backward()
    assert all(p.grad is None for p in case.teacher.parameters())
    assert any(bool((p.grad != 0).any()) for p in case.refiner.blocks.parameters() if p.grad is not None)
    index, small = int(weight.grad.abs().argmax()), 1e-2
    sums = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[index] += sign * small
            sums.append(float(case.objective(batch).double().sum()))
            weight[index] -= sign * small
    assert float(weight.grad[index]) == pytest.approx((sums[0] - sums[1]) / (2 * small), rel=2e-2)


def test_a_trajectory_depends_on_seed_and_number_alone(randomise):
    data = made(randomise).data
    z, y = data.starts(range(290, 310))
    one = data.starts([300])
    assert torch.equal(one[0][0], z[10])
    assert int(one[1]) == int(y[10])
    assert y[:6].tolist() == data.labels[290 - HELD_OUT : 296 - HELD_OUT]
    assert abs(float(z.mean())) < 0.05
    assert len(set(data.labels)) > 5
    other = made(randomise, count=50).data
    assert other.labels[:40] == data.labels
    assert other.fingerprint() == data.fingerprint()
    assert made(randomise, schedule="M3R1").data.fingerprint() != data.fingerprint()


class Stop:
    """A wish to stop, from the n-th question on."""

    def __init__(self, after=10**9):
        self.after = after

    @property
    def wanted(self):
        self.after -= 1
        return self.after < 0


def test_a_cache_that_is_stopped_keeps_what_is_finished_and_goes_on(randomise, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "BATCH", 32)
    data, made_of = made(randomise, count=40).data, []

    def make(numbers):
        made_of.append(numbers)
        return torch.tensor(numbers)[:, None, None, None].expand(-1, 3, 8, 8).float()

    def cache(stop, channels=3):
        made_of.clear()
        whole = data.cache(tmp_path / "c", channels, make, World(0, 0, 1, CPU), stop)
        return whole, [numbers.start for numbers in made_of]

    assert cache(Stop(3)) == (False, [0, 32, 64])
    (tmp_path / "c" / "00001.npy").write_bytes(b"half")
    assert cache(Stop()) == (True, [32, *range(96, 296, 32)])
    assert cache(Stop()) == (True, [])
    assert [float(data.read(index, False)[0][0, 0, 0]) for index in (0, 39)] == [256, 295]
    assert torch.equal(data.held_out()[0][:, 0, 0, 0], torch.arange(256.0))
    written = sum(np.load(file).nbytes for file in (tmp_path / "c").iterdir())
    assert written == data.bytes(3)
    with pytest.raises(OSError, match="MiB are free"):
        data.cache(tmp_path / "d", 10**12, make, World(0, 0, 1, CPU), Stop())
    with pytest.raises(ValueError, match="trajectories 0 to 31 are not finite"):
        data.cache(tmp_path / "e", 3, lambda n: make(n) * torch.nan, World(0, 0, 1, CPU), Stop())


# ---- runs


@pytest.fixture(scope="module")
def flags(teacher):
    return [
        *(*COMMON, "--model-teacher-ckpt", teacher, "--recipe", "endpoint", "--schedule", "M2R1", "--cfg-scale", 1),
        *("--refiner-step", "midpoint", "--reference", "M6", "--trajectories", 40, "--log-every", 5),
    ]


def test_a_run_without_images_lowers_the_error_that_users_will_see(flags, teacher, tmp_path):
    more = ["--steps", 60, "--lr", "3e-3", "--global-batch-size", 16, "--sample-every", 60, "--log-every", 20]
    folder = run(tmp_path, *flags, *more)
    logged = metrics(folder)
    assert logged[-1]["rmse"] < 0.9 * logged[0]["rmse"]
    record = json.loads((folder / "config.json").read_text())["training"]
    assert {name: record[name] for name in ("recipe", "schedule", "refiner_step", "cfg_scale", "cfg_every")} == {
        **{"recipe": "endpoint", "schedule": "M2R1", "refiner_step": "midpoint", "cfg_scale": 1.0, "cfg_every": 1}
    }
    assert (folder / "samples" / "0000060.png").is_file()
    assert "MiB in" in (folder / "log.txt").read_text()

    predictor = load_network(SiT, str(teacher))
    refiner = load_network(VelocityRefiner, str(folder))
    options = train.parse([*map(str, flags)])
    data = open_data(options, FrozenNetworks(predictor, NoAutoencoder(), CPU, torch.float32))
    z, y = data.starts(range(HELD_OUT))
    target = FlowTurbo(predictor, None, "M6", 1.0).sample(z, y)
    for name, schedule in (("rmse", "M2R1"), ("rmse_free", "M2L1"), ("rmse_without", "M2")):
        end = FlowTurbo(predictor, refiner, schedule, 1.0, "midpoint").sample(z, y)
        squares = (end - target).square().mean((1, 2, 3))
        assert [record[name] for record in logged][-1] == pytest.approx(float(squares.mean().sqrt()), rel=1e-4)
        error = squares.std() / len(squares) ** 0.5 / (2 * squares.mean().sqrt())
        assert logged[-1][name + "_error"] == pytest.approx(float(error), rel=1e-4)
    assert logged[-1]["step"] == logged[-2]["step"] == 60  # at the last log, and at the checkpoint
    assert re.search(
        r"step 60: end-point RMSE from 256 noises: M2R1 0\.\d{4} ± 0\.\d{4}, M2L1 .*, M2 .*, M2R1/M2L1 0\.\d{3} ± ",
        (folder / "log.txt").read_text(),
    )


def test_images_that_are_given_are_not_used_and_that_is_said(flags, data, tmp_path):
    """They cannot take the place of trajectories: a script for all recipes may always name them."""
    folder = run(tmp_path, *flags, "--steps", 1, "--data-path", data, "--trajectories", 8)
    assert "note: recipe endpoint trains on trajectories" in (folder / "log.txt").read_text()


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(flags, tmp_path):
    flags = [*flags, "--steps", 7, "--ckpt-every", 3]
    whole = run(tmp_path / "whole", *flags)
    parts = tmp_path / "parts"
    run(parts, *flags, "--resume", "auto", "--steps", 3)
    folder = run(parts, *flags, "--resume", "auto")
    assert [path.name for path in parts.iterdir()] == [folder.name]
    assert_same_bits(checkpoint(whole, 7), checkpoint(folder, 7))
    with pytest.raises(ValueError, match="trained otherwise: schedule 'M2R1', not 'M3R1'"):
        run(parts, *flags, "--resume", "auto", "--schedule", "M3R1")
    with pytest.raises(ValueError, match=r"trained otherwise: cfg_scale 1\.0, not 2\.0"):
        run(parts, *flags, "--resume", "auto", "--cfg-scale", 2)


def test_a_run_that_is_stopped_while_it_caches_goes_on(flags, tmp_path):
    flags = [*flags, "--steps", 3]
    whole = run(tmp_path / "whole", *flags)
    with pytest.raises(SystemExit, match="75"):
        run(tmp_path / "parts", *flags, "--resume", "auto", "--max-hours", 1e-9)
    (folder,) = (tmp_path / "parts").iterdir()
    assert [path.name for path in (folder / "checkpoints").glob("*.pt")] == ["0000000.pt"]
    assert run(tmp_path / "parts", *flags, "--resume", "auto") == folder
    assert_same_bits(checkpoint(whole, 3), checkpoint(folder, 3))


def test_two_ranks_share_the_cache_and_the_steps(flags, forks, tmp_path):
    flags = [*flags, "--exact", "--steps", 3, "--global-batch-size", 24]
    one = run(tmp_path / "one", *flags)
    done = forks(tmp_path / "out", *flags, "--results-dir", tmp_path / "two", ranks=2)
    assert done.codes == [0, 0], done.text
    (two,) = (tmp_path / "two").iterdir()
    caches = [sorted(next(folder.glob("trajectories-*")).iterdir()) for folder in (one, two)]
    for a, b in zip(*caches, strict=True):
        assert a.name == b.name
        assert a.read_bytes() == b.read_bytes()
    assert_same_bits(checkpoint(one, 3), checkpoint(two, 3))
    assert [record["rmse"] for record in metrics(one)] == [record["rmse"] for record in metrics(two)]


def test_what_cannot_be_trained_is_one_line(flags, save_network, tmp_path):
    base = [*map(str, flags), "--results-dir", str(tmp_path)]
    for more, message in (
        (["--recipe", "paper"], "target refiner needs data_path, the images; only recipe endpoint does without"),
        (["--target", "predictor"], "target predictor needs data_path"),
        (["--schedule", "M4"], "expected R, and after the first R or L alone, got M4"),
        (["--schedule", "M2R1P1"], "got M2R1P1"),
        (["--schedule", "R1"], "cannot start with R"),
        (["--schedule", "M4Q"], "cannot read schedule 'M4Q'"),
        (["--reference", "M4R1"], "reference M4R1 must be of the predictor alone"),
        (["--trajectories", "0"], "trajectories 0 must be at least 1"),
        (["--cfg-every", "0"], "expected a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            train.parse([*base, *more])
    free = save_network(tmp_path / "free.pt", in_channels=1, class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="no null class to guide with: expected cfg_scale 1"):
        train.main([*base, "--model-teacher-ckpt", str(free), "--cfg-scale", "2"])
    assert not list(tmp_path.glob("0*"))
