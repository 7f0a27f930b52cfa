"""What the scripts share above the packages: networks from checkpoint files, precision, and sampling flags."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from flowturbo.data.randomness import keyed_noise
from flowturbo.evaluation import Extractor, make_extractor
from flowturbo.evaluation.extractors import INCEPTION_URL, INCEPTION_VARIABLE
from flowturbo.models import SiT, config_from_state
from flowturbo.networks.autoencoder import Autoencoder, NoAutoencoder, load_autoencoder
from flowturbo.refiner import VelocityRefiner
from flowturbo.system import cli
from flowturbo.transport import PATHS, FlowTurbo, Guidance, Sampler, SDESampler, make_sampler
from flowturbo.transport.samplers import DIFFUSIONS
from flowturbo.transport.schedule import REFINER_STEPS
from flowturbo.weights.checkpoint import load_checkpoint, load_weights, weights_of
from flowturbo.weights.fetch import fetch, hint, is_offline, locate

Network = TypeVar("Network", bound=SiT)
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
QUANTIZATIONS = ("int8", "float8")


def load_network(kind: type[Network], path: str, prefer_ema: bool = True) -> Network:
    """The SiT or VelocityRefiner in a checkpoint file, on the CPU in float32, in evaluation mode.

    Checkpoints of train.py carry their config; for the public ones it follows from the shapes.
    Raises ValueError naming the file for one that is missing, damaged, or holds another network.
    """
    found = locate(path)
    if found is None and hint(path):
        raise ValueError(f"checkpoint {path!r} does not exist: get it with {hint(path)}")
    path = str(found or path)
    content = load_checkpoint(path)
    weights = weights_of(content, path, prefer_ema)
    try:
        config = dict(content.get("config", {}).get("model", {}))
        name = config.pop("class", kind.__name__)
        if name != kind.__name__:
            raise ValueError(f"it holds a {name}, expected a {kind.__name__}")
        if config.get("depth", 1) > len(weights):  # a block has many weights; building it would take forever
            raise ValueError(f"its config has {config['depth']} blocks, its weights have not")
        with torch.device("meta"):  # no time for an initialisation that is overwritten
            network = kind(**(config or config_from_state(weights, kind.images_in)))
    except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"checkpoint {path!r} makes no network, by its config: {cli.one_line(error)}") from None
    load_weights(network, weights, path)
    return network.eval().requires_grad_(False)


def trained_path(path: str) -> str | None:
    """The interpolation path that a checkpoint of train.py was trained on; None where it does not say."""
    config = load_checkpoint(path).get("config")
    training = config.get("training") if isinstance(config, dict) else None
    found = training.get("path_type") if isinstance(training, dict) else None
    return found if found in PATHS else None


class CallCounter:
    """Counts the evaluations of a network while it is entered; `on_call` is called after each."""

    def __init__(self, network: nn.Module | None, on_call: Callable[[], object] = lambda: None):
        self.network, self.on_call, self.count = network, on_call, 0

    def __enter__(self) -> CallCounter:
        def hook(*_: object) -> None:
            self.count += 1
            self.on_call()

        self.handle = self.network.register_forward_hook(hook) if self.network is not None else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.handle is not None:
            self.handle.remove()


def model_config(network: SiT) -> dict:
    """What a checkpoint keeps so that `load_network` can rebuild the network; JSON types."""
    return {"class": type(network).__name__, **network.config}


def load_autoencoder_of(
    predictor: SiT | None, name: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> Autoencoder | NoAutoencoder:
    """The autoencoder called `name`, for a predictor that goes with it if one is given.

    Raises ValueError for another; for a model of pixels before an autoencoder is looked for.
    """
    if predictor is not None and name != "none" and predictor.input_shape[0] in (1, 3):
        raise ValueError(
            f"the predictor works on images of {predictor.input_shape[0]} channels, not latents: pass --vae-ckpt none"
        )
    autoencoder = load_autoencoder(name, device, dtype)
    if predictor is not None:
        check_match(predictor, None, autoencoder)
    return autoencoder


def check_match(predictor: SiT, refiner: VelocityRefiner | None, autoencoder: Autoencoder | NoAutoencoder) -> None:
    """Raises ValueError unless predictor, refiner and autoencoder speak of the same latents and classes."""
    if refiner is not None and (refiner.input_shape, refiner.num_classes) != (
        predictor.input_shape,
        predictor.num_classes,
    ):
        raise ValueError(
            f"the refiner is made for inputs {refiner.input_shape} and {refiner.num_classes} classes, "
            f"the predictor for {predictor.input_shape} and {predictor.num_classes}"
        )
    channels = predictor.input_shape[0]
    if autoencoder.channels not in (None, channels):
        raise ValueError(
            f"the autoencoder has {autoencoder.channels} latent channels, the predictor {channels}; "
            "a pixel-space model takes --vae-ckpt none"
        )
    if autoencoder.channels is None and channels not in (1, 3):
        raise ValueError(f"--vae-ckpt none is for models of 1 or 3 channels, this predictor has {channels}")


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


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """--predictor-ckpt, --refiner-ckpt, --vae-ckpt, --device and --precision."""
    group = parser.add_argument_group("networks")
    group.add_argument("--predictor-ckpt", metavar="FILE", default="SiT-XL-2-256x256.pt", help="the SiT's weights")
    group.add_argument(
        "--refiner-ckpt", metavar="FILE", default="SiT-XL-2-Refiner.pt", help="the refiner's, for schedules with R"
    )
    group.add_argument(
        "--vae-ckpt",
        metavar="NAME",
        default="vae-ema",
        help="autoencoder: vae-ema (stabilityai/sd-vae-ft-ema), vae-mse, a hub id, a local folder, or none for a "
        "model of pixels",
    )
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:K or cpu")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the blocks' weights and the autoencoder; auto is bf16 on CUDA, fp32 elsewhere",
    )
    group.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="the blocks' largest matrix products in 8 bits, with torchao; tells the error that it makes",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="each sampling block as a static graph, on CUDA the whole trajectory; takes up to a minute first",
    )


def add_sampling_flags(parser: argparse.ArgumentParser, cfg_scale: float) -> None:
    """--cfg-scale and what else shapes a trajectory."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--cfg-scale", type=float, default=cfg_scale, help="guidance; 1 is none, at half the cost")
    group.add_argument(
        "--cfg-channels", default="3", help="guide the first so many channels, or all; 3 as published for SiT"
    )
    group.add_argument(
        "--cfg-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="guide only while LOW <= t <= HIGH",
    )
    group.add_argument(
        "--refiner-step",
        choices=REFINER_STEPS,
        default="released",
        help="R blocks as in the published code, consistent with the training, or with a single evaluation",
    )
    group.add_argument(
        "--path-type",
        choices=tuple(PATHS),
        help="path the predictor was trained on (default: what its checkpoint says, or linear)",
    )
    group.add_argument("--atol", type=float, default=1e-6, help="absolute tolerance of dopri5")
    group.add_argument("--rtol", type=float, default=1e-3, help="relative tolerance of dopri5")
    group.add_argument("--diffusion", choices=tuple(DIFFUSIONS), default="sigma", help="diffusion term of the SDE")
    group.add_argument("--seed", type=cli.seed, default=0, help="image i depends on the seed and i alone")


def guidance_of(args: argparse.Namespace) -> Guidance:
    """The guidance that the sampling flags ask for. Raises ValueError for impossible values."""
    channels = args.cfg_channels
    if channels != "all" and not re.fullmatch("[0-9]{1,9}", channels):
        raise ValueError(f"--cfg-channels {channels!r} must be 'all' or a number")
    return Guidance(args.cfg_scale, channels if channels == "all" else int(channels), tuple(args.cfg_interval))


@dataclass
class Networks:
    """What a sampling run computes with."""

    predictor: SiT
    refiner: VelocityRefiner | None
    autoencoder: Autoencoder | NoAutoencoder
    device: torch.device


def parse_sampler(text: str) -> Sampler:
    """The sampler that a text names, without networks. Raises ValueError for what names none."""
    return make_sampler(text, lambda *_: None, lambda *_: None)


def needs_refiner(text: str) -> bool:
    """Whether the sampler of this name has R blocks."""
    sampler = parse_sampler(text)
    return isinstance(sampler, FlowTurbo) and "R" in sampler.schedule.blocks


def check_files(args: argparse.Namespace, refiner: bool) -> None:
    """Find the checkpoint files, here or among the downloads, and put their paths into the arguments.

    Raises Advice, two lines, where one is missing: which, the command that gets it, and the flag for a local path.
    """
    missing = {}
    for flag in ("--predictor-ckpt", "--refiner-ckpt") if refiner else ("--predictor-ckpt",):
        name = flag[2:].replace("-", "_")
        found = locate(getattr(args, name))
        if found is not None and found.is_file():
            setattr(args, name, str(found))
        else:
            missing[flag] = getattr(args, name)
    if missing:
        files = ", ".join(f"{path} ({flag})" for flag, path in missing.items())
        command = hint(*missing.values())
        raise cli.Advice(
            f"missing weights: {files}\n"
            + (f"get them with {command}, or " if command else "")
            + f"pass a local path with {' and '.join(missing)} (the autoencoder's with --vae-ckpt)"
        )


def load_networks(
    args: argparse.Namespace, refiner: bool, device: torch.device, say: Callable[[str], object] = print
) -> Networks:
    """Predictor, refiner if asked for, and autoencoder from the network flags, on the device.

    `say` is told the error that --quantize makes. Raises ValueError where a file is damaged or they do not fit each
    other or the guidance.
    """
    predictor = load_network(SiT, args.predictor_ckpt)
    dtype = pick_precision(args.precision, device)
    networks = Networks(
        predictor,
        load_network(VelocityRefiner, args.refiner_ckpt) if refiner else None,
        load_autoencoder_of(predictor, args.vae_ckpt, device, dtype),
        device,
    )
    check_match(networks.predictor, networks.refiner, networks.autoencoder)
    trained_on = trained_path(args.predictor_ckpt)
    args.path_type = args.path_type or trained_on or "linear"
    if trained_on not in (None, args.path_type):
        raise ValueError(f"the predictor was trained on the {trained_on} path, not on --path-type {args.path_type}")
    if networks.predictor.class_dropout_prob <= 0 and args.cfg_scale != 1:
        raise ValueError("this predictor has no null class to guide with: pass --cfg-scale 1")
    for network in (networks.predictor, networks.refiner):
        if network is not None:
            network.to(device).cast(dtype)
            if args.quantize:
                error = quantize(network, args.quantize)
                say(f"{type(network).__name__} in {args.quantize}: relative rms error of its output {error:.1e}")
    if args.compile:
        networks.autoencoder.compile()
    return networks


def quantize(network: SiT, kind: str) -> float:
    """Put the matrix products of qkv, fc1 and fc2, 88 % of a block's, into "int8" or "float8", row by row.

    Returns the error that it makes: the rms difference of the output for noise, relative to the output's rms.
    Raises ValueError where torchao is missing or the device cannot compute so.
    """
    try:
        import torchao.quantization as ao
    except ImportError:
        raise ValueError("--quantize needs torchao: pip install torchao") from None
    config = {
        "int8": ao.Int8DynamicActivationInt8WeightConfig,
        "float8": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
    }[kind]
    device = network.pos_embed.device
    shape = network.input_shape
    images = [keyed_noise(k, range(1), shape).to(device) for k in range(network.images_in)]
    t, y = torch.full((1,), 0.5, device=device), torch.zeros(1, dtype=torch.int64, device=device)

    def output() -> Tensor:
        with torch.no_grad():
            return network(images[0], t, *images[1:], y)

    try:
        exact = output()
        ao.quantize_(network.blocks, config(), lambda _, name: name.endswith(("attn.qkv", "mlp.fc1", "mlp.fc2")))
        network.regional = False  # torch's regions know no tensor subclasses
        return float((output() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"--quantize {kind} does not work on this device: {cli.one_line(error)[:300]}") from None


def sampler_of(args: argparse.Namespace, text: str, networks: Networks) -> Sampler:
    """The sampler that a text names, with the networks and the sampling flags."""
    return make_sampler(
        text,
        networks.predictor,
        networks.refiner,
        guidance_of(args),
        refiner_step=args.refiner_step,
        path=PATHS[args.path_type],
        atol=args.atol,
        rtol=args.rtol,
        diffusion=args.diffusion,
        compile=args.compile,
    )


def sample_numbers(sampler: Sampler, networks: Networks, seed: int, numbers: range, classes: Tensor) -> Tensor:
    """Latents of the samples with these numbers and classes (N,): all noise is keyed by (seed, number)."""
    shape = networks.predictor.input_shape
    z = keyed_noise(seed, numbers, shape).to(networks.device)
    y = classes.to(networks.device)
    if isinstance(sampler, SDESampler):
        return sampler.sample(z, y, noise=lambda k: keyed_noise(seed, numbers, shape, stream=k + 1))
    return sampler.sample(z, y)


def load_extractor(name: str, device: torch.device | str, weights: str | None) -> Extractor:
    """`make_extractor`, with Inception's weights from the downloads, fetched if need be, unless others are named."""
    if name == "inception" and weights is None and INCEPTION_VARIABLE not in os.environ:
        weights = str(locate(os.path.basename(INCEPTION_URL)) or fetch("inception"))
    if is_offline():
        os.environ["HF_HUB_OFFLINE"] = "1"  # timm's network
    return make_extractor(name, device, weights)


def file_name(text: str) -> str:
    """A user's text as a part of a file name."""
    return re.sub(r"[^\w.+-]", "_", text)[:100]
