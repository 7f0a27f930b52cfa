"""Training data: a folder with one folder of images per class, and the randomness of every training sample.

Sample number k of a run (k counts over all steps and ranks) is a pure function of (folder, seed, k): which
image, whether it is flipped, its noise and its times. A run resumes exactly by starting at another k.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import ImageFolder

from flowturbo.data.classes import class_indices
from flowturbo.data.randomness import keyed_generator
from flowturbo.system.distributed import World

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # whatever the name says; none runs a program
LARGEST_CROP = 2**26  # pixels that an image may have once its short side is the crop's
ORDER_STREAM, SUBSET_STREAM = 1, 2  # of the keyed generator; stream 0 is a sample's own
_STOPS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h
MICRO_BATCHES = 12  # of the exact mode: whole numbers of them for 1, 2, 3, 4, 6 and 12 ranks
MEMORY_BYTES = 512 * 2**20  # decoded images are kept where the whole data set fits in this


class Batch(NamedTuple):
    """Training samples. u_* are uniform draws in [0, 1) from which the loss takes its times and label drops."""

    images: Tensor  # (N, C, H, W) uint8, or the moments (N, 2C, h, w) float16 of cached latents
    labels: Tensor  # (N,) int64
    noise: Tensor  # (N, *latent shape) standard normal: x0
    posterior_noise: Tensor  # the same shape: the autoencoder's draw; empty for pixel-space models
    u_t: Tensor  # (N,)
    u_dt: Tensor  # (N,)
    u_drop: Tensor  # (N,)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, copied without waiting where the memory is pinned."""
        return Batch(*(value.to(device, non_blocking=True) for value in self))


class TrainingData(Protocol):
    """What training samples come from: images, or an autoencoder's moments of images."""

    classes: list[str]
    labels: list[int]  # the class index of each image
    image_size: int

    def __len__(self) -> int: ...

    def read(self, index: int, flipped: bool) -> tuple[np.ndarray, int]:
        """(image uint8 (C, H, W) or moments float16 (2C, h, w), class index)."""
        ...

    def fingerprint(self) -> str:
        """A sha256 that changes with the images behind the data."""
        ...


class ClassFolder:
    """Images in one folder per class, cropped to squares.

    `channels` 1, 3 or 4 reads as grey, RGB or RGBA. Raises ValueError where the folder or a class is empty or
    missing, an image cannot be read (it is named), or the classes do not fit the model's `num_classes`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int,
        channels: int = 3,
        num_classes: int | None = None,
        class_map: Mapping[str, int] | None = None,
    ):
        if channels not in MODES:
            raise ValueError(f"images have 1, 3 or 4 channels, not {channels}")
        if not Path(root).is_dir():
            raise ValueError(
                f"data folder {os.fspath(root)!r} does not exist: expected one folder of images per class"
            )
        try:
            folder = ImageFolder(os.fspath(root))
        except FileNotFoundError as error:
            hint = "expected one folder of images per class, like data/cat/1.png"
            raise ValueError(f"data folder {os.fspath(root)!r}: {error}; {hint}") from None
        self.root, self.classes = os.fspath(root), folder.classes
        self.paths = [path for path, _ in folder.samples]
        self.folders = [target for _, target in folder.samples]  # position in `classes`
        indices = class_indices(folder.classes, num_classes, class_map)
        self.labels = [indices[target] for target in self.folders]
        self.image_size, self.channels = image_size, channels
        fits = len(self.paths) * channels * image_size**2 <= MEMORY_BYTES
        self._memory: dict[int, np.ndarray] | None = {} if fits else None

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int, flipped: bool) -> tuple[np.ndarray, int]:
        """(image uint8 (C, H, W), class index)."""
        if self._memory is None:
            image = read_image(self.paths[index], self.image_size, self.channels)
        else:
            if index not in self._memory:
                self._memory[index] = read_image(self.paths[index], self.image_size, self.channels)
            image = self._memory[index]
        return image[:, :, ::-1] if flipped else image, self.labels[index]

    def fingerprint(self) -> str:
        """A sha256 over the relative path and size of every image, in order."""
        lines = (f"{os.path.relpath(path, self.root)}\0{os.path.getsize(path)}\n" for path in self.paths)
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


class Subset:
    """A share of every class of `data`, at least one image of each, drawn from the seed.

    Raises ValueError for a fraction outside (0, 1].
    """

    def __init__(self, data: TrainingData, fraction: float, seed: int):
        if not 0 < fraction <= 1:
            raise ValueError(f"subset {fraction} must lie in (0, 1]")
        self.data, self.classes, self.image_size = data, data.classes, data.image_size
        labels = np.asarray(data.labels)
        chosen = []
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            order = keyed_generator(seed, int(label), SUBSET_STREAM).permutation(len(members))
            chosen.append(members[order[: max(1, round(fraction * len(members)))]])
        self.indices = np.sort(np.concatenate(chosen))
        self.labels = labels[self.indices].tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, flipped: bool) -> tuple[np.ndarray, int]:
        return self.data.read(int(self.indices[index]), flipped)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.data.fingerprint().encode() + self.indices.tobytes()).hexdigest()


def read_image(path: str | os.PathLike[str], size: int, channels: int = 3) -> np.ndarray:
    """A file as a centre-cropped square, uint8 (C, size, size). Raises ValueError naming an unreadable file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if not os.path.isfile(path):  # a pipe would be waited for, for ever
                raise ValueError("no file")
            with Image.open(path, formats=FORMATS) as picture:
                if size**2 * max(picture.size) > LARGEST_CROP * min(picture.size):
                    raise ValueError(f"a strip of {picture.width}x{picture.height} pixels")
                square = centre_crop(picture.convert(MODES[channels]), size)
    except Exception as error:  # Pillow raises a dozen types on damaged files
        raise ValueError(f"cannot read image {os.fspath(path)!r}: {error or type(error).__name__}") from None
    array = np.asarray(square)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The ADM crop (Dhariwal & Nichol, 2021): halve by boxes while twice too large, then bicubic to the short
    side, then the centre."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


class TrainingSamples(Dataset):
    """Batches of `data` by sample numbers, with all the randomness keyed by (seed, number).

    Each pass over the data is a permutation drawn from (seed, pass). `posterior` says whether the autoencoder
    needs noise of its own.
    """

    def __init__(
        self, data: TrainingData, seed: int, latent_shape: Sequence[int], *, flip: bool = True, posterior: bool = True
    ):
        self.data, self.seed, self.flip = data, seed, flip
        self.latent_shape, self.posterior = tuple(latent_shape), posterior
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        return keyed_generator(self.seed, epoch, ORDER_STREAM).permutation(len(self.data))

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        count = len(numbers)
        images, labels = [], np.empty(count, np.int64)
        noise = np.empty((2 if self.posterior else 1, count, *self.latent_shape), np.float32)
        uniform = np.empty((3, count), np.float32)
        for row, number in enumerate(numbers):
            epoch, position = divmod(number, len(self.data))
            random = keyed_generator(self.seed, number)
            flipped = random.random() < 0.5 and self.flip
            image, labels[row] = self.data.read(int(self._order(epoch)[position]), flipped)
            images.append(image)
            uniform[:, row] = random.random(3, dtype=np.float32)
            noise[:, row] = random.standard_normal((len(noise), *self.latent_shape), dtype=np.float32)
        posterior = noise[1] if self.posterior else np.empty(0, np.float32)
        arrays = (np.stack(images), labels, noise[0], posterior, *uniform)
        return Batch(*map(torch.from_numpy, arrays))


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
    samples: TrainingSamples,
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
            + (f" and at most {MICRO_BATCHES} ranks with --exact" if exact else "")
        )
    return _Loader(
        samples,
        batch_sampler=StepSampler(global_batch_size, world, first, last, exact),
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
    )


class _Loader(DataLoader):
    """A loader whose workers hear no signal before they have left the parent's group."""

    def __iter__(self) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(worker: int) -> None:
    # torchrun and terminals signal the whole process group; without its loader the parent could not finish its step.
    # In a group of its own a worker hears of neither, but still ends by SIGTERM when the parent sends it.
    os.setpgrp()
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)  # forgets what came before
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    if sys.platform == "linux":  # it ends with its parent however that ends, and seconds before it would notice
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _as_it_is(batch: Any) -> Any:
    return batch
