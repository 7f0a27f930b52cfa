"""Cached latents: a folder of an autoencoder's moments, both flips of every image, in place of the images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo.data.classes import assign_classes
from flowturbo.data.identity import CLASSES, READING_RULES, RULES_OF_0_1, Identity, fingerprint_labels
from flowturbo.system.claims import OtherSettings, read_record
from flowturbo.system.files import sha256

INDEX = "index.json"


class UnfinishedLatents(ValueError):
    """A folder of cached latents is incomplete or damaged; caching again makes what is missing."""


class OtherLatents(OtherSettings):
    """A folder of cached latents was made with other settings, or of other images, than those at hand."""


class LatentFolder:
    """Cached moments in place of a folder of images: shards of float16 (n, 2 flips, 2C, h, w) and an index.

    `autoencoder` is the fingerprint of the one that the model works with. Raises OtherLatents where the folder was
    made with another, or at another image size, UnfinishedLatents where it is incomplete or damaged, and ValueError
    where its classes do not fit.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        autoencoder: str,
        image_size: int | None = None,
        num_classes: int | None = None,
        class_map: Mapping[str, int] | None = None,
    ):
        self.root = Path(root)
        index = read_record(self.root / INDEX)
        if index is None or "shards" not in index:
            raise UnfinishedLatents(f"{self.root} holds no finished latents")
        self._plan = plan = checked_plan(self.root, index)
        if plan["autoencoder"] != autoencoder:
            raise OtherLatents(f"{self.root} was made with another autoencoder ({plan['autoencoder_name']})")
        if image_size not in (None, plan["image_size"]):
            raise OtherLatents(f"{self.root} was made with image_size {plan['image_size']}, not {image_size}")
        self._digests: list[str] = index["shards"]
        self.image_size, self.shard_size, self.classes = plan["image_size"], plan["shard_size"], plan["classes"]
        keys = plan.get("class_keys", self.classes) if class_map is None else self.classes
        self.class_indices, self.note, self._renumbered = assign_classes(keys, num_classes, class_map)
        self.labels = [self.class_indices[target] for target in plan["folders"]]
        self._shards: dict[int, np.ndarray] = {}  # opened where they are read, so that loader workers open their own
        for shard in range(len(self._digests)):
            rows = min(self.shard_size, len(self) - shard * self.shard_size)
            if self._open(shard).shape[:2] != (rows, 2):
                raise UnfinishedLatents(f"{shard_path(self.root, shard)} is damaged")

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Class folder and place in it: the index has no file names."""
        folder = self._plan["folders"][index]
        return f"{self.classes[folder]}/{index - self._first[folder]}"

    @cached_property
    def _first(self) -> dict[int, int]:
        """The first image of each class folder: its images follow one another."""
        folders = self._plan["folders"]
        return {folders[k]: k for k in reversed(range(len(folders)))}

    def read(self, index: int, flipped: bool) -> tuple[np.ndarray, int]:
        """(moments float16 (2C, h, w), class index)."""
        shard, row = divmod(index, self.shard_size)
        if shard not in self._shards:
            if sha256(shard_path(self.root, shard)) != self._digests[shard]:
                raise UnfinishedLatents(f"{shard_path(self.root, shard)} is damaged")
            self._shards[shard] = self._open(shard)
        return np.array(self._shards[shard][row, int(flipped)]), self.labels[index]

    def fingerprint(self) -> str:
        """That of the images which the latents were made of."""
        return self._plan["dataset"]

    def identity(self) -> Identity:
        shards = hashlib.sha256("".join(self._digests).encode()).hexdigest()
        return identity_of(self._plan, fingerprint_labels(self.labels), shards)

    def read_otherwise(self, rule: str) -> int | None:
        if rule == CLASSES:
            return len(self) if self._renumbered else 0
        return self._plan.get("read_otherwise", {}).get(rule)

    def _open(self, shard: int) -> np.ndarray:
        path = shard_path(self.root, shard)
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise UnfinishedLatents(f"{path} is missing or damaged") from None


def identity_of(plan: Mapping[str, Any], labels: str | None = None, latents: str | None = None) -> Identity:
    """The identity of the images that a plan was made for; version 0.1 recorded names and sizes, and no rules."""
    of_0_1 = "reading_rules" not in plan
    return Identity(
        fingerprint=None if of_0_1 else plan["dataset"],
        covers=plan.get("dataset_covers", "names and sizes"),
        labels=labels,
        fingerprint_of_0_1=plan["dataset"] if of_0_1 else plan.get("dataset_of_0_1"),
        rules={
            **plan.get("reading_rules", RULES_OF_0_1),
            CLASSES: READING_RULES[CLASSES],
        },  # this is not in the latents
        background=plan.get("background"),
        latents=latents,
    )


def checked_plan(root: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The plan in a finished index. Raises UnfinishedLatents where it is anything but what caching writes."""
    plan: Any = index.get("plan")
    shards = index["shards"]
    texts = ("dataset", "autoencoder", "autoencoder_name")
    whole = (
        isinstance(plan, dict)
        and all(isinstance(plan.get(name), str) for name in texts)
        and all(type(plan.get(name)) is int and plan[name] > 0 for name in ("image_size", "shard_size"))
        and all(isinstance(plan.get(name), list) for name in ("classes", "folders"))
        and all(isinstance(name, str) for name in plan["classes"])
        and isinstance(keys := plan.get("class_keys", plan["classes"]), list)
        and len(keys) == len(plan["classes"])
        and all(isinstance(key, str) for key in keys)
        and all(type(target) is int and 0 <= target < len(plan["classes"]) for target in plan["folders"])
        and all(isinstance(plan.get(name, {}), dict) for name in ("reading_rules", "read_otherwise"))
        and isinstance(shards, list)
        and all(isinstance(digest, str) for digest in shards)
        and len(shards) == -(-len(plan["folders"]) // plan["shard_size"]) > 0
    )
    if not whole:
        raise UnfinishedLatents(f"{root / INDEX} is damaged")
    return plan


def is_latent_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a data folder holds cached latents, finished or not, rather than images."""
    return (Path(path) / INDEX).is_file()


def shard_path(root: Path, shard: int) -> Path:
    """Where shard number `shard` lies; its digest stands beside it until the index has it."""
    return root / f"{shard:05d}.npy"
