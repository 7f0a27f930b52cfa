"""The work of sampling, counted, and how long a measurement of it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from benchmarks.measure import Roofline, flops
from benchmarks.options import Plan
from benchmarks.variants import FLOAT32, Networks, stable_diffusion_autoencoder, variants_of
from flowturbo.models import SiT
from flowturbo.refiner import VelocityRefiner
from flowturbo.sampling.solvers import parse_schedule


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


def expected_seconds(plan: Plan, best: Roofline, work: Work) -> float:
    """What the measurement takes but for compiling, by its work at the rates of matrix products."""
    seconds = 0.0
    for variant in (*variants_of(plan), "reference"):
        slow = variant in (FLOAT32, "reference")
        rate = best.of(torch.float32 if slow else plan.dtype)
        calls = 1 if variant == "reference" else plan.repeats + plan.warm_up + 3
        for schedule in plan.schedules:
            per_image = sum(work.per_image(schedule, plan.cfg_scale, decode) for decode in plan.decode)
            seconds += calls * sum(plan.batch_sizes) * per_image / rate
    return 1.2 * seconds  # what is no product, and the parts


def duration(seconds: float) -> str:
    """Rounded up to seconds, minutes or hours."""
    for unit, size, limit in (("s", 1, 100), ("min", 60, 100 * 60)):
        if seconds < limit:
            return f"{math.ceil(seconds / size)} {unit}"
    return f"{seconds / 3600:.1f} h"
