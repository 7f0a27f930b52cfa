"""Randomness by key instead of by state: what is drawn for sample i depends on (seed, i) alone.

So draws do not change with the batch size, the number of ranks or workers, or an interruption.
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011 (Philox, as in numpy).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """Independent uses of one (seed, index): every stream of the keyed generator. The numbers are for ever."""

    NOISE = 0  # sampling, by sample: the state at t = 0
    SDE = 1  # sampling, by sample: the noise of step k is stream SDE + k
    EDIT = 2**62  # editing, by result: the noise of pass k > 0 is stream EDIT + k
    LABEL = 2**63  # sampling, by sample: its class
    TRAJECTORY = 2**63 + 1  # training, by trajectory of the predictor: its class and noise, in this order

    TRAINING = 0  # training, by sample: flip, times, label drop, noise, in this order
    ORDER = 1  # training, by pass over the data: the order of the images
    SUBSET = 2  # training, by class: which images are taken


def keyed_generator(seed: int, index: int, stream: int = Stream.NOISE) -> np.random.Generator:
    """The generator of sample `index` under `seed`; `stream` separates independent uses of one index.

    Any integers in [0, 2^64). Raises ValueError outside.
    """
    for name, value in (("seed", seed), ("index", index), ("stream", stream)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} {value} must lie in 0 to 2^64 - 1")
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, index], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
    )


def keyed_noise(seed: int, indices: Sequence[int], shape: Sequence[int], stream: int = Stream.NOISE) -> Tensor:
    """Standard normal noise (len(indices), *shape), float32 on the CPU, row k from (seed, indices[k])."""
    rows = [keyed_generator(seed, i, stream).standard_normal(tuple(shape), dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)


def between(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Noise (N, ...) on the great circle from `first`, share 0, to `second`, share 1: as long as noise is.

    A straight line would pass nearer to zero than noise ever is. Source: White, "Sampling Generative Networks", 2016.
    """
    a, b = first.flatten(1).double(), second.flatten(1).double()
    cosine = (a * b).sum(1, keepdim=True) / (a.norm(dim=1, keepdim=True) * b.norm(dim=1, keepdim=True))
    angle = cosine.clamp(-1, 1).acos()
    if float(angle.min()) == 0:  # one noise with itself: there is no circle to walk on
        angle = angle.clamp(min=1e-9)
    mixed = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
    return mixed.to(first.dtype).reshape(first.shape)
