"""Measure this device: sampling by every schedule of the paper, what each optimisation brings, and training.

Usage:
  python benchmark.py                          # FlowTurbo and the published code's way, eager and compiled
  python benchmark.py --json bench.json --plot bench.png
  python benchmark.py --ablate --batch-sizes 2 # one optimisation at a time, and what compiling takes
  python benchmark.py --train                  # steps of refiner training, and where their time goes

Weights are random: speed does not depend on them. All variants run in turn in one process, on the same inputs. On a
CPU the defaults are small (3 blocks, one image, three schedules) and one thread is timed by its process time.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

import pipeline
from benchmarks import ablation, sampling, training
from benchmarks.measure import describe, roofline
from benchmarks.plan import Plan
from benchmarks.report import SCHEDULES, plot, ratios
from flowturbo.data.pictures import save_png
from flowturbo.models import SIT_CONFIGS
from flowturbo.system import cli
from flowturbo.system.distributed import pick_device
from flowturbo.system.files import atomic_write, check_writable
from flowturbo.transport import Guidance, Schedule


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__.strip(), "Every flag may be spelled with - or _.")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--ablate", action="store_true", help="one optimisation at a time, on the first schedule")
    kind.add_argument("--train", action="store_true", help="steps of refiner training")
    parser.add_argument("--model", choices=tuple(SIT_CONFIGS), default="SiT-XL/2", help="size of the predictor")
    parser.add_argument("--depth", type=int, help="its blocks (default: the named size's; on a CPU 3)")
    parser.add_argument("--image-size", type=int, default=256, help="side of the images")
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="N", help="(default: 1 8 32; on a CPU 1)")
    parser.add_argument(
        "--schedules",
        nargs="+",
        metavar="SCHEDULE",
        help="(default: the paper's nine; on a CPU H8 H1P5R3 H2P4R2; with --ablate H1P5R3)",
    )
    parser.add_argument(
        "--decode", action=argparse.BooleanOptionalAction, help="only with, or only without decoding (default: both)"
    )
    parser.add_argument("--cfg-scale", type=float, default=1.5, help="guidance")
    parser.add_argument("--repeats", type=int, help="timed rounds (default: 20; on a CPU 3)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:K or cpu")
    parser.add_argument(
        "--precision",
        choices=pipeline.PRECISIONS,
        default="auto",
        help="auto is bf16 where the device, CPU or GPU, multiplies it itself",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    parser.add_argument("--plot", metavar="PNG", help="also draw them: latencies, and what they are made of")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    plan = plan_of(args)
    for file in filter(None, (args.json, args.plot)):
        check_writable(Path(file))
    if plan.device.type == "cuda":
        torch.cuda.set_device(plan.device)
    else:
        torch.set_num_threads(args.threads)
    best = roofline(plan.device, plan.dtype)
    for line in (*describe(plan.device), str(plan)):
        print(line)
    print(f"roofline: {best.matmul / 1e12:.3g} TFLOP/s in matrix products, {best.copy / 1e9:.3g} GB/s in copies\n")
    if args.train:
        rows = [asdict(row) for row in training.measure(plan)]
    elif args.ablate:
        rows = [asdict(row) for row in ablation.measure(plan)]
    else:
        measured = sampling.measure(plan, best)
        rows = [{**asdict(row), "ratios": ratios(row, measured)} for row in measured]
        if args.plot:
            save_png(args.plot, plot(measured))
            print(f"saved {args.plot}")
    if args.json:
        settings = {**vars(args), "device": describe(plan.device), "plan": str(plan)}
        with atomic_write(args.json) as file:
            file.write(json.dumps({"settings": settings, "roofline": asdict(best), "rows": rows}, indent=2).encode())


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(cli.hyphenate(argv))
    counts = (*(args.batch_sizes or ()), *(n for n in (args.depth, args.repeats) if n is not None), args.threads)
    if min(counts) < 1 or args.image_size < 64 or args.image_size % 64:
        parser.error(
            "--batch-sizes, --repeats, --depth and --threads must be at least 1, --image-size a multiple of 64"
        )
    for text in args.schedules or ():
        Schedule.parse(text)
    if Guidance(args.cfg_scale).scale == 1:
        parser.error(
            "--cfg-scale 1 leaves nothing to compare with: the published code cannot sample without guidance"
        )
    if args.train and (args.schedules or args.decode is not None):
        parser.error("--train has no --schedules and no --decode")
    if args.plot and (args.train or args.ablate or Path(args.plot).suffix.lower() != ".png"):
        parser.error("--plot is for the table of schedules, and its name must end in .png")
    return args


def plan_of(args: argparse.Namespace) -> Plan:
    """What to measure, by what is sensible on this device where the flags say nothing."""
    device = pick_device(args.device)
    gpu = device.type == "cuda"
    auto = torch.bfloat16 if pipeline.has_bf16(device) else torch.float32
    schedules = ["H1P5R3"] if args.ablate else SCHEDULES if gpu else ["H8", "H1P5R3", "H2P4R2"]
    return Plan(
        device=device,
        dtype=auto if args.precision == "auto" else pipeline.pick_precision(args.precision, device),
        model=args.model,
        depth=args.depth or (SIT_CONFIGS[args.model]["depth"] if gpu else 3),
        image_size=args.image_size,
        batch_sizes=tuple(args.batch_sizes or ((1, 8, 32) if gpu else (1,))),
        schedules=tuple(str(Schedule.parse(text)) for text in args.schedules or schedules),
        decode=(False, True) if args.decode is None else (args.decode,),
        cfg_scale=args.cfg_scale,
        repeats=args.repeats or (20 if gpu else 3),
    )


if __name__ == "__main__":
    cli.run_script(main)
