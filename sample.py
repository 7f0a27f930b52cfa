"""Sample images with FlowTurbo: by default the eight classes of the original, SiT-XL/2 with its refiner, H1P5R3.

Usage:
  python sample.py
  python sample.py --classes "golden retriever" 980 volcano --cfg-scale 4 --seed 1
  python sample.py --compare H8 H1P5R3 dopri5      # one row per sampler, from the same noise
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import pipeline
from flowturbo.data.classes import IMAGENET_CLASSES, class_index
from flowturbo.data.pictures import grid, save_png, to_uint8
from flowturbo.system import cli
from flowturbo.system.distributed import pick_device
from flowturbo.system.files import check_writable
from flowturbo.transport import FlowTurbo, Sampler

CLASSES = ("207", "980", "387", "974", "88", "972", "928", "279")  # the original sample.py's


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__.strip(), "Every flag may be spelled with - or _.")
    group = parser.add_argument_group("what to sample")
    group.add_argument(
        "--schedule",
        default="H1P5R3",
        help="blocks H (Heun), P (pseudo corrector), R (refiner), E (Euler) with counts, groups as [H1P1R1]x2; "
        "or dopri5, or sdeN for an SDE of N steps",
    )
    group.add_argument(
        "--compare", nargs="+", metavar="SCHEDULE", help="one row for each of these, all from the same noise"
    )
    group.add_argument(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="indices, or ImageNet names and WordNet ids (default: the original's eight, or the model's first eight)",
    )
    group.add_argument("--num-images", type=int, help="how many, going round the classes (default: one of each)")
    group.add_argument("--batch-size", type=int, default=16, help="images sampled at once")
    group.add_argument("--out", metavar="PNG", help="(default: samples/SCHEDULE-cfgSCALE-seedSEED.png)")
    pipeline.add_network_flags(parser)
    pipeline.add_sampling_flags(parser, cfg_scale=4.0)
    return parser


@dataclass
class Row:
    """What one sampler made, and what it took."""

    images: Tensor  # (N, C, H, W) uint8
    evaluations: tuple[int, int]  # predictor, refiner
    seconds: float  # sampling alone, without decoding

    def caption(self, name: str, cfg_scale: float) -> str:
        predictor, refiner = self.evaluations
        count = f"{predictor} + {refiner}" if refiner else f"{predictor}"
        ms = 1000 * self.seconds / len(self.images)
        return f"{name}   {count} evaluations   cfg {cfg_scale:g}   {ms:.3g} ms/image"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    texts = args.compare or [args.schedule]
    name = pipeline.file_name("-vs-".join(texts))
    out = Path(args.out or f"samples/{name}-cfg{args.cfg_scale:g}-seed{args.seed}.png")
    needs_refiner = any(map(pipeline.needs_refiner, texts))
    pipeline.check_files(args, needs_refiner)
    check_writable(out)
    networks = pipeline.load_networks(args, needs_refiner, pick_device(args.device))
    classes = pick_classes(args, networks.predictor.num_classes)
    for text in texts:
        pipeline.sampler_of(args, text, networks)  # a mistake in the last shows before the first is sampled
    warm_up = "E1R1" if needs_refiner else "E1"
    if args.compare and not args.compile:  # so that the first row's time does not contain the device's start-up
        sample_row(args, pipeline.sampler_of(args, warm_up, networks), networks, classes[: args.batch_size])
    rows, captions = [], []
    for text in texts:
        sampler = pipeline.sampler_of(args, text, networks)
        row = sample_row(args, sampler, networks, classes)
        if args.compare and args.compile:
            row = sample_row(args, sampler, networks, classes)  # the first contained the compilation
        rows.append(row.images)
        captions.append(row.caption(f"{sampler} compiled" if args.compile else str(sampler), args.cfg_scale))
        print(captions[-1] + (", compilation included" if args.compile and not args.compare else ""))
    if not args.compare:
        rows = list(rows[0].split(4 if len(classes) <= 8 else 8))
    save_png(out, grid(rows, captions if args.compare else ()))
    print(f"saved {out}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(cli.hyphenate(argv))
    if args.batch_size < 1 or (args.num_images is not None and args.num_images < 1):
        parser.error("--batch-size and --num-images must be at least 1")
    if args.out and Path(args.out).suffix.lower() != ".png":
        parser.error(f"--out {args.out!r} must end in .png")
    pipeline.guidance_of(args)
    return args


def pick_classes(args: argparse.Namespace, num_classes: int) -> Tensor:
    """The class of every image, (num_images,) int64."""
    names = args.classes or (
        CLASSES if num_classes == IMAGENET_CLASSES else [str(c) for c in range(min(8, num_classes))]
    )
    classes = [class_index(name, num_classes) for name in names]
    count = args.num_images or len(classes)
    return torch.tensor([classes[i % len(classes)] for i in range(count)])


def sample_row(args: argparse.Namespace, sampler: Sampler, networks: pipeline.Networks, classes: Tensor) -> Row:
    """Sample and decode all images, in batches."""
    images, seconds = [], 0.0
    starts = range(0, len(classes), args.batch_size)
    planned = sum(sampler.evaluations()) if isinstance(sampler, FlowTurbo) else None
    with (
        tqdm(
            total=planned and planned * len(starts),
            unit="evaluation",
            desc=str(sampler),
            leave=False,
            dynamic_ncols=True,
        ) as bar,
        pipeline.CallCounter(networks.predictor, bar.update) as of_predictor,
        pipeline.CallCounter(networks.refiner, bar.update) as of_refiner,
    ):
        for k, start in enumerate(starts):
            numbers = range(start, min(start + args.batch_size, len(classes)))
            _wait(networks.device)
            begin = time.perf_counter()
            latents = pipeline.sample_numbers(sampler, networks, args.seed, numbers, classes[start : numbers.stop])
            _wait(networks.device)
            seconds += time.perf_counter() - begin
            if planned:
                bar.update(planned * (k + 1) - bar.n)  # a static graph does not call the counters
            images.append(to_uint8(networks.autoencoder.decode(latents)).cpu())
    counted = (of_predictor.count // len(starts), of_refiner.count // len(starts))
    compiled = isinstance(sampler, FlowTurbo) and sampler.compiled is not None
    return Row(torch.cat(images), sampler.evaluations() if compiled else counted, seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    cli.run_script(main)
