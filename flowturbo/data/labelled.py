"""Images that have a class each, as training takes them, wherever they lie."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from flowturbo.data.classes import assign_classes
from flowturbo.data.identity import (
    CLASSES,
    CONTENT_FILES,
    ORDER,
    READING_RULES,
    Fingerprint,
    Identity,
    fingerprint_labels,
    sample_of,
)
from flowturbo.data.images import MODES, Source, in_threads, read_image, rules_of
from flowturbo.data.options import parse_background

MEMORY_BYTES = 512 * 2**20  # decoded images are kept where the whole data set fits in this


class Applied(NamedTuple):
    """How many images each reading rule changes, and how many images were looked at for that."""

    counts: Mapping[str, int]
    looked_at: int


class LabelledImages:
    """Images in classes, cropped to squares. What there are, and how each is read, is said by what derives from it.

    `channels` 1, 3 or 4 reads as grey, RGB or RGBA. `skipped` counts the entries that were passed over by kind, `note`
    says where classes that are numbers were taken by their order. Raises ValueError for other channels or backgrounds.
    """

    files: list[str]  # the images by name: relative to the root, in the order of their numbers
    classes: list[str]  # what they are called
    keys: list[str]  # by which a model's classes are found: their names, or numbers where data give both
    folders: list[int]  # the position in `classes` of each image
    class_indices: list[int]  # the model's class of each class
    labels: list[int]  # and of each image
    skipped: Mapping[str, int]
    note: str

    def __init__(self, root: str | os.PathLike[str], image_size: int, channels: int, background: str):
        if channels not in MODES:
            raise ValueError(f"images have 1, 3 or 4 channels, not {channels}")
        parse_background(background)
        self.root, self.image_size, self.channels, self.background = os.fspath(root), image_size, channels, background

    def _assign(
        self,
        classes: Sequence[str],
        keys: Sequence[str],
        folders: Sequence[int],
        num_classes: int | None,
        class_map: Mapping[str, int] | None,
    ) -> None:
        """Say which model's class each class is. Raises ValueError where they do not fit."""
        self.classes, self.keys, self.folders = list(classes), list(keys), list(folders)
        self.class_indices, self.note, self._renumbered = assign_classes(self.keys, num_classes, class_map)
        self.labels = [self.class_indices[k] for k in self.folders]
        fits = len(self) * self.channels * self.image_size**2 <= MEMORY_BYTES
        self._memory: dict[int, np.ndarray] | None = {} if fits else None

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """What tells an image from the others, wherever the data lie."""
        return self.files[index]

    def path(self, index: int) -> str:
        """Where image number `index` lies."""
        raise NotImplementedError

    def source(self, index: int) -> Source:
        """What image number `index` is read from."""
        raise NotImplementedError

    def read(self, index: int, flipped: bool) -> tuple[np.ndarray, int]:
        """(image uint8 (C, H, W), class index). Raises ValueError naming an image that cannot be read."""
        image = None if self._memory is None else self._memory.get(index)
        if image is None:
            image = read_image(self.source(index), self.image_size, self.channels, self.background).pixels
            if self._memory is not None:
                self._memory[index] = image
        return image[:, :, ::-1] if flipped else image, self.labels[index]

    def fingerprint(self) -> str:
        """A sha256 over names, sizes and content of the images; `fingerprint_covers` says of how many."""
        return self._fingerprint.digest

    @property
    def fingerprint_covers(self) -> str:
        return self._fingerprint.covers

    @property
    def fingerprint_of_0_1(self) -> str | None:
        """Version 0.1's, where it could read such data."""
        return None

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        raise NotImplementedError

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
        return 0 if rule == ORDER else self.applied.counts[rule]

    @cached_property
    def applied(self) -> Applied:
        """How many images each rule changes, from all headers, of a sample where they are more than CONTENT_FILES."""
        chosen: Sequence[int] = range(len(self))
        if len(self) > CONTENT_FILES:
            chosen = sorted(sample_of([os.fsencode(file) for file in self.files]))
        found = in_threads(lambda index: rules_of(self.source(index), self.channels), chosen, part=20)
        return Applied(Counter(rule for rules in found for rule in rules), len(chosen))
