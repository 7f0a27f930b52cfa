"""Sampling by every schedule: latency, what it is made of, how near to the device's limits, and its error."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.utils
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import Roofline, flops, interleave, kernel_seconds, peak_memory
from benchmarks.options import Plan
from benchmarks.report import LEGEND, Row, against_paper, table
from benchmarks.variants import (
    VARIANTS,
    Networks,
    Run,
    build_networks,
    error,
    make,
    noise_and_labels,
    reference,
    stable_diffusion_autoencoder,
    tf32,
)
from flowturbo.models import SiT
from flowturbo.networks.compiled import StaticGraphs
from flowturbo.networks.precision import autocast
from flowturbo.refiner import VelocityRefiner
from flowturbo.sampling.solvers import parse_schedule
from flowturbo.transport import FlowTurbo


@dataclass
class Work:
    """Floating point operations: of one row of each network, and of decoding one image."""

    predictor: int
    refiner: int
    decode: int

    @classmethod
    def of(cls, networks: Networks) -> Work:
        """Counted on networks of the same shapes that hold no data."""
        with torch.device("meta"):
            x, t = torch.empty(1, *networks.predictor.input_shape), torch.empty(1)
            y = torch.empty(1, dtype=torch.int64)
            predictor, refiner = SiT(**networks.predictor.config), VelocityRefiner(**networks.refiner.config)
            decode = stable_diffusion_autoencoder().decode
            return cls(flops(lambda: predictor(x, t, y)), flops(lambda: refiner(x, t, x, y)), flops(lambda: decode(x)))

    def per_image(self, schedule: str, cfg_scale: float, decode: bool) -> int:
        """Of sampling one image; guidance doubles the rows."""
        predictor, refiner = parse_schedule(schedule).evaluations()
        rows = 1 if cfg_scale == 1 else 2
        return rows * (predictor * self.predictor + refiner * self.refiner) + decode * self.decode


def measure(plan: Plan, best: Roofline) -> list[Row]:
    """Measure all, printing a table for each batch size with and without decoding."""
    networks = build_networks(plan)
    work = Work.of(networks)
    rows: list[Row] = []
    for batch_size in plan.batch_sizes:
        for decode in plan.decode:
            torch._dynamo.reset()
            with torch._inductor.utils.fresh_cache():  # first calls are those of a machine that never compiled this
                group = measure_group(plan, best, networks, work, batch_size, decode)
            print(f"batch {batch_size}, {'with' if decode else 'without'} decoding")
            print(table(group), end="\n\n", flush=True)
            if paper := against_paper(group):
                print(paper, end="\n\n")
            rows += group
    print(LEGEND)
    return rows


@torch.no_grad()
def measure_group(
    plan: Plan, best: Roofline, networks: Networks, work: Work, batch_size: int, decode: bool
) -> list[Row]:
    """All variants and schedules at one batch size, in turn; and in the same turns the parts that they consist of."""
    z, y = noise_and_labels(networks, batch_size)
    names = [(variant, schedule) for variant in VARIANTS for schedule in plan.schedules]
    exact = {
        s: reference(networks, s, plan.cfg_scale, decode).sample(z, y)
        for s in tqdm(plan.schedules, desc="float32", leave=False, disable=None)
    }

    calls: dict[tuple[str, str], Callable[[], Tensor]] = {}
    first, errors, memory = {}, {}, {}
    for name in tqdm(names, desc="first calls", unit="call", leave=False, disable=None):
        variant, schedule = name
        run = make(networks, variant, schedule, plan.cfg_scale, decode, batch_size)
        calls[name] = run.call
        begin = time.perf_counter()
        run.call()
        first[name] = time.perf_counter() - begin
        errors[name] = error(run.values(), exact[schedule])
        held = peak_memory(without_recording(run), plan.device)
        memory[name] = networks.weights(variant, decode) + held
    parts: dict[tuple[str, str], Callable[[], Tensor]] = {}
    for variant in VARIANTS:  # one more block of each kind shows what it takes
        for schedule in ("H1", "H2", "H1R1", "H1R2"):
            parts[variant, schedule] = make(networks, variant, schedule, plan.cfg_scale, False, batch_size).call
            parts[variant, schedule]()
        if decode:
            parts[variant, "decode"] = decoding(networks, variant, z)
            parts[variant, "decode"]()
    rounds: dict[str, Any] = {"repeats": plan.repeats, "warm_up": plan.warm_up}
    timings = interleave(calls, plan.device, **rounds, title=f"batch {batch_size}")
    seconds = {name: t.median for name, t in interleave(parts, plan.device, **rounds, title="parts").items()}
    kernels = bare_seconds(plan, networks, batch_size)
    rows = []
    for variant, schedule in names:
        timing = timings[variant, schedule]
        predictor, refiner = parse_schedule(schedule).evaluations()
        heun_block = max(0.0, seconds[variant, "H2"] - seconds[variant, "H1"])
        refiner_block = max(0.0, seconds[variant, "H1R2"] - seconds[variant, "H1R1"])
        bare = kernels * (predictor * plan.depth + refiner)
        if decode:
            bare += seconds["FlowTurbo compiled", "decode"]
        rate = batch_size * work.per_image(schedule, plan.cfg_scale, decode) / timing.median
        to_ms = 1000 / batch_size
        rows.append(
            Row(
                variant=variant,
                schedule=schedule,
                batch_size=batch_size,
                decode=decode,
                ms=timing.median * to_ms,
                p10=timing.quantile(0.1) * to_ms,
                p90=timing.quantile(0.9) * to_ms,
                tflops=rate / 1e12,
                of_peak=rate / best.matmul,
                of_kernels=bare / timing.median,
                predictor_ms=predictor / 2 * heun_block * to_ms,
                refiner_ms=refiner / 2 * refiner_block * to_ms,
                decode_ms=(seconds[variant, "decode"] if decode else 0.0) * to_ms,
                memory=memory[variant, schedule],
                first_call=first[variant, schedule],
                error=errors[variant, schedule],
            )
        )
    return rows


def without_recording(run: Run) -> Callable[[], Tensor]:
    """The call with its kernels launched one by one: the memory of a recorded graph is not counted as it runs."""
    engine = run.sampler.engine if isinstance(run.sampler, FlowTurbo) else None
    if not isinstance(engine, StaticGraphs):
        return run.call

    def call() -> Tensor:
        engine.recording = False
        try:
            return run.call()
        finally:
            engine.recording = True

    return call


def decoding(networks: Networks, variant: str, z: Tensor) -> Callable[[], Tensor]:
    """A variant's decoding alone."""
    decode = networks.autoencoder_of(variant).decode
    if variant.startswith("FlowTurbo"):
        return lambda: decode(z)

    def published() -> Tensor:
        with tf32(), autocast(z.device, networks.dtype):
            return decode(z)

    return published


def bare_seconds(plan: Plan, networks: Networks, batch_size: int) -> float:
    """Seconds that the bare kernels of one block take for a guided batch."""
    predictor = networks.predictor
    block = next(iter(predictor.blocks))
    pieces = kernel_seconds(
        (1 if plan.cfg_scale == 1 else 2) * batch_size,
        predictor.pos_embed.shape[1],
        predictor.width,
        block.attn.num_heads,
        block.mlp.fc1.out_features,
        plan.device,
        plan.dtype,
    )
    print("one block's bare kernels: " + ", ".join(f"{n} {1000 * s:.3g} ms" for n, s in pieces.items()))
    return sum(pieces.values())
