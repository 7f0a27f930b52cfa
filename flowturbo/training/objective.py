"""What is minimised: the loss of each sample of a batch, as a value made of options and networks.

An objective says what it draws for a sample, by the sample's number, and takes its times, noise and dropped labels
from that. Another one has other draws, or leaves the images alone: loader and update know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from flowturbo.data.folders import TrainingData
from flowturbo.data.loader import Batch
from flowturbo.data.pictures import from_uint8
from flowturbo.data.randomness import Stream, keyed_generator
from flowturbo.models import SiT
from flowturbo.networks.autoencoder import Autoencoder, NoAutoencoder
from flowturbo.networks.compiled import static_graph
from flowturbo.networks.precision import autocast
from flowturbo.system.distributed import World
from flowturbo.training.build import FrozenNetworks
from flowturbo.training.endpoint import EndpointMatching
from flowturbo.training.log import RunLog
from flowturbo.training.options import TrainingOptions
from flowturbo.training.stopping import StopRequest
from flowturbo.training.trajectories import Trajectories
from flowturbo.transport import PATHS, FlowTurbo, Path, flow_matching_loss, predictor_times, refiner_loss, refiner_times


class Loss(Protocol):
    """What is minimised over the samples of a run."""

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of each sample (N,), with gradients for the network that is trained."""
        ...

    @property
    def prepares(self) -> bool:
        """Whether `prepare` does anything, which may take a while."""
        ...

    def prepare(self, folder: FilePath, ranks: World, stop: StopRequest, log: RunLog) -> bool:
        """Make in the run's folder what has to be there before the first step; False where a stop came before its
        end, and what is finished stays."""
        ...

    def figures(self, ema: nn.Module) -> Mapping[str, float]:
        """What to log of the averaged weights, besides the loss."""
        ...


class Objective(Loss, Protocol):
    """A loss that says what its samples are drawn."""

    @property
    def draw(self) -> Callable[[Sequence[int]], Any]:
        """Called with sample numbers, in the loader's workers: a named tuple of tensors with a row for each. It comes
        back as `Batch.draws`. It can be pickled, and holds nothing that lies on a device."""
        ...


class Draws(NamedTuple):
    """Random numbers of training samples. u_* are uniform in [0, 1), for times and dropped labels."""

    noise: Tensor  # (N, *shape) standard normal: x0
    posterior_noise: Tensor  # the same shape: the autoencoder's; (0,) where it needs none
    u_t: Tensor  # (N,)
    u_dt: Tensor  # (N,)
    u_drop: Tensor  # (N,)


@dataclass(frozen=True)
class KeyedDraws:
    """Draws of samples by number: those of number k depend on (seed, k) alone.

    `shape` is that of a latent; `posterior` says whether the autoencoder needs noise of its own.
    """

    seed: int
    shape: tuple[int, ...]
    posterior: bool

    def __call__(self, numbers: Sequence[int]) -> Draws:
        noise = np.empty((2 if self.posterior else 1, len(numbers), *self.shape), np.float32)
        uniform = np.empty((3, len(numbers)), np.float32)
        for row, number in enumerate(numbers):
            random = keyed_generator(self.seed, number, Stream.TRAINING)
            random.random()  # decides the flip
            uniform[:, row] = random.random(3, dtype=np.float32)
            noise[:, row] = random.standard_normal((len(noise), *self.shape), dtype=np.float32)
        posterior = noise[1] if self.posterior else np.empty(0, np.float32)
        return Draws(*map(torch.from_numpy, (noise[0], posterior, *uniform)))


@dataclass(frozen=True)
class LatentObjective:
    """What the objectives share that learn from images: latents x1, and labels that are dropped at random.

    `model` is the network that is trained: its weights are in float32, and computed with in `dtype` under autocast.
    `class_dropout` is how often a label becomes null; None for a model without a null class.
    """

    model: Callable[..., Tensor]
    draw: KeyedDraws
    autoencoder: Autoencoder | NoAutoencoder
    dtype: torch.dtype
    class_dropout: float | None
    prepares = False

    def latents(self, batch: Batch) -> Tensor:
        """x1 (N, C, h, w), drawn from the moments of the batch's images."""
        moments = batch.images
        if moments.dtype == torch.uint8:
            with autocast(batch.images.device, self.dtype):
                moments = self.autoencoder.moments(from_uint8(batch.images))
        return self.autoencoder.sample(moments, batch.draws.posterior_noise)

    def drop(self, batch: Batch) -> Tensor | None:
        """Whether each label becomes null, (N,)."""
        return None if self.class_dropout is None else batch.draws.u_drop < self.class_dropout

    def prepare(self, folder: FilePath, ranks: World, stop: StopRequest, log: RunLog) -> bool:
        """Nothing is needed but the data."""
        return True

    def figures(self, ema: nn.Module) -> Mapping[str, float]:
        """Nothing but the loss."""
        return {}

    def trained(self, x: Tensor, *inputs: Tensor | None) -> Tensor:
        """The model's output."""
        with autocast(x.device, self.dtype):
            return self.model(x, *inputs)


@dataclass(frozen=True)
class VelocityMatching(LatentObjective):
    """The predictor's: velocity matching on a path."""

    path: Path
    time_distribution: str

    def __call__(self, batch: Batch) -> Tensor:
        low, high = self.path.interval
        t = low + (high - low) * predictor_times(batch.draws.u_t, self.time_distribution)
        x1, drop = self.latents(batch), self.drop(batch)
        return flow_matching_loss(self.trained, x1, batch.labels, x0=batch.draws.noise, t=t, drop=drop, path=self.path)


@dataclass(frozen=True)
class VelocityRefinement(LatentObjective):
    """The refiner's: the teacher's velocity, from the one that it had an Euler step earlier.

    The weights of the teacher's blocks are to be in `dtype`, as of `networks.precision.cast`; autocast would cast
    them anew in every evaluation.
    """

    teacher: Callable[..., Tensor]
    recipe: str
    max_dt: float

    def __call__(self, batch: Batch) -> Tensor:
        draws, x1, drop = batch.draws, self.latents(batch), self.drop(batch)
        t, dt = refiner_times(draws.u_t, draws.u_dt, self.max_dt, self.recipe)
        shared: dict[str, Any] = {"x0": draws.noise, "t": t, "dt": dt, "drop": drop, "recipe": self.recipe}
        return refiner_loss(self.trained, self.teacher, x1, batch.labels, **shared)


def make_objective(
    options: TrainingOptions, frozen: FrozenNetworks, model: SiT, data: TrainingData | None = None
) -> Objective:
    """The objective of a run, for the network that it trains; recipe endpoint needs its data, the others do not."""
    graph = static_graph if options.hardware.compile else lambda network: network
    if isinstance(data, Trajectories):
        assert frozen.teacher is not None
        teacher, refiner, guidance = graph(frozen.teacher), options.refiner, options.guidance.guidance
        sampler = FlowTurbo(teacher, graph(model), refiner.schedule, guidance, refiner.refiner_step)
        reference = FlowTurbo(teacher, None, refiner.reference, replace(guidance, every=1))
        return EndpointMatching(sampler, reference, data, frozen.dtype)
    shared: dict[str, Any] = {
        "model": graph(model),
        "draw": KeyedDraws(options.optimisation.seed, model.input_shape, frozen.autoencoder.channels is not None),
        "autoencoder": frozen.autoencoder,
        "dtype": frozen.dtype,
        "class_dropout": options.optimisation.class_dropout if model.class_dropout_prob > 0 else None,
    }
    if frozen.teacher is None:
        predictor = options.predictor
        return VelocityMatching(
            **shared, path=PATHS[predictor.path_type], time_distribution=predictor.time_distribution
        )
    recipe = options.refiner
    return VelocityRefinement(**shared, teacher=graph(frozen.teacher), recipe=recipe.recipe, max_dt=recipe.max_dt)
