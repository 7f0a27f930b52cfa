from __future__ import annotations

import copy

import pytest
import torch

from flowturbo.models import SIT_CONFIGS, SiT
from flowturbo.networks.load import load_network
from flowturbo.networks.precision import cast
from flowturbo.refiner import VelocityRefiner

SMALL = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 10}


def on_meta(kind, **config):
    with torch.device("meta"):
        return kind(**config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_changes_the_blocks_and_nothing_else(predictor, refiner, dtype):
    for network in (predictor, refiner):
        assert cast(network, dtype) is network
        dtypes = {name: value.dtype for name, value in network.named_parameters()}
        assert {d for name, d in dtypes.items() if name.startswith("blocks.")} == {dtype}
        assert {d for name, d in dtypes.items() if not name.startswith("blocks.")} == {torch.float32}
        assert not any(block.attn.fused for block in network.blocks)  # slower on a CPU
        cast(network, torch.float32)
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert all(block.attn.fused for block in network.blocks)


def errors_in_half(network, arguments, dtype):
    """Relative errors of the output: of autocast over float32 weights, of `cast`, of all weights in half."""
    with torch.no_grad():
        exact = network(*arguments)
        with torch.autocast("cpu", dtype):
            outputs = [network(*arguments)]
        outputs.append(cast(copy.deepcopy(network), dtype)(*arguments))
        outputs.append(copy.deepcopy(network).to(dtype)(*arguments))
    assert outputs[1].dtype == torch.float32
    return [float((out.float() - exact).norm() / exact.norm()) for out in outputs]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
@pytest.mark.parametrize(("kind", "depth"), [(SiT, 4), (VelocityRefiner, 1)])
def test_cast_makes_several_times_less_error_than_autocast(kind, depth, dtype, bound, randomise, batch):
    """At weights of a network's usual size for its width."""
    network = randomise(kind(**SMALL | {"hidden_size": 128, "depth": depth}), 1, std=0.05)
    x, y = batch(16)
    arguments = (x, torch.rand(16), y) if kind is SiT else (x, torch.rand(16), torch.randn_like(x), y)
    of_autocast, of_cast, of_all = errors_in_half(network, arguments, dtype)
    assert 0 < of_cast < bound
    assert of_cast < of_autocast / 3
    assert of_cast < of_all / 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_makes_less_error_on_a_trained_network(dtype):
    """Its blocks do more than those of random networks, and make 0.6 times the error of all."""
    network = load_network(SiT, "digits-predictor.pt")
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(64, 1, 8, 8, generator=generator), torch.rand(64, generator=generator)
    of_autocast, of_cast, of_all = errors_in_half(network, (x, t, torch.arange(64) % 10), dtype)
    assert 0 < of_cast < 0.75 * of_autocast
    assert of_cast < 0.5 * of_all


def test_a_full_size_sampler_holds_at_most_1600_megabytes():
    """SiT-XL/2, its refiner and Stable Diffusion's decoder, as sampled with in bf16."""
    from diffusers import AutoencoderKL

    def held(*modules):
        return sum(p.nbytes for module in modules for p in (*module.parameters(), *module.buffers()))

    config = SIT_CONFIGS["SiT-XL/2"]
    predictor, refiner = on_meta(SiT, **config), on_meta(VelocityRefiner, **config | {"depth": 1})
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    autoencoder = on_meta(AutoencoderKL, **blocks, **widths)
    modules = predictor, refiner, autoencoder.decoder, autoencoder.post_quant_conv
    assert held(*modules) > 3e9
    for network in (predictor, refiner):
        cast(network, torch.bfloat16)
    autoencoder.to(torch.bfloat16)
    assert 1.5e9 < held(*modules) <= 1.6e9
