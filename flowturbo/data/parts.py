"""Parts of data: a share of every class, and what is held out of training."""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata

import numpy as np

from flowturbo.data.folders import TrainingData
from flowturbo.data.identity import Identity, fingerprint_labels
from flowturbo.data.randomness import Stream, keyed_generator


class Part:
    """The images at `numbers` of `data`."""

    def __init__(self, data: TrainingData, numbers: np.ndarray):
        self.data, self.numbers, self.image_size = data, numbers, data.image_size
        self.classes, self.class_indices = data.classes, data.class_indices
        self.labels: list[int] = np.asarray(data.labels)[numbers].tolist()

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return self.data.name(int(self.numbers[index]))

    def read(self, index: int, flipped: bool) -> tuple[np.ndarray, int]:
        return self.data.read(int(self.numbers[index]), flipped)

    def fingerprint(self) -> str:
        return self._of(self.data.fingerprint())

    def identity(self) -> Identity:
        whole = self.data.identity()
        return dataclasses.replace(
            whole,
            fingerprint=whole.fingerprint and self._of(whole.fingerprint),
            labels=fingerprint_labels(self.labels),
            fingerprint_of_0_1=whole.fingerprint_of_0_1 and self._of(whole.fingerprint_of_0_1),
        )

    def read_otherwise(self, rule: str) -> int | None:
        return self.data.read_otherwise(rule)

    def _of(self, fingerprint: str) -> str:
        return hashlib.sha256(fingerprint.encode() + self.numbers.tobytes()).hexdigest()


class Subset(Part):
    """A share of every class of `data`, at least one image of each, drawn from the seed.

    Raises ValueError for a fraction outside (0, 1].
    """

    def __init__(self, data: TrainingData, fraction: float, seed: int):
        if not 0 < fraction <= 1:
            raise ValueError(f"subset {fraction} must lie in (0, 1]")
        labels = np.asarray(data.labels)
        chosen = []
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            order = keyed_generator(seed, int(label), Stream.SUBSET).permutation(len(members))
            chosen.append(members[order[: max(1, round(fraction * len(members)))]])
        super().__init__(data, np.sort(np.concatenate(chosen)))


class Split(Part):
    """What is trained on of `data`, where a share of its images is held out: they are `held_out`.

    An image is held out by its name alone, so neither the seed nor other images that come or go change which are. A
    class keeps at least one to train on. Raises ValueError for a share outside (0, 1), or one that holds none out.
    """

    def __init__(self, data: TrainingData, share: float):
        if not 0 < share < 1:
            raise ValueError(f"holdout {share} must lie in (0, 1)")
        places = np.array([place_of(data.name(index)) for index in range(len(data))])
        labels, held = np.asarray(data.labels), places < share
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            held[members[places[members].argmax()]] = False
        if not held.any():
            raise ValueError(
                f"holdout {share:g} takes none of {len(data)} images (a class keeps one to train on): expected a "
                "larger share, or more images"
            )
        super().__init__(data, np.flatnonzero(~held))
        self.held_out = Part(data, np.flatnonzero(held))


def place_of(name: str) -> float:
    """Where a name lies in [0, 1), evenly spread; the same for composed and decomposed letters."""
    text = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big") / 2**48


def whole_of(data: TrainingData) -> TrainingData:
    """The data that data are a part of."""
    while isinstance(data, Part):
        data = data.data
    return data


def held_out_of(data: TrainingData) -> Part | None:
    """The images that were held out of data, if any."""
    while isinstance(data, Part):
        if isinstance(data, Split):
            return data.held_out
        data = data.data
    return None
