"""What only a CUDA device can show; every test skips itself without one."""

import numpy as np
import pytest
import torch

import sample
import sample_ddp_feature
import train
from flowturbo.data.loader import Batch
from flowturbo.models import SiT
from flowturbo.networks.autoencoder import NoAutoencoder, load_autoencoder
from flowturbo.networks.compiled import StaticGraphs
from flowturbo.networks.load import load_network
from flowturbo.networks.precision import cast, quantize
from flowturbo.refiner import VelocityRefiner
from flowturbo.sampling.sample_folder import read_archive
from flowturbo.system.distributed import World, pick_device
from flowturbo.training.build import FrozenNetworks
from flowturbo.training.objective import make_objective
from flowturbo.training.options import DataOptions, Optimisation, RefinerOptions, TrainingOptions
from flowturbo.training.step import State, update
from flowturbo.transport import FlowTurbo, Guidance
from flowturbo.weights.checkpoint import load_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_latents_on_cuda_equal_those_on_the_cpu(predictor, refiner, batch):
    z, y = batch(4)
    on_cpu = FlowTurbo(predictor, refiner, "H1P5R3", 4.0).sample(z, y)
    on_cuda = FlowTurbo(predictor.cuda(), refiner.cuda(), "H1P5R3", 4.0).sample(z.cuda(), y.cuda())
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_full_precision(predictor, refiner, batch, dtype):
    z, y = (value.cuda() for value in batch(4))
    sampler = FlowTurbo(predictor.cuda(), refiner.cuda(), "H1P5R3", 1.5)
    full = sampler.sample(z, y)
    with torch.autocast("cuda", dtype):
        half = sampler.sample(z, y)
    assert half.dtype == torch.float32
    assert (half - full).square().mean().sqrt() < 0.1 * full.square().mean().sqrt()


def test_the_device_index_is_the_local_rank():
    assert pick_device("cuda", local_rank=0) == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="is not there"):
        pick_device("cuda", local_rank=torch.cuda.device_count())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_does_not_wait_for_the_device(predictor, batch, dtype):
    """Whatever would wait raises an error; figures are read afterwards."""
    device = torch.device("cuda")
    teacher = cast(predictor.requires_grad_(False).to(device), dtype)
    model = VelocityRefiner(**{**teacher.config, "depth": 1}).to(device)
    chosen = Optimisation(global_batch_size=6, lr=1e-3, clip_grad=1.0, ema_decay=0.99, accumulate=2)
    options = TrainingOptions("refiner", DataOptions("-"), RefinerOptions("-"), optimisation=chosen)
    state = State.new(model, device, options.optimisation)
    objective = make_objective(options, FrozenNetworks(teacher, NoAutoencoder(), device, dtype), model)
    x1, y = batch(6, seed=1)
    samples = Batch(x1, y, torch.arange(6), objective.draw(range(6))).to(device)

    def step():
        return update(state, World(0, 0, 1, device), samples, objective, options.optimisation)

    results = [step()]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results += [step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    losses = [result.loss for result in results]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16 --compile"])
def test_a_refiner_trains_and_samples_on_cuda(tmp_path, digits, precision):
    arguments = ["--data-path", str(digits), "--model-teacher-ckpt", "digits-predictor.pt", "--device", "cuda"]
    arguments += ["--vae-ckpt", "none", "--steps", "20", "--global-batch-size", "32", "--lr", "1e-3"]
    train.main([*arguments, "--precision", *precision.split(), "--results-dir", str(tmp_path), "--num-workers", "2"])
    path = tmp_path / "000-refiner-no-note" / "checkpoints" / "0000020.pt"
    assert load_checkpoint(path)["step"] == 20
    assert sum(p.abs().sum() for p in load_network(VelocityRefiner, str(path)).final_layer.parameters()) > 0
    made = sample_ddp_feature.main(
        [
            *("--predictor-ckpt", "digits-predictor.pt", "--refiner-ckpt", str(path), "--vae-ckpt", "none"),
            *("--num-fid-samples", "20", "--sample-dir", str(tmp_path), "--tag", "cuda", "--device", "cuda"),
        ]
    )
    assert made.archive.is_file()


# Compiled and recorded trajectories


def recorded(sampler):
    """How many shapes the sampler replays as CUDA graphs; what could not be recorded is not counted."""
    return sum(function.__name__ == "replay" for function in sampler.engine.recordings.values())


@pytest.mark.filterwarnings("error:no CUDA graph")
@pytest.mark.parametrize("form", ["released", "single"])
def test_a_recorded_trajectory_follows_its_inputs(predictor, refiner, batch, form):
    """Noise and labels change between the calls, the shape now and then."""
    networks = predictor.cuda(), refiner.cuda()
    sampler = FlowTurbo(*networks, "H1P5R3", refiner_step=form, engine=StaticGraphs)
    eager = FlowTurbo(*networks, "H1P5R3", refiner_step=form)
    results = []
    for rows, seed in ((4, 0), (4, 1), (2, 2), (4, 0), (2, 3)):
        z, y = (value.cuda() for value in batch(rows, seed))
        for labels in (y, (y + 1) % 10):
            before = z.clone()
            out = sampler.sample(z, labels)
            assert torch.equal(z, before)
            expected = eager.sample(z, labels)
            torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)
            results.append((out, expected))
    assert recorded(sampler) == len(sampler.engine.recordings) == 2
    for out, expected in results:  # later calls change no earlier result
        torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)
    assert (results[0][0] - results[1][0]).abs().max() > 0.01  # the labels matter


@pytest.mark.filterwarnings("error:no CUDA graph")
@pytest.mark.parametrize("kwargs", [{"cfg_scale": 1.0}, {"cfg_scale": Guidance(interval=(0.2, 0.7))}], ids=str)
def test_other_guidance_is_recorded_too(predictor, refiner, batch, kwargs):
    networks = predictor.cuda(), refiner.cuda()
    sampler = FlowTurbo(*networks, "P2R2E1", engine=StaticGraphs, **kwargs)
    eager = FlowTurbo(*networks, "P2R2E1", **kwargs)
    for seed in (0, 1):
        z, y = (value.cuda() for value in batch(3, seed))
        torch.testing.assert_close(sampler.sample(z, y), eager.sample(z, y), atol=1e-3, rtol=1e-3)
        for step, other in zip(sampler.trajectory(z, y), eager.trajectory(z, y)):
            torch.testing.assert_close(step.x, other.x, atol=1e-3, rtol=1e-3)
    assert recorded(sampler) == 1


@pytest.mark.filterwarnings("error:no CUDA graph")
def test_without_recording_the_graphs_of_the_blocks_give_the_same(predictor, refiner, batch):
    z, y = (value.cuda() for value in batch(4))
    sampler = FlowTurbo(predictor.cuda(), refiner.cuda(), "H1P2R2", engine=StaticGraphs)
    latents = sampler.sample(z, y)
    assert recorded(sampler) == 1
    sampler.engine.recording = False
    torch.testing.assert_close(sampler.sample(z, y), latents, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("error:no CUDA graph")
def test_decoding_is_a_part_of_the_recording(predictor, refiner, batch, vae_folder):
    autoencoder = load_autoencoder(str(vae_folder), "cuda")
    autoencoder.compile()
    sampler = FlowTurbo(predictor.cuda(), refiner.cuda(), "H1P2R1", engine=StaticGraphs, decode=autoencoder.decode)
    eager, decode = FlowTurbo(predictor, refiner, "H1P2R1"), load_autoencoder(str(vae_folder), "cuda").decode
    images = []
    for seed in (0, 1):
        z, y = (value.cuda() for value in batch(2, seed))
        images.append(sampler.sample(z, y))
        assert images[-1].shape == (2, 3, 16, 16)
        # Convolutions are in TF32, torch's default.
        torch.testing.assert_close(images[-1], decode(eager.sample(z, y)), atol=1e-2, rtol=1e-2)
    assert (images[0] - images[1]).abs().max() > 0.1
    assert recorded(sampler) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_networks_in_half_stay_near_full_precision(predictor, refiner, batch, dtype):
    z, y = (value.cuda() for value in batch(4))
    networks = predictor.cuda(), refiner.cuda()
    full = FlowTurbo(*networks, "H1P5R3").sample(z, y)
    for network in networks:
        cast(network, dtype)
        assert all(block.attn.fused for block in network.blocks)
    half = FlowTurbo(*networks, "H1P5R3", engine=StaticGraphs).sample(z, y)
    assert half.dtype == torch.float32
    assert 0 < (half - full).norm() < 0.05 * (full - z).norm()


@pytest.mark.filterwarnings("error:no CUDA graph")
def test_the_scripts_compile_on_cuda(tmp_path, pixel_models, capsys):
    """Files are written by another thread while a trajectory is recorded."""
    flags = [*pixel_models, "--schedule", "H1P2R1", "--device", "cuda", "--precision", "fp32"]
    counts = ["--num-fid-samples", "18", "--per-proc-batch-size", "4", "--png", "--sample-dir", str(tmp_path)]
    eager, compiled = (
        read_archive(sample_ddp_feature.main([*flags, *counts, "--tag", tag, *extra]).archive).astype(int)
        for tag, extra in (("eager", []), ("compiled", ["--compile"]))
    )
    assert np.abs(eager - compiled).max() <= 1
    sample.main([*flags, "--compare", "H2", "H1P1R1", "--compile", "--out", str(tmp_path / "out.png")])
    assert "H1P1R1 compiled   3 + 2 evaluations" in capsys.readouterr().out


@pytest.mark.filterwarnings("error:no CUDA graph")
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_quantised_networks_are_compiled_and_recorded(randomise, kind):
    pytest.importorskip("torchao")
    if kind == "float8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 on this device")
    config = {"input_size": 8, "hidden_size": 128, "depth": 2, "num_heads": 4, "num_classes": 10}
    network = cast(randomise(SiT(**config), 1, std=0.05).cuda(), torch.bfloat16)
    z, y = torch.randn(16, 4, 8, 8, device="cuda"), torch.arange(16, device="cuda") % 10
    exact = FlowTurbo(network, None, "H1P2").sample(z, y)
    assert 0 < quantize(network, kind) < 0.05
    sampler = FlowTurbo(network, None, "H1P2", engine=StaticGraphs)
    assert (sampler.sample(z, y) - exact).norm() < 0.05 * (exact - z).norm()
    assert recorded(sampler) == 1
