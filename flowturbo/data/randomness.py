"""Randomness by key instead of by state: what is drawn for sample i depends on (seed, i) alone.

So draws do not change with the batch size, the number of ranks or workers, or an interruption.
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011 (Philox, as in numpy).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def keyed_generator(seed: int, index: int, stream: int = 0) -> np.random.Generator:
    """The generator of sample `index` under `seed`; `stream` separates independent uses of one index.

    Any integers in [0, 2^64). Raises ValueError outside.
    """
    for name, value in (("seed", seed), ("index", index), ("stream", stream)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} {value} must lie in 0 to 2^64 - 1")
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, index], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
    )


def keyed_noise(seed: int, indices: Sequence[int], shape: Sequence[int], stream: int = 0) -> Tensor:
    """Standard normal noise (len(indices), *shape), float32 on the CPU, row k from (seed, indices[k])."""
    rows = [keyed_generator(seed, i, stream).standard_normal(tuple(shape), dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)
