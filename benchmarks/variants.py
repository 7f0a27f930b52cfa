"""What is compared: sampling as the released code does it, and FlowTurbo, on the same networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from benchmarks.options import Plan
from benchmarks.published import PlainSiT, ReleasedStyle
from flowturbo.data.pictures import to_uint8
from flowturbo.data.randomness import keyed_noise
from flowturbo.models import SIT_CONFIGS, SiT
from flowturbo.networks.autoencoder import Autoencoder
from flowturbo.networks.compiled import StaticGraphs
from flowturbo.networks.precision import cast
from flowturbo.refiner import VelocityRefiner
from flowturbo.sampling.generate import ImageSampler
from flowturbo.sampling.generate import Networks as SampledNetworks
from flowturbo.sampling.solvers import parse_sampler, parse_schedule
from flowturbo.transport import FlowTurbo, Guidance, SamplerSettings

AnySiT = TypeVar("AnySiT", bound=SiT)


class Sampler(Protocol):
    """What ReleasedStyle and the samplers of flowturbo.transport have in common."""

    def sample(self, z: Tensor, y: Tensor) -> Tensor: ...


FLOAT32 = "released, float32"  # beside the released code's own setting, which is autocast where a plan is in half


def variants_of(plan: Plan) -> list[str]:
    """The names of what is compared."""
    own = ["released", "FlowTurbo", "released compiled", "FlowTurbo compiled"]
    return own if plan.dtype == torch.float32 else [FLOAT32, *own]


@dataclass
class Networks:
    """One set of networks twice: in float32, and as FlowTurbo holds them for a precision."""

    predictor: SiT
    refiner: VelocityRefiner
    autoencoder: Autoencoder
    dtype: torch.dtype

    def __post_init__(self) -> None:
        half = self.dtype != torch.float32
        self.fast_predictor = cast(copy.deepcopy(self.predictor), self.dtype) if half else self.predictor
        self.fast_refiner = cast(copy.deepcopy(self.refiner), self.dtype) if half else self.refiner
        self.fast_autoencoder = copy.deepcopy(self.autoencoder).to(self.dtype)
        self.autoencoder.network.to(memory_format=torch.contiguous_format)  # as the released code decodes
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


def stable_diffusion_autoencoder() -> Any:
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


def awaken(network: AnySiT) -> AnySiT:
    """The network with small random weights where adaLN-Zero has zeros: it must not return zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)
    return network


@dataclass
class Run:
    """What is measured of a variant: `call`, as users make it; and `values`, float, for its error."""

    call: Callable[[], Tensor]
    values: Callable[[], Tensor]
    sampler: Sampler


def make(networks: Networks, variant: str, schedule: str, cfg_scale: float, decode: bool, batch_size: int) -> Run:
    """The run of a name in `variants_of` on the batch that all of them sample.

    Without decoding it goes from noise on the device to latents. With it, from seed, numbers and classes to uint8
    images, as sample.py and sample_ddp_feature.py make them.
    """
    z, y = noise_and_labels(networks, batch_size)
    autoencoder = networks.autoencoder_of(variant)
    decoder = autoencoder.decode if decode else None
    compiled = variant.endswith("compiled")
    sampler: Sampler
    if variant.startswith("released"):
        full = (PlainSiT(networks.predictor), PlainSiT(networks.refiner), parse_schedule(schedule), cfg_scale)
        dtype = torch.float32 if variant == FLOAT32 else networks.dtype
        sampler = ReleasedStyle(*full, dtype, compile=compiled, decode=decoder)
    else:
        fast = (networks.fast_predictor, networks.fast_refiner, parse_schedule(schedule), cfg_scale)
        sampler = FlowTurbo(*fast, engine=StaticGraphs if compiled else None, decode=decoder)

    def values() -> Tensor:
        return sampler.sample(z, y)

    if not decode:
        return Run(values, values, sampler)
    if variant.startswith("released"):

        def images() -> Tensor:
            noise = keyed_noise(0, range(batch_size), networks.predictor.input_shape).to(z.device)
            return to_uint8(sampler.sample(noise, y))

        return Run(images, values, sampler)
    sampled = SampledNetworks(networks.fast_predictor, networks.fast_refiner, autoencoder, z.device)
    image_sampler = ImageSampler(sampled, parse_sampler(schedule), SamplerSettings(Guidance(cfg_scale)), compiled)
    classes = y.tolist()
    return Run(lambda: image_sampler(0, range(batch_size), classes), values, image_sampler.sampler)


def reference(networks: Networks, schedule: str, cfg_scale: float, decode: bool) -> FlowTurbo:
    """What every error is measured against: float32 throughout, eager."""
    autoencoder = networks.autoencoder.decode if decode else None
    return FlowTurbo(networks.predictor, networks.refiner, parse_schedule(schedule), cfg_scale, decode=autoencoder)


@dataclass
class Error:
    """The difference of a result from the exact one: rms relative to its rms, and the largest."""

    rms: float
    largest: float


def error(result: Tensor, exact: Tensor) -> Error:
    difference = (result.float() - exact).square()
    return Error(float((difference.mean() / exact.square().mean()).sqrt()), float(difference.max().sqrt()))
