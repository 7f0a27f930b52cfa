"""Training images in packed files: their classes, from what lies beside them, their folders or their archives."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from flowturbo.data.folders import OUTSIDE_CLASSES, ClassFolder
from flowturbo.data.identity import Fingerprint, fingerprint_pieces
from flowturbo.data.images import ImageBytes
from flowturbo.data.labelled import LabelledImages
from flowturbo.data.shards import Shards, open_shards
from flowturbo.data.tables import TabledImages

LABEL = "label"  # the column, or the key in a .json, that says an image's class


class Labels(NamedTuple):
    """The class of each image."""

    names: list[str]  # of the classes
    keys: list[str]  # their names, or their numbers where the data give both
    positions: list[int]  # of each image's class in them; -1 for none


class PackedImages(LabelledImages):
    """The images of packed files, cropped to squares, with the class of each.

    A table's column "label" (or the only one that it calls class labels) says it, beside images in archives NAME.cls or
    "label" in NAME.json, and else their folders, or the archives where nothing lies in folders. Raises ValueError where
    an image has no class, the classes do not fit the model, and as `open_shards`.
    """

    def __init__(
        self,
        shards: Shards,
        root: str | os.PathLike[str],
        image_size: int,
        channels: int = 3,
        num_classes: int | None = None,
        class_map: Mapping[str, int] | None = None,
        background: str = "white",
    ):
        super().__init__(root, image_size, channels, background)
        self._shards = shards
        names, keys, positions = labels_of(shards)
        self._numbers = [k for k, position in enumerate(positions) if position >= 0]  # of the images in the shards
        if not self._numbers:
            raise ValueError(f"{shards.where(0)} lies in no class folder, and no label lies beside it")
        all_names = shards.names
        self.files = [all_names[k] for k in self._numbers]
        outside = len(positions) - len(self.files)
        self.skipped = {**shards.skipped, **({OUTSIDE_CLASSES: outside} if outside else {})}
        if class_map is not None and len(set(names)) == len(names):
            keys = names
        self._assign(names, keys, [positions[k] for k in self._numbers], num_classes, class_map)

    def path(self, index: int) -> str:
        return self._shards.where(self._numbers[index])

    def source(self, index: int) -> ImageBytes:
        return self._shards.read(self._numbers[index])

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        what = "row groups" if isinstance(self._shards, TabledImages) else "files"
        return fingerprint_pieces(self._shards.pieces(), self._shards.digest, what)


def open_images(
    root: str | os.PathLike[str],
    image_size: int,
    channels: int = 3,
    num_classes: int | None = None,
    class_map: Mapping[str, int] | None = None,
    background: str = "white",
) -> LabelledImages:
    """A folder of images per class, or images in packed files, by a path to either. Raises ValueError as they do."""
    settings: Any = (image_size, channels, num_classes, class_map, background)
    shards = open_shards(root)
    return ClassFolder(root, *settings) if shards is None else PackedImages(shards, root, *settings)


def labels_of(shards: Shards) -> Labels:
    """The classes of packed images. Raises ValueError naming an image that has none while others have."""
    if isinstance(shards, TabledImages):
        field = _label_column(shards)
        values = shards.column(field)
        return _named(shards, [str(value) if type(value) in (int, str) else "" for value in values], field)
    if "cls" in shards.fields:
        texts = shards.column("cls")
        return _named(shards, ["" if text is None else text.decode(errors="replace").strip() for text in texts])
    if "json" in shards.fields and any(labels := [_label_in(text) for text in shards.column("json")]):
        return _named(shards, labels)
    names = shards.names
    if len(shards.files) > 1 and not any("/" in name for name in names):  # ImageNet's own archives are such
        return _sorted([os.path.splitext(os.path.basename(shards.file(k)))[0] for k in range(len(names))])
    return _sorted([name.split("/")[0] if "/" in name else "" for name in names])


def _label_column(table: TabledImages) -> str:
    labels = [field for field in table.fields if table.class_names(field)]
    if LABEL in table.fields or len(labels) == 1:
        return LABEL if LABEL in table.fields else labels[0]
    columns = ", ".join(table.fields) or "no others"
    raise ValueError(f"{table.files[0]} has no column {LABEL!r} beside the images, but {columns}")


def _label_in(content: bytes | None) -> str:
    """The label in a .json; empty for none."""
    try:
        label = json.loads(content or b"{}").get(LABEL)
    except (ValueError, AttributeError):
        return ""
    return str(label).strip() if type(label) in (int, str) else ""


def _named(shards: Shards, labels: Sequence[str], field: str = "") -> Labels:
    """The classes that labels say. Raises ValueError naming an image without one."""
    bad = next((k for k, label in enumerate(labels) if not label or label.startswith("-")), None)
    if bad is not None:
        raise ValueError(f"{shards.where(bad)} has {f'the label {labels[bad]}' if labels[bad] else 'no label'}")
    found = _sorted(labels)
    names = shards.class_names(field) if isinstance(shards, TabledImages) else None
    if names is None:
        return found
    if high := [key for key in found.keys if not key.isdigit() or int(key) >= len(names)]:
        raise ValueError(f"{shards.files[0]}: label {high[0]} is none of its {len(names)} class names")
    return found._replace(names=[names[int(key)] for key in found.keys])


def _sorted(labels: Sequence[str]) -> Labels:
    classes = sorted(set(labels) - {""})
    position = {name: k for k, name in enumerate(classes)} | {"": -1}
    return Labels(classes, classes, [position[label] for label in labels])
