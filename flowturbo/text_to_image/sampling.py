"""From prompts to uint8 images with a pipeline of diffusers: by FlowTurbo's schedules, or by solvers of diffusers."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowturbo.data.pictures import to_uint8
from flowturbo.data.randomness import Stream, keyed_generator
from flowturbo.text_to_image.apply import apply_flowturbo, remove_flowturbo
from flowturbo.text_to_image.convention import flow_config
from flowturbo.text_to_image.families import network_of
from flowturbo.text_to_image.options import TextSamplingOptions
from flowturbo.text_to_image.pipelines import encode_prompts
from flowturbo.text_to_image.refined import FlowRefiner
from flowturbo.text_to_image.scheduler import blocks_or_solver
from flowturbo.transport.schedule import Schedule
from flowturbo.transport.solver import Solver

SOLVERS = ("Euler", "UniPC", "DPM++")  # of diffusers; of the two last the second order


@dataclass(frozen=True)
class Row:
    """A way to sample: a schedule of blocks, a learned solver, or one of diffusers with its evaluations ("UniPC8")."""

    name: str
    schedule: Schedule | Solver | None = None
    text: str = ""  # that names the schedule
    solver: str = ""
    count: int = 0

    @classmethod
    def parse(cls, text: str) -> Row:
        """Raises ValueError, with the grammar of schedules, for anything else."""
        if found := re.fullmatch(r"(euler|unipc|dpm\+\+)([1-9][0-9]{0,3})", text.strip(), re.IGNORECASE):
            solver = next(name for name in SOLVERS if name.lower() == found[1].lower())
            return cls(f"{solver}{found[2]}", solver=solver, count=int(found[2]))
        schedule = blocks_or_solver(text)
        return cls(str(schedule), schedule, text)

    def evaluations(self, refiner_step: str = "single") -> tuple[int, int]:
        """(predictor, refiner) evaluations of one trajectory."""
        return (self.count, 0) if self.schedule is None else self.schedule.evaluations(refiner_step)

    @property
    def needs_refiner(self) -> bool:
        """Whether it evaluates a refiner."""
        return self.schedule is not None and self.schedule.has_refiner


class TextSampler:
    """Images of prompts, by one row; image i depends on the seed and i alone, not on its batch.

    It puts its scheduler on the pipeline when it is called: several may share one.
    """

    def __init__(self, pipe: Any, row: Row, options: TextSamplingOptions, refiner: FlowRefiner | None = None):
        self.pipe, self.row, self.options, self.refiner = pipe, row, options, refiner
        if row.needs_refiner and refiner is None:
            raise ValueError(f"schedule {row.name} has R blocks: they need a refiner")

    def __str__(self) -> str:
        return self.row.name

    @property
    def evaluations(self) -> tuple[int, int]:
        """(predictor, refiner) evaluations of one trajectory."""
        return self.row.evaluations(self.options.refiner_step)

    @torch.no_grad()
    def __call__(self, seed: int, numbers: Sequence[int], prompts: Sequence[str]) -> Tensor:
        """uint8 (N, C, H, W), a row for each prompt."""
        pipe, options = self.pipe, self.options
        before = pipe.scheduler
        try:
            self._apply(before)
            seeds = [int(keyed_generator(seed, i, Stream.NOISE).integers(2**63)) for i in numbers]
            found = pipe(
                **self._prompts(list(prompts)),
                **options.call(getattr(pipe, "vae", None) is None, getattr(pipe, "vae_scale_factor", 8)),
                num_inference_steps=sum(self.evaluations),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent" if getattr(pipe, "vae", None) is None else "pt",
            ).images
        finally:
            remove_flowturbo(pipe)
            pipe.scheduler = before
        return to_uint8(found if getattr(pipe, "vae", None) is None else 2 * found - 1)

    def _apply(self, scheduler: Any) -> None:
        """Put the row's scheduler on the pipeline."""
        if self.row.schedule is None:
            self.pipe.scheduler = solver_of_diffusers(self.row.solver, scheduler)
            return
        settings = {"velocity": self.options.velocity} if self.options.velocity else {}
        apply_flowturbo(self.pipe, self.refiner, self.row.text, self.options.refiner_step, **settings)

    def _prompts(self, prompts: list[str]) -> dict[str, Any]:
        """The pipeline's arguments for prompts: texts, or embeddings where it has no text encoder of its own."""
        negative = self.options.negative_prompt
        if getattr(self.pipe, "text_encoder", None) is not None:
            return {"prompt": prompts, **({"negative_prompt": [negative] * len(prompts)} if negative else {})}
        encoded = encode_prompts(self.pipe, prompts)
        null = encode_prompts(self.pipe, [negative] * len(prompts))
        return {**encoded, **{f"negative_{name}": value for name, value in null.items()}}


def solver_of_diffusers(name: str, scheduler: Any) -> Any:
    """A scheduler of diffusers for the flow model that another is for."""
    import diffusers

    config = flow_config(scheduler.config)
    known = ("use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    shared = {key: config[key] for key in (*known, "time_shift_type", "num_train_timesteps") if key in config}
    shift = config.get("shift") or 1.0
    if name == "Euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **shared)
    dynamic = {key: shared[key] for key in ("use_dynamic_shifting", "time_shift_type") if key in shared}
    kind = {"UniPC": diffusers.UniPCMultistepScheduler, "DPM++": diffusers.DPMSolverMultistepScheduler}[name]
    return kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2, **dynamic)


@dataclass
class Made:
    """What a sampler has made of all prompts, and what it took."""

    images: Tensor  # (N, C, H, W) uint8
    seconds: float

    @property
    def ms(self) -> float:
        """Milliseconds per image."""
        return 1000 * self.seconds / len(self.images)


def sample_all(sampler: TextSampler, seed: int, prompts: Sequence[str], batch_size: int) -> Made:
    """Sample all prompts, in batches; image i is of prompt i."""
    images, seconds = [], 0.0
    for start in range(0, len(prompts), batch_size):
        numbers = range(start, min(start + batch_size, len(prompts)))
        begin = time.perf_counter()
        images.append(sampler(seed, numbers, prompts[start : numbers.stop]).cpu())
        seconds += time.perf_counter() - begin
    return Made(torch.cat(images), seconds)


def open_pipeline(options: TextSamplingOptions, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline of the options on a device, offloaded where they say so. Raises ValueError for that on a CPU."""
    from flowturbo.text_to_image.pipelines import load_pipeline

    if options.offload != "none" and device.type != "cuda":
        raise ValueError(f"offload {options.offload} moves networks between GPU and CPU: this device is {device}")
    pipe = load_pipeline(options.pipeline, dtype, device if options.offload == "none" else "cpu")
    if options.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif options.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    pipe.set_progress_bar_config(disable=True)
    if options.compile:
        network_of(pipe).compile()
    return pipe
