"""FlowTurboScheduler: the sampling blocks as a scheduler of diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from flowturbo.sampling.solvers import parse_sampler
from flowturbo.text_to_image.convention import VELOCITIES, flow_config
from flowturbo.text_to_image.evaluations import Evaluation, evaluations, from_evaluation
from flowturbo.transport.blocks import BLOCKS, check_refiner_step
from flowturbo.transport.schedule import Schedule
from flowturbo.transport.solver import Solver

__all__ = ["FlowTurboScheduler", "SchedulerMixin"]


class FlowTurboScheduler(FlowMatchEulerDiscreteScheduler):
    """Sampling blocks in place of Euler's steps, for any flow-matching pipeline of diffusers.

        pipe.scheduler = FlowTurboScheduler.from_config(pipe.scheduler.config)                     # any number of steps
        pipe.scheduler = FlowTurboScheduler.from_config(pipe.scheduler.config, schedule="H1P5")    # 7 evaluations

    `timesteps` and `sigmas` have one entry an evaluation, and num_inference_steps is their number. With a `schedule` it
    has to be the schedule's own; without one, as many blocks `solver` as fit. The grid of steps is the model's: its
    shift, static or dynamic, is applied to equal distances, or to the `sigmas` that a pipeline gives; a grid that the
    schedule names ("P8@shift2") takes its place. R blocks are evaluated by the hook of `apply_flowturbo`.
    `velocity` is "noise-data" for diffusers' models, "data-noise" for InstaFlow's U-Net.

    The scheduler remembers velocities alone. The state that a pipeline holds between two evaluations is an ordinary one
    of its timestep, which masks and callbacks may change, and from which image-to-image may start.

    Raises ValueError for impossible schedules, and for what it cannot do: timesteps for each token, stochastic
    sampling, models that do not predict a velocity.
    """

    __module__ = "flowturbo"  # as a saved pipeline names it: ["flowturbo", "FlowTurboScheduler"]
    init_noise_sigma = 1.0
    sigmas: Tensor
    _step_index: Any
    _begin_index: Any

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        schedule: str | None = None,
        solver: str = "A",
        refiner_step: str = "single",
        velocity: str = "noise-data",
    ):
        check_refiner_step(refiner_step)
        if velocity not in VELOCITIES:
            raise ValueError(f"velocity {velocity!r} is not one of {', '.join(VELOCITIES)}")
        solvers = [letter for letter, block in BLOCKS.items() if block.leads]
        if solver not in solvers:
            raise ValueError(f"solver {solver!r} is not one of {', '.join(solvers)}")
        self.schedule = None if schedule is None else blocks_or_solver(schedule)
        inherited = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        super().__init__(**{name: value for name, value in self.config.items() if name in inherited})
        self.trajectories = 0  # how many have been begun: who keeps something of one sees by it that it is over
        self.trajectory: tuple[Evaluation, ...] = ()  # from the evaluation that it begins with
        self._velocities: dict[int, Tensor] = {}

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler for the model that a scheduler of diffusers, or its config, is made for.

        Raises ValueError where that is no flow model.
        """
        known = set(inspect.signature(cls.__init__).parameters)
        changes = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        config = flow_config({**config, **changes})
        config = {name: value for name, value in config.items() if name in known}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def evaluations(self) -> int | None:
        """How many evaluations the schedule makes: the num_inference_steps to ask for. None without a schedule."""
        return None if self.schedule is None else sum(self.schedule.evaluations(self.config.refiner_step))

    @property
    def has_refiner(self) -> bool:
        """Whether the schedule evaluates a refiner."""
        return self.schedule is not None and self.schedule.has_refiner

    @property
    def current(self) -> int:
        """The place in `trajectory` of the evaluation that is next."""
        return 0 if self.step_index is None else self.step_index - self._first

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation that is next."""
        return self.trajectory[self.current]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Begin a trajectory of so many evaluations.

        sigmas: where steps begin, from 1 (noise) to 0 (data), before the model's shift; as many as there are steps, or
        evaluations. timesteps: the same times 1000, and after the shift. mu: the dynamic shift.
        Raises ValueError for a number that is not the schedule's, and for a dynamic shift without mu.
        """
        if sigmas is not None and timesteps is not None:
            raise ValueError("sigmas and timesteps are two ways to say one thing: expected one of them")
        given = sigmas if timesteps is None else timesteps
        count = num_inference_steps if given is None else len(given)
        schedule = self.schedule or fitting(self.config.solver, count)
        predictor, refiner = schedule.evaluations(self.config.refiner_step)
        whole = predictor + refiner
        if count not in ({whole, None} if given is None else {whole, len(schedule)}):
            raise ValueError(
                f"schedule {schedule} makes {whole} evaluations in {len(schedule)} steps: expected "
                f"num_inference_steps {whole}, got {count}"
            )
        if timesteps is not None:
            self._grid = [*_resampled([t / self.config.num_train_timesteps for t in timesteps], len(schedule)), 0.0]
        elif isinstance(schedule, Solver) or str(schedule.grid):
            self._grid = [1 - t for t in schedule.times()]
        else:
            places = [1 - k / len(schedule) for k in range(len(schedule))]
            given = places if sigmas is None else _resampled(sigmas, len(schedule))
            super().set_timesteps(sigmas=given, mu=mu, device="cpu")
            self._grid = self.sigmas.tolist()
        self._schedule = schedule
        self.num_inference_steps = whole
        self.trajectories += 1
        self._begin(0)
        times = torch.tensor([evaluation.time for evaluation in self.trajectory], dtype=torch.float32)
        self.timesteps = (times * self.config.num_train_timesteps).to(device)
        self.sigmas = torch.cat([times, torch.tensor(self._grid[-1:], dtype=torch.float32)]).to(device)
        self._step_index = self._begin_index = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at another evaluation than the first, as image-to-image does."""
        super().set_begin_index(begin_index)
        self._begin(begin_index)

    def _begin(self, number: int) -> None:
        """Begin a trajectory with this evaluation, from a state that is noised to its time."""
        if number == 0:
            self.trajectory = evaluations(self._schedule, self._grid, self.config.refiner_step)
        else:
            self.trajectory = from_evaluation(self._schedule, self._grid, number, self.config.refiner_step)
        self._first = number
        self._velocities = {}

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """The state at the next evaluation's timestep, or at the end, from the velocity at this one's.

        Raises ValueError for an integer timestep, which would be an index, and for timesteps of tokens.
        """
        if per_token_timesteps is not None:
            raise ValueError("every token of a sample has the same timestep here: expected no per_token_timesteps")
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"timestep {timestep} is an integer, as an index is: expected one of `timesteps`")
        if self.step_index is None:
            self._init_step_index(timestep)
            if self.step_index != self._first:  # a pipeline that tells no begin_index
                self._begin(self._step_index)
        number = self.current
        self._velocities[number] = VELOCITIES[self.config.velocity] * model_output
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))  # steps are too fine for half precision
        for j, weight in self.trajectory[number].weights.items():
            x = x + weight * self._velocities[j].to(x.dtype)
        later = set().union(*(evaluation.weights for evaluation in self.trajectory[number + 1 :]))
        self._velocities = {j: v for j, v in self._velocities.items() if j in later}
        self._step_index += 1
        x = x.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x) if return_dict else (x,)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample as it is; pipelines of diffusion models ask."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Data noised to timesteps (N,) or (1,): as `scale_noise`, for pipelines of diffusion models."""
        sigma = (timesteps / self.config.num_train_timesteps).to(original_samples)
        sigma = sigma.reshape(-1, *[1] * (original_samples.ndim - 1))
        return sigma * noise + (1 - sigma) * original_samples


def blocks_or_solver(text: str) -> Schedule | Solver:
    """The schedule that a text names, or the learned solver. Raises ValueError for anything else."""
    found = parse_sampler(text).schedule
    if found is None:
        raise ValueError(f"{text} is no schedule of blocks, nor a learned solver: a pipeline takes no other sampler")
    return found


def fitting(solver: str, count: int | None) -> Schedule:
    """The schedule of `count` evaluations by blocks of one kind. Raises ValueError where none has so many."""
    for steps in range(count or 0, 0, -1):
        schedule = Schedule(solver * steps)
        if schedule.evaluations() == (count, 0):
            return schedule
    raise ValueError(f"no schedule of {solver} blocks ({BLOCKS[solver].name}) makes {count} evaluations")


def _resampled(sigmas: Sequence[float], steps: int) -> list[float]:
    """A curve of noise levels, which ends at 0, taken at `steps` equal distances."""
    curve = [*map(float, sigmas), 0.0]
    if len(sigmas) == steps:
        return curve[:-1]
    return np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(curve)), curve)[:-1].tolist()
