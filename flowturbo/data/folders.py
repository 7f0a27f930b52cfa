"""Data as training takes them: a folder with one folder of images per class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from flowturbo.data.classes import ClassNames, assign_classes
from flowturbo.data.identity import (
    CLASSES,
    CONTENT_FILES,
    ORDER,
    READING_RULES,
    Fingerprint,
    Identity,
    fingerprint_files,
    fingerprint_labels,
    fingerprint_sizes,
    sample_of,
    sizes_of,
)
from flowturbo.data.images import MODES, in_threads, read_image, rules_of
from flowturbo.data.options import parse_background
from flowturbo.data.walk import HIDDEN, SYSTEM, walk

MEMORY_BYTES = 512 * 2**20  # decoded images are kept where the whole data set fits in this
OUTSIDE_CLASSES = "images outside class folders"  # a kind of entries that are passed over


class TrainingData(Protocol):
    """What training samples come from: images, or an autoencoder's moments of images."""

    classes: list[str]  # the class folders
    class_indices: list[int]  # the class index of each of them
    labels: list[int]  # the class index of each image
    image_size: int

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What tells an image from the others, wherever the folder lies."""
        ...

    def read(self, index: int, flipped: bool) -> tuple[np.ndarray, int]:
        """(image uint8 (C, H, W) or moments float16 (2C, h, w), class index)."""
        ...

    def fingerprint(self) -> str:
        """A sha256 that changes with the images behind the data."""
        ...

    def identity(self) -> Identity:
        """What a run records of its data."""
        ...

    def read_otherwise(self, rule: str) -> int | None:
        """How many images version 1 of a reading rule reads otherwise than version 2; None where that is not known."""
        ...


class Applied(NamedTuple):
    """How many images each reading rule changes, and how many images were looked at for that."""

    counts: Mapping[str, int]
    looked_at: int


class ClassFolder:
    """Images in one folder per class, cropped to squares.

    `channels` 1, 3 or 4 reads as grey, RGB or RGBA. `skipped` counts the entries that were passed over by kind, `note`
    says where class folders that are numbers were taken by their order. Raises ValueError where the folder or a class
    is empty or missing, an image cannot be read (it is named), or the classes do not fit the model's `num_classes`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int,
        channels: int = 3,
        num_classes: int | None = None,
        class_map: Mapping[str, int] | None = None,
        background: str = "white",
    ):
        if channels not in MODES:
            raise ValueError(f"images have 1, 3 or 4 channels, not {channels}")
        parse_background(background)
        self.root, self.image_size, self.channels, self.background = os.fspath(root), image_size, channels, background
        expected = "expected one folder of images per class, like data/cat/1.png"
        if not os.path.isdir(root):
            raise ValueError(f"data folder {self.root!r} does not exist: {expected}")
        found = walk(root)
        self.classes = found.folders
        position = {name: k for k, name in enumerate(self.classes)}
        self.files = [file for file in found.files if os.sep in file]  # relative to the root
        self.folders = [position[file.partition(os.sep)[0]] for file in self.files]  # positions in `classes`
        outside = len(found.files) - len(self.files)
        self.skipped = {**found.skipped, **({OUTSIDE_CLASSES: outside} if outside else {})}
        if not self.classes:
            raise ValueError(f"data folder {self.root!r} holds no folders: {expected}")
        if empty := sorted(set(self.classes) - {self.classes[k] for k in set(self.folders)}):
            raise ValueError(f"class folders without images: {', '.join(empty[:5])} in {self.root!r}; {expected}")
        self.class_indices, self.note, self._renumbered = assign_classes(self.classes, num_classes, class_map)
        self.labels = [self.class_indices[k] for k in self.folders]
        fits = len(self.files) * channels * image_size**2 <= MEMORY_BYTES
        self._memory: dict[int, np.ndarray] | None = {} if fits else None

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """Where image number `index` lies."""
        return os.path.join(self.root, self.files[index])

    def name(self, index: int) -> str:
        return self.files[index]

    def read(self, index: int, flipped: bool) -> tuple[np.ndarray, int]:
        """(image uint8 (C, H, W), class index)."""
        image = None if self._memory is None else self._memory.get(index)
        if image is None:
            image = read_image(self.path(index), self.image_size, self.channels, self.background).pixels
            if self._memory is not None:
                self._memory[index] = image
        return image[:, :, ::-1] if flipped else image, self.labels[index]

    def fingerprint(self) -> str:
        """A sha256 over names, sizes and content of the images; `fingerprint_covers` says of how many."""
        return self._fingerprint.digest

    @property
    def fingerprint_covers(self) -> str:
        return self._fingerprint.covers

    @cached_property
    def fingerprint_of_0_1(self) -> str | None:
        """Version 0.1's, over the relative path and size of every image that it took, in its order; None without."""
        sizes = dict(zip(self.files, self._sizes))
        try:
            return fingerprint_sizes(
                self._files_of_0_1,
                [sizes.get(file) or os.path.getsize(os.path.join(self.root, file)) for file in self._files_of_0_1],
            )
        except OSError:  # of a file that is passed over now
            return None

    def identity(self) -> Identity:
        return Identity(
            self.fingerprint(),
            self.fingerprint_covers,
            fingerprint_labels(self.labels),
            self.fingerprint_of_0_1,
            READING_RULES,
            self.background,
        )

    def read_otherwise(self, rule: str) -> int:
        if rule == CLASSES:
            return len(self) if self._renumbered else 0
        if rule == ORDER:
            return 0 if self._files_of_0_1 == self.files else len(self)
        return self.applied.counts[rule]

    @cached_property
    def applied(self) -> Applied:
        """How many images each rule changes, from all headers, of a sample where they are more than CONTENT_FILES."""
        files = self.files
        if len(files) > CONTENT_FILES:
            files = [files[i] for i in sample_of([os.fsencode(file) for file in files])]
        paths = [os.path.join(self.root, file) for file in files]
        found = in_threads(lambda path: rules_of(path, self.channels), paths, part=20)
        return Applied(Counter(rule for rules in found for rule in rules), len(files))

    @cached_property
    def _sizes(self) -> list[int]:
        return sizes_of(self.root, self.files)

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        return fingerprint_files(self.root, self.files, self._sizes)

    @cached_property
    def _files_of_0_1(self) -> list[str]:
        """What version 0.1 took, in its order: hidden files too, and a folder's files before those of its folders."""
        files = self.files
        if HIDDEN in self.skipped or SYSTEM in self.skipped:
            files = [file for file in walk(self.root, hidden=True).files if os.sep in file]
        if all(file.count(os.sep) == 1 for file in files):
            return files
        return sorted(files, key=lambda file: (file.partition(os.sep)[0], *os.path.split(file)))


def class_names(data: TrainingData, num_classes: int) -> ClassNames:
    """What a model trained on data calls its classes, and how many images of each it saw."""
    return ClassNames.of(data.classes, data.class_indices, data.labels, num_classes)
