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
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import pipeline
from models import SIT_CONFIGS, SiT
from refiner import VelocityRefiner
from runtime import cli
from runtime.autoencoder import Autoencoder, NoAutoencoder, load_autoencoder
from runtime.checkpoint import load_checkpoint, load_weights, newest_checkpoint, save_checkpoint, weights_of
from runtime.classes import read_class_map
from runtime.data import Batch, ClassFolder, Subset, TrainingData, TrainingSamples, training_loader
from runtime.distributed import World, world
from runtime.images import from_uint8, grid, save_png, to_uint8
from runtime.latents import LatentFolder, is_latent_folder
from runtime.randomness import keyed_noise
from runtime.runlog import RunLog
from transport import PATHS, FlowTurbo, flow_matching_loss, refiner_loss, refiner_times
from transport.losses import MAX_DT, RECIPES

# What differs between the targets; the refiner's are the paper's (section 4.1), the predictor's SiT's.
DEFAULTS = {
    "refiner": {"global_batch_size": 18, "lr": 5e-5, "steps": 30_000},
    "predictor": {"global_batch_size": 256, "lr": 1e-4, "steps": 400_000},
}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__.strip(), "Every flag may be spelled with - or _.")
    parser.add_argument("--target", choices=tuple(DEFAULTS), default="refiner", help="which network to train")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-path",
        required=True,
        metavar="DIR",
        help="one folder of images per class, or what python -m runtime.latents made of it",
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
    group.add_argument("--class-dropout", type=float, default=0.1, help="how often the label becomes null")
    group.add_argument("--ema-decay", type=float, default=0.9999, help="of the weights' moving average, once warm")
    group.add_argument(
        "--seed", "--global-seed", type=int, default=0, help="sample k depends on the seed and k alone"
    )

    group = parser.add_argument_group("hardware")
    group.add_argument("--device", default="auto", help="auto, cuda or cpu; under torchrun each rank takes its own")
    group.add_argument("--precision", choices=pipeline.PRECISIONS, default="auto", help="auto is bf16 on CUDA")

    group = parser.add_argument_group("output")
    group.add_argument("--results-dir", default="results", help="each run makes a folder here")
    group.add_argument("--note", default="no-note", help="a word for the run's folder name")
    group.add_argument("--log-every", type=int, default=100, help="steps between figures in log and TensorBoard")
    group.add_argument("--ckpt-every", type=int, default=5000, help="steps between checkpoints")
    group.add_argument("--sample-every", type=int, default=10_000, help="steps between sample grids; 0 for none")
    group.add_argument("--cfg-scale", type=float, default=4.0, help="guidance of the sample grids")
    group.add_argument(
        "--resume",
        metavar="FILE",
        help="continue from this checkpoint; 'auto' takes the newest of the same target and note, if any",
    )
    return parser


@dataclass
class State:
    """What a checkpoint holds: everything that the next step depends on besides the arguments."""

    model: SiT
    ema: SiT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0

    def save(self, path: Path, config: dict) -> None:
        save_checkpoint(
            path,
            {
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict(),
                "opt": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "config": config,
            },
        )

    def load(self, path: Path) -> None:
        content = load_checkpoint(path)
        if not {"model", "ema", "opt", "step"} <= content.keys():
            raise ValueError(f"checkpoint {str(path)!r} holds weights only: --resume needs one written by train.py")
        load_weights(self.model, weights_of(content, path, prefer_ema=False), path)
        load_weights(self.ema, weights_of(content, path), path)
        self.optimizer.load_state_dict(content["opt"])
        if content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        self.step = int(content["step"])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with world(args.device) as ranks:
        torch.manual_seed(args.seed)  # the initial weights; everything after is keyed by sample number
        dtype = pipeline.pick_precision(args.precision, ranks.device)
        autoencoder = load_autoencoder(args.vae_ckpt, ranks.device)
        teacher = None
        if args.target == "refiner":
            teacher = pipeline.load_network(SiT, args.model_teacher_ckpt)
            pipeline.check_match(teacher, None, autoencoder)
        data = open_data(args, teacher, autoencoder)
        model = build_model(args, teacher, data, autoencoder).to(ranks.device)
        teacher = teacher.to(ranks.device) if teacher is not None else None
        state = State(
            model,
            deepcopy(model).requires_grad_(False).eval(),
            torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad],
                lr=args.lr,
                weight_decay=args.wd,
                fused=ranks.device.type in ("cuda", "cpu"),
            ),
            torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16),
        )
        folder, resumed = run_folder(args, ranks)
        if resumed is not None:
            state.load(resumed)
        total = args.steps if args.epochs is None else math.ceil(args.epochs * len(data) / args.global_batch_size)
        config = {"model": pipeline.model_config(model), "training": vars(args)}
        log = RunLog(folder if ranks.is_main else None, total, state.step)
        if ranks.is_main:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.say(f"{args.target}: {trained:,} parameters, {len(data):,} images in {len(data.classes)} classes")
        log.say(f"{ranks.size} x {ranks.device}, {dtype}, steps {state.step} to {total}, writing to {folder}")

        samples = TrainingSamples(
            data, args.seed, model.input_shape, flip=args.flip, posterior=autoencoder.channels is not None
        )
        loader = training_loader(
            samples, args.global_batch_size, ranks, first=state.step, last=total, workers=args.num_workers
        )
        network = ranks.wrap(model.train())
        loss_of = make_loss(args, network, teacher, model)
        deadline = time.monotonic() + 3600 * args.max_hours if args.max_hours else math.inf
        for batch in loader:
            loss, norm, late = train_step(args, ranks, state, network, loss_of, autoencoder, batch, dtype, deadline)
            log.advance(state.step, args.global_batch_size)
            done = late or state.step == total
            if done or state.step % args.log_every == 0:
                log.scalars(loss=loss, gradient=norm)
            if ranks.is_main and args.sample_every and (done or state.step % args.sample_every == 0):
                picture = sample_grid(args, state.ema, teacher, autoencoder, ranks.device, dtype)
                save_png(folder / "samples" / f"{state.step:07d}.png", picture)
            if ranks.is_main and (done or state.step % args.ckpt_every == 0):
                path = folder / "checkpoints" / f"{state.step:07d}.pt"
                state.save(path, config)
                log.say(f"step {state.step}: loss {loss:.5f}, saved {path}")
            if late:
                log.say(
                    f"--max-hours {args.max_hours} are over at step {state.step}; --resume auto goes on from here"
                )
                break
        ranks.barrier()
        log.say(f"done: {folder}")
        log.close()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(cli.hyphenate(argv))
    for name, value in DEFAULTS[args.target].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("global_batch_size", "steps", "epochs", "log_every", "ckpt_every", "accumulate", "image_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("num_workers", "warmup", "sample_every", "seed"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0")
    if not (0 <= args.class_dropout < 1 and 0 <= args.ema_decay < 1):
        parser.error("--class-dropout and --ema-decay must lie in [0, 1)")
    if not (args.lr > 0 and args.wd >= 0 and (args.clip_grad is None or args.clip_grad > 0)):
        parser.error("--lr and --clip-grad must be positive, --wd at least 0")
    if args.max_hours is not None and not args.max_hours > 0:
        parser.error("--max-hours must be positive")
    if args.target == "refiner" and not args.model_teacher_ckpt:
        parser.error("--target refiner needs the trained predictor: --model-teacher-ckpt FILE")
    if args.target == "refiner" and args.path_type != "linear":
        parser.error("--target refiner works on the linear path")
    if "/" in args.note or args.note.startswith("."):
        parser.error(f"--note {args.note!r} must be a word for a folder name")
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
    args: argparse.Namespace, network: nn.Module, teacher: SiT | None, model: SiT
) -> Callable[[Tensor, Batch], Tensor]:
    """The loss per sample (N,) of data x1 (N, C, H, W) with the batch's labels and draws."""
    path = PATHS[args.path_type]
    has_null_class = model.class_dropout_prob > 0

    def loss_of(x1: Tensor, batch: Batch) -> Tensor:
        drop = batch.u_drop < args.class_dropout if has_null_class else None
        if teacher is None:
            low, high = path.interval
            t = low + (high - low) * batch.u_t
            return flow_matching_loss(network, x1, batch.labels, x0=batch.noise, t=t, drop=drop, path=path)
        t, dt = refiner_times(batch.u_t, batch.u_dt, args.max_dt, args.recipe)
        return refiner_loss(
            network, teacher, x1, batch.labels, x0=batch.noise, t=t, dt=dt, drop=drop, recipe=args.recipe
        )

    return loss_of


def train_step(
    args: argparse.Namespace,
    ranks: World,
    state: State,
    network: nn.Module,
    loss_of: Callable[[Tensor, Batch], Tensor],
    autoencoder: Autoencoder | NoAutoencoder,
    batch: Batch,
    dtype: torch.dtype,
    deadline: float = math.inf,
) -> tuple[float, float, bool]:
    """One update from this rank's share of the global batch; returns the global mean loss, the gradient's norm, and
    whether the deadline (of time.monotonic) has passed on any rank.

    Shares may be unequal: each rank's sum is weighted so that the averaged gradient is the global mean's.
    Raises FloatingPointError before the update, on every rank, where the loss or the gradient is not finite.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = args.lr * min(1.0, (state.step + 1) / max(1, args.warmup))
    total = torch.zeros((), device=ranks.device)
    passes = split(batch.to(ranks.device), args.accumulate)
    for index, part in enumerate(passes):
        with pipeline.autocast(ranks.device, dtype):
            moments = (
                autoencoder.moments(from_uint8(part.images)) if part.images.dtype == torch.uint8 else part.images
            )
            x1 = autoencoder.sample(moments, part.posterior_noise)
            loss = loss_of(x1, part).sum() / args.global_batch_size
        with ranks.no_sync(network) if index < len(passes) - 1 else nullcontext():
            state.scaler.scale(loss * ranks.size).backward()
        total += loss.detach()
    state.scaler.unscale_(state.optimizer)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf)
    late = torch.full_like(total, time.monotonic() > deadline)  # shares the loss's collective: all stop together
    mean, late = ranks.sum(torch.stack([total, late])).tolist()
    if not math.isfinite(mean) or not (state.scaler.is_enabled() or torch.isfinite(norm)):
        raise FloatingPointError(
            f"step {state.step + 1}: the loss is {mean} and its gradient's norm {norm.item()}; stopped before the "
            "update (lower --lr, set --clip-grad or --warmup, or take --precision fp32)"
        )
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    update_ema(state.ema, state.model, min(args.ema_decay, state.step / (state.step + 9)))
    return mean, norm.item(), late > 0


def split(batch: Batch, parts: int) -> list[Batch]:
    """The batch in at most `parts` pieces of about equal size."""
    rows = len(batch.labels)
    size = max(1, math.ceil(rows / parts))
    return [Batch(*(value[start : start + size] for value in batch)) for start in range(0, rows, size)]


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay·ema + (1 - decay)·model, all weights in one call."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


@torch.no_grad()
def sample_grid(
    args: argparse.Namespace,
    network: SiT,
    teacher: SiT | None,
    autoencoder: Autoencoder | NoAutoencoder,
    device: torch.device,
    dtype: torch.dtype,
):
    """Eight classes from the same noise: Heun's H8, and with a refiner also FlowTurbo's H1P5R3."""
    predictor, schedules = (network, ["H8"]) if teacher is None else (teacher, ["H8", "H1P5R3"])
    y = torch.linspace(0, predictor.num_classes - 1, min(8, predictor.num_classes)).round().long().to(device)
    z = keyed_noise(args.seed, range(len(y)), predictor.input_shape).to(device)
    cfg_scale = args.cfg_scale if predictor.class_dropout_prob > 0 else 1.0
    rows = []
    with pipeline.autocast(device, dtype):
        for schedule in schedules:
            sampler = FlowTurbo(predictor, network if teacher is not None else None, schedule, cfg_scale)
            rows.append(to_uint8(autoencoder.decode(sampler.sample(z, y))).cpu())
    return grid(rows, [f"{schedule}  cfg {cfg_scale:g}" for schedule in schedules])


def run_folder(args: argparse.Namespace, ranks: World) -> tuple[Path, Path | None]:
    """(the run's folder, the checkpoint to resume from or None), chosen by rank 0 for all."""

    def choose() -> tuple[str, str | None]:
        results, name = Path(args.results_dir), f"{args.target}-{args.note}"
        resumed = newest_checkpoint(results, f"[0-9]*-{name}") if args.resume == "auto" else args.resume
        if resumed is not None:
            folder = Path(resumed).resolve().parent.parent
        else:
            taken = [int(p.name.split("-")[0]) for p in results.glob("[0-9]*-*") if p.name.split("-")[0].isdigit()]
            folder = results / f"{max(taken, default=-1) + 1:03d}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder), None if resumed is None else str(resumed)

    folder, resumed = ranks.agree(choose)
    return Path(folder), None if resumed is None else Path(resumed)


if __name__ == "__main__":
    cli.run_script(main)
