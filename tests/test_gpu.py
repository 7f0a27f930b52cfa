"""What only a CUDA device can show; every test skips itself without one."""

import pytest
import torch

import sample_ddp_feature
import train
from pipeline import load_network
from refiner import VelocityRefiner
from runtime.checkpoint import load_checkpoint
from runtime.distributed import pick_device
from transport import FlowTurbo

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


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_refiner_trains_and_samples_on_cuda(tmp_path, digits, precision):
    arguments = ["--data-path", str(digits), "--model-teacher-ckpt", "assets/digits-predictor.pt", "--device", "cuda"]
    arguments += ["--vae-ckpt", "none", "--steps", "20", "--global-batch-size", "32", "--lr", "1e-3"]
    train.main([*arguments, "--precision", precision, "--results-dir", str(tmp_path), "--num-workers", "2"])
    path = tmp_path / "000-refiner-no-note" / "checkpoints" / "0000020.pt"
    assert load_checkpoint(path)["step"] == 20
    assert sum(p.abs().sum() for p in load_network(VelocityRefiner, str(path)).final_layer.parameters()) > 0
    made = sample_ddp_feature.main(
        [
            *("--predictor-ckpt", "assets/digits-predictor.pt", "--refiner-ckpt", str(path), "--vae-ckpt", "none"),
            *("--num-fid-samples", "20", "--sample-dir", str(tmp_path), "--tag", "cuda", "--device", "cuda"),
        ]
    )
    assert made.archive.is_file()
