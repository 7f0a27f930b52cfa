"""Measure this machine: what a training step of the refiner costs, with and without cached latents.

Usage:
  python benchmark.py --train                   # SiT-XL/2 as the teacher, Stable Diffusion's autoencoder
  python benchmark.py --train --depth 4 --batch-size 2 --json train.json

Weights are random. Both variants run the update of train.py itself, in turn, in one process. On a CPU the clock is
the process time of one thread, which other programs disturb least; on a GPU it is the wall clock between
synchronisations.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from tqdm import tqdm

import pipeline
import train
from models import SIT_CONFIGS, SiT
from refiner import VelocityRefiner
from runtime import cli
from runtime.autoencoder import Autoencoder
from runtime.data import Batch
from runtime.distributed import World, pick_device
from runtime.files import atomic_write
from runtime.trainer import State, update


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__.strip(), "Every flag may be spelled with - or _.")
    parser.add_argument("--train", action="store_true", required=True, help="steps of refiner training")
    parser.add_argument("--model", choices=tuple(SIT_CONFIGS), default="SiT-XL/2", help="the teacher's size")
    parser.add_argument("--depth", type=int, help="blocks of the teacher, in place of the named size's")
    parser.add_argument("--image-size", type=int, default=256, help="side of the images")
    parser.add_argument("--batch-size", type=int, default=1, help="images in a step")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each variant")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--precision", choices=pipeline.PRECISIONS, default="auto", help="auto is bf16 on CUDA")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    return parser


@dataclass
class Variant:
    """A way to make the same training step, its times in seconds and its last loss."""

    name: str
    step: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    loss: float = 0.0


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(cli.hyphenate(argv))
    if min(args.batch_size, args.repeats, args.depth or 1) < 1 or args.image_size < 16 or args.image_size % 16:
        parser.error("--batch-size, --repeats and --depth must be at least 1, --image-size a multiple of 16")
    device = pick_device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    dtype = pipeline.pick_precision(args.precision, device)
    variants = training_variants(args, device, dtype)
    for variant in variants:  # allocations and autotuning
        variant.step()
    for _ in tqdm(range(args.repeats), unit="round", leave=False):
        for variant in variants:
            begin = clock(device)
            variant.loss = variant.step()
            variant.seconds.append(clock(device) - begin)
    report(args, device, dtype, variants)


def training_variants(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Variant]:
    """Online encoding and cached moments: the same images, noise and weights."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(stable_diffusion_autoencoder()).to(device)
    config = {**SIT_CONFIGS[args.model], "input_size": args.image_size // autoencoder.factor}
    if args.depth:
        config["depth"] = args.depth
    teacher = awaken(SiT(**config)).to(device).eval().requires_grad_(False)
    images = torch.randint(0, 256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8)
    noise = torch.randn(2, args.batch_size, *teacher.input_shape)
    u = torch.rand(3, args.batch_size)
    labels = torch.randint(0, teacher.num_classes, (args.batch_size,))
    online = Batch(images, labels, noise[0], noise[1], *u).to(device)
    with torch.no_grad():
        moments = autoencoder.moments(train.from_uint8(online.images)).half()
    cached = online._replace(images=moments)
    settings = train.build_parser().parse_args(["--data-path", "-"])
    world = World(0, 0, 1, device)

    def variant(name: str, batch: Batch) -> Variant:
        model = VelocityRefiner(**{**config, "depth": 1}).to(device)
        state = State.new(model, device, lr=0.0, weight_decay=0.0, fp16=dtype == torch.float16)
        loss_of = train.make_loss(settings, model, teacher, autoencoder, dtype)

        def step() -> float:
            # A learning rate of zero: every step then costs the same and both variants stay comparable.
            return update(
                state, world, batch, loss_of, global_batch_size=args.batch_size, lr=0.0, clip=None, ema_decay=0.9999
            ).loss

        return Variant(name, step)

    return [variant("online encoding", online), variant("cached latents", cached)]


def stable_diffusion_autoencoder() -> torch.nn.Module:
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


def clock(device: torch.device) -> float:
    """Seconds: of the process on a CPU, of the wall once a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def report(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, variants: list[Variant]) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, one thread"
    depth = args.depth or SIT_CONFIGS[args.model]["depth"]
    print(f"{name}, torch {torch.__version__}, {dtype}; {args.model} with {depth} blocks, batch {args.batch_size}")
    print(f"{'variant':<18}{'s/step':>9}{'p10':>8}{'p90':>8}{'images/s':>10}{'ratio':>7}{'loss':>11}")
    slowest = median(variants[0].seconds)
    rows = []
    for v in variants:
        times = sorted(v.seconds)
        middle, low, high = median(times), times[len(times) // 10], times[-1 - len(times) // 10]
        rows.append({"variant": v.name, "seconds": middle, "ratio": slowest / middle, "loss": v.loss})
        rate = args.batch_size / middle
        print(
            f"{v.name:<18}{middle:>9.3f}{low:>8.3f}{high:>8.3f}{rate:>10.3f}{slowest / middle:>7.2f}{v.loss:>11.6f}"
        )
    difference = abs(variants[1].loss - variants[0].loss) / abs(variants[0].loss)
    print(f"relative difference of the loss, from moments in half precision: {difference:.1e}")
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps({"device": name, "settings": vars(args), "rows": rows}, indent=2).encode())


if __name__ == "__main__":
    cli.run_script(main)
