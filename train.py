"""Train a velocity refiner for a trained SiT, or a SiT itself, on a folder of images.

Usage:
  torchrun --nnodes=1 --nproc_per_node=1 train.py --data-path DIR --model-teacher-ckpt predictor.pt
  python train.py --target predictor --data-path DIR --model SiT-B/2      # one process needs no torchrun
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

import pipeline
from flowturbo.data.classes import read_class_map
from flowturbo.data.folders import Batch, ClassFolder, Subset, TrainingData, TrainingSamples, training_loader
from flowturbo.data.latents import LatentFolder, is_latent_folder
from flowturbo.data.pictures import from_uint8, grid, save_png, to_uint8
from flowturbo.data.randomness import keyed_noise
from flowturbo.models import SIT_CONFIGS, SiT
from flowturbo.networks.autoencoder import Autoencoder, NoAutoencoder
from flowturbo.networks.compiled import compiler_errors, graph_limits
from flowturbo.refiner import VelocityRefiner
from flowturbo.system import cli
from flowturbo.system.distributed import World, world
from flowturbo.system.files import atomic_write, exclusive, sha256
from flowturbo.training.log import RunLog
from flowturbo.training.step import State, Update, update
from flowturbo.training.stopping import EXIT_STOPPED, StopRequest
from flowturbo.transport import PATHS, FlowTurbo, Guidance, flow_matching_loss, refiner_loss, refiner_times
from flowturbo.transport.losses import MAX_DT, RECIPES
from flowturbo.weights.checkpoint import CheckpointFolder, newest_checkpoint
from flowturbo.weights.fetch import locate

# What differs between the targets; the refiner's are the paper's (section 4.1), the predictor's SiT's.
DEFAULTS = {
    "refiner": {"global_batch_size": 18, "lr": 5e-5, "steps": 30_000},
    "predictor": {"global_batch_size": 256, "lr": 1e-4, "steps": 400_000},
}

# The settings that a resumed run must share with its checkpoint.
SHAPING = (
    *(
        "target",
        "seed",
        "global_batch_size",
        "exact",
        "recipe",
        "max_dt",
        "path_type",
        "flip",
        "image_size",
        "class_map",
    ),
    *("lr", "warmup", "wd", "clip_grad", "class_dropout", "ema_decay", "precision", "compile", "vae_ckpt"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__.strip(), "Every flag may be spelled with - or _.")
    parser.add_argument("--target", choices=tuple(DEFAULTS), default="refiner", help="which network to train")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-path",
        required=True,
        metavar="DIR",
        help="one folder of images per class, or what python -m flowturbo.data.latents made of it",
    )
    group.add_argument("--class-map", metavar="JSON", help='which class each folder is, like {"tabby": 281}')
    group.add_argument("--subset", type=float, default=1.0, help="train on this share of every class")
    group.add_argument("--image-size", type=int, help="side of the square crop (default: the model's; 256)")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="random horizontal flips")
    group.add_argument("--num-workers", type=int, default=min(4, os.cpu_count() or 1), help="loader processes")
    group.add_argument(
        "--vae-ckpt",
        default="vae-ema",
        metavar="NAME",
        help="autoencoder: vae-ema (stabilityai/sd-vae-ft-ema), vae-mse, a hub id, a local folder, or none to "
        "work on pixels",
    )

    group = parser.add_argument_group("refiner")
    group.add_argument("--model-teacher-ckpt", metavar="FILE", help="the trained predictor that is refined")
    group.add_argument("--recipe", choices=RECIPES, default="paper", help="the paper's loss or the released code's")
    group.add_argument("--max-dt", type=float, default=MAX_DT, help="upper end of the time offset Δ")

    group = parser.add_argument_group("predictor")
    group.add_argument("--model", choices=tuple(SIT_CONFIGS), default="SiT-XL/2", help="named size")
    group.add_argument("--hidden-size", type=int, help="in place of the named size's")
    group.add_argument("--depth", type=int, help="in place of the named size's")
    group.add_argument("--num-heads", type=int, help="in place of the named size's")
    group.add_argument("--patch-size", type=int, help="in place of the named size's")
    group.add_argument("--channels", type=int, choices=(1, 3), default=3, help="of the images, with --vae-ckpt none")
    group.add_argument("--num-classes", type=int, help="(default: the number of class folders)")
    group.add_argument(
        "--learn-sigma",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the unused second half of output channels that public SiT checkpoints have",
    )
    group.add_argument("--path-type", choices=tuple(PATHS), default="linear", help="interpolation path")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--global-batch-size", type=int, help="over all ranks (default: refiner 18, predictor 256)")
    group.add_argument("--steps", type=int, help="updates (default: refiner 30000, predictor 400000)")
    group.add_argument("--max-hours", type=float, help="stop cleanly, with a checkpoint, after so many hours")
    group.add_argument("--epochs", type=int, help="passes over the data, in place of --steps")
    group.add_argument("--lr", type=float, help="(default: refiner 5e-5, predictor 1e-4)")
    group.add_argument("--warmup", type=int, default=0, help="updates over which the learning rate rises from 0")
    group.add_argument("--wd", "--weight-decay", type=float, default=0.0, help="AdamW's weight decay")
    group.add_argument("--clip-grad", type=float, help="largest norm of the gradient")
    group.add_argument("--accumulate", type=int, default=1, help="split each rank's share into so many passes")
    group.add_argument(
        "--exact",
        action="store_true",
        help="results that do not depend on the number of ranks, bit for bit: gradients of 12 fixed parts of the "
        "batch are added in a fixed order (slower, and 12 times the gradient's memory)",
    )
    group.add_argument("--class-dropout", type=float, default=0.1, help="how often the label becomes null")
    group.add_argument("--ema-decay", type=float, default=0.9999, help="of the weights' moving average, once warm")
    group.add_argument(
        "--seed", "--global-seed", type=cli.seed, default=0, help="sample k depends on the seed and k alone"
    )

    group = parser.add_argument_group("hardware")
    group.add_argument("--device", default="auto", help="auto, cuda or cpu; under torchrun each rank takes its own")
    group.add_argument("--precision", choices=pipeline.PRECISIONS, default="auto", help="auto is bf16 on CUDA")
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="the networks as static graphs, one for all blocks of each; takes up to a minute first",
    )

    group = parser.add_argument_group("output")
    group.add_argument("--results-dir", default="results", help="each run makes a folder here")
    group.add_argument("--note", default="no-note", help="a word for the run's folder name")
    group.add_argument("--log-every", type=int, default=100, help="steps between figures in log and TensorBoard")
    group.add_argument("--ckpt-every", type=int, default=5000, help="steps between checkpoints")
    group.add_argument(
        "--keep-last", type=int, default=0, metavar="K", help="keep the newest K checkpoints; 0 for all"
    )
    group.add_argument("--keep-every", type=int, default=0, metavar="M", help="keep also those of every M-th step")
    group.add_argument("--sample-every", type=int, default=10_000, help="steps between sample grids; 0 for none")
    group.add_argument("--cfg-scale", type=float, default=4.0, help="guidance of the sample grids")
    group.add_argument(
        "--resume",
        metavar="FILE",
        help="continue from this checkpoint; 'auto' takes the newest whole one of this target and note, if any",
    )
    group.add_argument("--allow-changes", action="store_true", help="resume although settings or data have changed")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with world(args.device) as ranks, StopRequest(args.max_hours) as stop:
        torch.manual_seed(args.seed)  # the initial weights; everything after is keyed by sample number
        if args.exact and ranks.device.type == "cpu":
            torch.set_num_threads(1)  # a split of the work over threads changes the last bits
        dtype = pipeline.pick_precision(args.precision, ranks.device)
        teacher = pipeline.load_network(SiT, args.model_teacher_ckpt) if args.target == "refiner" else None
        autoencoder = pipeline.load_autoencoder_of(teacher, args.vae_ckpt, ranks.device)
        teacher = teacher.to(ranks.device).cast(dtype) if teacher is not None else None
        data = open_data(args, teacher, autoencoder)
        model = build_model(args, teacher, data, autoencoder).to(ranks.device)
        state = State.new(model, ranks.device, args.lr, args.wd, dtype == torch.float16)
        config = {"model": pipeline.model_config(model), "training": vars(args), "data": data.fingerprint()}
        config["teacher"] = None if teacher is None else sha256(locate(args.model_teacher_ckpt))
        folder = resume(args, ranks, state, config)
        total = args.steps if args.epochs is None else math.ceil(args.epochs * len(data) / args.global_batch_size)
        posterior = autoencoder.channels is not None
        loader = training_loader(
            TrainingSamples(data, args.seed, model.input_shape, flip=args.flip, posterior=posterior),
            args.global_batch_size,
            ranks,
            first=state.step,
            last=total,
            workers=args.num_workers,
            exact=args.exact,
        )

        def save() -> Path:
            checkpoints = CheckpointFolder(folder / "checkpoints", args.keep_last, args.keep_every)
            path = checkpoints.path(state.step)
            checkpoints.record(path, state.save(path, config))
            return path

        def draw() -> None:
            picture = sample_grid(args, state.ema, teacher, autoencoder, ranks.device, dtype)
            save_png(folder / "samples" / f"{state.step:07d}.png", picture)

        with (
            exclusive(folder, patience=20) if ranks.is_main else nullcontext(),  # a killed run's workers linger
            RunLog(folder if ranks.is_main else None, total, state.step) as log,
        ):
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            log.say(f"{args.target}: {trained:,} parameters, {len(data):,} images in {len(data.classes)} classes")
            log.say(f"{ranks.size} x {ranks.device}, {dtype}, steps {state.step} to {total}, writing to {folder}")
            loss_of = make_loss(args, model, teacher, autoencoder, dtype)
            fit(args, ranks, state, loader, loss_of, stop, log, save, draw, total)
            ranks.barrier()
            if state.step >= total:
                log.say(f"done: {folder}")
                return
            why = stop.signal or ("the time limit" if stop.late else "another rank's signal")
            log.say(f"stopped by {why} after step {state.step}; go on with the same command and --resume auto")
        if not stop.late:
            sys.exit(EXIT_STOPPED)


def fit(
    args: argparse.Namespace,
    ranks: World,
    state: State,
    loader: Iterable[Batch],
    loss_of: Callable[[Batch], Tensor],
    stop: StopRequest,
    log: RunLog,
    save: Callable[[], Path],
    draw: Callable[[], None],
    total: int,
) -> None:
    """Update on every batch; rank 0 saves and draws when it is time. Ends early, saved, when a stop is wanted.

    What a step tells is read while the next one runs, or at once where it is needed: nothing is logged, saved or
    drawn before every step so far was found finite.
    """
    last: Update | None = None
    for batch in loader:
        result = update(
            state,
            ranks,
            batch.to(ranks.device),
            loss_of,
            global_batch_size=args.global_batch_size,
            lr=args.lr * min(1.0, (state.step + 1) / max(1, args.warmup)),
            clip=args.clip_grad,
            ema_decay=args.ema_decay,
            passes=args.accumulate,
            exact=args.exact,
            stop=stop.wanted,
        )
        log.advance(state.step, args.global_batch_size)
        intervals = (args.log_every, args.ckpt_every, args.sample_every)
        stopping = last is not None and last.stop
        if stopping or state.step == total or any(every and state.step % every == 0 for every in intervals):
            stopping |= result.stop
        last = result
        done = stopping or state.step == total
        if done or state.step % args.log_every == 0:
            log.scalars(loss=result.loss, gradient=result.norm)
        if ranks.is_main and (done or state.step % args.ckpt_every == 0):
            log.say(f"step {state.step}: loss {result.loss:.4g}, saved {save()}")
        if stopping:
            return
        if ranks.is_main and args.sample_every and (done or state.step % args.sample_every == 0):
            draw()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(cli.hyphenate(argv))
    for name in ("global_batch_size", "steps", "epochs", "log_every", "ckpt_every", "accumulate", "image_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("num_workers", "warmup", "sample_every", "keep_last", "keep_every"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0")
    if not (0 <= args.class_dropout < 1 and 0 <= args.ema_decay < 1):
        parser.error("--class-dropout and --ema-decay must lie in [0, 1)")
    if not ((args.lr is None or args.lr > 0) and args.wd >= 0 and (args.clip_grad is None or args.clip_grad > 0)):
        parser.error("--lr and --clip-grad must be positive, --wd at least 0")
    for name in ("hidden_size", "depth", "num_heads", "patch_size", "num_classes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not (math.isfinite(args.lr or 1) and math.isfinite(args.wd) and 0 < args.max_dt < 1 and 0 < args.subset <= 1):
        parser.error("--lr and --wd must be finite, --max-dt in (0, 1), --subset in (0, 1]")
    Guidance(args.cfg_scale)  # refuses impossible scales now rather than at the first sample grid
    if args.steps is not None and args.epochs is not None:
        parser.error("--steps and --epochs are two ways to say one thing: pass one of them")
    if args.max_hours is not None and not args.max_hours > 0:
        parser.error("--max-hours must be positive")
    if args.target == "refiner" and not args.model_teacher_ckpt:
        parser.error("--target refiner needs the trained predictor: --model-teacher-ckpt FILE")
    if args.target == "refiner" and args.path_type != "linear":
        parser.error("--target refiner works on the linear path")
    if "/" in args.note or args.note.startswith("."):
        parser.error(f"--note {args.note!r} must be a word for a folder name")
    for name, value in DEFAULTS[args.target].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def open_data(
    args: argparse.Namespace, teacher: SiT | None, autoencoder: Autoencoder | NoAutoencoder
) -> TrainingData:
    """The images, or cached latents, at the size and in the channels that the model works with."""
    size, num_classes = args.image_size, args.num_classes
    channels = args.channels if isinstance(autoencoder, NoAutoencoder) else 3
    if teacher is not None:
        inputs, height, width = teacher.input_shape
        size, num_classes = height * autoencoder.factor, teacher.num_classes
        channels = inputs if isinstance(autoencoder, NoAutoencoder) else 3
        if height != width or args.image_size not in (None, size):
            raise ValueError(f"the predictor works on {height}x{width} latents, that is --image-size {size}")
    class_map = read_class_map(args.class_map) if args.class_map else None
    data: TrainingData
    if is_latent_folder(args.data_path):
        if isinstance(autoencoder, NoAutoencoder):
            raise ValueError(f"{args.data_path} holds latents: name their autoencoder with --vae-ckpt")
        data = LatentFolder(args.data_path, autoencoder, size, num_classes, class_map)
    else:
        data = ClassFolder(args.data_path, size or 256, channels, num_classes, class_map)
    return Subset(data, args.subset, args.seed) if args.subset != 1 else data


def build_model(
    args: argparse.Namespace, teacher: SiT | None, data: TrainingData, autoencoder: Autoencoder | NoAutoencoder
) -> SiT:
    """The network to train, freshly initialised: a refiner shaped after its teacher, or a SiT."""
    if teacher is not None:
        return VelocityRefiner(**{**teacher.config, "depth": 1})
    image_size = data.image_size
    if image_size % autoencoder.factor:
        raise ValueError(f"--image-size {image_size} is not a multiple of {autoencoder.factor}")
    given = {name: getattr(args, name) for name in ("hidden_size", "depth", "num_heads", "patch_size")}
    return SiT(
        input_size=image_size // autoencoder.factor,
        in_channels=autoencoder.channels or args.channels,
        num_classes=args.num_classes or len(data.classes),
        class_dropout_prob=args.class_dropout,
        learn_sigma=args.learn_sigma,
        **{**SIT_CONFIGS[args.model], **{name: value for name, value in given.items() if value is not None}},
    )


def make_loss(
    args: argparse.Namespace,
    model: SiT,
    teacher: SiT | None,
    autoencoder: Autoencoder | NoAutoencoder,
    dtype: torch.dtype,
) -> Callable[[Batch], Tensor]:
    """The loss of each sample (n,) of a batch, its randomness taken from the batch's draws.

    The model's weights are in float32 and computed with in dtype under autocast; the teacher's are to be in dtype as
    of `SiT.cast`, and are left alone.
    """
    path = PATHS[args.path_type]
    has_null_class = model.class_dropout_prob > 0
    of_model = compiled(model) if args.compile else model
    of_teacher = compiled(teacher) if args.compile and teacher is not None else teacher

    def trained(x: Tensor, *inputs: Tensor | None) -> Tensor:
        with pipeline.autocast(x.device, dtype):
            return of_model(x, *inputs)

    def loss_of(batch: Batch) -> Tensor:
        drop = batch.u_drop < args.class_dropout if has_null_class else None
        encoded = batch.images.dtype != torch.uint8
        with pipeline.autocast(batch.labels.device, dtype):
            moments = batch.images if encoded else autoencoder.moments(from_uint8(batch.images))
        x1 = autoencoder.sample(moments, batch.posterior_noise)
        if teacher is None:
            low, high = path.interval
            t = low + (high - low) * batch.u_t
            return flow_matching_loss(trained, x1, batch.labels, x0=batch.noise, t=t, drop=drop, path=path)
        t, dt = refiner_times(batch.u_t, batch.u_dt, args.max_dt, args.recipe)
        return refiner_loss(
            trained, of_teacher, x1, batch.labels, x0=batch.noise, t=t, dt=dt, drop=drop, recipe=args.recipe
        )

    return loss_of


def compiled(network: SiT) -> Callable[..., Tensor]:
    """What calls the network as a static graph; the network itself stays as it is."""
    graph = torch.compile(network, fullgraph=True, dynamic=False)

    def call(*inputs: Tensor | None) -> Tensor:
        with graph_limits(), compiler_errors():
            return graph(*inputs)

    return call


@torch.no_grad()
def sample_grid(
    args: argparse.Namespace,
    network: SiT,
    teacher: SiT | None,
    autoencoder: Autoencoder | NoAutoencoder,
    device: torch.device,
    dtype: torch.dtype,
):
    """Eight classes from the same noise: Heun's H8, and with a refiner also FlowTurbo's H1P5R3.

    Teacher and network have their blocks in dtype, as sample.py has them; the network in a copy.
    """
    network = deepcopy(network).cast(dtype)
    predictor, schedules = (network, ["H8"]) if teacher is None else (teacher, ["H8", "H1P5R3"])
    y = torch.linspace(0, predictor.num_classes - 1, min(8, predictor.num_classes)).round().long().to(device)
    z = keyed_noise(args.seed, range(len(y)), predictor.input_shape).to(device)
    cfg_scale = args.cfg_scale if predictor.class_dropout_prob > 0 else 1.0
    rows = []
    for schedule in schedules:
        refiner = network if teacher is not None else None
        latents = FlowTurbo(predictor, refiner, schedule, cfg_scale, path=PATHS[args.path_type]).sample(z, y)
        with pipeline.autocast(device, dtype):
            rows.append(to_uint8(autoencoder.decode(latents)).cpu())
    return grid(rows, [f"{schedule}  cfg {cfg_scale:g}" for schedule in schedules])


def resume(args: argparse.Namespace, ranks: World, state: State, config: dict) -> Path:
    """The run's folder, chosen by rank 0 for all; the state is that of the checkpoint to resume from, if any.

    Raises ValueError where settings that shape the training have changed since, unless --allow-changes.
    """

    def choose() -> tuple[str, str | None]:
        results, name = Path(args.results_dir), f"{args.target}-{args.note}"
        checkpoint: Path | None = None
        if args.resume == "auto":
            checkpoint = newest_checkpoint(results, name, warn=lambda text: print(f"warning: {text}"))
        elif args.resume:
            checkpoint = Path(args.resume)
        home = CheckpointFolder(checkpoint.resolve().parent) if checkpoint is not None else None
        if home is not None and (args.resume == "auto" or home.is_latest(checkpoint)):
            folder = home.folder.parent
        else:  # a new run, also where an earlier checkpoint is named: what came after it stays as it is
            taken = [int(p.name.split("-")[0]) for p in results.glob("[0-9]*-*") if p.name.split("-")[0].isdigit()]
            folder = results / f"{max(taken, default=-1) + 1:03d}-{name}"
        return str(folder), None if checkpoint is None else str(checkpoint)

    chosen, checkpoint = ranks.agree(choose)
    folder = Path(chosen)
    if checkpoint is not None:
        before = state.load(Path(checkpoint))
        if not args.allow_changes:
            refuse_changes(before, config, checkpoint)

    def prepare() -> None:
        with atomic_write(folder / "config.json") as file:
            file.write(json.dumps(config, indent=2).encode() + b"\n")

    ranks.agree(prepare)
    return folder


def refuse_changes(before: dict, now: dict, checkpoint: str) -> None:
    """Raises ValueError naming the settings and data that differ from those of the checkpoint."""
    old, new = before.get("training", {}), now["training"]
    if not isinstance(old, dict) or any(isinstance(old.get(name), (torch.Tensor, list, dict)) for name in SHAPING):
        raise ValueError(f"{checkpoint!r} is damaged: its config holds no settings; --allow-changes goes on without")
    changed = [
        f"--{name.replace('_', '-')} was {old[name]!r}, is {new[name]!r}"
        for name in SHAPING
        if name in old and old[name] != new[name]
    ]
    for name, what in (("data", "the data have other images"), ("teacher", "--model-teacher-ckpt has other weights")):
        if before.get(name) not in (None, now[name]):
            changed.append(what)
    architecture = before.get("model", now["model"])
    if architecture != now["model"]:
        names = [name for name in now["model"] if architecture.get(name) != now["model"][name]]
        changed.append(f"the network has another {', '.join(names)}")
    if changed:
        raise ValueError(
            f"{checkpoint!r} was trained otherwise: {'; '.join(changed)}; pass --allow-changes to go on all the same"
        )


if __name__ == "__main__":
    cli.run_script(main)
