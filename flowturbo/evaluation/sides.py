"""The two sides of a comparison, from a path to features: images, stored statistics, or both."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from flowturbo.data.images import DEPTH, ORIENTATION, TRANSPARENCY
from flowturbo.data.shards import is_packed
from flowturbo.data.walk import OTHER, describe
from flowturbo.evaluation.extractors import Extractor, load_extractor
from flowturbo.evaluation.features import FeatureSet, extract
from flowturbo.evaluation.sources import Archive, ImageArchive, ImageFolder
from flowturbo.system.claims import check_same, read_record
from flowturbo.weights.cache import MissingWeights, find_asset, locate

DONE = {  # by the rules of reading
    ORIENTATION: "turned upright by their EXIF orientation",
    TRANSPARENCY: "with transparent pixels, shown on {background}",
    DEPTH: "of 16 bits, scaled to 8",
}


class Side(NamedTuple):
    """One side as it lies on disk."""

    images: ImageFolder | ImageArchive | None
    stored: FeatureSet | None

    @classmethod
    def open(cls, path: str, image_size: int | None = None, background: str = "white") -> Side:
        """Look at a folder, packed images or an .npz without reading the images; with an `image_size` they are cropped,
        but for those of an .npz.

        Raises MissingWeights for a registered file that is not here, ValueError for anything else.
        """
        found = locate(path)
        if found is None and find_asset(path):
            raise MissingWeights({"": path})
        path = str(found or path)
        if Path(path).is_dir() or is_packed(path):
            return cls(ImageFolder(path, image_size, background), None)
        archive = Archive(path)
        stored = FeatureSet.load(path) if "mu" in archive else None
        return cls(ImageArchive(path) if "arr_0" in archive or stored is None else None, stored)

    def features(
        self, extractor: Extractor | None, keep: Collection[str], batch_size: int, device: torch.device | str
    ) -> FeatureSet:
        """Features and statistics, computed from the images if there are any, by an extractor from `pick_extractor`.

        As in the ADM suite, statistics stored beside the images take the place of the images' own, but not of another
        extractor's.
        """
        if self.images is None or extractor is None:
            assert self.stored is not None
            return self.stored
        computed = extract(extractor, self.images, batch_size=batch_size, keep=keep, device=device)
        if isinstance(self.images, ImageFolder) and self.images.image_size is not None:
            computed = dataclasses.replace(computed, source=f"{computed.source} at {self.images.image_size} px")
        if self.stored is None or self.stored.extractor != extractor.identity:
            return computed
        return dataclasses.replace(self.stored, pool=computed.pool, spatial=computed.spatial, logits=computed.logits)

    def notes(self, extractor: Extractor | None) -> list[str]:
        """What a user should know of how this side was read, once `features` has read it."""
        if self.images is None:
            return []
        notes, name = [], self.images.path
        if self.stored and extractor and self.stored.extractor != extractor.identity:
            notes.append(f"{name} stores statistics of '{self.stored.extractor}', not used with '{extractor.identity}'")
        if isinstance(self.images, ImageFolder):
            if skipped := {kind: count for kind, count in self.images.skipped.items() if kind != OTHER}:
                notes.append(f"{name}: passed over {describe(skipped)}")
            for rule, count in sorted(self.images.applied.items()):
                done = DONE[rule].format(background=self.images.background)
                notes.append(f"{name}: {count} of {len(self.images)} images {done}")
        return notes


def pick_extractor(
    sides: Sequence[Side], name: str | None, device: torch.device | str, weights: str | None
) -> Extractor | None:
    """The extractor called `name`, else that of a feature file, else inception; None with nothing to extract.

    ValueError, before any work, when a feature file was made with another.
    """
    fixed = [side.stored for side in sides if side.images is None and side.stored is not None]
    chosen = name or (fixed[0].extractor.split()[0] if fixed else "inception")
    extractor = load_extractor(chosen, device, weights) if len(fixed) < len(sides) else None
    if extractor:
        identity = extractor.identity
    elif name:
        identity = "torchscript" if Path(name).is_file() else name
    else:
        identity = fixed[0].extractor
    for stored in fixed:
        if stored.extractor != identity and stored.extractor.split()[0] != identity:
            raise ValueError(f"unlike extractors: {stored.source} was made with '{stored.extractor}', not '{identity}'")
    return extractor


def with_labels(features: FeatureSet, labels: str | None) -> FeatureSet:
    """The features with the label mode the user states. Raises OtherSettings when the file says otherwise."""
    if labels and features.labels:
        check_same(features.source, {"labels": features.labels}, {"labels": labels})
    return dataclasses.replace(features, labels=labels or features.labels)


def recorded_labels(path: str) -> str | None:
    """The label mode of an archive that sample_ddp_feature.py has written, from the settings beside it, if any."""
    try:
        record = read_record(Path(path).with_suffix("") / "settings.json")
        return record["settings"]["labels"] if record and Path(path).name in record["outputs"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
