"""Training samples by number, and the loader that shares each step's batch between ranks and workers.

Sample number k of a run (k counts over all steps and ranks) is a pure function of (data, seed, k): which image,
whether it is flipped, and what the objective draws for it. A run goes on exactly by starting at another k.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from flowturbo.data.folders import TrainingData
from flowturbo.data.randomness import Stream, keyed_generator
from flowturbo.data.workers import Loader, LoaderFailed, items
from flowturbo.system.cli import one_line
from flowturbo.system.distributed import World

MICRO_BATCHES = 12  # of the exact mode: whole numbers of them for 1, 2, 3, 4, 6 and 12 ranks


class Batch(NamedTuple):
    """Training samples, one in each row."""

    images: Tensor  # (N, C, H, W) uint8, the moments (N, 2C, h, w) float16 of cached latents, or trajectories
    labels: Tensor  # (N,) int64
    numbers: Tensor  # (N,) int64: the sample numbers
    draws: Any  # what the objective has drawn for them: a named tuple of tensors with N rows

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, copied without waiting where the memory is pinned."""
        return self.each(lambda value: value.to(device, non_blocking=True))

    def rows(self, start: int, stop: int) -> Batch:
        """The samples start..stop-1."""
        return self.each(lambda value: value[start:stop])

    def each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """What a function makes of every tensor."""
        images, labels, numbers = map(function, self[:3])
        return Batch(images, labels, numbers, self.draws._make(map(function, self.draws)))


class TrainingSamples(Dataset):
    """Batches of `data` by sample numbers, with all the randomness keyed by (seed, number).

    Each pass over the data is a permutation drawn from (seed, pass). `draw` is the objective's: it is called with the
    numbers of a batch, in the loader's workers. It may use Stream.TRAINING of each number after its first uniform
    draw, which decides the flip.
    """

    def __init__(self, data: TrainingData, seed: int, draw: Callable[[Sequence[int]], Any], *, flip: bool = True):
        self.data, self.seed, self.draw, self.flip = data, seed, draw, flip

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        images, labels = [], []
        for number in numbers:
            epoch, position = divmod(number, len(self.data))
            flipped = self.flip and keyed_generator(self.seed, number, Stream.TRAINING).random() < 0.5
            image, label = self.data.read(int(order_of(self.seed, epoch, len(self.data))[position]), flipped)
            images.append(image)
            labels.append(label)
        return Batch(
            torch.from_numpy(np.stack(images)), torch.tensor(labels), torch.tensor(numbers), self.draw(numbers)
        )


@lru_cache(maxsize=2)
def order_of(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of the images in a pass over the data."""
    return keyed_generator(seed, epoch, Stream.ORDER).permutation(count)


def micro_batch(micro: int, global_batch_size: int) -> range:
    """The positions in the global batch of micro-batch number `micro` of the exact mode."""
    return range(global_batch_size * micro // MICRO_BATCHES, global_batch_size * (micro + 1) // MICRO_BATCHES)


class StepSampler(Sampler[list[int]]):
    """The sample numbers of this rank's share of each step's global batch, from step `first` to `last`.

    With `exact` the share is one of whole micro-batches.
    """

    def __init__(self, global_batch_size: int, world: World, first: int, last: int, exact: bool = False):
        share = world.share(global_batch_size)
        if exact:
            micro = world.share(MICRO_BATCHES)
            share = range(
                micro_batch(micro.start, global_batch_size).start, micro_batch(micro.stop, global_batch_size).start
            )
        self.global_batch_size, self.share = global_batch_size, share
        self.first, self.last = first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            yield [step * self.global_batch_size + i for i in self.share]


def training_loader(
    samples: Dataset,
    global_batch_size: int,
    world: World,
    *,
    first: int,
    last: int,
    workers: int,
    exact: bool = False,
) -> DataLoader:
    """Batches for the steps first..last-1 of this rank.

    Raises ValueError for a batch smaller than the world, or in exact mode than its micro-batches.
    """
    least = MICRO_BATCHES if exact else world.size
    if global_batch_size < least or (exact and world.size > MICRO_BATCHES):
        raise ValueError(
            f"global batch size {global_batch_size} over {world.size} ranks: needs at least {least} samples"
            + (f" and at most {MICRO_BATCHES} ranks in exact mode" if exact else "")
        )
    sampler = StepSampler(global_batch_size, world, first, last, exact)
    return Loader(samples, workers, world.device, batch_sampler=sampler, collate_fn=_as_it_is)


def ahead(batches: Iterable[Batch], count: int = 2) -> Iterator[tuple[Batch, LoaderFailed | None]]:
    """Batches, each with what reading one of the next `count` has raised, or None.

    So a rank learns that it cannot go on while it has the batches of the steps that the others may make before they
    hear of it. Raises at once where the first batches cannot be read.
    """
    held: deque[Batch] = deque()
    failure: LoaderFailed | None = None
    source, begun = items(batches), False
    while True:
        try:
            while failure is None and len(held) <= count:
                held.append(next(source))
        except StopIteration:
            count = -1
        except Exception as error:
            if not begun:
                raise
            failure = error if isinstance(error, LoaderFailed) else LoaderFailed(one_line(error))
        if not held:
            return
        begun = True
        yield held.popleft(), failure


def _as_it_is(batch: Any) -> Any:
    return batch
