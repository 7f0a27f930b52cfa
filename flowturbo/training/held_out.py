"""The loss on images that are held out of training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from flowturbo.data.loader import Batch
from flowturbo.data.parts import Part, place_of
from flowturbo.models import SiT
from flowturbo.sampling.fidelity import Estimate
from flowturbo.training.build import FrozenNetworks
from flowturbo.training.curves import ERROR
from flowturbo.training.log import Measured
from flowturbo.training.objective import make_objective
from flowturbo.training.options import TrainingOptions

SEED = 0  # of what is drawn: the same in every run, so that runs can be compared
FIRST = 2**62  # the number of the first draw, which no training comes to
MOST_IMAGES = 1024
LEAST_DRAWS = 256  # fewer images are taken several times, each time with other times and noise
BATCH = 32


class HeldOutLoss:
    """What a run minimises, with the averaged weights, on held-out images: not flipped, with the same draws every time.

    Of many images it takes MOST_IMAGES, which their names pick; the standard error is over images.
    """

    def __init__(self, options: TrainingOptions, frozen: FrozenNetworks, ema: SiT, data: Part):
        eager = replace(
            options,
            hardware=replace(options.hardware, compile=False),  # no second graph for batches of another size
            optimisation=replace(options.optimisation, seed=SEED),
        )
        self.objective = make_objective(eager, frozen, ema)
        order = sorted(range(len(data)), key=lambda index: place_of(data.name(index)))
        self.data, self.chosen, self.device = data, sorted(order[:MOST_IMAGES]), frozen.device

    @torch.no_grad()
    def __call__(self) -> Measured:
        """Raises ValueError where an image cannot be read any more."""
        losses = torch.cat([self.objective(batch.to(self.device)).double().cpu() for batch in self._batches()])
        each = losses.reshape(-1, len(self.chosen)).mean(0)
        loss = Estimate.mean(each)
        many = f"{len(each):,} image{'s' if len(each) > 1 else ''}"
        return Measured(
            f"held-out loss {loss} ({many})", {"holdout": loss.value, "holdout" + ERROR: loss.standard_error}
        )

    def _batches(self) -> Iterator[Batch]:
        images = len(self.chosen)
        count = images * math.ceil(LEAST_DRAWS / images)
        for start in range(0, count, BATCH):
            places = range(start, min(start + BATCH, count))
            read = [self.data.read(self.chosen[place % images], False) for place in places]
            numbers = [FIRST + place for place in places]
            pixels, labels = (np.stack(column) for column in zip(*read))
            yield Batch(
                torch.from_numpy(pixels), torch.from_numpy(labels), torch.tensor(numbers), self.objective.draw(numbers)
            )
