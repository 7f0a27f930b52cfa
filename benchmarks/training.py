"""Steps of refiner training: the published code's way, and train.py's from images, from latents and compiled."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benchmarks.measure import Keep, Roofline, interleave, repeated
from benchmarks.options import Plan
from benchmarks.published import tf32
from benchmarks.variants import Networks, build_networks
from flowturbo.data.loader import Batch
from flowturbo.data.pictures import from_uint8
from flowturbo.networks.autoencoder import Autoencoder
from flowturbo.networks.compiled import CannotCompile
from flowturbo.networks.precision import autocast
from flowturbo.refiner import VelocityRefiner
from flowturbo.system import cli
from flowturbo.system.distributed import World
from flowturbo.training.build import FrozenNetworks
from flowturbo.training.objective import KeyedDraws, make_objective
from flowturbo.training.options import DataOptions, HardwareOptions, Optimisation, RefinerOptions, TrainingOptions
from flowturbo.training.step import State, Update, update
from flowturbo.transport import refiner_loss, refiner_times

PUBLISHED = "published way, float32"


@dataclass
class Row:
    """One way to make the same step; `ratio` to the published one, `error` of its loss against eager float32's."""

    variant: str
    batch_size: int
    seconds: float
    p10: float
    p90: float
    steps_per_second: float
    images_per_second: float
    ratio: float
    loss: float
    error: float


@dataclass
class Part:
    """What a part of train.py's step takes by itself."""

    part: str
    batch_size: int
    seconds: float


def measure(plan: Plan, best: Roofline, keep: Keep) -> list[Row | Part]:
    """A table of steps and one of their parts for each batch size."""
    networks = build_networks(plan)
    measured: list[Row | Part] = []
    for batch_size in plan.batch_sizes:
        online, cached = batches(plan, networks, batch_size)
        rows = measure_steps(plan, networks, online, cached)
        print(f"batch {batch_size}; {best}\n{table(rows)}\n", flush=True)
        keep([asdict(each) for each in (*measured, *rows)])
        parts = measure_parts(plan, networks, online, cached)
        print(f"parts of an online step, eager: {shares(parts)}")
        print(f"of one with cached latents: {shares(parts[1:])}\n")
        measured += [*rows, *parts]
        keep([asdict(each) for each in measured])
    print("ratio: to the published code's way. error: of the loss, relative; cached latents are in half precision.")
    return measured


def batches(plan: Plan, networks: Networks, batch_size: int) -> tuple[Batch, Batch]:
    """The same images, labels and noise twice: as bytes, and as moments of the autoencoder."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch_size, 3, plan.image_size, plan.image_size), generator=generator).byte()
    labels = torch.randint(0, networks.predictor.num_classes, (batch_size,), generator=generator)
    draws = KeyedDraws(0, networks.predictor.input_shape, posterior=True)(range(batch_size))
    online = Batch(images, labels, torch.arange(batch_size), draws).to(plan.device)
    with torch.no_grad():
        moments = networks.autoencoder.moments(from_uint8(online.images)).half()
    return online, online._replace(images=moments)


def measure_steps(plan: Plan, networks: Networks, online: Batch, cached: Batch) -> list[Row]:
    steps: dict[str, Callable[[], Update | float]] = {
        PUBLISHED: published_step(plan, networks, online),
        "train.py, online encoding": step(plan, networks, online),
        "train.py, cached latents": step(plan, networks, cached),
        "train.py, cached latents, --compile": step(plan, networks, cached, compile=True),
    }
    losses: dict[str, float] = {}
    for name, call in steps.items():
        begin = time.perf_counter()
        try:
            told = call()
        except CannotCompile as reason:
            print(f"{name}: left out: {cli.one_line(reason)}")
            continue
        losses[name] = told if isinstance(told, float) else told.loss  # of the first step, from equal weights
        print(f"{name}: first step {time.perf_counter() - begin:.1f} s, loss {losses[name]:.6f}", flush=True)
    inner = 10 if plan.device.type == "cuda" else 1  # in a row, so that a step may run while the next is launched
    rounds = {name: repeated(steps[name], inner) for name in losses}
    timings = interleave(rounds, plan.device, repeats=plan.repeats, warm_up=max(1, plan.warm_up), title="steps")
    n, first = len(online.labels), timings[PUBLISHED].median
    return [
        Row(
            variant=name,
            batch_size=n,
            seconds=timing.median / inner,
            p10=timing.quantile(0.1) / inner,
            p90=timing.quantile(0.9) / inner,
            steps_per_second=inner / timing.median,
            images_per_second=n * inner / timing.median,
            ratio=first / timing.median,
            loss=losses[name],
            error=abs(losses[name] / losses[PUBLISHED] - 1),
        )
        for name, timing in timings.items()
    ]


def new_refiner(networks: Networks) -> VelocityRefiner:
    """The refiner to train, from the same weights in every variant."""
    refiner = copy.deepcopy(networks.refiner).requires_grad_(True)
    refiner.pos_embed.requires_grad_(False)
    return refiner


def options_of(batch_size: int, compile: bool = False) -> TrainingOptions:
    """train.py's defaults, but for the learning rate: next to none, so that every step costs the same and the variants
    stay comparable."""
    return TrainingOptions(
        "refiner",
        DataOptions(data_path="-"),
        RefinerOptions(model_teacher_ckpt="-"),
        optimisation=Optimisation(global_batch_size=batch_size, lr=1e-30),
        hardware=HardwareOptions(compile=compile),
    )


def step(plan: Plan, networks: Networks, batch: Batch, compile: bool = False) -> Callable[[], Update]:
    """A step of train.py, in the plan's precision; nobody waits for what it returns."""
    options, model = options_of(len(batch.labels), compile), new_refiner(networks)
    state = State.new(model, plan.device, options.optimisation, fp16=plan.dtype == torch.float16)
    autoencoder = Autoencoder(copy.deepcopy(networks.autoencoder.network))  # as train.py has it, channels last
    frozen = FrozenNetworks(networks.fast_predictor, autoencoder, plan.device, plan.dtype)
    objective, world = make_objective(options, frozen, model), World(0, 0, 1, plan.device)
    return lambda: update(state, world, batch, objective, options.optimisation)


def published_step(plan: Plan, networks: Networks, batch: Batch) -> Callable[[], float]:
    """The published code's step: float32, images encoded in every step, one tensor of the EMA after another, and a
    wait for the loss."""
    model = new_refiner(networks)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    autoencoder, predictor = networks.autoencoder, networks.predictor
    draws = batch.draws
    t, dt = refiner_times(draws.u_t, draws.u_dt)
    drop = draws.u_drop < Optimisation().class_dropout

    @tf32()
    def call() -> float:
        x1 = autoencoder.sample(autoencoder.moments(from_uint8(batch.images)), draws.posterior_noise)
        losses = refiner_loss(model, predictor, x1, batch.labels, x0=draws.noise, t=t, dt=dt, drop=drop)
        loss = losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for averaged, weight in zip(ema.parameters(), model.parameters(), strict=True):
                averaged.mul_(0.9999).add_(weight, alpha=1 - 0.9999)
        return loss.item()

    return call


def measure_parts(plan: Plan, networks: Networks, online: Batch, cached: Batch) -> list[Part]:
    """Encoding, the teacher's two evaluations, the refiner forward and backward, and the rest of the update."""
    model, teacher = new_refiner(networks), networks.fast_predictor
    autoencoder = Autoencoder(copy.deepcopy(networks.autoencoder.network))
    x, t, drop = cached.draws.noise, cached.draws.u_t, cached.draws.u_drop < Optimisation().class_dropout
    whole = step(plan, networks, cached)

    def encode() -> None:
        with torch.no_grad(), autocast(plan.device, plan.dtype):
            autoencoder.moments(from_uint8(online.images))

    def teach() -> None:
        with torch.inference_mode():
            for _ in range(2):
                teacher(x, t, cached.labels, drop)

    def refine() -> None:
        with autocast(plan.device, plan.dtype):
            loss = model(x, t, x, cached.labels, drop).square().mean()
        loss.backward()

    calls = {"encoding": encode, "teacher": teach, "refiner": refine, "step": whole}
    timings = interleave(calls, plan.device, repeats=plan.repeats, warm_up=max(1, plan.warm_up), title="parts")
    seconds = {name: timing.median for name, timing in timings.items()}
    rest = seconds.pop("step") - seconds["teacher"] - seconds["refiner"]
    seconds["optimizer, EMA and the rest"] = max(0.0, rest)
    return [Part(name, len(online.labels), value) for name, value in seconds.items()]


def shares(parts: list[Part]) -> str:
    """What each takes of their sum."""
    whole = sum(part.seconds for part in parts)
    return ", ".join(f"{part.part} {100 * part.seconds / whole:.0f} %" for part in parts)


def table(rows: list[Row]) -> str:
    head = f"{'variant':<38}{'s/step':>9}{'p10':>9}{'p90':>9}{'steps/s':>9}{'images/s':>10}{'ratio':>7}"
    head += f"{'loss':>10}{'error':>9}"
    lines = [head, "-" * len(head)]
    for row in rows:
        lines.append(
            f"{row.variant:<38}{row.seconds:>9.4f}{row.p10:>9.4f}{row.p90:>9.4f}{row.steps_per_second:>9.3g}{row.images_per_second:>10.3g}"
            f"{row.ratio:>7.2f}{row.loss:>10.6f}{row.error:>9.1e}"
        )
    return "\n".join(lines)
