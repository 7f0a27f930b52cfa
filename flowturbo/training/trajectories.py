"""Trajectories of a frozen predictor in place of images: drawn by number, computed once, cached in files.

What is kept of each the recipe says that trains on them: here it is one array of channels, a record.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowturbo.data.identity import READING_RULES, Identity
from flowturbo.data.randomness import Stream, keyed_generator
from flowturbo.system.distributed import World
from flowturbo.system.files import atomic_write, sha256
from flowturbo.training.stopping import StopRequest

HELD_OUT = 256  # the first so many trajectories, which are not trained on
BATCH = 64  # trajectories that are computed at once, and lie in one file


class Trajectories:
    """`count` trajectories to train on and HELD_OUT others, a TrainingData without images.

    Trajectory k starts at the noise, of `shape` (C, h, w), and class drawn from (seed, k). `settings` (JSON types) are
    what else shapes them besides the predictor, which `file` holds; the fingerprint is that of both.
    """

    classes: list[str]
    class_indices: list[int]

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        settings: Mapping[str, Any],
        seed: int,
        count: int,
        file: Path | None = None,
    ):
        self.predictor_file, self.settings, self.seed = file, {**settings, "seed": seed}, seed
        self.shape, self.num_classes, self.image_size = shape, num_classes, shape[1]
        self.classes, self.class_indices = [], []
        self.labels = [self._label(HELD_OUT + index) for index in range(count)]
        self.note = ""  # to tell the user
        self.folder: Path | None = None  # set by cache
        self._files: dict[int, np.ndarray] = {}  # opened where they are read, so that loader workers open their own

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return str(HELD_OUT + index)

    def read(self, index: int, flipped: bool) -> tuple[np.ndarray, int]:
        """(record float32 (channels, h, w), class index). There is nothing to flip: a mirrored start is another one."""
        return self._record(HELD_OUT + index), self.labels[index]

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Records (HELD_OUT, channels, h, w) and labels of the trajectories that are not trained on."""
        numbers = range(HELD_OUT)
        return torch.from_numpy(np.stack([self._record(k) for k in numbers])), self.starts(numbers)[1]

    def starts(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Noise (N, C, h, w) and labels (N,) of trajectories by number."""
        noise = []
        for number in numbers:
            random = keyed_generator(self.seed, number, Stream.TRAJECTORY)
            random.integers(self.num_classes)  # the class
            noise.append(random.standard_normal(self.shape, dtype=np.float32))
        return torch.from_numpy(np.stack(noise)), torch.tensor([self._label(number) for number in numbers])

    def _label(self, number: int) -> int:
        return int(keyed_generator(self.seed, number, Stream.TRAJECTORY).integers(self.num_classes))

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        predictor = None if self.predictor_file is None else sha256(self.predictor_file)
        text = json.dumps({**self.settings, "predictor": predictor}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def identity(self) -> Identity:
        return Identity(
            self.fingerprint(), "the settings of trajectories, and their predictor", None, None, READING_RULES
        )

    def read_otherwise(self, rule: str) -> int:
        return 0  # no rule of reading images concerns them

    # ---- the cache

    def bytes(self, channels: int) -> int:
        """The size of the cache."""
        return 4 * (HELD_OUT + len(self)) * channels * self.shape[1] * self.shape[2]

    def cache(
        self,
        folder: Path,
        channels: int,
        make: Callable[[Sequence[int]], Tensor],
        ranks: World,
        stop: StopRequest,
    ) -> bool:
        """Make the records that are not in `folder` yet, or go on with them; whether all are there.

        `make` gives the records (N, channels, h, w) of trajectories by number. What is finished stays where a stop is
        wanted. Raises ValueError where a record is not finite, OSError where the disk has no room.
        """
        self.folder, total = folder, HELD_OUT + len(self)
        files = range(-(-total // BATCH))
        missing = ranks.agree(lambda: [file for file in files if not self._is_whole(file, channels)])
        if missing:
            ranks.agree(lambda: _check_room(folder, self.bytes(channels) * len(missing) // len(files)))
        left = missing[ranks.rank :: ranks.size]
        with tqdm(
            total=total,
            initial=total - sum(len(self._numbers(file)) for file in missing),
            unit="trajectory",
            desc="caching",
            dynamic_ncols=True,
            leave=False,
            disable=not (ranks.is_main and missing),
        ) as bar:
            while left and not stop.wanted:
                numbers = self._numbers(left[0])
                records = make(numbers)
                if not bool(records.isfinite().all()):
                    raise ValueError(f"the predictor's trajectories {numbers[0]} to {numbers[-1]} are not finite")
                with atomic_write(self._path(left.pop(0))) as out:
                    np.save(out, records.float().cpu().numpy())
                bar.update(min(len(numbers) * ranks.size, total - bar.n))  # the other ranks are about as far
        return float(ranks.sum(torch.tensor(float(len(left)), device=ranks.device))) == 0

    def _record(self, number: int) -> np.ndarray:
        file, row = divmod(number, BATCH)
        if file not in self._files:
            self._files[file] = np.load(self._path(file), mmap_mode="r", allow_pickle=False)
        return np.array(self._files[file][row])

    def _numbers(self, file: int) -> range:
        return range(file * BATCH, min((file + 1) * BATCH, HELD_OUT + len(self)))

    def _path(self, file: int) -> Path:
        assert self.folder is not None, "nothing is cached yet"
        return self.folder / f"{file:05d}.npy"

    def _is_whole(self, file: int, channels: int) -> bool:
        try:
            found = np.load(self._path(file), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        expected = (len(self._numbers(file)), channels, *self.shape[1:])
        return found.shape == expected and found.dtype == np.float32


def _check_room(folder: Path, size: int) -> None:
    """Raises OSError where the disk has less room than is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < size:
        raise OSError(f"{folder} needs {size / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free")
