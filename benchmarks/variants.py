"""What is compared: sampling as the published code does it, and FlowTurbo, on the same networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.plan import Plan
from flowturbo.data.randomness import keyed_noise
from flowturbo.models import SIT_CONFIGS, SiT
from flowturbo.networks.autoencoder import Autoencoder
from flowturbo.networks.compiled import graph_limits
from flowturbo.refiner import VelocityRefiner
from flowturbo.transport import FlowTurbo, Schedule
from flowturbo.transport.guidance import guide
from flowturbo.transport.integrators import integrate
from pipeline import autocast


class Sampler(Protocol):
    """What ReleasedStyle and FlowTurbo have in common."""

    def sample(self, z: Tensor, y: Tensor) -> Tensor: ...


VARIANTS = ("released", "FlowTurbo", "released compiled", "FlowTurbo compiled")


@dataclass
class Networks:
    """One set of networks twice: in float32, and as FlowTurbo holds them for a precision."""

    predictor: SiT
    refiner: VelocityRefiner
    autoencoder: Autoencoder
    dtype: torch.dtype

    def __post_init__(self) -> None:
        half = self.dtype != torch.float32
        self.fast_predictor = copy.deepcopy(self.predictor).cast(self.dtype) if half else self.predictor
        self.fast_refiner = copy.deepcopy(self.refiner).cast(self.dtype) if half else self.refiner
        self.fast_autoencoder = copy.deepcopy(self.autoencoder).to(self.dtype)
        self.autoencoder.network.to(memory_format=torch.contiguous_format)  # as the published code decodes
        # On a CPU these are no other than the two above: compiling would gain nothing.
        self.compiled_autoencoder = copy.deepcopy(self.autoencoder)
        self.fast_compiled_autoencoder = copy.deepcopy(self.fast_autoencoder)
        for autoencoder in (self.compiled_autoencoder, self.fast_compiled_autoencoder):
            autoencoder.compile()
        # The published code does not freeze its weights: autocast then keeps what it has cast until it ends.
        for network in (self.predictor, self.refiner, self.autoencoder, self.compiled_autoencoder):
            network.requires_grad_(True)

    def autoencoder_of(self, variant: str) -> Autoencoder:
        """The one that a variant decodes with."""
        compiled, fast = variant.endswith("compiled"), variant.startswith("FlowTurbo")
        name = "_".join(["fast"] * fast + ["compiled"] * compiled + ["autoencoder"])
        return getattr(self, name)

    def weights(self, variant: str, decode: bool) -> int:
        """Bytes of the weights that a variant samples with."""
        fast = variant.startswith("FlowTurbo")
        held = [self.fast_predictor, self.fast_refiner] if fast else [self.predictor, self.refiner]
        if decode:
            autoencoder = self.autoencoder_of(variant).network
            held += [autoencoder.decoder, autoencoder.post_quant_conv]
        return sum(p.numel() * p.element_size() for network in held for p in network.parameters())


def build_networks(plan: Plan) -> Networks:
    """SiT, refiner and Stable Diffusion's autoencoder with random weights, the same in every run."""
    torch.manual_seed(0)
    with plan.device:
        autoencoder = Autoencoder(stable_diffusion_autoencoder())
        config = {**SIT_CONFIGS[plan.model], "input_size": plan.image_size // autoencoder.factor}
        predictor = awaken(SiT(**{**config, "depth": plan.depth}))
        refiner = awaken(VelocityRefiner(**{**config, "depth": 1}))
    return Networks(
        predictor.eval().requires_grad_(False), refiner.eval().requires_grad_(False), autoencoder, plan.dtype
    )


def noise_and_labels(networks: Networks, batch_size: int) -> tuple[Tensor, Tensor]:
    """The batch that every variant samples: z (N, C, H, W) and y (N,)."""
    device, predictor = networks.predictor.pos_embed.device, networks.predictor
    z = keyed_noise(0, range(batch_size), predictor.input_shape).to(device)
    return z, torch.arange(batch_size, device=device) % predictor.num_classes


def stable_diffusion_autoencoder() -> nn.Module:
    """An AutoencoderKL of Stable Diffusion's shape with random weights."""
    from diffusers import AutoencoderKL

    levels = 4
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    )


def awaken(network: SiT) -> SiT:
    """The network with small random weights where adaLN-Zero has zeros: it must not return zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)
    return network


class ReleasedStyle:
    """Sampling with the costs of the published code.

    float32 weights, in half precision under one autocast round trajectory and decoding, in float32 with TF32; time
    and class embedded in every evaluation; a doubled state; times on the host. `compile` compiles each network as a
    whole, and nothing of what lies between them.
    """

    def __init__(
        self,
        predictor: SiT,
        refiner: VelocityRefiner,
        schedule: str,
        cfg_scale: float,
        dtype: torch.dtype,
        *,
        compile: bool = False,
        decode: Callable[[Tensor], Tensor] | None = None,
    ):
        self.predictor, self.refiner = (whole(n) if compile else n for n in (predictor, refiner))
        self.null, self.schedule = predictor.null_class, Schedule.parse(schedule)
        self.cfg_scale, self.dtype, self.decode = cfg_scale, dtype, decode

    @torch.no_grad()
    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        """Latents or images from noise z (N, C, H, W) and labels y (N,)."""
        n = len(z)
        labels = torch.cat([y, torch.full_like(y, self.null)])

        def guided(network: Callable[..., Tensor], x: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
            both = network(torch.cat([x[:n], x[:n]]), t.to(z.device).expand(2 * n), *rest, labels)
            return guide(both.float(), self.cfg_scale, 3)

        steps = integrate(
            lambda x, t: guided(self.predictor, x, t),
            torch.cat([z, z]),
            self.schedule.blocks,
            self.schedule.times(),
            offset=lambda x, t, v: guided(self.refiner, x, t, v),
        )
        with graph_limits(), tf32(), autocast(z.device, self.dtype):
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


def whole(network: SiT) -> Callable[..., Tensor]:
    """The network compiled as one graph, without the shared compilation of its blocks; the same weights."""
    network = copy.copy(network)
    network.regional = False
    return torch.compile(network, dynamic=False)


def make(networks: Networks, variant: str, schedule: str, cfg_scale: float, decode: bool) -> Sampler:
    """The sampler of a name in VARIANTS."""
    how: dict[str, Any] = {
        "compile": variant.endswith("compiled"),
        "decode": networks.autoencoder_of(variant).decode if decode else None,
    }
    if variant.startswith("released"):
        return ReleasedStyle(networks.predictor, networks.refiner, schedule, cfg_scale, networks.dtype, **how)
    return FlowTurbo(networks.fast_predictor, networks.fast_refiner, schedule, cfg_scale, **how)


def reference(networks: Networks, schedule: str, cfg_scale: float, decode: bool) -> FlowTurbo:
    """What every error is measured against: float32 throughout, eager."""
    autoencoder = networks.autoencoder.decode if decode else None
    return FlowTurbo(networks.predictor, networks.refiner, schedule, cfg_scale, decode=autoencoder)


@dataclass
class Error:
    """The difference of a result from the exact one: rms relative to its rms, and the largest."""

    rms: float
    largest: float


def error(result: Tensor, exact: Tensor) -> Error:
    difference = (result.float() - exact).square()
    return Error(float((difference.mean() / exact.square().mean()).sqrt()), float(difference.max().sqrt()))
