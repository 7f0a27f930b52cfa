"""Data as training takes them: a folder with one folder of images per class."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

import numpy as np

from flowturbo.data.classes import ClassNames
from flowturbo.data.identity import (
    ORDER,
    Fingerprint,
    Identity,
    fingerprint_files,
    fingerprint_sizes,
    sizes_of,
)
from flowturbo.data.labelled import LabelledImages
from flowturbo.data.walk import HIDDEN, SYSTEM, walk

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


class ClassFolder(LabelledImages):
    """Images in one folder per class, cropped to squares.

    Raises ValueError where the folder or a class is empty or missing, an image cannot be read (it is named), or the
    classes do not fit the model's `num_classes`.
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
        super().__init__(root, image_size, channels, background)
        expected = "expected one folder of images per class, like data/cat/1.png"
        if not os.path.isdir(root):
            raise ValueError(f"data folder {self.root!r} does not exist: {expected}")
        found = walk(root)
        classes, position = found.folders, {name: k for k, name in enumerate(found.folders)}
        self.files = [file for file in found.files if os.sep in file]  # relative to the root
        folders = [position[file.partition(os.sep)[0]] for file in self.files]  # positions in `classes`
        outside = len(found.files) - len(self.files)
        self.skipped = {**found.skipped, **({OUTSIDE_CLASSES: outside} if outside else {})}
        if not classes:
            raise ValueError(f"data folder {self.root!r} holds no folders: {expected}")
        if empty := sorted(set(classes) - {classes[k] for k in set(folders)}):
            raise ValueError(f"class folders without images: {', '.join(empty[:5])} in {self.root!r}; {expected}")
        self._assign(classes, classes, folders, num_classes, class_map)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])

    def source(self, index: int) -> str:
        return self.path(index)

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

    def read_otherwise(self, rule: str) -> int:
        if rule == ORDER:
            return 0 if self._files_of_0_1 == self.files else len(self)
        return super().read_otherwise(rule)

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
