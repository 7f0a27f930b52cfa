"""Half precision and 8 bits: which a device has, and networks held in them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from flowturbo.models import SiT

AnySiT = TypeVar("AnySiT", bound=SiT)


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The torch dtype for "auto" (bf16 on CUDA where the device has it, else fp32), "fp32", "bf16" or "fp16"."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bf16(device) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices itself; one that emulates them is slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to a half precision, or nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def cast(network: AnySiT, dtype: torch.dtype) -> AnySiT:
    """The same network with the weights of its blocks, 99 % of all in SiT-XL/2, held in dtype and nothing else.

    What surrounds the blocks costs next to nothing and stays in float32: in half precision it would make most
    of the rounding error. On a CPU, attention in half precision is faster as two plain matrix products.
    Raises ValueError naming a weight that is larger than dtype goes.
    """
    network.blocks.to(dtype)
    check_finite(network)
    for block in network.blocks:
        block.attn.fused = network.pos_embed.is_cuda or dtype == torch.float32
    return network


def check_finite(network: SiT, of: str = "") -> None:
    """Raises ValueError naming a weight that is not finite in the type that it is held in; `of` says whose it is."""
    for name, value in network.named_parameters():
        if not value.is_meta and not value.isfinite().all():
            raise ValueError(f"{of}{name} is not finite in {str(value.dtype).removeprefix('torch.')}")


def quantize(network: SiT, kind: str) -> float:
    """Put the matrix products of qkv, fc1 and fc2, 88 % of a block's, into "int8" or "float8", row by row.

    Returns the error that it makes: the rms difference of the output for noise, relative to the output's rms.
    Raises ValueError where torchao is missing or the device cannot compute so.
    """
    try:
        import torchao.quantization as ao
    except ImportError:
        raise ValueError("quantization needs torchao: pip install torchao") from None
    config = {
        "int8": ao.Int8DynamicActivationInt8WeightConfig,
        "float8": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
    }[kind]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(network.images_in, 1, *network.input_shape, generator=generator).to(network.pos_embed.device)
    t, y = images.new_full((1,), 0.5), torch.zeros(1, dtype=torch.int64, device=images.device)

    def output() -> Tensor:
        with torch.no_grad():
            return network.evaluate(tuple(images), t, y)

    try:
        exact = output()
        ao.quantize_(network.blocks, config(), lambda _, name: name.endswith(("attn.qkv", "mlp.fc1", "mlp.fc2")))
        return float((output() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"quantization to {kind} does not work on this device: {reason}") from None
