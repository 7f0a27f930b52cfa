"""The networks and the sampling loop of the published code, with its costs: the baseline of every ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowturbo.models import Block, SiT
from flowturbo.networks.compiled import compiler_errors, graph_limits
from flowturbo.networks.precision import autocast
from flowturbo.transport import Schedule
from flowturbo.transport.blocks import integrate
from flowturbo.transport.branches import guide
from flowturbo.transport.solver import Solver


class PlainSiT(nn.Module):
    """A SiT's weights in a network as the published one is built: the patches by a convolution, one adaLN after the
    other, attention and MLP as timm has them.

    It shares its weights with the network that it is made of, and takes the same arguments but for `drop`.
    """

    def __init__(self, network: SiT):
        super().__init__()
        self.network = network

    @property
    def null_class(self) -> int:
        return self.network.null_class

    def forward(self, x: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
        """(N, C, H, W), t (N,), for a refiner a velocity, labels (N,) -> (N, C, H, W)."""
        net = self.network
        *velocities, y = rest
        channels, height, width = net.input_shape
        p = net.patch_size
        embed = net.x_embedder.proj
        tokens = F.conv2d(torch.cat([x, *velocities], 1), embed.weight, embed.bias, stride=p).flatten(2).transpose(1, 2)
        tokens = tokens + net.pos_embed
        condition = net.t_embedder(t) + net.y_embedder(y)
        for block in net.blocks:
            tokens = plain_block(block, tokens, condition)
        final = net.final_layer
        shift, scale = final.adaLN_modulation(condition).chunk(2, dim=1)
        patches = final.linear(shifted(final.norm_final(tokens), shift, scale))
        patches = patches.reshape(len(x), height // p, width // p, p, p, net.out_channels)
        images = torch.einsum("nhwpqc->nchpwq", patches).reshape(len(x), net.out_channels, height, width)
        return images[:, :channels]


def plain_block(block: Block, tokens: Tensor, condition: Tensor) -> Tensor:
    """x + gate · attention(shift + scale · norm(x)), and the same of the MLP: adaLN-Zero, from the condition (N, D)."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(condition).chunk(6, dim=1)
    n, length, width = tokens.shape
    inputs, attention = shifted(block.norm1(tokens), shift_a, scale_a), block.attn
    qkv = attention.qkv(inputs).reshape(n, length, 3, attention.num_heads, width // attention.num_heads)
    mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
    tokens = tokens + gate_a.unsqueeze(1) * attention.proj(mixed.transpose(1, 2).reshape(n, length, width))
    inputs = shifted(block.norm2(tokens), shift_m, scale_m)
    return tokens + gate_m.unsqueeze(1) * block.mlp.fc2(F.gelu(block.mlp.fc1(inputs), approximate="tanh"))


def shifted(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine map, of rows (N, T, D) by (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class ReleasedStyle:
    """Sampling with the costs of the released code.

    float32 weights, in half precision under one autocast round trajectory and decoding, in float32 with TF32; time
    and class embedded in every evaluation; a doubled state; times on the host. `compile` compiles each network as a
    whole, and nothing of what lies between them; raises ValueError, when called, where this machine cannot.
    """

    def __init__(
        self,
        predictor: SiT | PlainSiT,
        refiner: SiT | PlainSiT,
        schedule: Schedule | Solver,
        cfg_scale: float,
        dtype: torch.dtype,
        *,
        compile: bool = False,
        decode: Callable[[Tensor], Tensor] | None = None,
    ):
        self.predictor, self.refiner = (whole(n) if compile else n for n in (predictor, refiner))
        self.null, self.schedule = predictor.null_class, schedule
        self.cfg_scale, self.dtype, self.decode = cfg_scale, dtype, decode

    @torch.no_grad()
    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        """Latents or images from noise z (N, C, H, W) and labels y (N,)."""
        n = len(z)
        labels = torch.cat([y, torch.full_like(y, self.null)])

        def guided(network: Callable[..., Tensor], x: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
            both = network(torch.cat([x[:n], x[:n]]), t.to(z.device).expand(2 * n), *rest, labels)
            return guide(both.float(), self.cfg_scale, 3)

        def on_host(t: float) -> Tensor:
            return torch.tensor(t, dtype=torch.float32)

        steps = integrate(
            self.schedule.plan(),
            torch.cat([z, z]),
            lambda x, t: guided(self.predictor, x, on_host(t)),
            lambda x, t, seen, base: base + guided(self.refiner, x, on_host(t), seen),
        )
        with ExitStack() as within:
            for each in (graph_limits(), compiler_errors(), tf32(), autocast(z.device, self.dtype)):
                within.enter_context(each)
            for step in steps:
                latents = step.x[:n]
            return latents if self.decode is None else self.decode(latents)


@contextmanager
def tf32() -> Iterator[None]:
    """float32 matrix products in TF32, on CUDA devices that have it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def whole(network: nn.Module) -> Callable[..., Tensor]:
    """The network compiled as one graph, without the shared compilation of its blocks; the same weights."""
    return torch.compile(network, dynamic=False)
